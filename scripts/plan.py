"""Plan a training: what it takes of a GPU's memory, how many teacher views fit, and about how many iterations."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from nerfstudio.models.base_model import ModelConfig
from nerfstudio.utils.rich_utils import CONSOLE

from r2l_nerfstudio.errors import InputError, command_line
from r2l_nerfstudio.planning.plan import GPUS, Capture, Gpu, TrainingPlan, make_plan, teacher_bytes
from r2l_nerfstudio.ranges import FloatRange, IntRange, check_ranges

MethodName = Literal["r2l", "r2l-lite", "r2l-paper", "mobile-r2l", "mobile-r2l-lite", "mobile-r2l-paper"]


@dataclass
class Plan:
    """Memory, teacher views, batch and iterations of a training, worked out without a GPU.

    Memory is counted by running a training step and a frame on tensors without values. The time of a step is an estimate
    from data sheets: nothing of it was measured.
    """

    method: tyro.conf.Positional[MethodName]
    """The method to train."""
    teacher: Path | None = None
    """The teacher's run, for the sizes of capture and teacher; by default a nerfacto of `--photos` photos of
    `--width` x `--height`."""
    gpu_memory: Annotated[float, FloatRange(0, above=True)] | None = None
    """The GPU's memory in GiB; by default this machine's GPU, or 8."""
    minutes: Annotated[float, FloatRange(0, above=True)] = 20.0
    """Training time, as --max-minutes of ns-train, rendering of teacher views included."""
    width: Annotated[int, IntRange(1, 10**5)] = 800
    """Width of a photo in pixels; without --teacher."""
    height: Annotated[int, IntRange(1, 10**5)] = 800
    """Height of a photo in pixels; without --teacher."""
    photos: Annotated[int, IntRange(1, 10**6)] = 100
    """Training photos; without --teacher."""
    train_num_rays_per_batch: Annotated[int, IntRange(1, 10**8)] | None = None
    """As --pipeline.datamanager.train-num-rays-per-batch of ns-train."""
    num_views: Annotated[int, IntRange(1, 10**7)] | None = None
    """As --pipeline.datamanager.num-views of ns-train."""
    view_downscale: Annotated[float, FloatRange(0.01, 1024)] | None = None
    """As --pipeline.datamanager.view-downscale of ns-train."""
    whole_images: Annotated[int, IntRange(1, 10**4)] | None = None
    """As --pipeline.datamanager.whole-images of ns-train."""

    def main(self) -> None:
        """Print the plan.

        Raises:
            InputError: if the training cannot fit, with the flag to lower, or the teacher cannot be read.
        """
        # Imported late: it imports every registered method.
        from nerfstudio.configs.method_configs import all_methods

        check_ranges(self)
        config = copy.deepcopy(all_methods[self.method])
        data = config.pipeline.datamanager
        for name in ("train_num_rays_per_batch", "num_views", "view_downscale", "whole_images"):
            value = getattr(self, name)
            if value is None:
                continue
            if not hasattr(data, name):
                raise InputError(f"--{name.replace('_', '-')}: {self.method} has no such option; leave it out.")
            setattr(data, name, value)
        gpu = find_gpu(self.gpu_memory)
        capture, teacher = self._capture()
        found = make_plan(config, capture, gpu, self.minutes, teacher_bytes(teacher, capture.photos))
        CONSOLE.print(describe(self.method, found), markup=False, highlight=False, soft_wrap=True)

    def _capture(self) -> tuple[Capture, ModelConfig]:
        if self.teacher is None:
            from nerfstudio.models.nerfacto import NerfactoModelConfig

            return Capture(self.width, self.height, self.photos), NerfactoModelConfig()
        from r2l_nerfstudio.capture import parse_capture
        from r2l_nerfstudio.dataparsers import dataparser_at
        from r2l_nerfstudio.run_config import capture_path, load_run_config, resolve_run

        path = resolve_run(self.teacher).absolute()
        run = load_run_config(path)
        outputs = parse_capture(dataparser_at(run, capture_path(run, path)))
        width, height = (int(side.float().median()) for side in (outputs.cameras.width, outputs.cameras.height))
        return Capture(width, height, len(outputs.image_filenames)), run.pipeline.model


def find_gpu(gigabytes: float | None) -> Gpu:
    """The GPU of so much memory, by default this machine's: its own memory with the speed of the nearest listed one."""
    if gigabytes is None:
        gigabytes = torch.cuda.mem_get_info()[1] / 2**30 if torch.cuda.is_available() else GPUS[0].gigabytes
    fitting = [gpu for gpu in GPUS if gpu.gigabytes <= 1.1 * gigabytes]
    nearest = fitting[-1] if fitting else GPUS[0]
    return dataclasses.replace(nearest, gigabytes=round(gigabytes, 1))


def describe(method: str, plan: TrainingPlan) -> str:
    """The plan in lines."""

    def gib(count: float) -> str:
        return f"{count / 2**30:6.2f} GiB"

    step, frame = plan.student.step, plan.student.frame
    width, height = plan.view_size
    return "\n".join(
        [
            f"{method} on a GPU of {plan.gpu.gigabytes:g} GiB, {width}x{height} pixels",
            f"  {gib(plan.total_bytes)}  in all, of {plan.gpu.usable_bytes / 2**30:.2f} GiB that can be used",
            f"  {gib(plan.ring_bytes)}  {plan.teacher_views} teacher views in the ring"
            f" (--pipeline.datamanager.num-views {plan.teacher_views})",
            f"  {gib(step.peak_bytes)}  a training step of {plan.pixels_per_step} pixels",
            f"  {gib(frame.peak_bytes)}  a frame of {width}x{height}, in the viewer between two steps",
            f"  {gib(plan.teacher_bytes)}  the teacher",
            f"  {gib(plan.photo_bytes)}  photos",
            f"  {gib(plan.student.held_bytes)}  the student, its optimizers and its hard rays",
            f"  About {1e3 * plan.seconds_per_step:.0f} ms a step, {plan.iterations} iterations in {plan.minutes:g} minutes"
            f" (estimate for a {plan.gpu.name}: {step.flops / 1e12:.2f} TFLOP, {step.traffic_bytes / 1e9:.1f} GB of traffic,"
            f" {step.kernels} kernels a step)",
        ]
    )


def main() -> None:
    """Console entry point `r2l-plan`."""
    with command_line():
        tyro.cli(Plan, prog="r2l-plan", description=__doc__).main()


if __name__ == "__main__":
    main()
