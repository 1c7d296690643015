"""A student as a static web page: one folder for any file server."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
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
from r2l_nerfstudio.export.navigation import start_pose, view_limits
from r2l_nerfstudio.export.onnx_file import require_onnx
from r2l_nerfstudio.export.web_graph import WebGraph, write_web_graph
from r2l_nerfstudio.export.web_precision import Photos, PrecisionChoice, choose_weights
from r2l_nerfstudio.export.web_runtime import FILES, describe_runtime
from r2l_nerfstudio.export.web_weights import WebWeights, encoding_description, require_safetensors
from r2l_nerfstudio.models.r2l import R2LModel
from r2l_nerfstudio.psnr import psnr
from r2l_nerfstudio.rays.ray_image import ray_image_intrinsics, ray_image_size
from r2l_nerfstudio.student import Student

PAGE = (
    "README.txt",
    "index.html",
    "page.css",
    "light-field.js",
    "light-field.d.ts",
    "style.js",
    "input.js",
    "rigs.js",
    "pace.js",
    "scene.js",
    "fetching.js",
    "weights.js",
    "layers.js",
    "wgsl.js",
    "kernel.js",
    "renderer.js",
    "gpu.js",
    "fallback.js",
    "rays.js",
    "worker.js",
)
UNREAD = ("README.txt", "light-field.d.ts", "package.json", "worker.js")
"""Files that a browser with WebGPU does not load."""
LICENSE = "LICENSE.onnxruntime-web.txt"
SCENE = "scene.json"
VERSION = 2
"""Version of scene.json; a page only reads its own."""
RUNTIME = "ort"
FALLBACK = "student.onnx"
LARGEST = 1280
"""Longer side in pixels of the page's frames, if the student renders at any size."""
POSTER = 720
NEEDED_DB = 50.0
"""Least PSNR in dB of a page's pixels against PyTorch; rounding to 8 bits leaves 59 dB."""
PROBE_CELLS = 5
_COMMENT = re.compile(r"^[ \t]*(?://.*|/\*\*(?:(?!\*/)[\s\S])*\*/)[ \t]*\n", re.MULTILINE)


@dataclass(frozen=True)
class PageOptions:
    """What a page is called, and how its weights are stored."""

    title: str
    precision: PrecisionChoice = "fp16"
    """Precision of the weights; auto: int8 if it costs little."""
    photos: Photos = ()
    """Held-out cameras and photos to judge int8 by; if empty, it is judged by the student's own renders."""


@dataclass(frozen=True)
class WebExport:
    """A finished export."""

    folder: Path
    psnr: dict[str, float]
    """PSNR in dB against PyTorch, by model file."""
    notes: tuple[str, ...] = ()
    """Reasons for the precision of the weights, as sentences."""

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes of each file, by its path in the folder."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}

    @property
    def visitor_bytes(self) -> int:
        """Bytes that a browser with WebGPU loads."""
        unread = (*UNREAD, FALLBACK)
        return sum(size for name, size in self.bytes.items() if "/" not in name and name not in unread)


def export_web(
    student: Student,
    cameras: CaptureCameras,
    runtime: Path | None,
    output: Path,
    options: PageOptions,
    overwrite: bool = False,
) -> WebExport:
    """Write a folder with page, student, scene, and the fallback for browsers without WebGPU.

    Args:
        student: on the CPU.
        cameras: its training cameras, in its frame.
        runtime: folder with the files of ONNX Runtime Web; None leaves the fallback out.
        output: the folder to write; missing parents are created.
        options: title and precision.
        overwrite: whether an existing export may be replaced.

    Raises:
        InputError: if packages are missing, the folder is not empty, int8 is requested and costs too much, or the page's
            student differs from torch; nothing is written then.
    """
    require_safetensors()
    if runtime is not None:
        require_onnx()
    with atomic_folder(output, overwrite, SCENE, "web export") as folder:
        found, notes = _fill(student, cameras, runtime, folder, options)
    return WebExport(Path(output), found, notes)


