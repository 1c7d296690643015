"""Nerfstudio's models without the LPIPS network they build: a teacher does not need it, and its weights are a
download."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity


class AbsentLpips(nn.Module):
    """Replaces a model's LPIPS metric. It has no parameters and adds nothing to a state dict."""

    def forward(self, *images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, ""]:
        """Return NaN on the images' device, rather than a figure from untrained weights."""
        return torch.full((), float("nan"), device=images[0].device if images else None)


_absent: ContextVar[bool] = ContextVar("lpips_absent", default=False)
_lock = threading.Lock()
_open_contexts = 0


@contextmanager
def without_lpips() -> Iterator[None]:
    """Within it, torchmetrics' LPIPS metric is created as an `AbsentLpips`, wherever it was imported from.

    It affects only the thread that entered it; it nests, and restores the library on every exit.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity as Lpips

    global _open_contexts, _real_init
    with _lock:
        if _open_contexts == 0:
            _real_init = Lpips.__init__
            Lpips.__init__ = _init
        _open_contexts += 1
    token = _absent.set(True)
    try:
        yield
    finally:
        _absent.reset(token)
        with _lock:
            _open_contexts -= 1
            if _open_contexts == 0:
                Lpips.__init__ = _real_init


def _init(self: LearnedPerceptualImagePatchSimilarity, *args: Any, **kwargs: Any) -> None:
    if not _absent.get():
        _real_init(self, *args, **kwargs)
        return
    # The class changes, not the name in the library's module, since plugins import the name at their top level.
    object.__setattr__(self, "__class__", AbsentLpips)
    nn.Module.__init__(self)
