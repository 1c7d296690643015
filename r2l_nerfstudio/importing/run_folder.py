"""Published networks as ordinary run folders, checked against the file's own weights before they are kept."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import yaml
from nerfstudio.data.datasets.base_dataset import InputDataset
from torch import Tensor

from r2l_nerfstudio.atomic_output import atomic_folder
from r2l_nerfstudio.distillation.frame_check import view_errors
from r2l_nerfstudio.distillation.photos import read_photo
from r2l_nerfstudio.distillation.survey import thumbnail
from r2l_nerfstudio.errors import InputError, one_line
from r2l_nerfstudio.importing.capture_frame import CaptureFrame
from r2l_nerfstudio.importing.published_network import PublishedNetwork
from r2l_nerfstudio.importing.reference_picture import published_picture
from r2l_nerfstudio.psnr import psnr
from r2l_nerfstudio.rays.published import PublishedScene, published_scene
from r2l_nerfstudio.rays.spacing import SceneBounds
from r2l_nerfstudio.student import Student, load_student

if TYPE_CHECKING:
    from nerfstudio.engine.trainer import TrainerConfig

CELLS_ACROSS = {"blender": 100, "llff": 84}
"""Columns of the published ray images."""
NEEDED_DB = 60.0
"""Minimum PSNR in dB of the imported student against the file's own weights."""
COMPARED_SIDE = 64
"""Longer side in pixels of an R2L image that is compared."""


@dataclass(frozen=True)
class Placement:
    """A published network in a capture."""

    network: PublishedNetwork
    frame: CaptureFrame
    scene: PublishedScene
    cells: tuple[int, int]
    """Rows and columns of the ray image of one image at the trained size; for R2L, of pixels of an image to compare."""
    focal: float
    """Focal length in cells, or for R2L in pixels of the image to compare."""


@dataclass(frozen=True)
class Imported:
    """A finished import."""

    folder: Path
    psnr: float
    """PSNR in dB of one image against the file's own weights."""
    largest: float
    """Largest difference of a color in that image."""
    photos: tuple[float, float] | None
    """Mean squared errors of training views against their own photos, and against other photos; None for too few."""


def place(
    network: PublishedNetwork,
    frame: CaptureFrame,
    cells: tuple[int, int] | None = None,
    near: float | None = None,
    far: float | None = None,
    is_ndc: bool | None = None,
) -> Placement:
    """Find the ray conventions of a published network in a capture.

    Args:
        network: network read from its file.
        frame: frame of the capture.
        cells: rows and columns of the ray image it was trained on; by default those of the file, or else the published
            ones.
        near: position of the first sample point, which may be negative; as published by default.
        far: position of the last sample point; as published by default.
        is_ndc: whether points lie in normalized device coordinates; by default for a MobileR2L in an LLFF capture.

    Raises:
        InputError: if near is not below far, or the cells do not fit the capture's images.
    """
    cameras = frame.cameras
    focal = float(cameras.intrinsics[:, :2].median())
    reads_ray_image = network.kind == "mobile-r2l"
    if reads_ray_image:
        cells = cells or network.cells
        if cells is None:
            columns = CELLS_ACROSS[frame.layout]
            cells = (max(1, round(columns * cameras.height / cameras.width)), columns)
    else:
        shrink = min(1.0, COMPARED_SIDE / max(cameras.height, cameras.width))
        cells = (max(1, round(shrink * cameras.height)), max(1, round(shrink * cameras.width)))
    rows, columns = cells
    if min(cells) < 1 or abs(columns * cameras.height / (rows * cameras.width) - 1) > 0.05:
        raise InputError(
            f"A ray image of {rows} rows and {columns} columns has another shape than the capture's photos of"
            f" {cameras.width}x{cameras.height} pixels: give the checkpoint's own scene with --data, or the ray image"
            " it was trained on with --cells ROWS COLUMNS."
        )
    focal = focal * rows / cameras.height
    given = network.arguments
    if is_ndc is None:
        is_ndc = reads_ray_image and frame.layout == "llff" and given.get("ndc", True) is not False
    ndc = is_ndc
    if ndc and (not reads_ray_image or frame.layout != "llff"):
        raise InputError("--ndc: only a MobileR2L of a forward-facing capture uses normalized device coordinates.")
    scene = published_scene(
        frame.similarity,
        reads_ray_image,
        frame.layout == "blender",
        frame.bounds,
        (2 * focal / columns, 2 * focal / rows) if ndc else None,
    )
    if near is None and far is None and _number(given, "trial.near") > 0:  # As R2L's own code sets them.
        near, far = _number(given, "trial.near"), _number(given, "trial.far")
    near, far = scene.near if near is None else near, scene.far if far is None else far
    if not (math.isfinite(near) and math.isfinite(far) and near < far):
        raise InputError(f"--near must be below --far (got {near:g} and {far:g}).")
    return Placement(network, frame, PublishedScene(scene.conventions, near, far), cells, focal)


