"""Kinds of space, and placement of sample points, on a CPU: ray by ray, without the large tensors of the PyTorch version.

Results equal those of `rays.placement.place_samples`, which is the specification. Numba compiles the kernels on first use,
keeps them in its cache, and releases the GIL, so that Python threads share the rays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

jit: Callable[[Callable[..., Any]], Callable[..., Any]] = njit(
    nogil=True, cache=True, error_model="numpy", fastmath=True
)


@jit
def ball(x, y, z, origin, axes, nearest):  # noqa: ANN001, ANN202
    return x, y, z


@jit
def contracted(x, y, z, origin, axes, nearest):  # noqa: ANN001, ANN202
    norm = max(np.sqrt(x * x + y * y + z * z), np.float32(1.0))
    scale = (np.float32(2.0) - np.float32(1.0) / norm) / norm
    return x * scale, y * scale, z * scale


@jit
def frustum(x, y, z, origin, axes, nearest):  # noqa: ANN001, ANN202
    x, y, z = x - origin[0], y - origin[1], z - origin[2]
    u = x * axes[0, 0] + y * axes[1, 0] + z * axes[2, 0]
    v = x * axes[0, 1] + y * axes[1, 1] + z * axes[2, 1]
    depth = -(x * axes[0, 2] + y * axes[1, 2] + z * axes[2, 2])
    disparity = np.float32(1.0) / max(depth, nearest)
    return u * disparity, v * disparity, disparity


@jit
def to_cell(x, most):  # noqa: ANN001, ANN202
    """Round down to an index. As unsigned, what NaN becomes is clamped too: arrays are read without a bounds check."""
    return np.int32(min(np.uint32(np.int32(x)), most))


@jit
def to_unit(x, low, inverse):  # noqa: ANN001, ANN202
    return min(max((x - low) * inverse, np.float32(0.0)), np.float32(1.0))


def _path_along(warped):  # noqa: ANN001, ANN202
    """Return a function that finds the points of the unit cube at many positions of one ray. There is one for each kind of
    space, since a loop without branches is vectorized."""

    @jit
    def path(positions, ray, starts, steps, origin, axes, nearest, low, inverse, xs, ys, zs):  # noqa: ANN001, ANN202
        for j in range(positions.shape[0]):
            x = starts[ray, 0] + positions[j] * steps[ray, 0]
            y = starts[ray, 1] + positions[j] * steps[ray, 1]
            z = starts[ray, 2] + positions[j] * steps[ray, 2]
            x, y, z = warped(x, y, z, origin, axes, nearest)
            xs[j] = to_unit(x, low[0], inverse[0])
            ys[j] = to_unit(y, low[1], inverse[1])
            zs[j] = to_unit(z, low[2], inverse[2])

    return path


_ball_path, _contracted_path, _frustum_path = _path_along(ball), _path_along(contracted), _path_along(frustum)


@jit
def place(  # noqa: ANN201
    starts, steps, draws, positions, warp, origin, axes, nearest, low, inverse,  # noqa: ANN001
    occupied, sizes, fractions, deltas, is_empty,  # noqa: ANN001
):  # fmt: skip
    """Write fractions [n, K], step lengths in cells [n, K] and emptiness [n].

    `occupied` is uint8 [z, y, x]; `sizes` the volume's cells along x, y, z; `draws` [n, K] in [0, 1) or [1, K] of 0.5.
    """
    zero, one = np.float32(0.0), np.float32(1.0)
    count = fractions.shape[1]
    num_probes = positions.shape[0]
    per = one / np.float32(num_probes)
    xs, ys, zs = np.empty(num_probes, np.float32), np.empty(num_probes, np.float32), np.empty(num_probes, np.float32)
    weight = np.empty(num_probes, np.float32)
    jittered = draws.shape[0] == starts.shape[0]
    nz, ny, nx = occupied.shape
    cells = occupied.reshape(-1)
    sx, sy, sz = np.float32(nx), np.float32(ny), np.float32(nz)
    mx, my, mz = np.uint32(nx - 1), np.uint32(ny - 1), np.uint32(nz - 1)
    row, layer = np.int32(nx), np.int32(ny * nx)
    for ray in range(starts.shape[0]):
        fractions[ray] = zero
        deltas[ray] = zero
        if is_empty[ray]:
            continue
        total = zero
        if warp == 0:
            _ball_path(positions, ray, starts, steps, origin, axes, nearest, low, inverse, xs, ys, zs)
        elif warp == 1:
            _contracted_path(positions, ray, starts, steps, origin, axes, nearest, low, inverse, xs, ys, zs)
        else:
            _frustum_path(positions, ray, starts, steps, origin, axes, nearest, low, inverse, xs, ys, zs)
        for j in range(num_probes):
            ix, iy, iz = to_cell(xs[j] * sx, mx), to_cell(ys[j] * sy, my), to_cell(zs[j] * sz, mz)
            here = np.float32(cells[np.uint32(iz * layer + iy * row + ix)])
            weight[j] = here
            total += here
        is_empty[ray] = total == 0
        if total == 0:
            continue
        j = -1
        before, here = zero, zero
        length = zero
        share = total / np.float32(count)
        drawn = ray if jittered else 0
        for i in range(count):
            wanted = share * (np.float32(i) + draws[drawn, i])
            while j < 0 or (wanted >= before + here and j < num_probes - 1):
                j += 1
                if j > 0:
                    before += here
                here = weight[j]
                if here > 0:
                    first, last = max(j - 1, 0), min(j + 1, num_probes - 1)
                    x, y, z = xs[last] - xs[first], ys[last] - ys[first], zs[last] - zs[first]
                    x, y, z = x * sizes[0], y * sizes[1], z * sizes[2]
                    length = np.sqrt(x * x + y * y + z * z) / np.float32(last - first)
            fractions[ray, i] = (np.float32(j) + (wanted - before)) * per
            deltas[ray, i] = length * share
