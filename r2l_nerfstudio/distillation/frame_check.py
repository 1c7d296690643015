"""Whether teacher and data show one scene in one frame."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datasets.base_dataset import InputDataset
from torch import Tensor
from torch.nn.functional import interpolate

from r2l_nerfstudio.distillation.photographs import read_photograph
from r2l_nerfstudio.distillation.survey import thumbnail
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.teacher import Teacher

NUM_VIEWS = 6
OWN_SHARE = 0.85
"""Own photos fit at least this much better than others', by mean squared error."""


def check_cameras(teacher: Teacher, cameras: Cameras) -> None:
    """Compare the student's training cameras with the teacher's.

    Args:
        teacher: whose frame it is.
        cameras: what the student's dataparser makes of the capture.

    Raises:
        InputError: if their number or any pose differs.
    """
    theirs = teacher.dataparser_outputs.cameras.camera_to_worlds
    ours = cameras.camera_to_worlds.to(theirs)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=1e-4):
        raise InputError(
            f"Teacher and student are in different frames: the {len(ours)} training cameras of the student's data are not"
            f" the {len(theirs)} of the teacher {teacher.config_path}. A student lives in its teacher's frame: leave"
            " --data and all dataparser options out."
        )


def check_frame(teacher: Teacher, dataset: InputDataset) -> None:
    """Render thumbnails from some training cameras and compare them with the photographs.

    A teacher in the data's frame fits each camera's own photograph clearly better than another camera's.

    Args:
        teacher: who renders.
        dataset: the training views.

    Raises:
        InputError: if own photographs fit no better than others'.
    """

    def render(camera: Cameras) -> Float[Tensor, "height width 3"]:
        return teacher.view(thumbnail(camera, 32, undistorted=teacher.views_only)).rgb.cpu()

    errors = view_errors(render, dataset)
    if errors is None:
        return
    own, other = errors
    if own > OWN_SHARE * other:
        raise InputError(
            f"Teacher and data do not match: the teacher {teacher.config_path} renders the photographs of"
            f" {teacher.dataparser_outputs.image_filenames[0].parent} from their own cameras no better than from others'"
            f" (mean squared errors {own:.4f} and {other:.4f}). Either --data names another capture than"
            " the teacher was trained on, or the teacher is barely trained. Leave --data out to use the teacher's own;"
            " if you are sure, add --pipeline.check-frame False."
        )


def view_errors(
    render: Callable[[Cameras], Float[Tensor, "height width 3"]], dataset: InputDataset
) -> tuple[float, float] | None:
    """Compare pictures from some training cameras with the photos, at thumbnail size.

    Args:
        render: draws one camera, at any size.
        dataset: the training views.

    Returns:
        mean squared errors against the cameras' own photos, and against other cameras'; None for fewer than three views.
    """
    count = min(NUM_VIEWS, len(dataset))
    if count < 3:  # too few for others to compare with
        return None
    renders, photographs = [], []
    for index in torch.linspace(0, len(dataset) - 1, count).round().long().tolist():
        rgb = render(dataset.cameras[index])
        image = read_photograph(dataset, index, "float32")["image"]
        image = image[..., :3] * image[..., 3:] + 1 - image[..., 3:] if image.shape[-1] == 4 else image
        size = (32, 32)
        renders.append(interpolate(rgb.permute(2, 0, 1)[None].float().nan_to_num(), size, mode="area"))
        photographs.append(interpolate(image.permute(2, 0, 1)[None], size, mode="area"))
    own = torch.stack([(a - b).square().mean() for a, b in zip(renders, photographs, strict=True)])
    other = torch.stack(
        [
            (renders[i] - photographs[(i + shift) % count]).square().mean()
            for i in range(count)
            for shift in range(1, count)
        ]
    )
    return float(own.mean()), float(other.mean())
