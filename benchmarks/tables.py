"""The four tables of the papers (quality, storage, latency, speed against PSNR and size) with our measured rows."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.utils.rich_utils import CONSOLE

from benchmarks.figures import RESULTS
from benchmarks.published_figures import FOOTNOTES, LATENCY, QUALITY, STORAGE, TRADE_OFF
from r2l_nerfstudio.disk import write_atomically
from r2l_nerfstudio.engines.cache import device_name
from r2l_nerfstudio.engines.switch import EngineOption
from r2l_nerfstudio.errors import InputError

Group = Literal["NeRF-Synthetic", "LLFF", "other captures"]

SCENES: dict[Group, tuple[str, ...]] = {
    "NeRF-Synthetic": ("chair", "drums", "ficus", "hotdog", "lego", "materials", "mic", "ship"),
    "LLFF": ("fern", "flower", "fortress", "horns", "leaves", "orchids", "room", "trex"),
}
FULL_SIZE = {"NeRF-Synthetic": (800, 800), "LLFF": (1008, 756)}
"""Width and height in pixels at which the published figures were measured."""
CPU_SCALE = 0.25
WARM_UP_VIEWS = 2
"""Rendered before any is timed."""
DEEPEST = 2
"""Folders below the root in which scenes are looked for, as in nerf_synthetic/lego."""


@dataclass(frozen=True)
class Scene:
    """A capture that is measured."""

    name: str
    path: Path
    group: Group

    @property
    def is_blender(self) -> bool:
        """Whether it is in NeRF-Synthetic's format."""
        return (self.path / "transforms_train.json").is_file()

    def dataparser(self) -> DataParserConfig:
        """How it is read. LLFF's evaluation views are every eighth, as in the papers."""
        if self.is_blender:
            return BlenderDataParserConfig(data=self.path)
        parser = NerfstudioDataParserConfig(data=self.path, downscale_factor=1, load_3D_points=False)
        if self.group == "LLFF":
            parser.eval_mode, parser.eval_interval = "interval", 8
        return parser


