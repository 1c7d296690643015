"""Frequency encoding as R2L and MobileR2L use it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def frequency_encode(values: Float[Tensor, "*batch dim"], num_frequencies: int) -> Float[Tensor, "*batch encoded"]:
    """The values themselves, then sines and cosines of 2^0 … 2^(L-1) times them, without a factor pi (R2L, sec. 3.2).

    Always in fp32: the top frequency turns half-precision rounding of a coordinate into noise.

    Args:
        values: numbers of order one.
        num_frequencies: L; 0 returns the values alone.

    Returns:
        dim * (2 L + 1) numbers: values, then for all frequencies sines, then cosines.
    """
    values = values.float()
    if num_frequencies == 0:
        return values
    frequencies = 2.0 ** torch.arange(num_frequencies, device=values.device, dtype=torch.float32)
    phases = (values[..., None, :] * frequencies[:, None]).flatten(-2)
    return torch.cat([values, phases.sin(), phases.cos()], dim=-1)


def encoded_dim(dim: int, num_frequencies: int) -> int:
    """Length of `frequency_encode`'s result for `dim` values."""
    return dim * (2 * num_frequencies + 1)
