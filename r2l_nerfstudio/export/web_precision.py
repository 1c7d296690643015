"""fp16 or int8 for the web page's weights: int8 halves the bytes, and is used where it costs little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.export.int8 import JUDGED_VIEWS, MOST_LOSS, NEEDED_DB, sampled_views
from r2l_nerfstudio.export.web_weights import WebWeights
from r2l_nerfstudio.psnr import psnr
from r2l_nerfstudio.student import Student

Photos = Sequence[tuple[Cameras, Float[Tensor, "height width 3"]]]
PrecisionChoice = Literal["auto", "fp16", "int8"]


def choose_weights(
    student: Student, cameras: CaptureCameras, photos: Photos, precision: PrecisionChoice
) -> tuple[WebWeights, tuple[str, ...]]:
    """Return the student's weights in the requested precision, and sentences on its cost.

    Args:
        student: on the CPU.
        cameras: of its training.
        photos: cameras and photos that no training used; may be empty.
        precision: auto: int8 if it loses at most 0.5 dB on the photos and stays within 40 dB of the student's own renders.

    Raises:
        InputError: if int8 is requested and costs more.
    """
    if precision == "fp16":
        return WebWeights(student.model, "fp16"), ()
    weights = WebWeights(student.model, "int8")
    likeness = _likeness(student, weights, cameras)
    said = f"int8: {likeness:.1f} dB against the student's own renders of {JUDGED_VIEWS} sampled cameras"
    loss = 0.0
    if photos:
        own, rounded = _on_photos(student, weights, photos)
        loss = own - rounded
        said += f"; {rounded:.2f} dB on {len(photos)} held-out photos, the student {own:.2f} dB"
    if likeness >= NEEDED_DB and loss <= MOST_LOSS:
        return weights, (f"{said}.",)
    limits = f"At least {NEEDED_DB:.0f} dB and at most {MOST_LOSS} dB lost on photos are needed"
    if precision == "int8":
        raise InputError(f"--precision int8: {said}. {limits}: choose --precision fp16.")
    return WebWeights(student.model, "fp16"), (f"{said}. {limits}: the weights are in fp16.",)


@torch.no_grad()
def _likeness(student: Student, weights: WebWeights, cameras: CaptureCameras) -> float:
    found = []
    for pose, intrinsics, size in sampled_views(student, cameras, JUDGED_VIEWS, seed=1):
        camera = (pose.numpy(), intrinsics.numpy(), size.width, size.height)
        truth = torch.from_numpy(student.render(*camera))
        with weights.drawing():
            found.append(psnr(torch.from_numpy(student.render(*camera)), truth))
    return sum(found) / len(found)


def _on_photos(student: Student, weights: WebWeights, photos: Photos) -> tuple[float, float]:
    own, rounded = [], []
    for camera, truth in photos:
        own.append(psnr(student.model.render_camera(camera)["rgb"], truth))
        with weights.drawing():
            rounded.append(psnr(student.model.render_camera(camera)["rgb"], truth))
    return sum(own) / len(own), sum(rounded) / len(rounded)
