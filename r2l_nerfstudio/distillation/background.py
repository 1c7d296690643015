"""The background color: one rule for teacher, photos, frame check and student."""

from __future__ import annotations

import torch
from jaxtyping import Float
from nerfstudio.utils import colors
from PIL import Image
from torch import Tensor

from r2l_nerfstudio.distillation.survey import thumbnail
from r2l_nerfstudio.teacher import Teacher

_PHOTOS_LOOKED_AT = 3
_VIEWS_LOOKED_AT = 4
_EMPTY = 0.1
"""Accumulation below which a pixel shows the background."""


def background_of(teacher: Teacher) -> Float[Tensor, "3"]:
    """Return the color that a student has where its teacher has nothing, and on which photos with an alpha channel are
    blended.

    It is the color the teacher was trained with, by how Nerfstudio's renderers composite photos in training
    (`RGBRenderer.blend_background_for_loss_computation`):

    * fixed (`white`, `black`, a color): that color;
    * `random`: the one that `Teacher.background` composites on, since any was as good in training;
    * `last_sample`: black, if photos have an alpha channel; else what the teacher shows where its accumulation is near
      zero, or white if it is zero nowhere.

    Args:
        teacher: a trained teacher.

    Returns:
        RGB in [0, 1], on the CPU.
    """
    if teacher.background is not None:
        return teacher.background.cpu()
    fixed = _fixed(teacher)
    if fixed is not None:
        return fixed
    alpha_color = teacher.dataparser_outputs.alpha_color
    if alpha_color is not None:  # The dataset blends photos with it before any model reads them.
        return alpha_color.detach().cpu().float()
    if has_alpha(teacher):
        return torch.zeros(3)
    return _shown(teacher)


def has_alpha(teacher: Teacher) -> bool:
    """Return whether the capture's photos have an alpha channel, judging by the first few."""
    for file in teacher.dataparser_outputs.image_filenames[:_PHOTOS_LOOKED_AT]:
        try:
            with Image.open(file) as photo:
                if "A" in photo.getbands():
                    return True
        except OSError:  # The code that reads the photo reports it.
            continue
    return False


def _fixed(teacher: Teacher) -> Float[Tensor, "3"] | None:
    color = getattr(getattr(teacher.model, "renderer_rgb", None), "background_color", None)
    if color is None or isinstance(color, str) and color not in colors.COLORS_DICT:
        color = getattr(teacher.model.config, "background_color", None)
    if isinstance(color, str):
        color = colors.COLORS_DICT.get(color)
    if isinstance(color, Tensor) and color.numel() == 3:
        return color.detach().cpu().float().flatten()
    return None


def _shown(teacher: Teacher) -> Float[Tensor, "3"]:
    cameras = teacher.dataparser_outputs.cameras
    chosen = torch.linspace(0, len(cameras) - 1, min(_VIEWS_LOOKED_AT, len(cameras))).round().long().unique()
    found = []
    for index in chosen.tolist():
        outputs = teacher.view(thumbnail(cameras[index], undistorted=teacher.views_only))
        if outputs.accumulation is not None:
            is_empty = (outputs.accumulation[..., 0] < _EMPTY) & outputs.rgb.isfinite().all(-1)
            found.append(outputs.rgb[is_empty].cpu())
    colors_there = torch.cat(found) if found else torch.zeros(0, 3)
    return colors_there.median(dim=0).values if len(colors_there) else torch.ones(3)
