"""What each part of the training recipe contributes: students of one teacher, in equal processor time, three seeds
each."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.engine.optimizers import AdamOptimizerConfig, Optimizers
from nerfstudio.utils.rich_utils import CONSOLE

from benchmarks.figures import RESULTS
from r2l_nerfstudio.distillation.optimization import ScheduledRate, WarmupCosineSchedulerConfig
from r2l_nerfstudio.distillation.pipeline import DistillationPipeline
from r2l_nerfstudio.distillation.progress import TrainingProgress
from r2l_nerfstudio.distillation.trainer import DistillationTrainerConfig
from r2l_nerfstudio.distillation.view_ring import TeacherView, ViewRenderer
from r2l_nerfstudio.models.metrics import psnr

Changes = dict[str, Any]
UNSEEN_SEED = 27_182_818
UNSEEN_VIEWS = 8


def adam(lr: float) -> Changes:
    """Adam at this rate, with our schedule, for all matrices and ends."""
    return {
        f"optimizers.{group}": {
            "optimizer": AdamOptimizerConfig(lr=lr),
            "scheduler": WarmupCosineSchedulerConfig(warmup_steps=50),
        }
        for group in ("hidden", "ends")
    }


COMMON: Changes = {
    "pipeline.datamanager.photo_iterations": 0,
    "pipeline.datamanager.refresh_share": 0.0,
    "pipeline.model.engine": "torch",
}
WARM_UP: Changes = {"optimizers.*.scheduler": WarmupCosineSchedulerConfig(warmup_steps=50)}
LITE: dict[str, tuple[str, Changes]] = {"r2l": ("r2l-lite", {}), "mobile-r2l": ("mobile-r2l-lite", {})}
"""The baseline: a method for a CPU, unchanged."""
PAPER: dict[str, tuple[str, Changes]] = {
    "r2l": (
        "r2l-paper",
        {
            "pipeline.model.width": 128,
            "pipeline.model.depth": 44,
            "pipeline.datamanager.train_num_rays_per_batch": 4096,
        },
    ),
    "mobile-r2l": (
        "mobile-r2l-paper",
        {
            "pipeline.model.width": 128,
            "pipeline.model.upsampling_factor": 4,
            "pipeline.datamanager.whole_images": 4,
        },
    ),
}
"""The published recipe on a network of a CPU's size: half the width; for r2l half the depth; batches to fit."""

FULL: dict[str, tuple[str, Changes]] = {
    "r2l": ("r2l", PAPER["r2l"][1] | WARM_UP),
    "mobile-r2l": (
        "mobile-r2l",
        PAPER["mobile-r2l"][1]
        | WARM_UP
        | {
            "pipeline.datamanager.whole_images": 0,
            "pipeline.datamanager.train_num_rays_per_batch": 16384,
            "pipeline.datamanager.crop_cells": 8,
        },
    ),
}
"""What a GPU trains, on the same small network as the published recipe: batches and warm-up as short as the training."""

PUBLISHED = "paper, published network"
"""The row of the published recipe at the published size."""

COMPARED = {"paper": "tab:gray", PUBLISHED: "black", "ours": "tab:blue"}
"""Recipes whose curves are drawn, and their colors."""

SHRUNK = ("pipeline.model.width", "pipeline.model.depth")
"""What makes the published network smaller; the row of the published network leaves it out."""

EVEN: dict[str, Changes] = {
    method: {
        "pipeline.model.ray_encoding": "points",
        "pipeline.model.volume_resolution": 40,
        "pipeline.model.num_frequencies": 6,
        "pipeline.model.jitter_points": False,
        "optimizers.volume.optimizer.lr": 4e-2,
        **depth,
    }
    for method, depth in (
        ("r2l", {"pipeline.model.depth": 12, "pipeline.model.num_points": 16}),
        ("mobile-r2l", {"pipeline.model.blocks": 4, "pipeline.model.num_points": 8}),
    )
}
"""The lite methods as they were before composited features: points evenly spaced, concatenated, a dense volume of 40^3."""
HALF_PIXELS: dict[str, Changes] = {"r2l": {}, "mobile-r2l": {"pipeline.model.pixel_samples": 12}}

