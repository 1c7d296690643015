"""Small constants on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def constant(like: Tensor, values: Sequence[float]) -> Float[Tensor, "values"]:
    """Return numbers as a vector of another tensor's type, on its device.

    A GPU fills the vector itself: `Tensor.new_tensor` copies it from the host, and waits for the GPU to get there.
    """
    if like.device.type == "cuda":
        return torch.stack([like.new_full((), value) for value in values])
    return like.new_tensor(values)