def _number(arguments: dict[str, Any], name: str) -> float:
    value = arguments.get(name, 0.0)
    return float(value) if isinstance(value, int | float) else 0.0


DATASETS = {"blender": "blender", "llff": "llff", "colmap": "llff"}
"""Kinds of capture by the published code's --dataset_type, in lower case."""


def check_layout(network: PublishedNetwork, frame: CaptureFrame) -> None:
    """Compare the capture with the kind of dataset that the file was trained on.

    Raises:
        InputError: if they differ.
    """
    said = network.arguments.get("dataset_type")
    expected = DATASETS.get(said.lower()) if isinstance(said, str) else None
    if expected is not None and expected != frame.layout:
        raise InputError(
            f"The checkpoint {network.path} was trained on a {said} dataset, and the capture {frame.dataparser.data}"
            f" is read as {frame.layout}: give the checkpoint's own scene with --data (an LLFF scene needs its"
            " poses_bounds.npy), or set --layout."
        )


def run_config(placement: Placement, output_dir: Path, experiment: str, timestamp: str) -> TrainerConfig:
    """Return the run's configuration: the published recipe, with the network's sizes and the capture."""
    from nerfstudio.configs.method_configs import all_methods

    network = placement.network
    config = copy.deepcopy(all_methods[f"{network.kind}-paper"])
    model = config.pipeline.model
    for name, value in network.sizes.items():
        setattr(model, name, value)
    model.num_points, model.num_frequencies = network.num_points, network.num_frequencies
    datamanager = config.pipeline.datamanager
    datamanager.dataparser = copy.deepcopy(placement.frame.dataparser)
    datamanager.data = placement.frame.dataparser.data
    config.output_dir, config.experiment_name, config.timestamp = Path(output_dir), experiment, timestamp
    return config


def checkpoint_state(placement: Placement, config: TrainerConfig) -> dict[str, Any]:
    """Return what `ns-train` would have saved for this student before its first iteration."""
    network, frame = placement.network, placement.frame
    model = config.pipeline.model.setup(
        scene_box=frame.outputs.scene_box, num_train_data=1, metadata={}, device="cpu", grad_scaler=None
    )
    center = frame.cameras.positions.mean(0)
    radius = float((frame.cameras.positions - center).norm(dim=-1).max().clamp_min(1e-3))
    factor = network.sizes.get("upsampling_factor", 1)
    alpha = frame.outputs.alpha_color
    model.set_scene(
        SceneBounds("near-far", tuple(center.tolist()), radius, placement.scene.near, placement.scene.far),
        frame.cameras.mean_axes,
        torch.ones(3) if alpha is None else alpha.float(),
        has_accumulation=False,
        has_depth=False,
        focal=placement.focal * factor,
        conventions=placement.scene.conventions,
    )
    try:
        model.network.load_state_dict(network.state, strict=True)
    except RuntimeError as error:  # The state was read with the same sizes: an error of ours.
        raise InputError(f"The network of {network.path} does not fit ours ({one_line(error)}).") from error
    state = {f"_model.{name}": value for name, value in model.state_dict().items()}
    pipeline = {**state, "done": torch.zeros(())}
    return {"step": 0, "pipeline": pipeline, "optimizers": {}, "schedulers": {}, "scalers": {}}


