"""Frame times of every engine of this machine for all students, beside the machine's own matrix products, in one
run."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.utils.rich_utils import CONSOLE
from torch import nn

from benchmarks.figures import RESULTS, results_stem, write_figures
from r2l_nerfstudio.engines.cache import EngineCache, device_name
from r2l_nerfstudio.engines.parity import parity
from r2l_nerfstudio.engines.protocol import ENGINE_NAMES, Engine, EngineName, Precision
from r2l_nerfstudio.engines.registry import build_engine, engine_module
from r2l_nerfstudio.engines.weights import weights_hash
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.lpips import without_lpips
from r2l_nerfstudio.models.light_field import LightFieldModel
from r2l_nerfstudio.models.probe_cameras import probe_encoding
from r2l_nerfstudio.rays.occupancy import grid_point_index
from r2l_nerfstudio.rays.ray_image import ray_image_size
from r2l_nerfstudio.rays.spacing import SceneBounds

SIZES = {"r2l": 100, "r2l-lite": 400, "mobile-r2l": 800, "mobile-r2l-lite": 400}
"""Pixels along each side of each method's frame."""
TEACHER_SIDE = 64
"""Pixels along each side of the teacher's frame, whose time is scaled up: a full one takes minutes on a CPU."""
_FIELD_OF_VIEW = 0.6
"""Approximate field of view in radians: image width over focal length."""
_CHUNKS = (2048, 16384)
"""Chunk sizes for matrix products: engines may keep a chunk in a cache."""
_FRAMES = 2
"""Number of engines whose frames are timed: those with the fastest networks; the rest of a frame is the same for
all."""


