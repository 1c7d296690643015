"""Frequency encoding of R2L and MobileR2L."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_DOUBLED = 6
"""Octaves computed from one pair of sine and cosine on a CPU: the rounding error doubles with each."""


def frequency_encode(values: Float[Tensor, "*batch dim"], num_frequencies: int) -> Float[Tensor, "*batch encoded"]:
    """Return the values, then sines and cosines of 2^0 … 2^(L-1) times them, without a factor pi (R2L, sec. 3.2).

    Always in fp32: the top frequency turns half-precision rounding of a coordinate into noise.

    Args:
        values: numbers of order one.
        num_frequencies: L; 0 returns the values only.

    Returns:
        dim * (2 L + 1) numbers: values, then for all frequencies sines, then cosines.
    """
    values = values.float()
    if num_frequencies == 0:
        return values
    frequencies = 2.0 ** torch.arange(num_frequencies, device=values.device, dtype=torch.float32)
    phases = (values[..., None, :] * frequencies[:, None]).flatten(-2)
    return torch.cat([values, phases.sin(), phases.cos()], dim=-1)


def frequency_encode_into(
    values: Float[Tensor, "batch dim"], num_frequencies: int, encoded: Float[Tensor, "batch encoded"]
) -> None:
    """Write what `frequency_encode` returns, without gradients and without temporary memory.

    On a CPU, where sines take most of an encoding's time, they are computed for every sixth octave only and doubled
    from there (sin 2x = 2 sin x cos x, cos 2x = 1 - 2 sin^2 x): the error is 7e-6 at most, 130 dB on average. Elsewhere
    the result is bit-identical.

    Args:
        values: fp32 numbers of order one.
        num_frequencies: L; may be 0.
        encoded: output.
    """
    dim = values.shape[-1]
    encoded[:, :dim] = values
    if num_frequencies == 0:
        return
    sines, cosines = encoded[:, dim:].unflatten(-1, (2, num_frequencies, dim)).unbind(1)
    if encoded.device.type != "cpu":
        frequencies = 2.0 ** torch.arange(num_frequencies, device=values.device, dtype=torch.float32)
        phases = values[:, None, :] * frequencies[:, None]
        torch.sin(phases, out=sines)
        torch.cos(phases, out=cosines)
        return
    zero, one = values.new_zeros(()), values.new_ones(())
    for octave in range(num_frequencies):
        sine, cosine = sines[:, octave], cosines[:, octave]
        if octave % _DOUBLED == 0:
            phases = values * 2.0**octave
            torch.sin(phases, out=sine)
            torch.cos(phases, out=cosine)
        else:
            before, beside = sines[:, octave - 1], cosines[:, octave - 1]
            torch.addcmul(zero, before, beside, value=2, out=sine)
            torch.addcmul(one, before, before, value=-2, out=cosine)


def encoded_dim(dim: int, num_frequencies: int) -> int:
    """Return the length of `frequency_encode`'s result for `dim` values."""
    return dim * (2 * num_frequencies + 1)
