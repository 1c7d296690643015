"""Quickstart: a procedural scene, a nerfacto teacher, r2l and mobile-r2l students, one image and one table."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
import tyro
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.utils.rich_utils import CONSOLE
from rich.table import Table
from torch import Tensor

from r2l_nerfstudio.console import progress_bar
from r2l_nerfstudio.disk import write_atomically
from r2l_nerfstudio.distillation.pose_sampling import PoseSamplerConfig
from r2l_nerfstudio.errors import command_line
from r2l_nerfstudio.lpips import without_lpips
from r2l_nerfstudio.models.metrics import psnr, ssim
from r2l_nerfstudio.scene import Scene, band_poses, camera_in_dataparser_frame, write_capture
from r2l_nerfstudio.scene.capture import band_cameras

from .contact_sheet import contact_sheet
from .small_nerfacto import PROCEDURAL_RANGE, procedural_dataparser, small_nerfacto

if TYPE_CHECKING:
    from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
    from nerfstudio.engine.trainer import TrainerConfig
    from nerfstudio.models.nerfacto import NerfactoModelConfig

Device = Literal["cpu", "cuda"]
UNSEEN_SEED = 2_718_281
EXPERIMENT = "procedural-scene"
STUDENTS = {"R2L student": "r2l-lite", "MobileR2L student": "mobile-r2l-lite"}
"""Stages, and the methods that they train."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of everything that the quickstart makes."""

    image: int = 160
    """Width and height of the photos in pixels."""
    train_views: int = 60
    test_views: int = 6
    teacher_iterations: int = 2800
    teacher_rays: int = 256
    """Rays per iteration: on two cores many small steps learn more per second than few large ones."""
    width: int | None = None
    """Width of both students' networks; None: as the methods have it."""
    grid_points: int | None = None
    """Grid points with features, at most; None: as the methods have it."""
    r2l_iterations: int = 3000
    r2l_rays: int = 2048
    mobile_iterations: int = 1200
    mobile_pixels: int = 8192
    ring_views: int = 70
    """Teacher views to learn from."""
    photo_iterations: int = 150
    """Length of the photo stage in iterations."""
    unseen_views: int = 12
    """Cameras for the figures, sampled again from the band; no training used them."""
    picture_rows: int = 4


FULL = Sizes()
FAST = Sizes(
    image=32,
    train_views=10,
    test_views=2,
    teacher_iterations=60,
    teacher_rays=128,
    width=32,
    grid_points=3000,
    r2l_iterations=40,
    r2l_rays=512,
    mobile_iterations=40,
    mobile_pixels=512,
    ring_views=6,
    photo_iterations=10,
    unseen_views=3,
    picture_rows=2,
)


@dataclass
class Quickstart:
    """Write a capture of a small scene, train a teacher on it, distil two students, and compare all with the ground
    truth.

    Finished stages are kept. Runs on CUDA if available, else on the CPU.
    """

    folder: Path = Path("quickstart")
    """Folder to write to."""
    force: bool = False
    """Repeat every stage. Earlier runs are kept; image and table are replaced."""
    fast: bool = False
    """Run a miniature in FOLDER/fast: it checks in a minute that everything works, and its quality is meaningless."""
    seed: int = 0
    """Seed of cameras and weights."""

    def main(self) -> None:
        """Run all stages.

        Raises:
            InputError: if the folder holds something else.
        """
        sizes = FAST if self.fast else FULL
        root = self.folder / "fast" if self.fast else self.folder
        device: Device = "cuda" if torch.cuda.is_available() else "cpu"
        stages = Stages(root, self.force)
        CONSOLE.print(f"Quickstart in {root}, on {'CUDA' if device == 'cuda' else f'{os.cpu_count()} CPU cores'}.")

        capture_key = digest(sizes.image, sizes.train_views, sizes.test_views, self.seed)
        capture = stages.run(
            "Capture",
            capture_key,
            lambda: on_one_thread(lambda: photograph(root / "capture", sizes, self.seed, self.force)),
        )
        teacher_key = digest(capture_key, sizes.teacher_iterations, sizes.teacher_rays)
        teacher = stages.run(
            "Teacher",
            teacher_key,
            lambda: on_one_thread(
                lambda: train(teacher_config(capture.parent, root / "outputs", sizes, device, self.seed))
            ),
        )
        students, keys = {}, []
        for stage, method in STUDENTS.items():
            keys.append(digest(teacher_key, str(teacher), method, *dataclasses.astuple(sizes)))
            students[method] = stages.run(
                stage,
                keys[-1],
                lambda method=method: train(student_config(method, teacher, root, sizes, device, self.seed)),
            )
        stages.run(
            "Evaluation",
            digest(*keys, *(str(student) for student in students.values())),
            lambda: evaluate(root, teacher, students, sizes),
        )
        report(root, stages.seconds)
        for method, student in students.items():
            show(f"Open the viewer on {method}: {command('ns-viewer')} --load-config {shown(student)}")