def find_scenes(root: Path, names: Sequence[str] = ()) -> list[Scene]:
    """Return the captures in a folder, in order of set and name.

    Args:
        root: a capture, or a folder of captures, or of folders of captures.
        names: only these scenes.

    Raises:
        InputError: if there are none, or a name is not among them.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"There is no folder {root}: give the one that contains the scenes with --data.")
    found: dict[str, Scene] = {}
    level, without = [root], []
    for _ in range(DEEPEST + 1):
        deeper = []
        for folder in level:
            if any((folder / name).is_file() for name in ("transforms_train.json", "transforms.json")):
                scene = _scene(folder)
                if scene.name in found:
                    raise InputError(
                        f"--data {root} holds two scenes of the name {scene.name} ({found[scene.name].path} and {folder}):"
                        " rename one of them."
                    )
                found[scene.name] = scene
            elif (folder / "poses_bounds.npy").is_file():
                without.append(folder)
            else:
                deeper += [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        level = deeper
    if not found:
        hint = f" ({without[0]} has poses_bounds.npy only: make its transforms.json first)" if without else ""
        raise InputError(
            f"--data {root} holds no capture, neither transforms_train.json nor transforms.json within {DEEPEST} folders"
            f"{hint}."
        )
    unknown = sorted(set(names) - set(found))
    if unknown:
        raise InputError(f"--scenes {' '.join(unknown)}: choose from {', '.join(sorted(found))}.")
    order = [*SCENES, "other captures"]
    chosen = [scene for name, scene in found.items() if not names or name in names]
    return sorted(chosen, key=lambda scene: (order.index(scene.group), scene.name))


def _scene(folder: Path) -> Scene:
    # Reduced copies carry their size in the name: lego_400, fern_504.
    name = folder.resolve().name.lower()
    short = name.split("_")[0]
    for group, names in SCENES.items():
        if short in names:
            return Scene(short, folder, group)
    return Scene(name, folder, "other captures")


@dataclass
class Tables:
    """Train a teacher and students on all scenes found, measure them on their test views, and write the papers' four
    tables with our rows beside the published ones. Continues where an earlier call stopped."""

    data: Path
    """Folder of the scenes: NeRF-Synthetic's, LLFF's, or any captures."""
    scenes: tuple[str, ...] = ()
    """Only these; all by default."""
    methods: tuple[str, ...] = ("r2l-lite", "mobile-r2l-lite")
    """Students, as for ns-train."""
    teachers: Path | None = None
    """Folder with a trained run per scene, SCENE/config.yml; without it a small nerfacto is trained for each."""
    teacher_iterations: int = 2500
    """Iterations of the small nerfacto."""
    iterations: int = 3000
    """Iterations of a student."""
    minutes: float | None = None
    """Minutes to train each student, instead of iterations."""
    num_views: int = 150
    """Teacher views in the ring."""
    scale: float | None = None
    """Resolution, as a share of the captures'; by default 1 on a GPU and 0.25 on a CPU."""
    test_views: int = 25
    """At most this many test views a scene, evenly spaced; they are used for nothing but the final figures."""
    engine: EngineOption = "torch"
    """Engine that runs the network while frames are timed."""
    output_dir: Path = Path("outputs/tables")
    """Folder of runs and of each scene's figures."""
    results_dir: Path = RESULTS
    """Folder of tables.json and tables.md."""
    changes: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=dict)
    """Changes of the students' configurations, by dotted name."""
    teacher_changes: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=dict)
    """Changes of the teachers' configurations, by dotted name."""

    def main(self) -> None:
        """Measure what is missing, and write the tables after each scene.

        Raises:
            InputError: for scenes or methods that do not exist, or in the end if a scene failed.
        """
        from nerfstudio.configs.method_configs import all_methods

        from r2l_nerfstudio.distillation.trainer import DistillationTrainerConfig

        students = [name for name, config in all_methods.items() if isinstance(config, DistillationTrainerConfig)]
        unknown = [method for method in self.methods if method not in students]
        if unknown or not self.methods:
            raise InputError(f"--methods {' '.join(unknown)}: choose from {', '.join(students)}.")
        if self.scale is None:
            self.scale = 1.0 if torch.cuda.is_available() else CPU_SCALE
        if not 0 < self.scale <= 1:
            raise InputError(f"--scale must be above 0 and at most 1 (got {self.scale:g}).")
        scenes = find_scenes(self.data, self.scenes)
        failed, figures = [], []
        for number, scene in enumerate(scenes, start=1):
            CONSOLE.print(f"Scene {number} of {len(scenes)}: {scene.name} ({scene.group}).", highlight=False)
            for method in self.methods:
                try:
                    figures.append(self.measured(scene, method))
                except (InputError, SystemExit) as error:
                    failed.append(f"{scene.name} with {method}")
                    if isinstance(error, InputError):
                        CONSOLE.print(f"[red]{scene.name}, {method}: {error}", soft_wrap=True)
                if figures:
                    self._write(figures)
        if failed:
            raise InputError(
                f"No figures of {', '.join(failed)} (see above); the tables are written without. Call again to retry."
            )
        CONSOLE.print(f"Written: {self.results_dir / 'tables.md'} and .json.", soft_wrap=True)

    def settings(self, scene: Scene, method: str) -> dict[str, Any]:
        """What a scene's figures depend on: equal settings are not measured again."""
        return {
            "scene": scene.name,
            "capture": str(scene.path.absolute()),
            "method": method,
            "teacher": "given" if self.teachers else f"shrunk nerfacto, {self.teacher_iterations} iterations",
            "budget": f"{self.minutes:g} min" if self.minutes else f"{self.iterations} iterations",
            "num_views": self.num_views,
            "scale": self.scale,
            "test_views": self.test_views,
            "engine": self.engine,
            "device": device_name(_device()),
            "changes": {name: repr(value) for name, value in {**self.changes, **self.teacher_changes}.items()},
        }

    def measured(self, scene: Scene, method: str) -> dict[str, Any]:
        """Return the figures of one scene and method: those of an earlier call with these settings, or measured now.

        Raises:
            InputError: if the scene or its teacher cannot be used.
            SystemExit: if a training ends so.
        """
        settings = self.settings(scene, method)
        file = self.output_dir / "figures" / f"{scene.name}_{method}.json"
        kept = _read(file)
        if kept is not None and kept.get("settings") == settings:
            CONSOLE.print(f"  {method}: measured before ({file}).", highlight=False, soft_wrap=True)
            return kept
        teacher = self._teacher(scene)
        started = time.perf_counter()
        run = self._student(scene, method, teacher)
        minutes = (time.perf_counter() - started) / 60
        figures = {
            "settings": settings,
            "group": scene.group,
            "student_minutes": round(minutes, 2),
            **measure(run, teacher, self.test_views, self.engine),
        }
        write_atomically(file, json.dumps(figures, indent=2) + "\n")
        return figures

    def _teacher(self, scene: Scene) -> Path:
        if self.teachers is not None:
            run = self.teachers / scene.name / "config.yml"
            if not run.is_file():
                raise InputError(
                    f"--teachers {self.teachers} holds no {scene.name}/config.yml: train that teacher first."
                )
            _check_split(scene, run)
            return run
        from r2l_nerfstudio.lpips import without_lpips
        from r2l_nerfstudio.scripts.small_nerfacto import small_nerfacto

        config = small_nerfacto(
            scene.dataparser(),
            self.output_dir,
            self.teacher_iterations,
            (2.0, 6.0) if scene.is_blender else None,
            self.scale,
        )
        config.experiment_name = scene.name
        config.timestamp = f"scale-{self.scale:g}-{self.teacher_iterations}"
        _change(config, self.teacher_changes)
        run = config.get_base_dir() / "config.yml"
        finished = config.get_checkpoint_dir() / f"step-{config.max_num_iterations - 1:09d}.ckpt"
        if not (run.is_file() and finished.is_file()):
            with without_lpips():
                _train(config)
        return run

    def _student(self, scene: Scene, method: str, teacher: Path) -> Path:
        from nerfstudio.configs.method_configs import all_methods

        config = copy.deepcopy(all_methods[method])
        config.teacher = teacher
        config.output_dir = self.output_dir
        config.experiment_name = scene.name
        config.timestamp = time.strftime("%Y-%m-%d_%H%M%S")
        config.vis = "tensorboard"
        config.viewer.quit_on_train_completion = True
        config.max_num_iterations, config.max_minutes = self.iterations, self.minutes
        config.pipeline.datamanager.num_views = self.num_views
        _change(config, self.changes)
        _train(config)
        return config.get_base_dir() / "config.yml"

    def _write(self, figures: list[dict[str, Any]]) -> None:
        # Where the captures lie on this machine is nobody else's concern.
        public = [
            {
                **one,
                "settings": {
                    name: Path(value).name if name == "capture" else value for name, value in one["settings"].items()
                },
            }
            for one in figures
        ]
        write_atomically(self.results_dir / "tables.json", json.dumps(public, indent=2) + "\n")
        write_atomically(self.results_dir / "tables.md", as_tables(figures))


