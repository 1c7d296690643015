"""Frames of any size, run by engines that are compiled for few sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from r2l_nerfstudio.students.mobile import MobileR2L
from r2l_nerfstudio.students.resmlp import ResMLP

GRID_STEP = 8
"""Cells; on GPUs the sides of ray images are rounded up to a multiple of it, so that few sizes are planned or
captured."""


def reads_ray_image(network: nn.Module) -> bool:
    """Return whether a network reads ray images [batch, in_dim, rows, columns] rather than rays [rays, in_dim]."""
    return isinstance(network, MobileR2L)


def in_dim(network: nn.Module) -> int:
    """Return the length of the ray encoding that a student's network reads."""
    return cast(MobileR2L | ResMLP, network).in_dim


def out_dim(network: nn.Module) -> int:
    """Return the number of values per ray, or per pixel of a ray image, that a student's network gives."""
    return network.get_parameter("tail.weight").shape[0]


def upsampling_factor(network: nn.Module) -> int:
    """Return the pixels along each side of a cell: 1 for a network that reads single rays."""
    return network.factor if isinstance(network, MobileR2L) else 1


def device_of(network: nn.Module) -> torch.device:
    """Return the device that a student's network is on."""
    return network.get_parameter("head.weight").device


def chunk_rows(device: torch.device) -> int:
    """Return the rays per call of a ResMLP, whose hidden layers then stay in cache."""
    return 65536 if device.type == "cuda" else 2048


def in_chunks(
    run: Callable[[Float[Tensor, "chunk in_dim"], Float[Tensor, "chunk out_dim"]], None],
    encoded: Float[Tensor, "rays in_dim"],
    out_dim: int,
    chunk: int,
) -> Float[Tensor, "rays out_dim"]:
    """Run any number of rays in calls on exactly `chunk` of them; the last call is filled up with zeros.

    Args:
        run: reads its first argument and writes its values into its second, both contiguous.
        encoded: all rays, encoded.
        out_dim: values per ray.
        chunk: rays per call.
    """
    encoded = encoded.contiguous()
    count = encoded.shape[0]
    values = encoded.new_empty(count, out_dim)
    whole = count - count % chunk
    for start in range(0, whole, chunk):
        run(encoded[start : start + chunk], values[start : start + chunk])
    if whole < count:
        last = encoded.new_zeros(chunk, encoded.shape[1])
        last[: count - whole] = encoded[whole:]
        filled = encoded.new_empty(chunk, out_dim)
        run(last, filled)
        values[whole:] = filled[: count - whole]
    return values


def to_bucket(
    encoded: Float[Tensor, "batch in_dim rows columns"], step: int
) -> Float[Tensor, "batch in_dim more_rows more_columns"]:
    """Repeat the last row and column of a ray image until both sides are multiples of `step`, so that few shapes occur.

    Pixels beyond the image, and those next to them, are invalid: see `MobileR2L`.
    """
    rows, columns = encoded.shape[-2:]
    return pad(encoded, (0, -columns % step, 0, -rows % step), mode="replicate")


def from_bucket(
    values: Float[Tensor, "batch out_dim more_height more_width"], rows: int, columns: int, factor: int
) -> Float[Tensor, "batch out_dim height width"]:
    """Return the pixels of the first `rows` x `columns` cells."""
    return values[..., : rows * factor, : columns * factor]