class Stages:
    """Finished stages of a folder, recorded in its `stages.json`: a stage is not repeated with the same settings."""

    def __init__(self, root: Path, force: bool) -> None:
        self.path = root / "stages.json"
        self.force = force
        self.done: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        if self.path.exists():
            try:
                self.done = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError:
                CONSOLE.print(f"[yellow]{self.path} cannot be read: repeating every stage.")

    def run(self, name: str, key: str, work: Callable[[], Path]) -> Path:
        """Run a stage unless it is finished.

        Args:
            name: heading.
            key: of its settings and those of the stages before it.
            work: does it and returns the file that shows it is finished.
        """
        CONSOLE.rule(f"[bold]{name}", align="left")
        found = self.done.get(name)
        if found is not None and not self.force and found["key"] == key and Path(found["result"]).exists():
            self.seconds[name] = found["seconds"]
            CONSOLE.print(f"Found: {shown(Path(found['result']))} ({found['seconds']:.0f} s, in an earlier run).")
            return Path(found["result"])
        start = time.perf_counter()
        result = work().absolute()
        self.seconds[name] = round(time.perf_counter() - start, 1)
        CONSOLE.print(f"{name}: {self.seconds[name]:.0f} s.")
        self.done[name] = {"key": key, "result": str(result), "seconds": self.seconds[name]}
        write_atomically(self.path, json.dumps(self.done, indent=2) + "\n")
        return result


def photograph(folder: Path, sizes: Sizes, seed: int, overwrite: bool) -> Path:
    """Write the capture and return its transforms.json; see `write_capture`."""
    with progress_bar() as bar:
        task = bar.add_task("Ray tracing", total=sizes.train_views + sizes.test_views)
        write_capture(
            folder,
            sizes.train_views,
            sizes.test_views,
            sizes.image,
            seed,
            overwrite,
            on_picture=lambda done, total: bar.update(task, completed=done, total=total),
        )
    return folder / "transforms.json"


def teacher_config(capture: Path, output_dir: Path, sizes: Sizes, device: Device, seed: int) -> TrainerConfig:
    """Return the configuration of a nerfacto for this scene."""
    config = small_nerfacto(
        procedural_dataparser(capture), output_dir, sizes.teacher_iterations, object_range=PROCEDURAL_RANGE
    )
    config.experiment_name = EXPERIMENT
    quieten(config, device, seed)
    datamanager = cast("VanillaDataManagerConfig", config.pipeline.datamanager)
    model = cast("NerfactoModelConfig", config.pipeline.model)
    datamanager.train_num_rays_per_batch = datamanager.eval_num_rays_per_batch = sizes.teacher_rays
    model.num_levels, model.log2_hashmap_size, model.base_res, model.max_res = 3, 15, 16, 128
    # Few samples suffice for an object that fills the range, and they decide the time per teacher view.
    model.num_proposal_samples_per_ray, model.num_nerf_samples_per_ray = (32,), 12
    model.proposal_net_args_list = [
        {"hidden_dim": 16, "log2_hashmap_size": 14, "num_levels": 2, "max_res": 48, "use_linear": False}
    ]
    model.proposal_weights_anneal_max_num_iters = model.proposal_warmup = 300
    for group in ("proposal_networks", "fields"):
        config.optimizers[group]["optimizer"].lr = 2e-2
    return config


