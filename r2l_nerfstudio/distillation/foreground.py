"""Where the teacher sees something: part of what a student learns from is drawn there."""

from __future__ import annotations

from jaxtyping import Int64, UInt8
from torch import Tensor

TRIES = 8
LEAST_ACCUMULATION = 2  # of 255: less is a teacher's haze


def first_in_foreground(accumulation: UInt8[Tensor, "tries draws"]) -> Int64[Tensor, "draws"]:
    """Which try of every draw to take: the first that sees something, else the first of all.

    Tries instead of a list of all pixels that see something: nothing to keep up to date while views come and go, nothing
    that waits for a GPU.

    Args:
        accumulation: of the pixels tried, of 255.
    """
    return (accumulation > LEAST_ACCUMULATION).int().argmax(0)
