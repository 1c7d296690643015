"""Training photos as rays, for the photo stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.utils.data_utils import get_image_mask_tensor_from_path
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from torch import Tensor

from r2l_nerfstudio.distillation.ray_sample import RECORD_WIDTH, RaySample
from r2l_nerfstudio.distillation.view_ring import free_memory
from r2l_nerfstudio.errors import InputError, one_line
from r2l_nerfstudio.rays.conventions import OURS, RayConventions
from r2l_nerfstudio.rays.pinhole import planar_directions

SHARE_OF_MEMORY = 0.4
"""Share of the device's free memory that photos may take; teacher views need memory too."""
MOST_TRIES = 64
DRAWS_AT_ONCE = 32
"""Iterations for which rays are made at once: Nerfstudio's cameras synchronize with a GPU each time."""
_MODES = ("RGB", "RGBA", "L")
"""Kinds of images that Nerfstudio reads correctly."""
_ROWS_AT_ONCE = 256


def split_held_out(num_views: int, fraction: float) -> tuple[list[int], list[int]]:
    """Return training views to learn from, and every n-th one to hold out.

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
            " --pipeline.datamanager.held-out-fraction, or set --pipeline.datamanager.photo-iterations 0 and the fraction"
            " to 0 to learn only from the teacher."
        )
    return kept, held


@dataclass
class Photo:
    """A photo with its mask."""

    rgb: UInt8[np.ndarray, "height width 3"]
    """The photo on the background, if it has an alpha channel."""
    mask: Bool[np.ndarray, "height width"] | None
    """Pixels that count; None for all."""


def read_photo(dataset: InputDataset, index: int, background: Float[Tensor, "3"]) -> Photo:
    """Read a photo and its mask, in 8 bits.

    Args:
        dataset: the training views.
        index: index of the view.
        background: color behind photos with an alpha channel, unless the capture has its own (`alpha_color`).

    Raises:
        InputError: the photo or its mask cannot be read, is of a kind that Nerfstudio misreads, or does not have its
            camera's size.
    """
    path = dataset.image_filenames[index]
    _check_mode(path)
    try:
        photo = _read(dataset, index, background)
    except Exception as error:  # Every decoder raises its own exceptions.
        raise InputError(
            f"The photo {path} cannot be used ({one_line(error)}): restore it, or give a complete copy of the capture"
            " with --data."
        ) from error
    _check_size(dataset, index, photo)
    return photo


def _read(dataset: InputDataset, index: int, background: Tensor) -> Photo:
    is_stock = getattr(type(dataset), "get_data", None) is InputDataset.get_data and dataset.mask_color is None
    if is_stock:
        # `get_data` would blend a whole photo in fp32.
        image: Any = dataset.get_numpy_image(index)
        outputs = dataset._dataparser_outputs
        alpha_color, mask = outputs.alpha_color, None
        if outputs.mask_filenames is not None:
            mask = get_image_mask_tensor_from_path(outputs.mask_filenames[index], scale_factor=dataset.scale_factor)
    else:
        data = dataset.get_data(index, image_type="uint8")
        image, mask, alpha_color = data["image"].numpy(), data.get("mask"), None
    if image.dtype != np.uint8:
        image = (image.clip(0, 1) * 255).round().astype(np.uint8)
    if mask is not None:
        mask = mask[..., 0].numpy().astype(bool)
        if mask.shape != image.shape[:2]:
            raise ValueError(
                f"its mask has {mask.shape[1]}x{mask.shape[0]} pixels, and the photo {image.shape[1]}x{image.shape[0]}"
            )
    if image.shape[-1] == 4:
        behind = background if alpha_color is None else alpha_color
        image = _blended(image, 255 * behind.detach().cpu().float().numpy())
    return Photo(image, mask)


def _blended(image: np.ndarray, behind: np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
    """Blend a few rows at a time: a photo of 12 million pixels takes 150 MB in fp32."""
    out = np.empty((*image.shape[:2], 3), np.uint8)
    for top in range(0, len(image), _ROWS_AT_ONCE):
        part = image[top : top + _ROWS_AT_ONCE].astype(np.float32)
        alpha = part[..., 3:] / 255
        out[top : top + _ROWS_AT_ONCE] = (part[..., :3] * alpha + behind * (1 - alpha)).round()
    return out


def _check_mode(path: Any) -> None:
    try:
        with Image.open(path) as photo:
            mode = photo.mode
    except Exception:  # Read by other means, or not at all, which the reading itself reports.
        return
    if mode not in _MODES:
        kind = {"CMYK": "CMYK", "P": "a palette", "LA": "gray with alpha", "1": "one bit a pixel"}.get(
            mode, f"mode {mode}"
        )
        raise InputError(
            f"The photo {path} is an image of an unusual kind ({kind}), which Nerfstudio reads with other colors:"
            " convert the capture's photos to 8-bit RGB, for instance with ImageMagick (mogrify -colorspace sRGB"
            " -type TrueColor -depth 8 *.png), and train the teacher again."
        )


def _check_size(dataset: InputDataset, index: int, photo: Photo) -> None:
    height, width = photo.rgb.shape[:2]
    wanted = int(dataset.cameras.height[index]), int(dataset.cameras.width[index])
    if abs(height - wanted[0]) <= 2 and abs(width - wanted[1]) <= 2:  # Rounding of a downscaled capture.
        return
    is_turned = abs(height - wanted[1]) <= 2 and abs(width - wanted[0]) <= 2
    remedy = (
        "it is stored on its side (EXIF orientation), and its camera describes it upright: rotate the capture's photos"
        " (mogrify -auto-orient), or describe them as they are stored"
        if is_turned
        else "write the size of the photos into the capture's cameras, or restore the photos they were made for"
    )
    raise InputError(
        f"The photo {dataset.image_filenames[index]} has {width}x{height} pixels, and its camera"
        f" {wanted[1]}x{wanted[0]}: {remedy}; then train the teacher again."
    )


class Photos:
    """Pixels of some training photos in 8 bits on the device, 3 bytes each, 4 with masks, and their rays.

    Lens distortion is undone per ray, and the teacher's learned pose corrections are applied, so that student and
    teacher agree on the pose of every photo. Photos that a mask covers entirely are skipped. If memory is short, photos
    are shrunk by a whole number.

    Args:
        dataset: the training views.
        indices: indices of the photos.
        corrections: the teacher's pose corrections for all training views, or None.
        background: color behind photos with an alpha channel.
        device: device of pixels and rays.
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
        self.cameras = dataset.cameras.to(self.device)
        self.corrections = None if corrections is None else corrections.to(self.device)
        outputs = getattr(dataset, "_dataparser_outputs", None)
        channels = 3 if getattr(outputs, "mask_filenames", None) is None else 4
        sizes = [_stored_size(dataset, index) for index in indices]
        shrink = self._shrink(sum(height * width for height, width in sizes) * channels)
        sizes = [(max(1, height // shrink), max(1, width // shrink)) for height, width in sizes]
        self.pixels = torch.empty(
            sum(height * width for height, width in sizes), channels, dtype=torch.uint8, device=self.device
        )
        """rgb, and with masks 1 where the pixel counts."""
        views, starts, kept, blank = [], [0], 0, []
        for index, (height, width) in zip(indices, sizes, strict=True):
            rgb, mask = _at_size(read_photo(dataset, index, background), height, width)
            if mask is not None and not mask.any():
                blank.append(dataset.image_filenames[index])
                continue
            part = self.pixels[starts[-1] : starts[-1] + height * width]
            part[:, :3] = torch.from_numpy(rgb.reshape(-1, 3)).to(self.device)
            if channels == 4:
                part[:, 3] = 1 if mask is None else torch.from_numpy(mask.reshape(-1)).to(self.device)
            kept += height * width if mask is None else int(mask.sum())
            views.append((index, height, width))
            starts.append(starts[-1] + height * width)
        if blank:
            CONSOLE.print(
                f"[yellow]Skipping {len(blank)} photos that their masks cover entirely, the first being {blank[0]}.",
                soft_wrap=True,
            )
        self.pixels = self.pixels[: starts[-1]]
        self._starts = torch.tensor(starts, device=self.device)
        self._views = torch.tensor(views, device=self.device).reshape(-1, 3)
        self._records = torch.empty(0, RECORD_WIDTH, device=self.device)
        self._tries = 1
        if len(self.pixels) and kept < len(self.pixels):
            # With this many tries, one draw in a hundred finds no valid pixel.
            self._tries = min(MOST_TRIES, math.ceil(math.log(0.01) / math.log1p(-kept / len(self.pixels))))

    def __len__(self) -> int:
        """Number of photos that have a pixel which counts."""
        return len(self._views)

    def _shrink(self, needed: int) -> int:
        room = int(SHARE_OF_MEMORY * free_memory(self.device))
        if needed <= room:
            return 1
        shrink = math.ceil(math.sqrt(needed / max(1, room)))
        CONSOLE.print(
            f"[bold yellow]Photos would take {needed / 1e9:.1f} GB on {self.device}, where there is room for"
            f" {room / 1e9:.1f} GB: learning from them at 1/{shrink} of their width and height."
        )
        return shrink

    def read_by(self, conventions: RayConventions) -> None:
        """Follow another student's conventions."""
        self.conventions = conventions
        self._records = self._records[:0]

    def draw(self, num_rays: int) -> Float[Tensor, "rays 13"]:
        """Draw rays as `sample` does, as records; they are made for several iterations at once."""
        if len(self._records) < num_rays:
            self._records = self.sample(DRAWS_AT_ONCE * num_rays).records()
        drawn, self._records = self._records[:num_rays], self._records[num_rays:]
        return drawn

    def sample(self, num_rays: int, generator: torch.Generator | None = None) -> RaySample:
        """Draw rays uniformly over all pixels that count; the few that are masked even after some tries have no weight.

        Args:
            num_rays: number of rays.
            generator: for a repeatable draw.
        """
        device = "cpu" if generator else self.device
        flat = torch.randint(len(self.pixels), (self._tries, num_rays), generator=generator, device=device).to(
            self.device
        )
        if self._tries == 1:
            return self.rays(flat[0])
        first = (self.pixels[flat, 3] > 0).int().argmax(dim=0)
        return self.rays(flat.gather(0, first[None])[0])

    def rays(self, flat: Int[Tensor, "rays"]) -> RaySample:
        """Return the rays of given pixels, numbered row by row through all photos."""
        photo = torch.searchsorted(self._starts, flat, right=True) - 1
        views, heights, widths = self._views[photo].unbind(-1)
        inside = flat - self._starts[photo]
        offset = self.conventions.pixel_offset
        # In the camera's pixels, which are smaller than those of a photo that was shrunk.
        down = self.cameras.height[views, 0] / heights
        across = self.cameras.width[views, 0] / widths
        rows, columns = (inside // widths + offset) * down, (inside % widths + offset) * across
        coords = torch.stack([rows, columns], dim=-1).float()
        bundle = self.cameras.generate_rays(camera_indices=views[:, None], coords=coords)
        origins, directions = bundle.origins, bundle.directions
        if self.corrections is not None:
            # Like CameraOptimizer.apply_to_raybundle: shift the origin, rotate the direction, both in the world frame.
            origins = origins + self.corrections[views, :, 3]
            directions = (self.corrections[views, :, :3] @ directions[..., None]).squeeze(-1)
        if self.conventions.is_planar:
            poses = self.cameras.camera_to_worlds[views]
            if self.corrections is not None:
                poses = self.corrections[views, :, :3] @ poses
            directions = planar_directions(directions, poses)
        pixels = self.pixels[flat]
        ones = torch.ones_like(origins[:, :1])
        weight = pixels[:, 3:].float() if pixels.shape[-1] == 4 else ones
        zeros = torch.zeros_like(ones)
        return RaySample(origins, directions, pixels[:, :3].float() / 255, ones, zeros, weight, zeros)


def _stored_size(dataset: InputDataset, index: int) -> tuple[int, int]:
    """Return height and width of a photo, from its file's header if possible."""
    try:
        with Image.open(dataset.image_filenames[index]) as photo:
            width, height = photo.size
        scale = getattr(dataset, "scale_factor", 1.0)
        return (height, width) if scale == 1.0 else (int(height * scale), int(width * scale))
    except Exception:  # Read by other means.
        return int(dataset.cameras.height[index]), int(dataset.cameras.width[index])


def _at_size(photo: Photo, height: int, width: int) -> tuple[np.ndarray, np.ndarray | None]:
    if photo.rgb.shape[:2] == (height, width):
        return photo.rgb, photo.mask
    rgb = cv2.resize(photo.rgb, (width, height), interpolation=cv2.INTER_AREA)
    if photo.mask is None:
        return rgb, None
    # Only where all source pixels count.
    mask = cv2.resize(photo.mask.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_AREA)
    return rgb, mask == 255