def _check_split(scene: Scene, run: Path) -> None:
    """Refuse a teacher of LLFF with other evaluation views than the published ones: it may have learned from these."""
    from r2l_nerfstudio.run_config import load_run_config

    parser = load_run_config(run).pipeline.datamanager.dataparser
    split = getattr(parser, "eval_mode", None), getattr(parser, "eval_interval", None)
    if scene.group == "LLFF" and not scene.is_blender and split != ("interval", 8):
        raise InputError(
            f"The teacher {run} was not trained without every eighth view, which the papers evaluate on: train it with"
            " nerfstudio-data --eval-mode interval --eval-interval 8."
        )


def measure(run: Path, teacher_run: Path, test_views: int, engine: EngineOption) -> dict[str, Any]:
    """Return the figures of a trained student and its teacher on the capture's test views.

    Args:
        run: the student's config.yml.
        teacher_run: its teacher's.
        test_views: at most this many, evenly spaced.
        engine: engine that runs the student's network.
    """
    from nerfstudio.utils.eval_utils import eval_setup

    from r2l_nerfstudio.models.metrics import image_metrics, mean_metrics
    from r2l_nerfstudio.teacher import Teacher

    def use_engine(config: Any) -> Any:
        config.pipeline.model.engine = engine
        return config

    config, pipeline, checkpoint, step = eval_setup(run, test_mode="test", update_config_callback=use_engine)
    model, dataset = pipeline.model, pipeline.datamanager.eval_dataset
    teacher = Teacher.load(teacher_run, device=model.device, data=config.pipeline.datamanager.data)
    views: dict[str, Callable] = {
        "student": lambda camera: model.render_camera(camera)["rgb"],
        "teacher": lambda camera: teacher.view(camera).rgb,
    }
    chosen = torch.linspace(0, len(dataset) - 1, min(test_views, len(dataset))).round().long().tolist()
    scores: dict[str, list[dict[str, float]]] = {who: [] for who in views}
    seconds: dict[str, list[float]] = {who: [] for who in views}
    for who, view in views.items():
        for index in [chosen[0]] * WARM_UP_VIEWS:
            view(dataset.cameras[index : index + 1].to(model.device))
        for index in chosen:
            camera = dataset.cameras[index : index + 1].to(model.device)
            started = time.perf_counter()
            rgb = view(camera)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[who].append(time.perf_counter() - started)
            truth = model.blend(dataset.get_data(index)["image"].to(model.device))
            scores[who].append(image_metrics(rgb, truth, networks=("vgg", "alex")))
    camera = dataset.cameras[chosen[0]]
    numbers = stored_numbers(model)
    return {
        "width": int(camera.width),
        "height": int(camera.height),
        "test_views": f"{len(chosen)} of {len(dataset)}",
        "step": int(step),
        "teacher_method": teacher.config.method_name,
        **{who: _rounded(mean_metrics(values)) for who, values in scores.items()},
        **{f"{who}_milliseconds": round(1000 * median(values), 3) for who, values in seconds.items()},
        "megabytes_fp16": round(2 * numbers / 1e6, 3),
        "teacher_megabytes": round(teacher.checkpoint.stat().st_size / 1e6, 1),
        "checkpoint_megabytes": round(checkpoint.stat().st_size / 1e6, 1),
        "mflop_per_pixel": round(flop_per_pixel(model) / 1e6, 4),
    }


