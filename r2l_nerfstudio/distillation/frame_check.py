"""Check that teacher and data show one scene in one frame."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import torch
from jaxtyping import Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor
from torch.nn.functional import interpolate

from r2l_nerfstudio.distillation.photo_views import undistorted_photo
from r2l_nerfstudio.distillation.photos import read_photo
from r2l_nerfstudio.distillation.survey import thumbnail
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.models.camera_rays import is_pinhole
from r2l_nerfstudio.teacher import Teacher

NUM_VIEWS = 6
OWN_SHARE = 0.85
"""Factor by which own photos must fit better than others, in mean squared error."""


def check_cameras(teacher: Teacher, cameras: Cameras) -> None:
    """Compare the student's training cameras with the teacher's.

    Args:
        teacher: teacher whose frame counts.
        cameras: cameras that the student's dataparser returns for the capture.

    Raises:
        InputError: if their number or any pose differs.
    """
    theirs = teacher.dataparser_outputs.cameras.camera_to_worlds
    ours = cameras.camera_to_worlds.to(theirs)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=1e-4):
        raise InputError(
            f"Teacher and student are in different frames: the {len(ours)} training cameras of the student's data are"
            f" not the {len(theirs)} of the teacher {teacher.config_path}. A student uses its teacher's frame: leave"
            " out --data and all dataparser options."
        )


def check_frame(teacher: Teacher, dataset: InputDataset, background: Float[Tensor, "3"]) -> None:
    """Render thumbnails from some training cameras and compare them with the photos.

    A teacher in the data's frame fits each camera's own photo clearly better than another camera's.

    Args:
        teacher: teacher to check.
        dataset: the training views.
        background: color on which photos with an alpha channel are blended; that of the teacher.

    Raises:
        InputError: if a camera's own photo fits no better than others.
    """

    def pair(index: int) -> tuple[Tensor, Tensor] | None:
        camera = thumbnail(dataset.cameras[index], 32, undistorted=teacher.views_only)
        photo = _small_photo(teacher, dataset, index, camera, background)
        return None if photo is None else (teacher.view(camera).rgb.cpu(), photo)

    errors = view_errors(pair, len(dataset))
    if errors is None:
        return
    own, other = errors
    if own > OWN_SHARE * other:
        raise InputError(
            f"Teacher and data do not match: from a photo's own camera the teacher {teacher.config_path} renders the"
            f" photos of {teacher.dataparser_outputs.image_filenames[0].parent} no better than from others (mean"
            f" squared errors {own:.4f} and {other:.4f}). Either --data is another capture than the teacher was"
            " trained on, or the teacher is barely trained. Leave out --data to use the teacher's own; to continue"
            " anyway, add --pipeline.check-frame False."
        )


def view_errors(pair: Callable[[int], tuple[Tensor, Tensor] | None], views: int) -> tuple[float, float] | None:
    """Compare images from some training cameras with the photos, at thumbnail size.

    Args:
        pair: returns for the number of a view its image in [0, 1] and its photo in uint8, both (height width 3); None
            if they cannot be compared.
        views: number of views.

    Returns:
        Mean squared errors against the cameras' own photos, and against those of other cameras; None for fewer than
        three views, or if one cannot be compared.
    """
    count = min(NUM_VIEWS, views)
    if count < 3:  # Too few to compare with each other.
        return None
    renders, photos = [], []
    for index in torch.linspace(0, views - 1, count).round().long().tolist():
        found = pair(index)
        if found is None:
            return None
        rgb, photo = found
        size = (32, 32)
        renders.append(interpolate(rgb.permute(2, 0, 1)[None].float().nan_to_num(), size, mode="area"))
        photos.append(interpolate(photo.permute(2, 0, 1)[None].float() / 255, size, mode="area"))
    own = torch.stack([(a - b).square().mean() for a, b in zip(renders, photos, strict=True)])
    others = [
        (renders[i] - photos[(i + shift) % count]).square().mean() for i in range(count) for shift in range(1, count)
    ]
    return float(own.mean()), float(torch.stack(others).mean())


def _small_photo(
    teacher: Teacher, dataset: InputDataset, index: int, camera: Cameras, background: Float[Tensor, "3"]
) -> UInt8[Tensor, "height width 3"] | None:
    """Return what the thumbnail's camera should see; None if the photo cannot be brought into its projection."""
    if not teacher.views_only or is_pinhole(dataset.cameras[index : index + 1]):
        # Shrink a photo to its thumbnail's size at once: many millions of pixels would take gigabytes in fp32.
        size = (int(camera.width), int(camera.height))
        photo = read_photo(dataset, index, background).rgb
        return torch.from_numpy(cv2.resize(photo, size, interpolation=cv2.INTER_AREA))
    wanted = torch.cat([camera.fx, camera.fy, camera.cx, camera.cy], dim=-1)[0]
    try:
        view = undistorted_photo(dataset, index, wanted, (int(camera.height), int(camera.width)), background)
    except InputError:
        CONSOLE.print("[yellow]Not checking the teacher against the photos: their lens cannot be undistorted.")
        return None
    return view[..., :3]
    return float(own.mean()), float(other.mean())
