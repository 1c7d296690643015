"""A student as a static web page: one folder for any file server."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from r2l_nerfstudio.atomic_output import atomic_folder
from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.export.graph import GraphPrecision
from r2l_nerfstudio.export.navigation import start_pose, view_limits
from r2l_nerfstudio.export.onnx_file import require_onnx
from r2l_nerfstudio.export.web_graph import WebGraph, write_web_graph
from r2l_nerfstudio.export.web_runtime import BACKENDS, describe_runtime
from r2l_nerfstudio.psnr import psnr
from r2l_nerfstudio.rays.ray_image import ray_image_intrinsics, ray_image_size
from r2l_nerfstudio.student import Student

PAGE = (
    "README.txt",
    "index.html",
    "style.css",
    "main.js",
    "hands.js",
    "rigs.js",
    "pace.js",
    "rays.js",
    "scene.js",
    "fetching.js",
    "worker.js",
)
LICENSE = "LICENSE.onnxruntime-web.txt"
SCENE = "scene.json"
RUNTIME = "ort"
LARGEST = 1280
"""Longer side in pixels of the page's pictures, where the student draws at any size."""
POSTER = 720
NEEDED_DB = 50.0
"""Least PSNR against torch of a page's pixels; rounding to 8 bits leaves 59 dB."""
PROBE_CELLS = 5


@dataclass(frozen=True)
class WebExport:
    """A finished folder."""

    folder: Path
    psnr: dict[str, float]
    """In dB against torch, by model file."""

    @property
    def bytes(self) -> dict[str, int]:
        """Of each file, by its path in the folder."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}


def export_web(
    student: Student, cameras: CaptureCameras, runtime: Path, output: Path, title: str, overwrite: bool = False
) -> WebExport:
    """Write the folder: page, runtime, student, scene.

    Args:
        student: on the CPU.
        cameras: of its training, in its frame.
        runtime: folder with the runtime's files.
        output: the folder to make; its parent is made too.
        title: of the page.
        overwrite: whether an export that is there may be replaced.

    Raises:
        InputError: packages are missing, the folder holds something, or the page's student differs from torch; nothing is
            left then.
    """
    require_onnx()
    with atomic_folder(output, overwrite, SCENE, "web export") as folder:
        found = _fill(student, cameras, runtime, folder, title)
    return WebExport(Path(output), found)


def _fill(student: Student, cameras: CaptureCameras, runtime: Path, folder: Path, title: str) -> dict[str, float]:
    with as_file(files("r2l_nerfstudio.export") / "web") as page:
        for name in PAGE:
            shutil.copyfile(page / name, folder / name)
        (folder / RUNTIME).mkdir()
        shutil.copyfile(page / LICENSE, folder / RUNTIME / LICENSE)
    for names in BACKENDS.values():
        for name in names:
            shutil.copyfile(runtime / name, folder / RUNTIME / name)
    code = student.model.ray_code
    view = view_limits(cameras, code.spacing == "sphere", float(code.radius))
    picture = _picture(student, cameras)
    pose = start_pose(view)
    models, found = {}, {}
    for precision in ("fp16", "fp32"):
        file = folder / f"student.{precision}.onnx"
        write_web_graph(student, precision, file)
        found[file.name] = _check_model(student, precision, file, pose, picture)
        content = file.read_bytes()
        models[precision] = {"file": file.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    graph = WebGraph(student, "fp32").eval()
    scene = {
        "title": title,
        "method": student.method_name,
        "background": student.model.background.tolist(),
        "factor": graph.factor,
        "margin": graph.margin,
        "rays": {"planar": code.conventions.is_planar, "offset": code.conventions.pixel_offset},
        "raysPerCell": graph.rays_per_cell,
        "sphere": {"center": code.center.tolist(), "radius": float(code.radius)} if code.spacing == "sphere" else None,
        "picture": picture,
        "models": models,
        "runtime": describe_runtime(RUNTIME, runtime),
        "view": view,
        "probe": _probe(graph, pose, picture),
    }
    (folder / SCENE).write_text(json.dumps(scene, indent=1) + "\n")
    _poster(student, pose, picture).save(folder / "poster.jpg", quality=85)
    return found


def _picture(student: Student, cameras: CaptureCameras) -> dict[str, Any]:
    """Width, height and focal length in pixels of what the student draws by itself."""
    focal = float(cameras.intrinsics[:, :2].mean())
    if student.model.reads_ray_image:
        scale = student.model.native_focal(focal) / focal
    else:
        scale = min(1.0, LARGEST / max(cameras.width, cameras.height))
    return {
        "width": max(1, round(cameras.width * scale)),
        "height": max(1, round(cameras.height * scale)),
        "focal": focal * scale,
    }


def page_rays(
    graph: WebGraph, pose: Float[Tensor, "3 4"], picture: dict[str, Any]
) -> tuple[Float[Tensor, "3"], Float[Tensor, "rows columns 3"]]:
    """Origin and directions as the page makes them for a picture."""
    width, height, focal = picture["width"], picture["height"], picture["focal"]
    intrinsics = torch.tensor([focal, focal, width / 2, height / 2])
    if graph.reads_ray_image:
        size = ray_image_size(height, width, graph.factor, graph.margin)
        height, width = (count * graph.rays_per_cell for count in size)
        intrinsics = ray_image_intrinsics(intrinsics, graph.factor, None, graph.rays_per_cell, graph.margin)
    origins, directions = graph.encoded_network.encoding.ray_code.image_rays(pose, intrinsics, height, width)
    return origins[0, 0], directions


def _check_model(
    student: Student, precision: GraphPrecision, file: Path, pose: Float[Tensor, "3 4"], picture: dict[str, Any]
) -> float:
    """PSNR in dB of a model file's pixels against torch's, at the start.

    Raises:
        InputError: it is too low.
    """
    import onnxruntime

    # R2L's graph goes through a picture in parts on the page; here a smaller one tells as much.
    share = 1.0 if student.model.reads_ray_image else min(1.0, 200 / max(picture["width"], picture["height"]))
    width, height, focal = round(picture["width"] * share), round(picture["height"] * share), picture["focal"] * share
    origin, directions = page_rays(WebGraph(student, "fp32"), pose, {"width": width, "height": height, "focal": focal})
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (pixels,) = session.run(None, {"origin": origin.numpy(), "directions": directions.numpy()})
    rgb = torch.from_numpy(to_rgb(np.asarray(pixels))[:height, :width]).float() / 255
    intrinsics = torch.tensor([focal, focal, width / 2, height / 2])
    # The page itself paints the background where rays pass by the scene.
    missed = student.model.ray_code.misses_scene(*student.model.ray_code.image_rays(pose, intrinsics, height, width))
    truth = torch.from_numpy(student.render(pose.numpy(), intrinsics.numpy(), width, height))
    found = psnr(torch.where(missed, student.model.background, rgb), truth)
    if not found >= NEEDED_DB:
        raise InputError(
            f"The page's student in {precision} does not draw what torch draws ({found:.0f} dB, and {NEEDED_DB:.0f} dB are"
            " needed): nothing was written. A network trained with very large weights may not fit half precision; export"
            " it with r2l-export onnx --precision fp32."
        )
    return found


def to_rgb(pixels: Int[np.ndarray, "height width"]) -> Int[np.ndarray, "height width 3"]:
    """Bytes of the page's pixels, without the fourth."""
    return np.ascontiguousarray(pixels.astype("<i4")).view(np.uint8).reshape(*pixels.shape, 4)[..., :3]


