"""`place_samples`, `SparseVolume` and `composite` in one pass on a CPU, with gradients for the volume."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

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
        """Return the arguments of `cpu_compositing`'s kernels."""
        return (self.is_disparity, self.near, self.far, *self.box)

    @property
    def box(self) -> tuple[int, np.ndarray, np.ndarray, np.float32, np.ndarray, np.ndarray]:
        """Return the arguments of `place`."""
        return (self.warp, self.origin, self.axes, self.nearest, self.low, self.inverse)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="march")


def _in_parts(work: Callable[[slice], None], groups: int, group: int) -> None:
    """Share groups of rays among as many threads as PyTorch uses."""
    threads = min(torch.get_num_threads(), max(1, groups * group // _LEAST_RAYS))
    if threads == 1:
        work(slice(0, groups))
        return
    edges = [groups * part // threads for part in range(threads + 1)]
    futures = [_pool().submit(work, slice(*pair)) for pair in zip(edges[1:-1], edges[2:], strict=True)]
    work(slice(*edges[:2]))
    for future in futures:
        future.result()


class Rays(Protocol):
    """Rays in groups that share their sample points; see `models.composited_encoding.RaySpan` for the tensors."""

    @property
    def origin(self) -> Tensor: ...
    @property
    def direction(self) -> Tensor: ...
    @property
    def lead_start(self) -> Tensor: ...
    @property
    def lead_step(self) -> Tensor: ...
    @property
    def enter(self) -> Tensor | None: ...
    @property
    def length(self) -> Tensor | None: ...
    @property
    def is_missed(self) -> Tensor | None: ...


def _array(tensor: Tensor) -> np.ndarray:
    """What is no number would be no cell either."""
    return tensor.detach().nan_to_num(0.0).contiguous().numpy()


def _columns(table: np.ndarray) -> tuple[int, ...]:
    """As the kernels take the number of a table's columns."""
    return (0,) * table.shape[1]


class _March(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, rows: Tensor, rays: Rays, space: MarchSpace, samples: int, jitter: bool
    ) -> tuple[Tensor, Tensor]:
        from r2l_nerfstudio.students.cpu_compositing import composite  # Importing Numba takes a second,
        from r2l_nerfstudio.students.cpu_kernels import place  # and Nerfstudio imports every method.

        groups, group = rays.direction.shape[:2]
        leads = (_array(rays.lead_start), _array(rays.lead_step))
        origins, directions = _array(rays.origin[:, 0]), _array(rays.direction).reshape(-1, 3)
        enter, length = np.zeros(groups, np.float32), np.ones(groups, np.float32)
        if rays.enter is not None and rays.length is not None:
            enter, length = _array(rays.enter[:, 0]), _array(rays.length[:, 0])
        table = rows.detach().contiguous().numpy()
        draws = torch.rand(groups, samples).numpy() if jitter else np.full((1, samples), 0.5, np.float32)
        fractions, steps = (np.empty((groups, samples), np.float32) for _ in range(2))
        empty = np.zeros(groups, np.bool_) if rays.is_missed is None else rays.is_missed.numpy().copy()
        out = np.empty((len(directions), table.shape[1] + 4), np.float32)

        def lines(part: slice) -> tuple[np.ndarray, ...]:
            own = slice(part.start * group, part.stop * group)
            return origins[part], directions[own], enter[part], length[part], fractions[part], steps[part], empty[part]

        def work(part: slice) -> None:
            place(
                leads[0][part], leads[1][part], draws[part] if jitter else draws, space.positions, *space.box,
                space.occupied, space.cells, fractions[part], steps[part], empty[part],
            )  # fmt: skip
            own = slice(part.start * group, part.stop * group)
            composite(_columns(table), *lines(part), *space.geometry, space.index, table, out[own])

        _in_parts(work, groups, group)
        found, is_empty = torch.from_numpy(out), torch.from_numpy(empty)
        context.save_for_backward(rows, found)  # The volume is read again.
        context.kept = (lines, groups, group, space)
        context.mark_non_differentiable(is_empty)
        return found, is_empty

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        from r2l_nerfstudio.students.cpu_compositing import spread

        lines, groups, group, space = ctx.kept
        table, out = (tensor.detach().contiguous().numpy() for tensor in ctx.saved_tensors)
        grad = grad_outputs[0].contiguous().float().numpy()
        sums: dict[int, np.ndarray] = {}

        def work(part: slice) -> None:
            own = slice(part.start * group, part.stop * group)
            sums[part.start] = np.zeros_like(table)  # One for each thread: their rays read the same rows.
            gradient = (out[own], grad[own], sums[part.start])
            spread(_columns(table), *lines(part), *space.geometry, space.index, table, *gradient)

        _in_parts(work, groups, group)
        total, *others = (sums[start] for start in sorted(sums))
        for other in others:
            total += other
        return torch.from_numpy(total), None, None, None, None


def march(
    rows: Float[Tensor, "rows values"], rays: Rays, space: MarchSpace, samples: int, jitter: bool = False
) -> tuple[Float[Tensor, "rays composited"], Bool[Tensor, "groups"]]:
    """Return features, accumulation, fraction and point of rays, as `Composited` side by side, and which groups are empty.

    Args:
        rows: rows of the volume, on the CPU, fp32.
        rays: rays on the CPU.
        space: space in which they are marched.
        samples: points per ray.
        jitter: draw the points at random inside their shares.
    """
    return _March.apply(rows, rays, space, samples, jitter)
