"""How alike photos of different sizes are: what a renderer without aliasing reaches in the report's steadiness."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from benchmarks.distil import find_capture
from r2l_nerfstudio.capture import CaptureError, parse_capture
from r2l_nerfstudio.distillation.photos import read_photo
from r2l_nerfstudio.errors import InputError, one_line
from r2l_nerfstudio.report.measure import SIZES, psnr_of_sizes


@dataclass
class PhotoSizes:
    """Reduce test photos to two sizes by averaging, and compare these as `r2l-report` compares a student's renders.

    A student that shows no aliasing cannot be steadier between sizes than these, unless it is blurred.
    """

    capture: str
    """One of the development captures; or any name, with --data."""
    data_dir: Path | None = None
    """Folder of the development captures."""
    data: Path | None = None
    """Folder of any other capture."""
    dataparser: str = "nerfstudio-data"
    """How --data is read, by Nerfstudio's name."""
    smaller: tuple[float, ...] = (2.0, 4.0)
    """How many times smaller than a full-size photo the images are that stand for a student's own size."""
    photos: int = 8
    """Test photos, evenly spaced."""

    def main(self) -> None:
        """Print the lowest and the mean PSNR of each size.

        Raises:
            InputError: for sizes or a number of photos that make no sense, or if the capture cannot be read.
        """
        if self.photos < 1:
            raise InputError(f"--photos must be at least 1 (got {self.photos}).")
        if not all(smaller >= max(SIZES) for smaller in self.smaller):
            raise InputError(
                f"--smaller must be at least {max(SIZES):g} (got {self.smaller}): photos are only made smaller, and one of"
                f" the sizes is {max(SIZES):g} times the student's."
            )
        capture, place = find_capture(self.capture, self.data_dir, self.data, self.dataparser)
        dataparser = capture.dataparser(place)
        if hasattr(dataparser, "downscale_factor"):
            dataparser.downscale_factor = 1  # pyright: ignore[reportAttributeAccessIssue]
        try:
            test = InputDataset(parse_capture(dataparser, "test"))
        except CaptureError as error:
            raise InputError(f"The capture {place} cannot be read ({one_line(error)}).") from error
        if len(test) == 0:
            raise InputError(f"The capture {place} has no test photos.")
        chosen = np.linspace(0, len(test) - 1, min(self.photos, len(test))).round().astype(int)
        pictures = [read_photo(test, int(index), torch.ones(3)).rgb for index in chosen]
        for smaller in self.smaller:
            for scale in SIZES:
                found = [between(picture, smaller, scale) for picture in pictures]
                height, width = (round(side / smaller) for side in pictures[0].shape[:2])
                CONSOLE.print(
                    f"{self.capture} at {width}x{height} and at {scale:g} times the size: lowest {min(found):.1f} dB,"
                    f" mean {fmean(found):.1f} dB ({len(found)} photos)",
                    highlight=False,
                )


def between(photo: np.ndarray, smaller: float, scale: float) -> float:
    """Return the PSNR in dB between a photo made `smaller` times smaller and one of `scale` times that size.

    Args:
        photo: uint8 (height width 3).
        smaller: at least 1.
        scale: at most `smaller`.
    """
    return psnr_of_sizes(averaged(photo, smaller), averaged(photo, smaller / scale))


def averaged(photo: np.ndarray, smaller: float) -> Float[Tensor, "height width 3"]:
    """Return a photo whose pixels are means of the areas that they cover, in [0, 1].

    Args:
        photo: uint8 (height width 3).
        smaller: how many times smaller it becomes along each side; at least 1.
    """
    down, across = (overlaps(side, round(side / smaller)) for side in photo.shape[:2])
    colors = torch.from_numpy(photo).double().permute(2, 0, 1) / 255
    return (down @ colors @ across.T).permute(1, 2, 0).float()


def overlaps(number: int, fewer: int) -> Float[Tensor, "fewer number"]:
    """Return the share that each of `number` old pixels along a line has in each of `fewer` new ones."""
    edges = torch.arange(number + 1, dtype=torch.float64)
    ends = torch.linspace(0, number, fewer + 1, dtype=torch.float64)
    shared = torch.minimum(ends[1:, None], edges[None, 1:]) - torch.maximum(ends[:-1, None], edges[None, :-1])
    return shared.clamp(min=0) * fewer / number
