"""Measurements that need a GPU, in resumable stages, the most valuable first.

Each part of a stage, a few minutes long, writes its figures when it ends; the next call continues with the first part
without figures.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from nerfstudio.utils.rich_utils import CONSOLE

from benchmarks.curve import CaptureName, Curve
from benchmarks.distil import CAPTURES
from benchmarks.render import Render, fastest, results_stem, student
from r2l_nerfstudio.engines.cache import device_name
from r2l_nerfstudio.engines.parity import psnr
from r2l_nerfstudio.engines.protocol import EngineName
from r2l_nerfstudio.engines.torch_engine import TorchEngine
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.lpips import without_lpips
from r2l_nerfstudio.planning.cost import StudentWork, student_cost

StageName = Literal["smoke", "quality", "teachers", "engines", "viewer", "ranks"]
METHODS = ("r2l", "mobile-r2l", "r2l-lite", "mobile-r2l-lite")
ENGINES: tuple[EngineName, ...] = ("torch", "inductor", "triton", "tensorrt", "torch-tensorrt")
SIDES = (400, 800, 1440)
"""The last has as many pixels as 1920x1080."""
CUDA_TEACHERS = {"instant-ngp": "nerfacc", "splatfacto": "gsplat"}
"""Methods of Nerfstudio that run on a GPU only, and the package of their CUDA code."""
CURVE_FIGURES = (
    "student_psnr", "teacher_psnr", "published_test_psnr", "student_ssim", "teacher_ssim", "student_share_of_teacher_detail",
    "student_psnr_against_teacher_unseen", "student_lowest_psnr_between_sizes", "student_seconds_per_frame",
    "teacher_seconds_per_frame", "student_train_rays_per_second", "rays_per_iteration",
)  # fmt: skip
PARITY_DB = 60.0
"""Between fp32 on a CPU and on a GPU."""


@dataclass
class GpuDay:
    """Run the measurements that need a GPU: parity and training steps, quality after 20 minutes, CUDA teachers, engines,
    viewer, ranks."""

    data_dir: Path
    """Folder that holds lego_400, and the other captures to measure."""
    stages: tuple[StageName, ...] = get_args(StageName)
    """Stages to run, in this order."""
    methods: tuple[str, ...] = METHODS
    """Methods to measure."""
    minutes: float = 5.0
    """Training time of each student in the stages `quality` and `teachers`, teacher views included."""
    rays: int | None = None
    """Pixels per iteration of the students; by default the method's own."""
    captures: tuple[CaptureName, ...] = ("lego",)
    """Captures of the stage `quality`."""
    teacher: Path | None = None
    """The teacher's run in the stage `quality`; by default, a nerfacto of default size is trained."""
    teacher_iterations: int = 15_000
    """Of nerfacto; half of Nerfstudio's default."""
    cuda_teachers: tuple[str, ...] = tuple(CUDA_TEACHERS)
    """Teachers of the stage `teachers`."""
    cuda_teacher_iterations: int = 7_000
    """Of each teacher in the stage `teachers`."""
    view_size: int = 800
    """Side of the teacher views of the stage `smoke`, in pixels."""
    sides: tuple[int, ...] = SIDES
    """Sides of the frames of the stage `engines`, in pixels."""
    engines: tuple[EngineName, ...] = ENGINES
    """Engines to measure."""
    seconds: float = 10.0
    """Seconds to measure each set of engines."""
    tests: tuple[str, ...] = ("tests/end_to_end/test_viewer.py",)
    """Arguments of pytest in the stage `viewer`."""
    output_dir: Path = Path("outputs/gpu_day")
    """Folder of the runs."""
    results_dir: Path = Path("benchmarks/results")
    """Folder of the figures."""
    again: tuple[StageName, ...] = field(default=())
    """Stages to repeat although they have figures."""
    stop_after: float = math.inf
    """Begin no part after this many minutes, where a command may only run for a limited time."""

    def main(self) -> None:
        """Run the parts without figures; write `gpu_DEVICE.json` after each, and print one table.

        Raises:
            InputError: a method is unknown.
        """
        unknown = set(self.methods) - set(METHODS)
        if unknown:
            raise InputError(f"--methods {', '.join(sorted(unknown))}: choose from {', '.join(METHODS)}.")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        name = device_name(torch.device(device))
        self.results_dir.mkdir(parents=True, exist_ok=True)
        file = results_stem(self.results_dir, "gpu", name).with_suffix(".json")
        figures: dict[str, Any] = {"device": name, "torch": torch.__version__, "stages": {}}
        if file.exists():
            figures = json.loads(file.read_text())
        began = time.monotonic()
        for stage, part in [(name, part) for name in self.stages for part in STAGES[name].parts(self)]:
            kept = figures["stages"].setdefault(stage, {})
            if part in kept and stage not in self.again and "error" not in kept[part]:
                continue
            start = time.monotonic()
            if start - began > 60 * self.stop_after:
                CONSOLE.print(f"Stopped before {stage}, {part}: run the command again to go on.")
                break
            CONSOLE.print(f"{stage}, {part} …")
            try:
                found = STAGES[stage].run(self, device, part)
            except (Exception, SystemExit) as error:  # A failed part must not stop the next ones.
                found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-2000:]}
            kept[part] = {**found, "minutes": round((time.monotonic() - start) / 60, 2)}
            file.write_text(json.dumps(figures, indent=2) + "\n")
        CONSOLE.print(as_table(figures), markup=False, highlight=False, soft_wrap=True)
        CONSOLE.print(f"Written: {file}", markup=False, soft_wrap=True)