VOLUME: Changes = {"pipeline.model.volume_resolution": 40}
ZERO: Changes = {"pipeline.model.zero_init": True}
SPHERE: Changes = {"pipeline.model.spacing": "auto", "pipeline.model.published_rays": False}
SHALLOW: dict[str, Changes] = {"r2l": {"pipeline.model.depth": 12}, "mobile-r2l": {"pipeline.model.blocks": 4}}
SMALL_BATCH: dict[str, Changes] = {
    "r2l": {"pipeline.datamanager.train_num_rays_per_batch": 1024},
    "mobile-r2l": {
        "pipeline.datamanager.whole_images": 0,
        "pipeline.datamanager.train_num_rays_per_batch": 8192,
        "pipeline.datamanager.crop_cells": 6,
        "pipeline.model.margin": 1,
    },
}


def rows_of(method: Literal["r2l", "mobile-r2l"]) -> dict[str, tuple[str, Changes]]:
    """Named recipes: a method, and what is changed of it."""
    paper, paper_changes = PAPER[method]
    lite, _ = LITE[method]
    full, full_changes = FULL[method]
    with_paper = {
        "paper": {},
        "paper + cosine, 1e-3": adam(1e-3),
        "paper + cosine, 1e-3, zero-init": {**adam(1e-3), **ZERO},
        "paper + Muon": MUON,
        "paper + Muon, zero-init": {**MUON, **ZERO},
        "paper + volume": VOLUME,
        "paper + shallow": SHALLOW[method],
        "paper + small batches": SMALL_BATCH[method],
        "paper + points from the sphere on": SPHERE,
        "paper + foreground": {"pipeline.datamanager.foreground_fraction": 0.75},
        "paper + bf16": {"pipeline.bf16": True},
        "paper + averaged weights": {"pipeline.ema_decay": 0.99},
    }
    if method == "mobile-r2l":
        del with_paper["paper + bf16"]
    published = {name: change for name, change in paper_changes.items() if name not in SHRUNK}
    with_lite: dict[str, Changes] = {
        "ours": {},
        "ours - Muon": adam(4e-3),
        "ours, Adam at 1e-3": adam(1e-3),
        "ours, half the rates": rates(lite, 0.5),
        "ours, twice the rates": rates(lite, 2.0),
        "ours, points evenly spaced": EVEN[method],
        "ours, half the sample points": {"pipeline.model.num_samples": 12, **HALF_PIXELS[method]},
        "ours, 8 features": {"pipeline.model.feature_channels": 8},
        "ours, 50000 grid points": {"pipeline.model.max_grid_points": 50_000},
        "ours, 8 octaves": {"pipeline.model.point_octaves": 8},
        "ours, 10 octaves": {"pipeline.model.point_octaves": 10},
        "ours - foreground": {"pipeline.datamanager.foreground_fraction": 0.0},
        "ours - cosine": {"optimizers.*.scheduler": WarmupCosineSchedulerConfig(warmup_steps=50, final_share=1.0)},
        "ours - bf16": {"pipeline.bf16": False},
        "ours - accumulation and depth": {
            "pipeline.model.accumulation_weight": 0.0,
            "pipeline.model.depth_weight": 0.0,
        },
        "ours - jitter": {"pipeline.model.jitter_points": False},
    }
    if method == "r2l":
        with_lite |= {
            "ours - zero-init": {"pipeline.model.zero_init": False},
            "ours + hard rays": {"pipeline.datamanager.hard_fraction": 0.2},
            "ours + averaged weights": {"pipeline.ema_decay": 0.99},
            "ours, depth 4": {"pipeline.model.depth": 4},
            "ours, depth 12": {"pipeline.model.depth": 12},
            "ours, batches of 1024": {"pipeline.datamanager.train_num_rays_per_batch": 1024},
            "ours, batches of 4096": {"pipeline.datamanager.train_num_rays_per_batch": 4096},
        }
    else:
        with_lite |= {
            "ours + zero-init": ZERO,
            "ours - averaged weights": {"pipeline.ema_decay": 0.0},
            "ours, 1 block": {"pipeline.model.blocks": 1},
            "ours, 4 blocks": {"pipeline.model.blocks": 4},
            "ours, batches of 32768": {"pipeline.datamanager.train_num_rays_per_batch": 32768},
        }
    with_full: dict[str, Changes] = {
        "full": {},
        "full, Adam at 1e-3": adam(1e-3),
        "full, twice the rates": rates(full, 2.0),
        "full, 4 times the rates": rates(full, 4.0),
        "full, points evenly spaced": {"pipeline.model.ray_encoding": "points"},
        "full - foreground": {"pipeline.datamanager.foreground_fraction": 0.0},
        "full - jitter": {"pipeline.model.jitter_points": False},
    }
    if method == "r2l":
        with_full |= {
            "full - hard rays": {"pipeline.datamanager.hard_fraction": 0.0},
            "full - zero-init": {"pipeline.model.zero_init": False},
            "full + averaged weights": {"pipeline.ema_decay": 0.99},
        }
    else:
        with_full |= {
            "full + zero-init": ZERO,
            "full - averaged weights": {"pipeline.ema_decay": 0.0},
        }
    return {
        **{name: (full, {**full_changes, **changes}) for name, changes in with_full.items()},
        **{name: (paper, {**paper_changes, **changes}) for name, changes in with_paper.items()},
        PUBLISHED: (paper, published),
        **{name: (lite, changes) for name, changes in with_lite.items()},
    }


