"""The published frame of a capture, in which a published network expects its cameras."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from torch import Tensor

from r2l_nerfstudio.capture import CaptureError, parse_capture
from r2l_nerfstudio.dataparsers import without_points
from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras, capture_cameras
from r2l_nerfstudio.errors import InputError, one_line
from r2l_nerfstudio.rays.published import (
    BLENDER_RADIUS,
    Similarity,
    blender_residual,
    fit_similarity,
    from_dataparser,
    llff_frame,
)
from r2l_nerfstudio.run_config import load_run_config

Layout = Literal["blender", "llff"]

BOUNDS_FILE = "poses_bounds.npy"
MOST_RESIDUAL = 0.05
"""Maximum residual: of Blender cameras `blender_residual`; of LLFF cameras the fit's residual, as a share of the
cameras' spread."""
MOST_DEGREES = 3.0
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png")

LLFF_CENTERS = {
    "fern": (-0.85707248, -0.15615284, 29.99040892),
    "flower": (-2.82863346, 6.63070772, 70.20097372),
    "room": (4.1845688, -1.537188, 32.04525597),
    "orchids": (-0.17837235, 0.07818467, 32.35640172),
    "horns": (1.27204619, 1.52593104, 39.45094112),
    "trex": (-0.07751921, 1.63867973, 52.46994463),
    "fortress": (-0.0436502165, -0.00446507414, 22.292642),
    "leaves": (5.40735207, -2.33496984, 136.81563356),
}
"""Origins that the published MobileR2L uses for LLFF's scenes instead of the mean camera, in their files'
coordinates."""


@dataclass(frozen=True)
class CaptureFrame:
    """A capture, and the similarity to the published frame."""

    dataparser: DataParserConfig
    outputs: DataparserOutputs
    """Dataparser outputs of the training split."""
    cameras: CaptureCameras
    """The training cameras in the run's frame."""
    layout: Layout
    similarity: Similarity
    """Similarity from the run's frame to the published one."""
    bounds: tuple[float, float]
    """Nearest and farthest visible distance, in the published frame's unit; 0 for a Blender capture."""
    report: str
    """How well it fits, in words."""


def read_frame(
    data: Path,
    layout: Layout | None = None,
    center: tuple[float, float, float] | None = None,
    teacher: Path | None = None,
) -> CaptureFrame:
    """Read a capture and find the published frame in it.

    Args:
        data: folder of the capture.
        layout: kind of capture; by default `llff` if it has a poses_bounds.npy, else `blender`.
        center: origin of an LLFF capture's frame in the coordinates of its poses_bounds.npy; the mean camera by default.
        teacher: a trained run whose dataparser, and so whose frame, the student adopts.

    Raises:
        InputError: if the capture cannot be read, or does not have the published geometry.
    """
    if layout is not None and layout not in get_args(Layout):
        raise InputError(f"Unknown kind of capture {layout!r}: choose --layout from {', '.join(get_args(Layout))}.")
    data = Path(data)
    if not data.is_dir():
        raise InputError(f"There is no capture at {data}: give the folder of the checkpoint's scene with --data.")
    has_bounds = (data / BOUNDS_FILE).is_file()
    layout = layout or ("llff" if has_bounds else "blender")
    if layout == "llff" and not has_bounds:
        raise InputError(
            f"The capture {data} has no {BOUNDS_FILE}, from which the frame of an LLFF checkpoint is computed: give"
            " the scene as LLFF distributes it, with a transforms.json beside it for Nerfstudio."
        )
    dataparser = _dataparser(data, teacher)
    train = _outputs(dataparser, data, "train")
    cameras = capture_cameras(train.cameras)
    if layout == "blender":
        similarity = from_dataparser(train.dataparser_transform, train.dataparser_scale)
        return _blender(data, dataparser, train, cameras, similarity)
    return _llff(data, dataparser, train, cameras, center)


def _dataparser(data: Path, teacher: Path | None) -> DataParserConfig:
    if teacher is not None:
        parser = getattr(load_run_config(teacher).pipeline.datamanager, "dataparser", None)
        if parser is None:
            raise InputError(f"The run {teacher} was not trained on a capture: give another one with --teacher.")
    elif (data / "transforms_train.json").is_file():
        parser = BlenderDataParserConfig()
    elif (data / "transforms.json").is_file():
        parser = NerfstudioDataParserConfig()
    else:
        raise InputError(
            f"The capture {data} has neither transforms_train.json (Blender) nor transforms.json (Nerfstudio):"
            " convert it with ns-process-data first, or give another folder with --data."
        )
    parser = without_points(parser)
    parser.data = data.absolute()
    return parser


def _outputs(dataparser: DataParserConfig, data: Path, split: str) -> DataparserOutputs:
    try:
        return parse_capture(dataparser, split)
    except CaptureError as error:
        raise InputError(
            f"The capture {data} cannot be read ({one_line(error)}): restore it, or give a complete copy with --data."
        ) from error