def stored_numbers(model: Any) -> int:
    """Numbers of a student as it is exported: its network with BatchNorm folded, and its feature volume."""
    from r2l_nerfstudio.engines.weights import FixedNetwork

    network = sum(parameter.numel() for parameter in FixedNetwork(model.network, "fp32").parameters())
    inside = {id(parameter) for parameter in model.network.parameters()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside and p is not model.device_indicator_param)
    return network + rest


def flop_per_pixel(model: Any) -> float:
    """Floating-point operations of the network for one pixel, a multiply-add counted as two."""
    network = model.network
    if hasattr(network, "flops_per_cell"):
        return network.flops_per_cell / network.factor**2
    return network.flops_per_ray


# Markdown.


@dataclass
class Row:
    """Return means over the scenes of one set for one method."""

    group: Group
    method: str
    figures: list[dict[str, Any]]

    def mean(self, *keys: str) -> float | None:
        """Of a figure by its path; None where a scene lacks it."""
        values = []
        for figures in self.figures:
            value: Any = figures
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if value is None:
                return None
            values.append(value)
        return math.fsum(values) / len(values)

    @property
    def settings(self) -> dict[str, Any]:
        return self.figures[0]["settings"]

    @property
    def resolution(self) -> str:
        sizes = sorted({f"{figures['width']}x{figures['height']}" for figures in self.figures})
        return ", ".join(sizes)

    @property
    def scenes(self) -> str:
        """Which scenes, unless they are all of the set."""
        names = [figures["settings"]["scene"] for figures in self.figures]
        if self.group in SCENES and sorted(names) == sorted(SCENES[self.group]):
            return "all 8"
        return ", ".join(names)

    @property
    def is_reduced(self) -> bool:
        """Whether it was measured below the published resolution."""
        full = FULL_SIZE.get(self.group)
        sizes = [(figures["width"], figures["height"]) for figures in self.figures]
        return self.settings["scale"] < 1 or (full is not None and any(size != full for size in sizes))


def rows_of(figures: list[dict[str, Any]]) -> list[Row]:
    """Return figures by set and method, in order of appearance."""
    rows: dict[tuple[Group, str], Row] = {}
    for one in figures:
        key = (one["group"], one["settings"]["method"])
        rows.setdefault(key, Row(*key, [])).figures.append(one)
    return list(rows.values())


def as_tables(figures: list[dict[str, Any]]) -> str:
    """Return the four tables in Markdown, with footnotes."""
    rows = rows_of(figures)
    parts = ["# Published and measured figures", ""]
    reduced = [row for row in rows if row.is_reduced]
    if reduced:
        devices = sorted({row.settings["device"] for row in reduced})
        parts += [
            f"**Reduced scale.** Our rows marked (reduced) were measured on {', '.join(devices)} at less than the published"
            " resolution and with short trainings: they do not compare with the published rows, only with each other.",
            "",
        ]
    parts += ["## Quality", "", *_quality(rows), "", "## Storage", "", *_storage(rows), "", "## Latency", ""]
    parts += [*_latency(rows), "", "## Speed, PSNR and size", "", *_trade_off(rows), "", "## Notes", ""]
    parts += [f"{number}. {note}" for number, note in enumerate(FOOTNOTES, start=1)]
    return "\n".join(parts) + "\n"


def _name(row: Row) -> str:
    return f"**{row.method}**{' (reduced)' if row.is_reduced else ''}"