def rates(method: str, share: float) -> Changes:
    """A method's learning rates, all by the same factor."""
    from nerfstudio.configs.method_configs import all_methods

    optimizers = all_methods[method].optimizers
    return {f"optimizers.{group}.optimizer.lr": share * each["optimizer"].lr for group, each in optimizers.items()}


def muon() -> Changes:
    """The optimizers of our small methods."""
    from r2l_nerfstudio.method_configs.common import small_optimizers

    return {f"optimizers.{group}": settings for group, settings in small_optimizers().items()}


MUON = muon()


def configured(method: str, changes: Changes) -> DistillationTrainerConfig:
    """A method's configuration with dotted changes; `*` stands for every key of a dictionary."""
    from nerfstudio.configs.method_configs import all_methods

    config = copy.deepcopy(all_methods[method])
    for path, value in (COMMON | changes).items():
        *holders, name = path.split(".")
        places = [config]
        for holder in holders:
            places = [
                inner
                for place in places
                for inner in (
                    (place.values() if holder == "*" else [place[holder]])
                    if isinstance(place, dict)
                    else [getattr(place, holder)]
                )
            ]
        for place in places:
            value = copy.deepcopy(value)
            if isinstance(place, dict):
                place[name] = value
            else:
                setattr(place, name, value)
    return config


@dataclass
class Point:
    """A measurement during training."""

    seconds: float
    """Seconds of processor time, without measurements."""
    steps: int
    rays: int
    """Pixels trained on; a network of ray images evaluates one ray per cell of them."""
    psnr: float
    """PSNR in dB against the teacher at unseen cameras."""


class Laboratory:
    """One teacher, its views, and unseen cameras, for several students of one data manager.

    Args:
        config: of any row; what concerns teacher and views counts.
    """

    def __init__(self, config: DistillationTrainerConfig) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config.inherit_from_teacher()
        config.pipeline.datamanager.data = Path(config.pipeline.datamanager.data)
        self.base = config
        self.pipeline = DistillationPipeline(config.pipeline, str(self.device))
        ring = self.pipeline.datamanager.ring.renderer
        unseen = ViewRenderer(
            ring.teacher, ring.sampler, ring.survey, ring.height, ring.width, UNSEEN_SEED, ring.cache_dir
        )
        self.unseen = [unseen.render(index) for index in range(UNSEEN_VIEWS)]

    def learn(
        self,
        config: DistillationTrainerConfig,
        seconds: float,
        seed: int,
        measurements: int,
        report: Callable[[Point], None],
    ) -> list[Point]:
        """Train a student for a given processor time.

        Args:
            config: configuration with its recipe.
            seconds: processor time in seconds.
            seed: seed of weights and batches.
            measurements: number of measurements, including the final one.
            report: called with every measurement.
        """
        torch.manual_seed(seed)
        ours = config.pipeline
        ours.teacher = self.base.pipeline.teacher
        pipeline, datamanager = self.pipeline, ours.datamanager
        kept = self.base.pipeline.datamanager
        for name in ("dataparser", "data", "camera_res_scale_factor", "pose_sampler", "num_views", "view_downscale"):
            setattr(datamanager, name, getattr(kept, name))
        pipeline.restart(ours)
        clock = _Stopwatch()
        progress = TrainingProgress(1, seconds, clock=clock)
        optimizers = Optimizers(config.optimizers, pipeline.get_param_groups())
        for scheduler in optimizers.schedulers.values():
            if isinstance(scheduler, ScheduledRate):
                scheduler.progress = lambda: progress.fraction
        points: list[Point] = []
        step, learned = 0, 0
        pipeline.train()
        while True:
            pipeline.train_step(optimizers, step)
            for scheduler in optimizers.schedulers.values():
                scheduler.step()
            step += 1
            learned += pipeline.datamanager.get_train_rays_per_batch()
            progress.update(step)
            if progress.fraction >= (len(points) + 1) / measurements:
                with clock.stopped():
                    points.append(Point(clock(), step, learned, self.quality()))
                    report(points[-1])
            if progress.finished:
                return points

    @torch.no_grad()
    def quality(self) -> float:
        """Return the mean PSNR in dB against the teacher at the unseen cameras."""
        pipeline = self.pipeline
        pipeline.eval()
        with pipeline.averaged() if pipeline.average is not None else nullcontext():
            pipeline.eval()
            values = [psnr(self._draw(view), view.pixels[..., :3].cpu().float() / 255) for view in self.unseen]
        pipeline.train()
        return mean(values)

    def _draw(self, view: TeacherView) -> torch.Tensor:
        height, width = view.depth.shape
        fx, fy, cx, cy = view.intrinsics.tolist()
        camera = Cameras(view.camera_to_world[None], fx, fy, cx, cy, width=width, height=height).to(self.device)
        return self.pipeline.model.render_camera(camera)["rgb"].cpu()


