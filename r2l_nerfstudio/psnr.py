"""Peak signal-to-noise ratio, for a peak of 1."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

LEAST_ERROR = 1e-12
"""Smallest mean squared error that `decibels` distinguishes: 120 dB."""


def psnr(values: Float[Tensor, "*any"], truth: Float[Tensor, "*any"]) -> float:
    """Return the PSNR in dB of values against others of the same shape. Nothing is clamped.

    Returns:
        Infinity for equal values; minus infinity where shapes differ or a value is not finite.
    """
    if values.shape != truth.shape or not bool(values.isfinite().all()):
        return -math.inf
    error = float((values.double() - truth.double()).square().mean())
    return math.inf if error == 0 else decibels(error, least=0.0)


def decibels(error: float, least: float = LEAST_ERROR) -> float:
    """Return the PSNR in dB of a mean squared error.

    Args:
        error: mean squared error.
        least: smallest error; it keeps the result finite.
    """
    return -10 * math.log10(max(error, least))