def _conditions(row: Row) -> str:
    settings = row.settings
    conditions = f"teacher: {settings['teacher']}; budget: {settings['budget']}; {settings['device']}"
    return f"{row.scenes} at {row.resolution}; {conditions}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _quality(rows: list[Row]) -> list[str]:
    lines = [
        "| set | method | PSNR (dB) | SSIM | LPIPS (VGG) | LPIPS (Alex) | source, or scenes and conditions |",
        "|---|---|---|---|---|---|---|",
    ]
    for group, values in (("NeRF-Synthetic", "synthetic"), ("LLFF", "llff")):
        for published in QUALITY:
            psnr, ssim, lpips = getattr(published, values)
            lines.append(
                f"| {group} | {published.method} | {_number(psnr, 2)} | {_number(ssim, 3)} | {_number(lpips, 3)} | –"
                f" | {published.source} |"
            )
        lines += _measured_quality([row for row in rows if row.group == group])
    return lines + _measured_quality([row for row in rows if row.group not in SCENES])


def _measured_quality(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        for who, name in (("student", _name(row)), ("teacher", f"teacher of {_name(row)}")):
            digits = {"psnr": 2, "ssim": 3, "lpips_vgg": 3, "lpips": 3}
            values = " | ".join(_number(row.mean(who, key), places) for key, places in digits.items())
            lines.append(f"| {row.group} | {name} | {values} | {_conditions(row)} |")
    return lines


def _storage(rows: list[Row]) -> list[str]:
    lines = ["| method | NeRF-Synthetic (MB) | LLFF (MB) | what | source |", "|---|---|---|---|---|"]
    for method, source, synthetic, llff in STORAGE:
        lines.append(f"| {method} | {synthetic:.1f} | {llff:.1f} | files of a scene | {source} |")
    for method in dict.fromkeys(row.method for row in rows):
        sizes = {row.group: row.mean("megabytes_fp16") for row in rows if row.method == method}
        synthetic, llff = (_number(sizes.get(group), 2) for group in SCENES)
        other = sizes.get("other captures")
        more = f"; {other:.2f} MB on other captures" if other is not None else ""
        lines.append(f"| **{method}** | {synthetic} | {llff} | weights in half precision{more} | measured |")
    return lines


def _latency(rows: list[Row]) -> list[str]:
    lines = ["| method | device | NeRF-Synthetic (ms) | LLFF (ms) | resolution | source |", "|---|---|---|---|---|---|"]
    for method, source, device, synthetic, llff in LATENCY:
        lines.append(f"| {method} | {device} | {synthetic:.2f} | {llff:.2f} | 800x800, 1008x756 | {source} |")
    for row in rows:
        columns = ["–", "–"]
        value = _number(row.mean("student_milliseconds"), 1)
        if row.group in SCENES:
            columns[list(SCENES).index(row.group)] = value
        what = row.resolution if row.group in SCENES else f"{row.resolution}: {value} ms ({row.scenes})"
        engine = row.settings["engine"]
        lines.append(
            f"| {_name(row)} | {row.settings['device']}, engine {engine} | {columns[0]} | {columns[1]} | {what} | measured |"
        )
    return lines


def _trade_off(rows: list[Row]) -> list[str]:
    lines = [
        "| set | method | MFLOP per pixel | PSNR (dB) | against its teacher (dB) | MB | ms per frame | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = TRADE_OFF[0][3]
    for method, source, flop, psnr, size in TRADE_OFF:
        gain = f"{psnr - base:+.2f}" if method != TRADE_OFF[0][0] else "–"
        lines.append(
            f"| NeRF-Synthetic, 400x400 | {method} | {flop:g} | {psnr:.2f} | {gain} | {size:g} | – | {source} |"
        )
    for row in rows:
        student, teacher = row.mean("student", "psnr"), row.mean("teacher", "psnr")
        lines.append(
            f"| {row.group}, {row.resolution} | {_name(row)} | {_number(row.mean('mflop_per_pixel'), 3)} |"
            f" {_number(student, 2)} | {student - teacher:+.2f} | {_number(row.mean('megabytes_fp16'), 2)} |"
            f" {_number(row.mean('student_milliseconds'), 1)} (teacher {_number(row.mean('teacher_milliseconds'), 1)}) |"
            f" measured: {row.scenes} |"
        )
    return lines


# Files and trainings.


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _change(config: Any, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        *parents, last = name.split(".")
        holder = config
        for parent in parents:
            holder = getattr(holder, parent)
        if last not in {item.name for item in dataclasses.fields(holder)}:
            raise InputError(f"A configuration of {config.method_name} has no {name}.")
        setattr(holder, last, value)


def _train(config: Any) -> None:
    from nerfstudio.scripts.train import main
    from nerfstudio.utils import writer

    try:
        main(config)
    finally:
        # Nerfstudio's writers are global, and would log the next training into this run too.
        writer.EVENT_WRITERS.clear()
        writer.EVENT_STORAGE.clear()
        writer.GLOBAL_BUFFER.clear()