class _Stopwatch:
    """Return the processor time of this process; a GPU's work counts by wall time."""

    def __init__(self) -> None:
        self._clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        self._start = self._clock()

    def __call__(self) -> float:
        return self._clock() - self._start

    @contextmanager
    def stopped(self):  # noqa: ANN201
        """Exclude the time of this block."""
        began = self._clock()
        yield
        self._start += self._clock() - began


@dataclass
class Recipes:
    """Measure the training recipe part by part with one teacher: equal processor time for each, PSNR against the
    teacher at unseen cameras."""

    teacher: Path
    """Trained run of the teacher."""
    name: str
    """Name of the capture, for the file of figures."""
    method: Literal["r2l", "mobile-r2l"] = "r2l"
    """Which student."""
    rows: tuple[str, ...] = ()
    """Recipes to measure; all by default."""
    seconds: float = 40.0
    """Seconds of processor time per student."""
    seeds: int = 3
    """Students per recipe."""
    measurements: int = 4
    """Points of every learning curve."""
    num_views: int = 200
    """Teacher views that all students learn from."""
    cache_dir: Path | None = None
    """Folder to keep the teacher's views in."""
    results_dir: Path = RESULTS
    """Folder of the figures; rows already measured there for the same time are kept."""
    data: Path | None = None
    """The capture's location, if it has moved since the teacher was trained."""
    patience: dict[str, float] = field(default_factory=dict)
    """Other times for some recipes, by name."""

    def main(self) -> None:
        """Measure; write `recipes_NAME_METHOD.json` after every student, and `.md` and `.png` in the end."""
        recipes = rows_of(self.method)
        unknown = set(self.rows) - set(recipes)
        if unknown:
            from r2l_nerfstudio.errors import InputError

            raise InputError(f"--rows: unknown recipes {', '.join(sorted(unknown))}; choose from {'; '.join(recipes)}.")
        file = self.results_dir / f"recipes_{self.name}_{self.method}.json"
        figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": {}}
        first = configured(*LITE[self.method])
        first.teacher, first.data = self.teacher, self.data
        views = configured(*LITE["mobile-r2l"]).pipeline.datamanager.pose_sampler
        first.pipeline.datamanager.pose_sampler = views  # one set of views for both methods
        first.pipeline.datamanager.num_views = self.num_views
        first.pipeline.datamanager.cache_dir = self.cache_dir
        laboratory = Laboratory(first)
        size = laboratory.unseen[0].depth.shape
        figures |= {
            "capture": self.name,
            "method": self.method,
            "resolution": f"{size[1]}x{size[0]}",
            "teacher_views": self.num_views,
            "threads": torch.get_num_threads(),
        }
        for seed in range(self.seeds):
            for name in self.rows or recipes:
                seconds = self.patience.get(name, self.seconds)
                key = f"{name}, {seconds:g} s"
                runs = figures["rows"].setdefault(key, {"recipe": name, "seconds": seconds, "seeds": {}})["seeds"]
                if str(seed) in runs:
                    continue
                points = laboratory.learn(
                    configured(*recipes[name]), seconds, seed, self.measurements, lambda point: None
                )
                runs[str(seed)] = [vars(point) for point in points]
                row = figures["rows"][key]
                parameters = sum(p.numel() for p in laboratory.pipeline.model.parameters())
                row["megabytes_in_fp16"] = round(parameters * 2 / 1e6, 2)
                last = points[-1]
                CONSOLE.print(
                    f"{name} [{seed}]: {last.psnr:.2f} dB, {last.rays / 1e6:.2f} M rays, {last.seconds:.0f} s",
                    markup=False,
                )
                self.results_dir.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(figures, indent=1) + "\n")
        file.with_suffix(".md").write_text(as_table(figures))
        draw_curves(figures, file.with_suffix(".png"))
        CONSOLE.print(as_table(figures), markup=False)
        CONSOLE.print(f"Written: {file}, .md, .png")