def smoke(day: GpuDay, device: str, method: str) -> dict[str, Any]:
    """Compare a method's frames with a CPU's, and measure a training step's waits, time and memory."""
    return _parity(method, device) | _step(method, day, device)


def _parity(method: str, device: str) -> dict[str, Any]:
    side = 96
    truth_model, camera = student(method, side, torch.device("cpu"))
    truth = truth_model.get_outputs_for_camera(camera)
    model, camera = student(method, side, torch.device(device))
    model.load_state_dict(truth_model.state_dict())
    found = {}
    precisions = ("fp32", "fp16") if device == "cuda" else ("fp32",)
    for precision in precisions:
        engine = TorchEngine(model.network, precision)
        with model.network_run_by(engine):
            for _ in range(5):  # a CUDA graph is captured beside the first ones
                outputs = model.get_outputs_for_camera(camera)
                time.sleep(0.2 if device == "cuda" else 0.0)
        agreement = min(psnr(outputs[key].cpu(), value) for key, value in truth.items() if key != "depth")
        found[f"frame_{precision}_db"] = round(min(agreement, 999.0), 1)
        if engine._graphs is not None:
            found["cuda_graph"] = not engine._graphs.has_failed
    found["agrees"] = found["frame_fp32_db"] >= PARITY_DB
    return found


def _step(method: str, day: GpuDay, device: str) -> dict[str, Any]:
    from nerfstudio.configs.method_configs import all_methods

    config = all_methods[method]
    planned = student_cost(config, day.view_size, day.view_size)
    work = StudentWork(config, day.view_size, day.view_size, device)
    found: dict[str, Any] = {"planned_step_gib": round(planned.step.peak_bytes / 2**30, 3)}
    work.step()
    if device == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work.step()
        torch.cuda.set_sync_debug_mode("default")
        found["waits"] = sorted({f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)})
        found["step_gib"] = round((torch.cuda.max_memory_allocated() - held) / 2**30, 3)
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    taken = fastest({"step": work.step}, min(day.seconds, 3.0), torch.device(device))
    found["step_ms"] = round(taken["step"], 2)
    found["tflops"] = round(planned.step.flops / taken["step"] / 1e9, 2)
    return found


def quality(day: GpuDay, device: str, part: str) -> dict[str, Any]:
    """Train the teacher of a capture, or measure a method's learning curve and test PSNR there, at the capture's
    resolution."""
    capture, method = part.split(" ")
    curve = _curve(day, cast(CaptureName, capture), "", day.teacher)
    if method == "teacher":
        return {"run": str(day.teacher or curve.train_teacher())}
    curve.method = method
    return _curve_figures(curve)


def teachers(day: GpuDay, device: str, part: str) -> dict[str, Any]:
    """Train an instant-ngp or a splatfacto, or distil it into an `r2l-lite`, if its CUDA code is installed."""
    teacher, method = part.split(" ")
    package = CUDA_TEACHERS[teacher]
    if device != "cuda" or importlib.util.find_spec(package) is None:
        return {"skipped": "needs a GPU" if device != "cuda" else f"{package} is not installed"}
    run = _train_teacher(day, teacher)
    if method == "teacher":
        return {"run": str(run)}
    curve = _curve(day, "lego", teacher, run)
    curve.method = method
    return _curve_figures(curve)


def _curve(day: GpuDay, capture: CaptureName, folder: str, teacher: Path | None) -> Curve:
    return Curve(
        capture=capture,
        data_dir=day.data_dir,
        teacher=teacher,
        teacher_iterations=day.teacher_iterations,
        minutes=day.minutes,
        rays=day.rays,
        cache_dir=day.output_dir / "views",
        output_dir=day.output_dir / folder,
        results_dir=day.results_dir / "gpu_curves" / folder,
    )


def _curve_figures(curve: Curve) -> dict[str, Any]:
    curve.main()
    figures = json.loads((curve.results_dir / f"curve_{curve.capture}_{curve.method}.json").read_text())
    return {key: figures[key] for key in CURVE_FIGURES if figures.get(key) is not None}