def _blender(
    data: Path,
    dataparser: DataParserConfig,
    train: DataparserOutputs,
    cameras: CaptureCameras,
    similarity: Similarity,
) -> CaptureFrame:
    residual = blender_residual(similarity.poses(cameras.camera_to_worlds))
    if not residual <= MOST_RESIDUAL:
        raise InputError(
            f"A published Blender checkpoint cannot have been trained on the capture {data}: its cameras should look"
            f" at the origin from a distance of {BLENDER_RADIUS:g}, and deviate by {residual:.3f} (at most"
            f" {MOST_RESIDUAL:g}). Give the checkpoint's own scene with --data; a forward-facing one needs its"
            f" {BOUNDS_FILE}."
        )
    report = f"Blender frame: the cameras deviate by {residual:.4f} from {BLENDER_RADIUS:g} around the origin"
    return CaptureFrame(dataparser, train, cameras, "blender", similarity, (0.0, 0.0), report)


def _llff(
    data: Path,
    dataparser: DataParserConfig,
    train: DataparserOutputs,
    cameras: CaptureCameras,
    center: tuple[float, float, float] | None,
) -> CaptureFrame:
    poses, bounds = read_poses_bounds(data / BOUNDS_FILE)
    nearest = float(bounds.min())
    to_published = llff_frame(poses, nearest, None if center is None else torch.tensor(center))
    named = _named_poses(dataparser, data, train)
    folder = train.image_filenames[0].parent
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_ENDINGS)
    if len(names) != len(poses):
        raise InputError(
            f"The capture {data} has {len(names)} images in {folder}, but its {BOUNDS_FILE} has {len(poses)} poses:"
            " they correspond in order of name. Restore the missing images, or remove those that do not belong."
        )
    order = [index for index, name in enumerate(names) if name in named]
    if len(order) < 3:
        raise InputError(f"The capture {data} has {len(order)} cameras in common with its {BOUNDS_FILE}; 3 are needed.")
    ours = torch.stack([named[names[index]] for index in order])
    similarity, residual, degrees = fit_similarity(ours, to_published.poses(poses[order]))
    if not (residual <= MOST_RESIDUAL and degrees <= MOST_DEGREES):
        raise InputError(
            f"The cameras of {data} and of its {BOUNDS_FILE} are not from one scene: after the best fit they differ"
            f" by {residual:.3f} of their spread (at most {MOST_RESIDUAL:g}) and {degrees:.1f} degrees (at most"
            f" {MOST_DEGREES:g}). Give the checkpoint's own scene with --data."
        )
    scale = to_published.scale
    report = (
        f"LLFF frame: {len(order)} cameras fit to {residual:.5f} of their spread and {degrees:.2f} degrees (refused above"
        f" {MOST_RESIDUAL:g} and {MOST_DEGREES:g})"
    )
    seen = (scale * nearest, scale * float(bounds.max()))
    return CaptureFrame(dataparser, train, cameras, "llff", similarity, seen, report)


def _named_poses(dataparser: DataParserConfig, data: Path, train: DataparserOutputs) -> dict[str, Tensor]:
    """Return all cameras of a capture by the name of their image; training and evaluation share one frame."""
    found = {}
    for outputs in (train, _outputs(dataparser, data, "val")):
        for path, pose in zip(outputs.image_filenames, outputs.cameras.camera_to_worlds, strict=True):
            found[path.name] = pose
    return found


def read_poses_bounds(path: Path) -> tuple[Float[Tensor, "num 3 4"], Float[Tensor, "num 2"]]:
    """Read poses and depth bounds of an LLFF capture.

    Args:
        path: its poses_bounds.npy: per camera three rows of down, right, backward, center, (height, width, focal); then
            two bounds.

    Returns:
        Camera-to-world matrices with OpenGL axes, and nearest and farthest distance of each, in the file's unit.

    Raises:
        InputError: if it is damaged or of another kind.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error, 200)}): restore it.") from error
    shape = getattr(array, "shape", None)
    if shape is None or len(shape) != 2 or shape[1] != 17 or shape[0] < 3 or array.dtype.kind != "f":
        raise InputError(
            f"{path} has no LLFF poses (its shape is {shape}; [cameras, 17] numbers are needed): restore it."
        )
    table = torch.from_numpy(array.astype(np.float64))
    bounds = table[:, 15:]
    if not bool(table.isfinite().all()) or float(bounds.min()) <= 0:
        raise InputError(f"{path} has non-finite numbers, or bounds that are not above 0: restore it.")
    down, right, backward, position = table[:, :15].view(-1, 3, 5)[:, :, :4].unbind(-1)
    return torch.stack([right, -down, backward, position], dim=-1), bounds
