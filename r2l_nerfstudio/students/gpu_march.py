"""Reading a volume along rays and compositing it in one launch on a GPU, with gradients for the volume.

In PyTorch's operators the gradients of the rows are sorted by row, one grid corner after the other: 774 ms of 912 ms of a
`mobile-r2l`'s training step on an H100.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from r2l_nerfstudio.students.sparse_volume import DENSITY_SHIFT, MAX_EXPONENT, STOP, composite, read_rows

_RAYS = 64
"""Rays of a program."""


class _March(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, points: Tensor, *placed: Tensor) -> Tensor:
        from r2l_nerfstudio.students import gpu_kernels

        out = rows.new_empty(len(points), rows.shape[1] + 4)
        _launch(gpu_kernels.forward, rows, index, points, *placed, out)
        ctx.save_for_backward(rows, index, points, *placed, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        from r2l_nerfstudio.students import gpu_kernels

        kept = ctx.saved_tensors
        gradient = torch.zeros_like(kept[0])
        _launch(gpu_kernels.backward, *kept, grad_outputs[0].contiguous(), gradient)
        return gradient, None, None, None, None, None


def _launch(kernel: Any, rows: Tensor, index: Tensor, points: Tensor, lengths: Tensor, *rest: Tensor) -> None:
    rays, samples = points.shape[:2]
    if rays == 0:
        return
    z, y, x = index.shape
    width = rows.shape[1]
    columns = 1 << (width - 1).bit_length()
    kernel[(-(-rays // _RAYS),)](
        rows, index, points, lengths, *rest, rays, samples, rays // len(lengths), x, y, z, width,
        DENSITY_SHIFT, MAX_EXPONENT, STOP, RAYS=_RAYS, COLUMNS=columns,
    )  # fmt: skip


def march(
    rows: Float[Tensor, "rows values"],
    index: Int32[Tensor, "z y x"],
    points: Float[Tensor, "rays samples 3"],
    lengths: Float[Tensor, "groups samples"],
    fractions: Float[Tensor, "groups samples"],
    is_empty: Bool[Tensor, "groups"],
) -> Float[Tensor, "rays sums"]:
    """Return `composite` of `read_rows` at the sample points: features, accumulation, fraction, point, side by side.

    NeRF, eq. 3, with features instead of colors. The row of empty space gets no gradient. Gradients are summed in an
    order that differs from call to call.

    Args:
        rows: fp32.
        index: the row of each grid point.
        points: of the unit cube.
        lengths: of the samples, in cells; rays that follow one another share a group's.
        fractions: positions of the samples in the rays' span.
        is_empty: groups that meet nothing.
    """
    read = (index, points, lengths, fractions, is_empty.to(torch.uint8))
    return _March.apply(rows.contiguous(), *(tensor.contiguous() for tensor in read))  # pyright: ignore[reportReturnType]


@cache
def works(device: torch.device) -> bool:
    """Whether the kernels compile for a device, and agree there with PyTorch: they need Triton and a C compiler."""
    try:
        return _agrees(device)
    except Exception:  # Whatever a missing compiler or an incomplete installation raises.
        return False


def _agrees(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    rays, samples, channels = 70, 6, 4

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    rows = (4 * random(28, 1 + channels)).requires_grad_()
    index = torch.arange(60, device=device, dtype=torch.int32).view(3, 4, 5) % 28
    points, lengths, fractions = random(rays, samples, 3), random(rays // 2, samples), random(rays // 2, samples)
    is_empty = torch.arange(rays // 2, device=device) % 5 == 0
    weights = random(rays, channels + 5)
    with torch.enable_grad():
        found = march(rows, index, points, lengths, fractions, is_empty)
        (own,) = torch.autograd.grad((weights * found).sum(), rows)
        each = [tensor.repeat_interleave(2, 0) for tensor in (lengths, fractions, is_empty)]
        truth = composite(read_rows(rows, index, points), each[0], each[1], points, each[2])
        wanted = torch.cat(truth, dim=-1)
        (expected,) = torch.autograd.grad((weights * wanted).sum(), rows)
    return torch.allclose(found, wanted, atol=1e-4) and torch.allclose(own[1:], expected[1:], rtol=1e-3, atol=1e-3)