def _train_teacher(day: GpuDay, method: str) -> Path:
    from nerfstudio.configs.method_configs import all_methods
    from nerfstudio.scripts.train import main

    config = copy.deepcopy(all_methods[method])
    config.output_dir, config.experiment_name, config.timestamp = day.output_dir, "lego", "gpu_day"
    config.max_num_iterations = day.cuda_teacher_iterations
    config.vis = "tensorboard"
    config.viewer.quit_on_train_completion = True
    # Photos are blended on white: over random colors, both put white fog into empty space.
    cast(Any, config.pipeline.model).background_color = "white"
    lego = CAPTURES["lego"]
    cast(Any, config.pipeline.datamanager).dataparser = lego.dataparser(day.data_dir / lego.folder)
    if not any(config.get_checkpoint_dir().glob("*.ckpt")):
        with without_lpips():
            main(config)
    return config.get_base_dir() / "config.yml"


def engines(day: GpuDay, device: str, part: str) -> dict[str, Any]:
    """Measure milliseconds, share of bare matrix products and parity of every engine for one method and size of the
    frame."""
    side, method = part.split(" ")
    render = Render(
        engines=day.engines,
        seconds=day.seconds,
        side=int(side),
        teacher=False,
        cache_dir=day.output_dir / "engines",
    )
    return render._student(method, torch.device(device))


def viewer(day: GpuDay, device: str, part: str) -> dict[str, Any]:
    """Run the repository's tests of Nerfstudio's viewer in a browser."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *day.tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=460)
    return {"passed": done.returncode == 0, "summary": "".join(done.stdout.strip().splitlines()[-1:])}


def ranks(day: GpuDay, device: str, part: str) -> dict[str, Any]:
    """Train one student in two processes on one GPU over gloo, and compare their weights."""
    day.output_dir.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, device, day.output_dir), nprocs=2)
    first, second = (torch.load(day.output_dir / f"rank_{rank}.pt", weights_only=True) for rank in range(2))
    return {"equal": all(torch.equal(first[name], second[name]) for name in first), "tensors": len(first)}


def _rank(rank: int, port: int, device: str, folder: Path) -> None:
    from nerfstudio.configs.method_configs import all_methods

    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    torch.manual_seed(rank)  # Equal weights can only come from the first rank.
    work = StudentWork(all_methods["r2l-lite"], 64, 64, device)
    work.model.device_indicator_param.requires_grad_(False)  # In no loss, so ranks would wait for its gradient.
    inner = work.model
    work.model = torch.nn.parallel.DistributedDataParallel(inner, device_ids=[0] if device == "cuda" else None)  # pyright: ignore
    work.model.get_loss_dict = inner.get_loss_dict  # pyright: ignore
    for _ in range(3):
        work.step()
    torch.save({name: value.detach().cpu() for name, value in inner.named_parameters()}, folder / f"rank_{rank}.pt")
    torch.distributed.destroy_process_group()


class Stage(NamedTuple):
    """A stage of the measurements."""

    parts: Callable[[GpuDay], tuple[str, ...]]
    """Names of its parts, in their order."""
    run: Callable[[GpuDay, str, str], dict[str, Any]]
    """Return the figures of one part; arguments: options, device, name of the part."""


STAGES: dict[str, Stage] = {
    "smoke": Stage(lambda day: day.methods, smoke),
    "quality": Stage(
        lambda day: tuple(f"{capture} {part}" for capture in day.captures for part in ("teacher", *day.methods)),
        quality,
    ),
    "teachers": Stage(
        lambda day: tuple(f"{teacher} {part}" for teacher in day.cuda_teachers for part in ("teacher", "r2l-lite")),
        teachers,
    ),
    "engines": Stage(lambda day: tuple(f"{side} {method}" for side in day.sides for method in day.methods), engines),
    "viewer": Stage(lambda day: ("browser",), viewer),
    "ranks": Stage(lambda day: ("two",), ranks),
}


def as_table(figures: dict[str, Any]) -> str:
    """Return the main figures of all stages as one Markdown table."""
    lines = [f"# {figures['device']}, torch {figures['torch']}", "", "| stage | what | figure |", "|---|---|---|"]
    for stage, parts in figures["stages"].items():
        for part, found in parts.items():
            if "error" in found:
                lines.append(f"| {stage} | {part} failed | {found['error'][:200]} |")
                continue
            for engine in found.get("engines", ()):
                lines.append(
                    f"| {stage} | {found['method']} {found['frame']} {engine['engine']} {engine['precision']} |"
                    f" {engine['network_ms']:g} ms, {engine['share_of_bare_low_precision']:.0%} of bare matmul,"
                    f" {engine['psnr_db']:g} dB |"
                )
            shown = ", ".join(f"{key} {value}" for key, value in found.items() if key not in ("engines", "not_run"))
            lines.append(f"| {stage} | {part} | {shown} |")
    return "\n".join(lines) + "\n"