def write_run(
    placement: Placement, output_dir: Path, experiment: str | None = None, check_photos: bool = True
) -> Imported:
    """Write the run folder, load it again, compare one image with the file's own weights, and only then keep it.

    Args:
        placement: a network in a capture.
        output_dir: folder of all runs, as for `ns-train`.
        experiment: experiment name; by default that of the capture's folder.
        check_photos: compare training views with the photos too.

    Raises:
        InputError: if the folder cannot be written, or the student renders other images than the file's weights;
            nothing is kept then.
    """
    experiment = experiment or placement.frame.dataparser.data.name
    timestamp = datetime.now().strftime("%Y-%m-%d_%H%M%S")
    config = run_config(placement, output_dir, experiment, timestamp)
    number = 1
    while config.get_base_dir().exists():  # Another import in the same second.
        number += 1
        config.timestamp = f"{timestamp}_{number}"
    folder = config.get_base_dir()
    with atomic_folder(folder, overwrite=False, mark="config.yml", what="run") as made:
        checkpoints = made / config.relative_model_dir
        checkpoints.mkdir(parents=True)
        torch.save(checkpoint_state(placement, config), checkpoints / "step-000000000.ckpt")
        placement.frame.outputs.save_dataparser_transform(made / "dataparser_transforms.json")
        (made / "config.yml").write_text(yaml.dump(config), encoding="utf8")
        student = load_student(made, device="cpu", engine="torch")
        found, largest = compare(student, placement)
        photos = _photos(student, placement.frame) if check_photos else None
    return Imported(folder, found, largest, photos)


def compare(student: Student, placement: Placement) -> tuple[float, float]:
    """Compare one image of a training camera with the one that the file's own weights render.

    Returns:
        PSNR in dB, and the largest difference of a color.

    Raises:
        InputError: if they differ by more than rounding.
    """
    network, scene = placement.network, placement.scene
    factor = network.sizes.get("upsampling_factor", 1)
    height, width = (size * factor for size in placement.cells)
    focal = placement.focal * factor
    pose = placement.frame.cameras.camera_to_worlds[0]
    theirs = published_picture(
        network,
        placement.frame.similarity.poses(pose),
        height,
        width,
        focal,
        scene.near,
        scene.far,
        scene.conventions.ndc is not None,
    )
    intrinsics = torch.tensor([focal, focal, width / 2, height / 2])
    ours = cast(Tensor, student.render(pose, intrinsics, width, height))  # Its camera is an array, so the image is one.
    found, largest = psnr(ours, theirs), float((ours - theirs).abs().max())
    if not found >= NEEDED_DB:
        raise InputError(
            f"The student made from {network.path} does not render what the file's own weights render ({found:.0f}"
            f" dB, and {NEEDED_DB:.0f} dB are needed): nothing was written. If points, octaves or ray image are not"
            " the published ones, give --num-points, --num-frequencies and --cells."
        )
    return found, largest


def _photos(student: Student, frame: CaptureFrame) -> tuple[float, float] | None:
    """Return `view_errors`; None if the photos cannot be read."""

    dataset = InputDataset(frame.outputs)

    def pair(index: int) -> tuple[Tensor, Tensor]:
        camera = thumbnail(dataset.cameras[index], 32, undistorted=True)
        rgb = student.model.render_camera(camera)["rgb"].cpu()
        return rgb, torch.from_numpy(read_photo(dataset, index, student.model.background.cpu()).rgb)

    try:
        return view_errors(pair, len(dataset))
    except InputError:  # A capture without photos still has its cameras.
        return None