@torch.no_grad()
def _probe(graph: WebGraph, pose: Float[Tensor, "3 4"], picture: dict[str, Any]) -> dict[str, Any]:
    """A few rays across the picture and their pixels: a browser that gives others does not draw this student."""
    step = graph.factor if graph.reads_ray_image else max(1, picture["width"] // (2 * PROBE_CELLS))
    side = step * PROBE_CELLS
    if graph.reads_ray_image:
        small = {"width": side, "height": side, "focal": picture["focal"]}
    else:
        small = {"width": PROBE_CELLS, "height": PROBE_CELLS, "focal": picture["focal"] / step}
    origin, directions = page_rays(graph, pose, small)
    directions = directions.contiguous()
    rows, columns = directions.shape[:2]
    return {
        "origin": origin.tolist(),
        "rows": rows,
        "columns": columns,
        "directions": [round(value, 7) for value in directions.flatten().tolist()],
        "pixels": graph(origin, directions).flatten().tolist(),
    }


def _poster(student: Student, pose: Float[Tensor, "3 4"], picture: dict[str, Any]) -> Image.Image:
    scale = min(1.0, POSTER / max(picture["width"], picture["height"]))
    width, height = math.ceil(picture["width"] * scale), math.ceil(picture["height"] * scale)
    focal = picture["focal"] * scale
    rgb = np.asarray(student.render(pose.numpy(), [focal, focal, width / 2, height / 2], width, height))
    return Image.fromarray((rgb.clip(0, 1) * 255).round().astype(np.uint8))
