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
"""Per thread."""


@dataclass(frozen=True)
class MarchSpace:
    """Where rays are marched, as arrays for the kernels."""

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
        """As `march` takes it."""
        return (self.is_disparity, self.near, self.far, *self.box)

    @property
    def box(self) -> tuple[int, np.ndarray, np.ndarray, np.float32, np.ndarray, np.ndarray]:
        """As `place` takes it."""
        return (self.warp, self.origin, self.axes, self.nearest, self.low, self.inverse)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="march")


def _in_parts(work: Callable[[slice], None], groups: int, group: int) -> None:
    """Share groups of rays among as many threads as torch uses."""
    threads = min(torch.get_num_threads(), max(1, groups * group // _LEAST_RAYS))
    if threads == 1:
        work(slice(0, groups))
        return
    edges = [groups * part // threads for part in range(threads + 1)]
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
        lead_start: Tensor,
        lead_step: Tensor,
        missed: Tensor | None,
        space: MarchSpace,
        samples: int,
        jitter: bool,
    ) -> tuple[Tensor, Tensor]:
        from r2l_nerfstudio.students import cpu_kernels  # Numba: a second to import, and Nerfstudio loads every method

        rays, groups = len(start), len(lead_start)
        group = rays // groups if groups else 1
        starts, steps, lead_starts, lead_steps = (
            t.detach().nan_to_num(0.0).contiguous().numpy() for t in (start, step, lead_start, lead_step)
        )
        table = rows.detach().contiguous().numpy()
        draws = torch.rand(groups, samples).numpy() if jitter else np.full((1, samples), 0.5, np.float32)
        fractions, lengths = (np.empty((groups, samples), np.float32) for _ in range(2))
        empty = np.zeros(groups, np.bool_) if missed is None else missed.numpy().copy()
        out = np.empty((rays, table.shape[1] + 4), np.float32)
        keep = rows.requires_grad
        kept = (rays, samples) if keep else (1, 1)
        values, weights = np.empty((*kept, table.shape[1]), np.float32), np.empty(kept, np.float32)

        def work(part: slice) -> None:
            own = slice(part.start * group, part.stop * group)
            placed = (fractions[part], lengths[part])
            leads = (lead_starts[part], lead_steps[part], draws[part] if jitter else draws)
            cpu_kernels.place(*leads, space.positions, *space.box, space.occupied, space.cells, *placed, empty[part])
            held = (values[own], weights[own]) if keep else (values, weights)
            cpu_kernels.march(
                starts[own], steps[own], group, *placed, empty[part], *space.geometry, space.index, table,
                np.float32(DENSITY_SHIFT), np.float32(STOP), out[own], keep, *held,
            )  # fmt: skip

        _in_parts(work, groups, group)
        context.kept = (starts, steps, group, fractions, lengths, empty, space, table, values, weights)
        is_empty = torch.from_numpy(empty)
        context.mark_non_differentiable(is_empty)
        return torch.from_numpy(out), is_empty

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        from r2l_nerfstudio.students import cpu_kernels

        space: MarchSpace
        grad, _ = grad_outputs
        starts, steps, group, fractions, lengths, empty, space, table, values, weights = ctx.kept
        grad_rows = np.zeros_like(table)
        # One thread: two would write to the same rows.
        cpu_kernels.unmarch(
            starts, steps, group, fractions, lengths, empty, *space.geometry, space.index, table,
            np.float32(DENSITY_SHIFT), values, weights, grad.contiguous().float().numpy(), grad_rows,
        )  # fmt: skip
        return torch.from_numpy(grad_rows), *[None] * 8


def march(
    rows: Float[Tensor, "rows values"],
    start: Float[Tensor, "rays 3"],
    step: Float[Tensor, "rays 3"],
    lead_start: Float[Tensor, "groups 3"],
    lead_step: Float[Tensor, "groups 3"],
    missed: Bool[Tensor, "groups"] | None,
    space: MarchSpace,
    samples: int,
    jitter: bool = False,
) -> tuple[Float[Tensor, "rays composited"], Tensor]:
    """Features, accumulation, fraction and point of rays, as `Composited` side by side, and which groups are empty.

    Args:
        rows: of the volume, on the CPU, fp32.
        start: of the rays, as `RayCode.line` gives it.
        step: likewise.
        lead_start: of the ray by which the points of a group are placed; all groups are of one size.
        lead_step: likewise.
        missed: groups that are empty in any case.
        space: where they are marched.
        samples: points per ray.
        jitter: draw the points at random inside their shares.
    """
    return _March.apply(rows, start, step, lead_start, lead_step, missed, space, samples, jitter)