def student_config(method: str, teacher: Path, root: Path, sizes: Sizes, device: Device, seed: int) -> TrainerConfig:
    """Return what `ns-train METHOD --teacher …` builds, sized for two cores."""
    from r2l_nerfstudio import method_configs

    config = copy.deepcopy(getattr(method_configs, method.replace("-", "_")).config)
    config.teacher = teacher
    config.output_dir = root / "outputs"
    datamanager, model = config.pipeline.datamanager, config.pipeline.model
    model.width = sizes.width or model.width
    model.max_grid_points = sizes.grid_points or model.max_grid_points
    if method == "r2l-lite":
        config.max_num_iterations = sizes.r2l_iterations
        datamanager.train_num_rays_per_batch = sizes.r2l_rays
    else:
        config.max_num_iterations = sizes.mobile_iterations
        datamanager.train_num_rays_per_batch = sizes.mobile_pixels
    quieten(config, device, seed)
    datamanager.num_views = sizes.ring_views
    datamanager.photo_iterations = sizes.photo_iterations
    # Both students learn from the same views: the second one finds those rendered for the first.
    datamanager.pose_sampler = PoseSamplerConfig(focal_range=(1.0, 1.0))
    datamanager.cache_dir = root / "teacher_views"
    return config


def on_one_thread(work: Callable[[], Path]) -> Path:
    """Return what `work` returns. The tensors of photos and of the teacher are too small for a second thread to help, and
    threads that wait for each other are tens of times slower where something else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work()
    finally:
        torch.set_num_threads(threads)


def quieten(config: TrainerConfig, device: Device, seed: int) -> None:
    """Remove the viewer and the table of iterations, which the progress bar replaces; save a checkpoint at the end
    only."""
    config.machine.device_type = device
    config.machine.seed = seed
    config.vis = "tensorboard"
    config.viewer.quit_on_train_completion = True
    config.logging.local_writer.enable = False
    config.steps_per_save = config.max_num_iterations
    config.steps_per_eval_batch = config.steps_per_eval_image = config.steps_per_eval_all_images = 0


def train(config: TrainerConfig) -> Path:
    """Train as `ns-train` does, with a progress bar, and return the run's config.yml.

    Returns:
        The run's config.yml.
    """
    from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
    from nerfstudio.utils import writer

    config.set_timestamp()
    config.save_config()
    random.seed(config.machine.seed)
    np.random.seed(config.machine.seed)
    torch.manual_seed(config.machine.seed)
    try:
        with without_lpips():
            trainer = config.setup(local_rank=0, world_size=1)
            trainer.setup()
        with progress_bar() as bar:
            task = bar.add_task(f"Training {config.method_name}", total=config.max_num_iterations)
            trainer.callbacks.append(
                TrainingCallback(
                    where_to_run=[TrainingCallbackLocation.AFTER_TRAIN_ITERATION],
                    update_every_num_iters=1,
                    func=lambda step: bar.update(task, completed=step + 1),
                )
            )
            trainer.train()
        if getattr(getattr(trainer, "progress", None), "stopped", False):
            raise KeyboardInterrupt  # The student is saved, but its stage is not done.
    finally:
        # Without this the next run of this process would also be logged into this run's folder.
        writer.EVENT_WRITERS.clear()
    return config.get_base_dir() / "config.yml"


@torch.no_grad()
def evaluate(root: Path, teacher_path: Path, students: dict[str, Path], sizes: Sizes) -> Path:
    """Measure students and teacher against the ground truth at cameras that no training used, and write the image.

    Returns:
        The figures' file, result.json; result.png is beside it.
    """
    from nerfstudio.utils.eval_utils import eval_setup

    from r2l_nerfstudio.teacher import Teacher

    # Through Nerfstudio's own loader: the saved runs are measured, not the models in memory.
    models = {name: eval_setup(path, test_mode="inference")[1].model for name, path in students.items()}
    device = next(iter(models.values())).device
    teacher = Teacher.load(teacher_path, device=device)
    world = band_cameras(band_poses(sizes.unseen_views, seed=UNSEEN_SEED), sizes.image)
    cameras = camera_in_dataparser_frame(world, teacher.dataparser_outputs)
    scene = Scene()
    render: dict[str, Callable[[Cameras], Float[Tensor, "height width 3"]]] = {
        "teacher": lambda camera: teacher.view(camera).rgb.cpu(),
        **{
            name: lambda camera, model=model: model.get_outputs_for_camera(camera)["rgb"].cpu()
            for name, model in models.items()
        },
    }
    scores: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in render}
    rows: list[tuple[str, list[Tensor]]] = []
    with progress_bar() as bar:
        for index in bar.track(range(sizes.unseen_views), description="Unseen cameras"):
            truth = scene.render(world[index]).rgb
            images = {}
            for name, view in render.items():
                start = time.perf_counter()
                images[name] = view(cameras[index : index + 1].to(device)).clamp(0, 1)
                score = scores[name]
                score["seconds"].append(time.perf_counter() - start)
                score["psnr"].append(psnr(images[name], truth))
                score["ssim"].append(ssim(images[name], truth))
                if name in models:
                    score["psnr_against_teacher"].append(psnr(images[name], images["teacher"]))
            if index < sizes.picture_rows:
                errors = [(4 * (images[name] - truth).abs()).clamp(0, 1) for name in models]
                rows.append((f"pose {index + 1}", [truth, *images.values(), *errors]))
    networks = {"teacher": teacher.model, **models}
    figures = {
        "unseen_poses": sizes.unseen_views,
        "image_size": sizes.image,
        "methods": {
            name: {
                # The first frame includes warm-up; the median is representative.
                **{
                    key: round(sorted(v)[len(v) // 2] if key == "seconds" else sum(v) / len(v), 4)
                    for key, v in score.items()
                },
                "parameters": sum(p.numel() for p in networks[name].parameters()),
            }
            for name, score in scores.items()
        },
    }
    titles = ["truth", *render, *(f"|{name} - truth| x4" for name in models)]
    contact_sheet(rows, titles).save(root / "result.png")
    result = root / "result.json"
    result.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return result


def report(root: Path, seconds: dict[str, float]) -> None:
    """Print the table and write it to result.md."""
    figures = json.loads((root / "result.json").read_text(encoding="utf-8"))
    titles = [
        "",
        "PSNR against ground truth",
        "SSIM against ground truth",
        "PSNR against teacher",
        "seconds per frame",
        "parameters",
    ]
    lines = []
    for name, score in figures["methods"].items():
        against = score.get("psnr_against_teacher")
        lines.append(
            [
                name,
                f"{score['psnr']:.2f} dB",
                f"{score['ssim']:.3f}",
                "" if against is None else f"{against:.2f} dB",
                f"{score['seconds']:.3f}",
                f"{score['parameters']:,}",
            ]
        )
    size = figures["image_size"]
    caption = f"{figures['unseen_poses']} cameras that no training used, {size} x {size} pixels"
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    times += f"; {sum(seconds.values()) / 60:.1f} minutes in all"
    table = Table(*titles, title=caption)
    for line in lines:
        table.add_row(*line)
    CONSOLE.print(table)
    show(f"Time: {times}.")
    show(f"Picture: {shown(root / 'result.png')}; figures: {shown(root / 'result.json')}, {shown(root / 'result.md')}")
    markdown = [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *lines)]
    (root / "result.md").write_text("\n".join([*markdown, "", f"{caption}. Time: {times}.", ""]), encoding="utf-8")


def digest(*settings: Any) -> str:
    """Return a short key for a stage's settings."""
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def show(line: str) -> None:
    """Print a line without wrapping it, so that paths and commands can be copied."""
    CONSOLE.print(line, markup=False, highlight=False, soft_wrap=True)


def shown(path: Path) -> Path:
    """Return the path relative to the current folder if it is inside it."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def command(name: str) -> str:
    """Return how to call a command of this environment from the current shell, whether or not the environment is
    active."""
    here = Path(sys.executable).parent / name
    found = shutil.which(name)
    return name if found is not None and Path(found).absolute() == here.absolute() else str(shown(here))


def main() -> None:
    """Run `r2l-quickstart`."""
    with command_line():
        tyro.cli(Quickstart, prog="r2l-quickstart", description=__doc__).main()


if __name__ == "__main__":
    main()