@dataclass
class Render:
    """Milliseconds of every engine that runs here, only the network and the whole frame with rays and encoding, beside bare
    matrix products of the network's own shapes. Weights are random: they make no difference to the time."""

    methods: tuple[str, ...] = tuple(SIZES)
    """Methods to measure."""
    engines: tuple[EngineName, ...] = ENGINE_NAMES
    """Engines to measure; those that cannot run here are listed with the reason."""
    seconds: float = 20.0
    """Seconds to measure networks for each student, and again frames; the fastest call of all rounds counts."""
    side: int | None = None
    """Pixels along each side of the frame; by default each method's own."""
    teacher: bool = True
    """Time a nerfacto of default size for each student."""
    results_dir: Path = RESULTS
    """Folder of the figures."""
    cache_dir: Path = Path("outputs/benchmark/engines")
    """Folder of compiled networks, for the next run."""

    def main(self) -> None:
        """Measure and write `render_DEVICE.{json,md}`."""
        unknown = set(self.methods) - set(SIZES)
        if unknown:
            raise InputError(f"--methods {', '.join(sorted(unknown))}: choose from {', '.join(SIZES)}.")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = device_name(device)
        figures: dict[str, Any] = {
            "device": name,
            "torch": torch.__version__,
            "weights": "random",
            "students": [],
        }
        stem = results_stem(self.results_dir, "render", name)
        for method in self.methods:
            figures["students"].append(self._student(method, device))
            write_figures(stem, figures, as_markdown(figures))
        CONSOLE.print(as_markdown(figures), markup=False, highlight=False, soft_wrap=True)
        CONSOLE.print(f"Written: {stem}.json, .md")

    @torch.no_grad()
    def _student(self, method: str, device: torch.device) -> dict[str, Any]:
        CONSOLE.print(f"{method} …")
        side = self.side or SIZES[method]
        model, camera = student(method, side, device)
        encoded = frame_encoding(model, camera)
        truth = build_engine("torch", model.network, "fp32", device)
        engines, absent = self._built(model, device)
        calls: dict[str, Callable[[], Any]] = {
            f"network {label}": lambda engine=engine: engine(encoded) for label, engine in engines.items()
        }
        low = torch.float16 if device.type == "cuda" else torch.bfloat16
        bare = {"bare": low, "bare fp32": torch.float32}
        for label, dtype in bare.items():
            for number, call in enumerate(bare_products(model.network, encoded, dtype)):
                calls[f"{label} {number}"] = call
        taken = fastest(calls, self.seconds, device)
        values = truth(encoded)
        runs = {"rays and encoding": lambda read: values[: len(read)]}
        for label in sorted(engines, key=lambda label: taken[f"network {label}"])[:_FRAMES]:
            runs[f"frame {label}"] = engines[label]

        def draw(run: Callable[[torch.Tensor], torch.Tensor]) -> None:
            with model.network_run_by(run):
                model.render_camera(camera)

        frames = {label: lambda run=run: draw(run) for label, run in runs.items()}
        taken |= fastest(frames, self.seconds, device)
        limit = {label: min(ms for call, ms in taken.items() if re.fullmatch(rf"{label} \d", call)) for label in bare}
        rows = []
        probe = probe_encoding(model)
        for label, engine in engines.items():
            network, frame_ms = taken[f"network {label}"], taken.get(f"frame {label}")
            rows.append(
                {
                    "engine": engine.name,
                    "precision": engine.precision,
                    "network_ms": round(network, 2),
                    "share_of_bare_low_precision": round(limit["bare"] / network, 3),
                    "share_of_bare_fp32": round(limit["bare fp32"] / network, 3),
                    "frame_ms": None if frame_ms is None else round(frame_ms, 2),
                    "fps": None if frame_ms is None else round(1e3 / frame_ms, 2),
                    "psnr_db": round(min(parity(engine, model.network, device, probe, model.margin), 999.0), 1),
                }
            )
        rows.sort(key=lambda row: row["network_ms"])
        found = {
            "method": method,
            "frame": f"{side}x{side}",
            "factor": model.factor,
            "parameters": sum(p.numel() for p in model.network.parameters()),
            "evaluated": evaluated(model, encoded, side),
            "gflop": round(flops(model.network, encoded) / 1e9, 2),
            "bare_low_precision": str(low).removeprefix("torch."),
            "bare_low_precision_ms": round(limit["bare"], 2),
            "bare_fp32_ms": round(limit["bare fp32"], 2),
            "rays_and_encoding_ms": round(taken["rays and encoding"], 2),
            "engines": rows,
            "not_run": absent,
        }
        if self.teacher:
            found["nerfacto_frame_ms"] = round(teacher_milliseconds(device) * (side / TEACHER_SIDE) ** 2)
        return found

    def _built(self, model: LightFieldModel, device: torch.device) -> tuple[dict[str, Engine], dict[str, str]]:
        low: Precision = "fp16" if device.type == "cuda" else "bf16"
        engines: dict[str, Engine] = {}
        absent: dict[str, str] = {}
        network = model.network
        cache = EngineCache(self.cache_dir, weights_hash(network), device)
        for name in self.engines:
            for precision in (low, "fp32"):
                reason = engine_module(name).why_not(device, precision)
                if (name, precision) == ("inductor", "fp32"):
                    reason = "not measured: it compiles for half a minute, and is slower than in low precision."
                if reason is not None:
                    absent[f"{name} {precision}"] = reason
                    continue
                try:
                    folder = cache.artifacts(name, engine_module(name).version())
                    engines[f"{name} {precision}"] = build_engine(
                        name, network, precision, device, folder, model.margin
                    )
                except InputError as error:
                    absent[f"{name} {precision}"] = str(error)
        return engines, absent


def student(method: str, side: int, device: torch.device) -> tuple[LightFieldModel, Cameras]:
    """Return a student of a method's size with random weights, and a camera whose frame it renders without
    resampling."""
    from nerfstudio.configs.method_configs import all_methods

    torch.manual_seed(0)
    config = copy.deepcopy(all_methods[method].pipeline.model)
    config.fit_to(side, side)
    config.zero_init = False
    box = SceneBox(aabb=torch.tensor([[-1.0] * 3, [1.0] * 3]))
    model = config.setup(scene_box=box, num_train_data=1).to(device).eval()
    focal = side / _FIELD_OF_VIEW
    bounds = SceneBounds("sphere", (0.0, 0.0, 0.0), 1.0, 2.0, 6.0)
    model.set_scene(bounds, torch.eye(3), torch.ones(3), has_accumulation=True, has_depth=True, focal=focal)
    fill_ball(model)
    pose = torch.eye(4)[None, :3]
    pose[:, 2, 3] = 4.0
    camera = Cameras(pose, focal, focal, side / 2, side / 2, side, side)
    return model, camera.to(device)


