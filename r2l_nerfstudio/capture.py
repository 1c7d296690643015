"""Read captures with their dataparsers, without prompts and shell commands, and check their cameras."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from r2l_nerfstudio.config_builder import unsafe_dataparser
from r2l_nerfstudio.errors import InputError, one_line

if TYPE_CHECKING:
    from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs


_ONE_PLACE = (
    "its cameras are all in one place, or their positions are not finite, so it has no scale: record it from more places, or"
    " train the teacher with --auto-scale-poses False"
)


class CaptureError(Exception):
    """A capture cannot be read; the message is part of a sentence about it."""


def parse_capture(config: DataParserConfig, split: str = "train") -> DataparserOutputs:
    """Return what a dataparser reads of a capture.

    Args:
        config: dataparser configuration with the path of the capture; it is not changed.
        split: "train", "val" or "test".

    Raises:
        CaptureError: the capture is damaged or of another format, or its cameras are invalid.
    """
    reason = unsafe_dataparser(type(config)) or unsafe_dataparser(getattr(config, "_target", object))
    if reason is not None:
        raise CaptureError(reason)
    try:
        parser = copy.deepcopy(config).setup()
        if hasattr(parser, "_setup_downscale_factor"):
            parser._setup_downscale_factor = _Downscaled(parser)
        outputs = parser.get_dataparser_outputs(split=split)
    except (CaptureError, InputError):
        raise
    except ZeroDivisionError as error:  # Nerfstudio divides by the spread of the positions.
        raise CaptureError(_ONE_PLACE) from error
    except UnidentifiedImageError as error:
        raise CaptureError(
            f"{one_line(error)}: it is damaged, or in a format that Pillow does not read, such as EXR; convert the photos to"
            " 8-bit PNG or JPEG and train the teacher again"
        ) from error
    except (Exception, SystemExit) as error:  # Every dataparser raises its own exceptions.
        hint = ""
        if isinstance(error, FileNotFoundError) and "\\" in Path(str(error.filename)).name:
            hint = " (its paths were written on Windows: replace \\ by / in its file of cameras)"
        raise CaptureError(f"{type(error).__name__}: {one_line(error)}{hint}") from error
    _check_cameras(outputs)
    return outputs


class _Downscaled:
    """Find the downscaled images of a COLMAP capture.

    Nerfstudio's dataparser prompts whether to make missing ones, and makes them with a shell command that contains the
    images' names.

    Args:
        parser: the dataparser.
    """

    def __init__(self, parser: Any) -> None:
        self._parser = parser
        self._original = parser._setup_downscale_factor

    def __call__(self, image_filenames: list[Path], *others: Any) -> Any:
        config = self._parser.config
        factor = config.downscale_factor
        if factor is None and image_filenames:
            from nerfstudio.data.dataparsers.colmap_dataparser import MAX_AUTO_RESOLUTION

            with Image.open(image_filenames[0]) as image:
                factor = 2 ** max(0, math.ceil(math.log2(max(image.size) / MAX_AUTO_RESOLUTION)))
        if factor is not None and factor > 1:
            images = config.data / config.images_path
            folder = images.with_name(f"{images.name}_{factor}")
            missing = [
                file for file in image_filenames if not (folder / Path(file).relative_to(images)).parent.exists()
            ]
            if missing:
                raise CaptureError(
                    f"its images at 1/{factor} of their size are missing: {folder} does not exist. Restore the folder, or"
                    f" make it (mkdir {folder.name}; mogrify -path {folder.name} -resize {100 / factor:g}% {images.name}/*),"
                    " or train the teacher again with another --downscale-factor"
                )
        return self._original(image_filenames, *others)


def _check_cameras(outputs: DataparserOutputs) -> None:
    cameras = outputs.cameras
    if len(outputs.image_filenames) != cameras.size:
        raise CaptureError(f"it has {len(outputs.image_filenames)} images for {cameras.size} cameras")
    for name, values in (
        ("pose", cameras.camera_to_worlds.flatten(1)),
        ("focal length", _joined(cameras.fx, cameras.fy)),
    ):
        bad = ~values.isfinite().all(-1)
        if name == "focal length":
            bad |= (values <= 0).any(-1)
        if bad.any():
            index = int(bad.nonzero()[0, 0])
            raise CaptureError(
                f"the {name} of {int(bad.sum())} of its {cameras.size} cameras is invalid,"
                f" {Path(outputs.image_filenames[index]).name} being the first"
            )
    sizes = _joined(cameras.width, cameras.height)
    if sizes.numel() and (int(sizes.min()) < 1 or int(sizes.max()) > 10**5):
        raise CaptureError(f"a camera's image has a side of {int(sizes.min())} to {int(sizes.max())} pixels")
    if not math.isfinite(float(outputs.dataparser_scale)):
        raise CaptureError(_ONE_PLACE)


def _joined(*values: Tensor) -> Tensor:
    return torch.cat([value.reshape(-1, 1) for value in values], dim=-1)
