"""`place_samples`, `SparseVolume` and `composite` in one pass on a CPU, with gradients for the volume."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from r2l_nerfstudio.students.sparse_volume import DENSITY_SHIFT, STOP

_LEAST_RAYS = 512
"""Least rays per thread."""


@dataclass(frozen=True)
class MarchSpace:
    """The space in which rays are marched, as arrays for the kernels."""

    is_disparity: bool
    near: np.float32
    far: np.float32
    warp: int
    origin: np.ndarray
    axes: np.ndarray
    nearest: np.float32
    low: np.ndarray
    inverse: np.ndarray
    positions: np.ndarray
    occupied: np.ndarray
    index: np.ndarray
    cells: np.ndarray

    @property
    def geometry(
        self,
    ) -> tuple[bool, np.float32, np.float32, int, np.ndarray, np.ndarray, np.float32, np.ndarray, np.ndarray]:
        """Return the arguments of `march`."""
        return (self.is_disparity, self.near, self.far, *self.box)

    @property
    def box(self) -> tuple[int, np.ndarray, np.ndarray, np.float32, np.ndarray, np.ndarray]:
        """Return the arguments of `place`."""
        return (self.warp, self.origin, self.axes, self.nearest, self.low, self.inverse)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="march")


def _in_parts(work: Callable[[slice], None], rays: int) -> None:
    """Share rays among as many threads as PyTorch uses."""
    threads = min(torch.get_num_threads(), max(1, rays // _LEAST_RAYS))
    if threads == 1:
        work(slice(0, rays))
        return
    edges = [rays * part // threads for part in range(threads + 1)]
    futures = [_pool().submit(work, slice(*pair)) for pair in zip(edges[1:-1], edges[2:], strict=True)]
    work(slice(*edges[:2]))
    for future in futures:
        future.result()


class _March(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        rows: Tensor,
        start: Tensor,
        step: Tensor,
        missed: Tensor | None,
        space: MarchSpace,
        samples: int,
        jitter: bool,
    ) -> tuple[Tensor, Tensor]:
        from r2l_nerfstudio.students import (
            cpu_kernels,  # Importing Numba takes a second, and Nerfstudio imports every method.
        )

        rays = len(start)
        starts, steps = (t.detach().nan_to_num(0.0).contiguous().numpy() for t in (start, step))
        table = rows.detach().contiguous().numpy()
        draws = torch.rand(rays, samples).numpy() if jitter else np.full((1, samples), 0.5, np.float32)
        fractions, lengths = (np.empty((rays, samples), np.float32) for _ in range(2))
        empty = np.zeros(rays, np.bool_) if missed is None else missed.numpy().copy()
        out = np.empty((rays, table.shape[1] + 4), np.float32)
        keep = rows.requires_grad
        kept = (rays, samples) if keep else (1, 1)
        values, weights = np.empty((*kept, table.shape[1]), np.float32), np.empty(kept, np.float32)

        def work(part: slice) -> None:
            ours = (starts[part], steps[part])
            placed = (fractions[part], lengths[part])
            drawn = draws[part] if jitter else draws
            cpu_kernels.place(
                *ours, drawn, space.positions, *space.box, space.occupied, space.cells, *placed, empty[part]
            )
            held = (values[part], weights[part]) if keep else (values, weights)
            cpu_kernels.march(
                *ours, *placed, empty[part], *space.geometry, space.index, table,
                np.float32(DENSITY_SHIFT), np.float32(STOP), out[part], keep, *held,
            )  # fmt: skip

        _in_parts(work, rays)
        context.kept = (starts, steps, fractions, lengths, empty, space, table, values, weights)
        is_empty = torch.from_numpy(empty)
        context.mark_non_differentiable(is_empty)
        return torch.from_numpy(out), is_empty

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        from r2l_nerfstudio.students import cpu_kernels

        space: MarchSpace
        grad, _ = grad_outputs
        starts, steps, fractions, lengths, empty, space, table, values, weights = ctx.kept
        grad_rows = np.zeros_like(table)
        # One thread: two would write to the same rows.
        cpu_kernels.unmarch(
            starts, steps, fractions, lengths, empty, *space.geometry, space.index, table,
            np.float32(DENSITY_SHIFT), values, weights, grad.contiguous().float().numpy(), grad_rows,
        )  # fmt: skip
        return torch.from_numpy(grad_rows), None, None, None, None, None, None


def march(
    rows: Float[Tensor, "rows values"],
    start: Float[Tensor, "rays 3"],
    step: Float[Tensor, "rays 3"],
    missed: Bool[Tensor, "rays"] | None,
    space: MarchSpace,
    samples: int,
    jitter: bool = False,
) -> tuple[Float[Tensor, "rays composited"], Tensor]:
    """Return features, accumulation, fraction and point of rays, as in `Composited`, side by side, and which rays are
    empty.

    Args:
        rows: rows of the volume, on the CPU, fp32.
        start: start of the rays, as `RayCode.line` returns it.
        step: step of the rays, likewise.
        missed: rays that are empty in any case.
        space: space in which they are marched.
        samples: points per ray.
        jitter: draw the points at random inside their shares.
    """
    return _March.apply(rows, start, step, missed, space, samples, jitter)