@torch.no_grad()
def fill_ball(model: LightFieldModel) -> None:
    """Occupy the surface of a ball of nine tenths of the scene's radius, opaque, with as many features as allowed."""
    encoding = model.composited
    if encoding is None:
        return
    scene = encoding.occupancy.scene
    generator = torch.Generator().manual_seed(0)
    points = 0.9 * torch.nn.functional.normalize(torch.randn(200_000, 3, generator=generator), dim=-1)
    points = points.to(model.device)
    warp = "ball" if encoding.ray_encoding.spacing == "sphere" else "contracted"
    scene.fit(warp, points, points.new_zeros(3), torch.eye(3))
    encoding.occupancy.clear(scene.resolution(scene.cell_of(model.config.occupancy_cells)))
    encoding.occupancy.mark((encoding.occupancy.counts(points) > 0).to(torch.uint8))
    cell = scene.cell_of(4 * model.config.occupancy_cells)
    while int(grid_point_index(encoding.occupancy.cells, scene.resolution(cell)).max()) > model.config.max_grid_points:
        cell *= 1.05
    encoding.lay_out(scene.resolution(cell))
    encoding.volume.rows[1:, 0] = 3.0


def frame_encoding(model: LightFieldModel, camera: Cameras) -> torch.Tensor:
    """Return everything that the network reads for one frame."""
    encoded_rays: list[torch.Tensor] = []

    def record(encoded: torch.Tensor) -> torch.Tensor:
        encoded_rays.append(encoded)
        return model.engines(encoded)

    with model.network_run_by(record):
        model.render_camera(camera)
    # A single one is kept as it lies in memory.
    return torch.cat(encoded_rays) if len(encoded_rays) > 1 else encoded_rays[0]


def products(network: nn.Module, encoded: torch.Tensor) -> list[tuple[int, int, int]]:
    """Rows, inner and outer width of the matrix product that each layer comes down to, for this input."""
    found, scale = [], 1
    rows = encoded.numel() // encoded.shape[1]
    for layer in network.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            inner, outer, *kernel = layer.weight.shape
            found.append((rows * scale**2, inner, outer * kernel[0] * kernel[1]))
            scale *= layer.stride[0]
        elif isinstance(layer, (nn.Linear, nn.Conv2d)):
            outer, inner = layer.weight.shape[:2]
            found.append((rows * scale**2, inner, outer))
    return found


def evaluated(model: LightFieldModel, encoded: torch.Tensor, side: int) -> float:
    """Share of a frame's rays, or cells with their margin, that the network evaluates: those that see the scene."""
    if encoded.ndim == 2:
        return round(len(encoded) / side**2, 3)
    rows, columns = ray_image_size(side, side, model.factor, model.margin)
    return round(encoded[:, 0].numel() / (rows * columns), 3)


def flops(network: nn.Module, encoded: torch.Tensor) -> int:
    """Return the floating-point operations of one frame, a multiply-add counted as two."""
    return sum(2 * rows * inner * outer for rows, inner, outer in products(network, encoded))


def bare_products(network: nn.Module, encoded: torch.Tensor, dtype: torch.dtype) -> list[Callable[[], None]]:
    """`torch.matmul` at the shapes of all layers, one after the other: on all rows at once, and in chunks of rows."""
    shapes = products(network, encoded)
    matrices = {
        shape: (
            torch.rand(shape[0], shape[1], device=encoded.device, dtype=dtype),
            torch.rand(shape[1], shape[2], device=encoded.device, dtype=dtype),
            torch.empty(shape[0], shape[2], device=encoded.device, dtype=dtype),
        )
        for shape in set(shapes)
    }

    def multiply(chunk: int) -> None:
        for shape in shapes:
            rows, weights, out = matrices[shape]
            for start in range(0, shape[0], chunk):
                torch.matmul(rows[start : start + chunk], weights, out=out[start : start + chunk])

    most = max(rows for rows, _, _ in shapes)
    chunks = [chunk for chunk in _CHUNKS if chunk < most] + [most]
    return [lambda chunk=chunk: multiply(chunk) for chunk in chunks]