def _fill(
    student: Student,
    cameras: CaptureCameras,
    runtime: Path | None,
    folder: Path,
    options: PageOptions,
) -> tuple[dict[str, float], tuple[str, ...]]:
    with as_file(files("r2l_nerfstudio.export") / "web") as page:
        for name in PAGE:
            text = (page / name).read_text(encoding="utf-8")
            (folder / name).write_text(without_comments(text) if name.endswith(".js") else text, encoding="utf-8")
        if runtime is not None:
            (folder / RUNTIME).mkdir()
            shutil.copyfile(page / LICENSE, folder / RUNTIME / LICENSE)
    encoding = student.model.ray_encoding
    view = view_limits(cameras, encoding.spacing == "sphere", float(encoding.radius))
    picture = _picture(student, cameras)
    pose = start_pose(view)
    weights, notes = choose_weights(student, cameras, options.photos, options.precision)
    file = folder / f"student.{weights.precision}.safetensors"
    weights.write(file)
    found = {file.name: _check_weights(student, weights, pose, picture)}
    model = student.model
    scene: dict[str, Any] = {
        "version": VERSION,
        "title": options.title,
        "method": student.method_name,
        "background": model.background.tolist(),
        "picture": picture,
        "poster": "poster.jpg",
        "view": view,
        "sphere": {"center": encoding.center.tolist(), "radius": float(encoding.radius)}
        if encoding.spacing == "sphere"
        else None,
        "student": {
            "weights": {**_described(file), "precision": weights.precision},
            "rays": {"planar": encoding.conventions.is_planar, "offset": encoding.conventions.pixel_offset},
            "factor": model.factor,
            "margin": model.margin,
            "outputs": model.out_dim,
            "encoding": encoding_description(model),
            "network": weights.describe(),
        },
        "probe": _probe(student, weights, pose, picture),
        "fallback": None,
    }
    if runtime is not None:
        for name in FILES:
            shutil.copyfile(runtime / name, folder / RUNTIME / name)
        write_web_graph(student, "fp32", folder / FALLBACK)
        found[FALLBACK] = _check_model(student, folder / FALLBACK, pose, picture)
        scene["fallback"] = {
            "model": _described(folder / FALLBACK),
            "raysPerCell": model.rays_per_cell,
            "runtime": describe_runtime(RUNTIME, runtime),
        }
    (folder / SCENE).write_text(json.dumps(scene, separators=(",", ":")) + "\n")
    _poster(student, pose, picture).save(folder / "poster.jpg", quality=85)
    (folder / "package.json").write_text(json.dumps(_package(options.title), indent=2) + "\n")
    return found, notes


def without_comments(script: str) -> str:
    """Return a script, its shaders included, without the comments that have lines of their own: no visitor reads them."""
    return _COMMENT.sub("", script)


def _package(title: str) -> dict[str, Any]:
    """Return the folder's npm package.json: importing it defines `<light-field>`, which without `src` shows this scene."""
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "light-field"
    return {
        "name": name,
        "version": "1.0.0",
        "description": f"{title}: a neural light field, as the element <light-field>",
        "type": "module",
        "exports": {".": {"types": "./light-field.d.ts", "default": "./light-field.js"}, "./*": "./*"},
        "types": "./light-field.d.ts",
        "sideEffects": ["./light-field.js"],
        "files": ["*"],
    }


