"""The training photographs as rays, for the stage that follows distillation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from nerfstudio.data.datasets.base_dataset import InputDataset
from torch import Tensor

from r2l_nerfstudio.distillation.ray_sample import RaySample
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.rays.conventions import OURS, RayConventions
from r2l_nerfstudio.rays.pinhole import planar_directions


def split_holdout(num_views: int, fraction: float) -> tuple[list[int], list[int]]:
    """Training views to learn from, and every n-th one held out to watch for overfitting.

    Args:
        num_views: training views of the capture.
        fraction: share to hold out; at least one view unless 0.

    Raises:
        InputError: if nothing is left to learn from.
    """
    held: list[int] = []
    if fraction > 0:
        count = min(num_views, max(1, round(fraction * num_views)))
        held = sorted({int((index + 0.5) * num_views / count) for index in range(count)})
    kept = [index for index in range(num_views) if index not in held]
    if not kept:
        raise InputError(
            f"No training view is left after holding out {len(held)} of {num_views}: lower"
            " --pipeline.datamanager.holdout-fraction, or set --pipeline.datamanager.real-iterations 0 and the fraction"
            " to 0 to learn from the teacher alone."
        )
    return kept, held


def read_photograph(dataset: InputDataset, index: int, image_type: Literal["uint8", "float32"]) -> dict[str, Any]:
    """As `InputDataset.get_data`.

    Raises:
        InputError: if the image or its mask cannot be read.
    """
    try:
        return dataset.get_data(index, image_type=image_type)
    except Exception as error:  # every decoder has failures of its own
        raise InputError(
            f"The photograph {dataset.image_filenames[index]} cannot be used ({' '.join(str(error).split())}): restore"
            " it, or name a whole copy of the capture with --data."
        ) from error


class Photographs:
    """Pixels of some training photographs, in uint8 on the device, with the rays that the teacher's cameras saw them by.

    Lens distortion is undone per ray, and the teacher's learnt pose corrections are applied, so that student and teacher
    agree on where every photograph was taken from.

    Args:
        dataset: the training views.
        indices: which of them.
        corrections: the teacher's pose corrections for all training views, or None.
        background: colour behind photographs that have an alpha channel.
        device: where pixels live and rays are made.
        conventions: how the student's ray encoding reads rays.
    """

    def __init__(
        self,
        dataset: InputDataset,
        indices: list[int],
        corrections: Float[Tensor, "num_train 3 4"] | None,
        background: Float[Tensor, "3"],
        device: torch.device | str,
        conventions: RayConventions = OURS,
    ) -> None:
        self.device = torch.device(device)
        self.conventions = conventions
        self.background = background.to(self.device)
        self.cameras = dataset.cameras.to(self.device)
        self.corrections = None if corrections is None else corrections.to(self.device)
        pixels, views, rows, columns = [], [], [], []
        for index in indices:
            data = read_photograph(dataset, index, "uint8")
            image = data["image"]
            keep = torch.ones(image.shape[:2], dtype=torch.bool)
            if "mask" in data:
                keep = data["mask"][..., 0].bool()
            y, x = keep.nonzero(as_tuple=True)
            pixels.append(image[y, x])
            views.append(torch.full_like(y, index, dtype=torch.int32))
            rows.append(y.to(torch.int16))
            columns.append(x.to(torch.int16))
        self.pixels = torch.cat(pixels).to(self.device)
        self.views = torch.cat(views).to(self.device)
        self.rows = torch.cat(rows).to(self.device)
        self.columns = torch.cat(columns).to(self.device)

    def sample(self, num_rays: int, generator: torch.Generator | None = None) -> RaySample:
        """Rays drawn uniformly over all pixels.

        Args:
            num_rays: how many.
            generator: for a repeatable draw.
        """
        flat = torch.randint(
            len(self.pixels), (num_rays,), generator=generator, device="cpu" if generator else self.device
        )
        return self.rays(flat.to(self.device))

    def rays(self, flat: Int[Tensor, "rays"]) -> RaySample:
        """Rays of given pixels, numbered through all photographs."""
        views = self.views[flat].long()
        coords = torch.stack([self.rows[flat], self.columns[flat]], dim=-1).float() + self.conventions.pixel_offset
        bundle = self.cameras.generate_rays(camera_indices=views[:, None], coords=coords)
        origins, directions = bundle.origins, bundle.directions
        if self.corrections is not None:
            # As CameraOptimizer.apply_to_raybundle: shift the origin, rotate the direction, both in the world frame.
            origins = origins + self.corrections[views, :, 3]
            directions = (self.corrections[views, :, :3] @ directions[..., None]).squeeze(-1)
        if self.conventions.is_planar:
            poses = self.cameras.camera_to_worlds[views]
            if self.corrections is not None:
                poses = self.corrections[views, :, :3] @ poses
            directions = planar_directions(directions, poses)
        color = self.pixels[flat].float() / 255
        if color.shape[-1] == 4:
            alpha = color[:, 3:]
            color = color[:, :3] * alpha + self.background * (1 - alpha)
        ones = torch.ones_like(color[:, :1])
        return RaySample(origins, directions, color, ones, torch.zeros_like(ones), ones, torch.zeros_like(ones))