def fastest(calls: dict[str, Callable[[], Any]], seconds: float, device: torch.device) -> dict[str, float]:
    """Return the minimum milliseconds of each call, all of them in turns, for this many seconds or at least three
    rounds."""

    def finish() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    taken = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < end:
        rounds += 1
        for name, call in calls.items():
            start = finish()
            call()
            taken[name] = min(taken[name], 1e3 * (finish() - start))
    return taken


@torch.no_grad()
def teacher_milliseconds(device: torch.device) -> float:
    """Return the milliseconds of a nerfacto of default size, in PyTorch, for a frame of `TEACHER_SIDE` pixels per
    side."""
    from nerfstudio.models.nerfacto import NerfactoModelConfig

    box = SceneBox(aabb=torch.tensor([[-1.0] * 3, [1.0] * 3]))
    with without_lpips():
        model = NerfactoModelConfig(implementation="torch").setup(scene_box=box, num_train_data=1).to(device).eval()
    pose = torch.eye(4)[None, :3]
    pose[:, 2, 3] = 1.0
    focal = TEACHER_SIDE / _FIELD_OF_VIEW
    camera = Cameras(pose, focal, focal, TEACHER_SIDE / 2, TEACHER_SIDE / 2, TEACHER_SIDE, TEACHER_SIDE).to(device)
    return fastest({"teacher": lambda: model.render_camera(camera)}, 3.0, device)["teacher"]


def as_markdown(figures: dict[str, Any]) -> str:
    """Return the figures as one table per student."""
    lines = [
        f"# Drawing on {figures['device']}",
        "",
        f"`python -m benchmarks render`, torch {figures['torch']}, one run, random weights:"
        " the fastest call of many in turns.",
        "*Network* is only the compiled unit, *frame* all of `get_outputs_for_camera`: rays, encoding, network, depth.",
        "*Bare matmul* is `torch.matmul` at the shapes of the network's layers, in the fastest of several chunk sizes.",
        "",
    ]
    for found in figures["students"]:
        low = {"bfloat16": "bf16", "float16": "fp16"}[found["bare_low_precision"]]
        lines += [
            f"## {found['method']}, {found['frame']} pixels",
            "",
            f"{found['parameters'] / 1e6:.2f} M parameters, {found['gflop']:g} GFLOP a frame, of whose"
            f" {'rays' if found['factor'] == 1 else 'cells'} {found['evaluated']:.0%} see the scene and are evaluated. Bare"
            " matmul:"
            f" {found['bare_low_precision_ms']:g} ms in {low}, {found['bare_fp32_ms']:g} ms in fp32. Rays and encoding:"
            f" {found['rays_and_encoding_ms']:g} ms."
            + (
                f" A nerfacto's frame: {found['nerfacto_frame_ms'] / 1e3:.1f} s (scaled from"
                f" {TEACHER_SIDE}x{TEACHER_SIDE})."
                if "nerfacto_frame_ms" in found
                else ""
            ),
            "",
            f"| engine | network ms | of bare {low} matmul | of bare fp32 matmul | frame ms | fps | PSNR to fp32 |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in found["engines"]:
            agreement = "equal" if row["psnr_db"] == 999.0 else f"{row['psnr_db']:g} dB"
            lines.append(
                f"| {row['engine']} {row['precision']} | {row['network_ms']:g} |"
                f" {row['share_of_bare_low_precision']:.0%} | {row['share_of_bare_fp32']:.0%} |"
                + ("| |" if row["frame_ms"] is None else f" {row['frame_ms']:g} | {row['fps']:g} |")
                + f" {agreement} |"
            )
        lines += ["", *(f"- {name}: {reason}" for name, reason in found["not_run"].items()), ""]
    return "\n".join(lines).rstrip() + "\n"