def _described(file: Path) -> dict[str, Any]:
    """Return a file's entry in scene.json."""
    content = file.read_bytes()
    return {"file": file.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _check_weights(student: Student, weights: WebWeights, pose: Float[Tensor, "3 4"], picture: dict[str, Any]) -> float:
    """PSNR in dB of the student with the file's weights against the student, at the start.

    Raises:
        InputError: it is too low for fp16; that of int8 was judged before.
    """
    camera = _small_camera(student, picture)
    truth = drawn_rgb(student, pose, *camera)
    with weights.drawing():
        found = psnr(drawn_rgb(student, pose, *camera), truth)
    if weights.precision == "fp16" and not found >= NEEDED_DB:
        raise InputError(
            f"The student's weights do not fit half precision ({found:.0f} dB against torch, and {NEEDED_DB:.0f} dB are"
            " needed): nothing was written. Train it with a smaller learning rate, or export it with r2l-export onnx"
            " --precision fp32."
        )
    return found


def _small_camera(student: Student, picture: dict[str, Any]) -> tuple[float, int, int]:
    """Return focal length, width and height of the page's frame; smaller for students of single rays."""
    share = 1.0
    if not student.model.reads_ray_image:
        # Fewer rays are enough.
        share = min(1.0, 200 / max(picture["width"], picture["height"]))
    return picture["focal"] * share, round(picture["width"] * share), round(picture["height"] * share)


@torch.no_grad()
def drawn_rgb(
    student: Student, pose: Float[Tensor, "3 4"], focal: float, width: int, height: int
) -> Float[Tensor, "height width 3"]:
    """Render as the page does: one ray per pixel, where `Student.render` averages several in coarse images."""
    model = student.model
    intrinsics = torch.tensor([focal, focal, width / 2, height / 2])
    if not isinstance(model, R2LModel):
        return torch.from_numpy(student.render(pose.numpy(), intrinsics.numpy(), width, height))
    rays = model.ray_encoding.image_rays(pose, intrinsics, height, width)
    rgb = model.render_rays(*rays)[..., :3]
    return torch.where(model.ray_encoding.misses_scene(*rays), model.background, rgb)


def _picture(student: Student, cameras: CaptureCameras) -> dict[str, Any]:
    """Return width, height and focal length in pixels of the student's native image."""
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
    """Return the origin and directions that the page computes for a frame."""
    width, height, focal = picture["width"], picture["height"], picture["focal"]
    intrinsics = torch.tensor([focal, focal, width / 2, height / 2])
    if graph.reads_ray_image:
        size = ray_image_size(height, width, graph.factor, graph.margin)
        height, width = (count * graph.rays_per_cell for count in size)
        intrinsics = ray_image_intrinsics(intrinsics, graph.factor, None, graph.rays_per_cell, graph.margin)
    origins, directions = graph.encoded_network.encoding.ray_encoding.image_rays(pose, intrinsics, height, width)
    return origins[0, 0], directions


def _check_model(student: Student, file: Path, pose: Float[Tensor, "3 4"], picture: dict[str, Any]) -> float:
    """PSNR in dB of the fallback's pixels against torch's, at the start.

    Raises:
        InputError: it is too low.
    """
    import onnxruntime

    focal, width, height = _small_camera(student, picture)
    origin, directions = page_rays(WebGraph(student, "fp32"), pose, {"width": width, "height": height, "focal": focal})
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (pixels,) = session.run(None, {"origin": origin.numpy(), "directions": directions.numpy()})
    rgb = torch.from_numpy(to_rgb(np.asarray(pixels))[:height, :width]).float() / 255
    intrinsics = torch.tensor([focal, focal, width / 2, height / 2])
    # The page itself paints the background where rays pass by the scene.
    encoding = student.model.ray_encoding
    rays = encoding.image_rays(pose, intrinsics, height, width)
    missed = encoding.misses_scene(*rays)
    truth = drawn_rgb(student, pose, focal, width, height)
    found = psnr(torch.where(missed, student.model.background, rgb), truth)
    if not found >= NEEDED_DB:
        raise InputError(
            f"The page's fallback differs from PyTorch ({found:.0f} dB, and {NEEDED_DB:.0f} dB are needed):"
            " nothing was written. A network trained with very large weights may not fit half precision; export it with"
            " r2l-export onnx --precision fp32."
        )
    return found


def to_rgb(pixels: Int[np.ndarray, "height width"]) -> Int[np.ndarray, "height width 3"]:
    """Bytes of the page's pixels, without the fourth."""
    return np.ascontiguousarray(pixels.astype("<i4")).view(np.uint8).reshape(*pixels.shape, 4)[..., :3]


@torch.no_grad()
def _probe(
    student: Student, weights: WebWeights, pose: Float[Tensor, "3 4"], picture: dict[str, Any]
) -> dict[str, Any]:
    """Return a camera and the student's pixels for it, with which a browser checks its own rendering."""
    if student.model.reads_ray_image:
        side, focal = student.model.factor * PROBE_CELLS, picture["focal"]
    else:
        side, focal = PROBE_CELLS, picture["focal"] / max(1, picture["width"] // (2 * PROBE_CELLS))
    with weights.drawing():
        rgb = drawn_rgb(student, pose, focal, side, side)
    pixels = (rgb.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return {
        "position": pose[:, 3].tolist(),
        "axes": pose[:, :3].T.tolist(),
        "side": side,
        "focal": focal,
        "pixels": base64.b64encode(pixels.tobytes()).decode(),
    }


def _poster(student: Student, pose: Float[Tensor, "3 4"], picture: dict[str, Any]) -> Image.Image:
    scale = min(1.0, POSTER / max(picture["width"], picture["height"]))
    width, height = math.ceil(picture["width"] * scale), math.ceil(picture["height"] * scale)
    focal = picture["focal"] * scale
    rgb = np.asarray(student.render(pose.numpy(), [focal, focal, width / 2, height / 2], width, height))
    return Image.fromarray((rgb.clip(0, 1) * 255).round().astype(np.uint8))