def as_table(figures: dict[str, Any]) -> str:
    """Return the figures of one file as Markdown."""
    title = (
        f"{figures['capture']}, {figures['method']}, {figures['resolution']}, {figures['teacher_views']} teacher views"
    )
    lines = [f"## {title}", "", "| recipe | PSNR, dB | million pixels | s | MB in fp16 |", "|---|---|---|---|---|"]
    for row in figures["rows"].values():
        ends = [points[-1] for points in row["seeds"].values()]
        values = [end["psnr"] for end in ends]
        spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
        seen = mean(end["rays"] for end in ends) / 1e6
        lines.append(
            f"| {row['recipe']} | {mean(values):.2f}{spread} | {seen:.2f} | {row['seconds']:g}"
            f" | {row['megabytes_in_fp16']} |"
        )
    return "\n".join([*lines, "", *ratios(figures)]) + "\n"


def ratios(figures: dict[str, Any]) -> list[str]:
    """Time until our recipe was first measured at the PSNR that the published recipe ends with, on the small and on the
    published network."""
    of = {
        name: sorted((row for row in figures["rows"].values() if row["recipe"] == name), key=lambda row: row["seconds"])
        for name in COMPARED
    }

    lines = []
    for name in ("paper", PUBLISHED):
        if not (of[name] and of["ours"]):
            continue
        goal = mean_curve(of[name][-1])[-1]
        points = [point for row in of["ours"] for point in mean_curve(row)]
        reached = min(
            (point for point in points if point.psnr >= goal.psnr), key=lambda point: point.seconds, default=None
        )
        best = reached or mean_curve(of["ours"][-1])[-1]
        what = "The published recipe" + (" on the published network" if name == PUBLISHED else "")
        line = f"{what} has {goal.psnr:.2f} dB after {goal.seconds:.0f} s; ours has {best.psnr:.2f} dB after"
        line += f" {best.seconds:.0f} s"
        if reached:
            fewer = goal.rays / reached.rays
            line += f": {goal.seconds / reached.seconds:.0f} times less time,"
            line += f" {fewer:.{int(fewer < 10)}f} times fewer pixels"
        lines.append(line + ".")
    return lines


def mean_curve(row: dict[str, Any]) -> list[Point]:
    """Return the learning curve of a recipe, averaged over its seeds."""
    curves = [[Point(**point) for point in points] for points in row["seeds"].values()]
    return [
        Point(
            mean(point.seconds for point in points),
            round(mean(point.steps for point in points)),
            round(mean(point.rays for point in points)),
            mean(point.psnr for point in points),
        )
        for points in zip(*curves, strict=True)
    ]


def draw_curves(figures: dict[str, Any], file: Path) -> None:
    """Plot PSNR over processor time and over pixels, for the published recipe and ours; one line per seed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    drawn = sorted(
        (row for row in figures["rows"].values() if row["recipe"] in COMPARED),
        key=lambda row: (row["recipe"], row["seconds"]),
    )
    longest = max((row["seconds"] for row in drawn), default=1.0)
    for row in drawn:
        for seed, points in row["seeds"].items():
            label = f"{row['recipe']}, {row['seconds']:g} s" if seed == "0" else None
            shade = 0.3 + 0.7 * row["seconds"] / longest
            for axis, what, scale in ((axes[0], "seconds", 1), (axes[1], "rays", 1e6)):
                xs, ys = [point[what] / scale for point in points], [point["psnr"] for point in points]
                axis.plot(xs, ys, "o-", ms=3, lw=1, color=COMPARED[row["recipe"]], alpha=shade, label=label)
    for axis, label in zip(axes, ("seconds of one thread", "million pixels learned from"), strict=True):
        axis.set(xscale="log", xlabel=label)
        axis.grid(alpha=0.3, which="both")
        # Plain numbers, as many as fit.
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[0].set(ylabel="dB against the teacher, unseen poses")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{figures['capture']}, {figures['method']}, {figures['resolution']}")
    figure.savefig(file, dpi=110)
