"""Reads and compositing on a CPU, forward and backward, without the large tensors of the PyTorch version.

Rays are taken in packs of `LANES`, so that what does not read the volume is computed for all of them with vector
instructions. Results equal those of `students.sparse_volume`, which is the specification. As in `cpu_kernels`, Numba
compiles them on first use, and Python threads share the rays.
"""

from __future__ import annotations

import numpy as np

from r2l_nerfstudio.students.cpu_kernels import ball, contracted, frustum, jit, to_cell, to_unit
from r2l_nerfstudio.students.sparse_volume import DENSITY_SHIFT, MAX_EXPONENT, STOP

LANES = 16

# Rows of a pack's scratch memory, one number per ray.
_ORIGIN, _DIRECTION, _ENTER, _LENGTH = 0, 3, 6, 7
_FRACTION, _STEP = 8, 9  # of the sample in turn: position in [0, 1] of the span, length in cells
_POINT, _SHARE = 10, 13  # in the unit cube; in its cell
_DENSITY, _THICKNESS, _LIGHT, _WEIGHT = 16, 17, 18, 19
_BEHIND = 20
_ROWS = 21

_SHIFT, _MOST, _STOP = np.float32(DENSITY_SHIFT), np.float32(MAX_EXPONENT), np.float32(STOP)
_LEAST_EXPONENT = np.float32(-80.0)
"""Far below it, e to the power would be no normal number."""
_LOG2_E = np.float32(1.4426950408889634)


@jit
def _exp(x):  # noqa: ANN001, ANN202
    """Return e to the power x, for x in [-80, 80]: a power of two, times the Taylor series of what remains (at most 0.35, so
    that what is left out is below 2e-7). Unlike the library's function it is vectorized."""
    turns = x * _LOG2_E
    whole = np.int32(turns + np.float32(127.5)) - np.int32(127)
    rest = (turns - np.float32(whole)) * np.float32(0.6931471805599453)
    power = np.float32(1 / 720)
    for inverse in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        power = power * rest + np.float32(inverse)
    return power * np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)


@jit
def _begin(start, origins, directions, enter, length, is_empty, pack):  # noqa: ANN001, ANN202
    """Load a pack of rays from number `start` on; lanes beyond the last ray repeat it. Return whether any is not empty."""
    last = directions.shape[0] - 1
    group = max(1, directions.shape[0] // max(1, origins.shape[0]))
    meets = False
    for lane in range(LANES):
        ray = min(start + lane, last)
        placed = ray // group
        for axis in range(3):
            pack[_ORIGIN + axis, lane] = origins[placed, axis]
            pack[_DIRECTION + axis, lane] = directions[ray, axis]
        pack[_ENTER, lane] = enter[placed]
        pack[_LENGTH, lane] = length[placed]
        pack[_LIGHT, lane] = np.float32(0.0 if is_empty[placed] else 1.0)
        meets |= not is_empty[placed]
    return meets


@jit
def _absorb(pack):  # noqa: ANN001, ANN202
    """Weigh the sample in turn and reduce the light behind it. Return the brightest ray's light."""
    brightest = np.float32(0.0)
    for lane in range(LANES):
        exponent = min(max(pack[_DENSITY, lane] + _SHIFT, _LEAST_EXPONENT), _MOST)
        thickness = _exp(exponent) * pack[_STEP, lane]
        left = _exp(max(-thickness, _LEAST_EXPONENT))
        light = pack[_LIGHT, lane]
        pack[_THICKNESS, lane] = thickness
        pack[_WEIGHT, lane] = light * (np.float32(1.0) - left) if light >= _STOP else np.float32(0.0)
        pack[_LIGHT, lane] = light * left
        brightest = max(brightest, light * left)
    return brightest


def _located(warped):  # noqa: ANN001, ANN202
    """Return the function for one kind of space that finds the points of a pack's samples: in the unit cube, the first grid
    point of their cell, and where they are in that."""

    @jit
    def locate(is_disparity, near, far, origin, axes, nearest, low, inverse, index, pack, first):  # noqa: ANN001, ANN202
        one = np.float32(1.0)
        nz, ny, nx = index.shape
        mx, my, mz = np.uint32(nx - 2), np.uint32(ny - 2), np.uint32(nz - 2)
        row, layer = np.int32(nx), np.int32(ny * nx)
        for lane in range(LANES):
            position = pack[_FRACTION, lane]
            if is_disparity:
                position = one / (one / near + (one / far - one / near) * position)
            else:
                position = near + (far - near) * position
            distance = pack[_ENTER, lane] + pack[_LENGTH, lane] * position
            x = pack[_ORIGIN, lane] + distance * pack[_DIRECTION, lane]
            y = pack[_ORIGIN + 1, lane] + distance * pack[_DIRECTION + 1, lane]
            z = pack[_ORIGIN + 2, lane] + distance * pack[_DIRECTION + 2, lane]
            x, y, z = warped(x, y, z, origin, axes, nearest)
            x, y, z = to_unit(x, low[0], inverse[0]), to_unit(y, low[1], inverse[1]), to_unit(z, low[2], inverse[2])
            pack[_POINT, lane], pack[_POINT + 1, lane], pack[_POINT + 2, lane] = x, y, z
            x, y, z = x * np.float32(nx - 1), y * np.float32(ny - 1), z * np.float32(nz - 1)
            ix, iy, iz = to_cell(x, mx), to_cell(y, my), to_cell(z, mz)
            pack[_SHARE, lane] = x - np.float32(ix)
            pack[_SHARE + 1, lane] = y - np.float32(iy)
            pack[_SHARE + 2, lane] = z - np.float32(iz)
            first[lane] = iz * layer + iy * row + ix

    return locate


_in_ball, _in_contracted, _in_frustum = _located(ball), _located(contracted), _located(frustum)


@jit
def _locate(  # noqa: ANN202
    start, number, fractions, steps, group, last,  # noqa: ANN001
    is_disparity, near, far, warp, origin, axes, nearest, low, inverse, index, pack, first,  # noqa: ANN001
):  # fmt: skip
    """Find sample `number` of each ray of a pack."""
    for lane in range(LANES):
        placed = min(start + lane, last) // group
        pack[_FRACTION, lane] = fractions[placed, number]
        pack[_STEP, lane] = steps[placed, number]
    if warp == 0:
        _in_ball(is_disparity, near, far, origin, axes, nearest, low, inverse, index, pack, first)
    elif warp == 1:
        _in_contracted(is_disparity, near, far, origin, axes, nearest, low, inverse, index, pack, first)
    else:
        _in_frustum(is_disparity, near, far, origin, axes, nearest, low, inverse, index, pack, first)


@jit
def _shares(lane, pack):  # noqa: ANN001, ANN202
    """Return the trilinear weights of a cell's corners, x running fastest."""
    one = np.float32(1.0)
    fx, fy, fz = pack[_SHARE, lane], pack[_SHARE + 1, lane], pack[_SHARE + 2, lane]
    gx, gy, gz = one - fx, one - fy, one - fz
    a, b, c, d = gz * gy, gz * fy, fz * gy, fz * fy
    return a * gx, a * fx, b * gx, b * fx, c * gx, c * fx, d * gx, d * fx


@jit
def _corners(first, grid, row, layer):  # noqa: ANN001, ANN202
    """Return the rows of a cell's grid points, x running fastest. Unsigned, for no index is counted from the end."""
    at, one = np.uint64(first), np.uint64(1)
    up = at + row
    behind, last = at + layer, up + layer
    return (
        grid[at], grid[at + one], grid[up], grid[up + one],
        grid[behind], grid[behind + one], grid[last], grid[last + one],
    )  # fmt: skip


@jit
def _read(columns, pack, first, grid, row, layer, rows, values):  # noqa: ANN001, ANN202
    """Read the volume trilinearly for rays that still have light."""
    for lane in range(LANES):
        if pack[_LIGHT, lane] < _STOP:
            continue
        a, b, c, d, e, f, g, h = _corners(first[lane], grid, row, layer)
        wa, wb, wc, wd, we, wf, wg, wh = _shares(lane, pack)
        # Channels innermost, all corners at once: the sums stay in one register.
        for k in range(len(columns)):
            values[lane, k] = (
                wa * rows[a, k] + wb * rows[b, k] + wc * rows[c, k] + wd * rows[d, k]
                + we * rows[e, k] + wf * rows[f, k] + wg * rows[g, k] + wh * rows[h, k]
            )  # fmt: skip
        pack[_DENSITY, lane] = values[lane, 0]


@jit
def composite(  # noqa: ANN201
    columns, origins, directions, enter, length, fractions, steps, is_empty, is_disparity, near, far,  # noqa: ANN001
    warp, origin, axes, nearest, low, inverse, index, rows, out,  # noqa: ANN001
):  # fmt: skip
    """Write out [n, C + 5] = features C, accumulation, fraction, point 3 (unit cube), each times weight.

    `columns` is a tuple as long as a row of the volume, density included, so that the length is known when this is compiled.
    `directions` has equally many consecutive rays for each row of `origins`, `fractions`, `steps` and `is_empty`.
    """
    channels = len(columns)
    features = channels - 1
    group = max(1, directions.shape[0] // max(1, origins.shape[0]))
    last = directions.shape[0] - 1
    grid = index.reshape(-1)
    row, layer = np.uint64(index.shape[2]), np.uint64(index.shape[1] * index.shape[2])
    pack, first = np.zeros((_ROWS, LANES), np.float32), np.zeros(LANES, np.int32)
    values, sums = np.zeros((LANES, channels), np.float32), np.empty((LANES, channels + 4), np.float32)
    for start in range(0, directions.shape[0], LANES):
        has_light = _begin(start, origins, directions, enter, length, is_empty, pack)
        sums[:] = np.float32(0.0)
        number = 0
        while has_light and number < fractions.shape[1]:
            _locate(
                start, number, fractions, steps, group, last,
                is_disparity, near, far, warp, origin, axes, nearest, low, inverse, index, pack, first,
            )  # fmt: skip
            _read(columns, pack, first, grid, row, layer, rows, values)
            has_light = _absorb(pack) >= _STOP
            for lane in range(LANES):
                weight = pack[_WEIGHT, lane]
                for k in range(features):
                    sums[lane, k] += weight * values[lane, 1 + k]
                sums[lane, features] += weight
                sums[lane, features + 1] += weight * pack[_FRACTION, lane]
                for axis in range(3):
                    sums[lane, features + 2 + axis] += weight * pack[_POINT + axis, lane]
            number += 1
        for lane in range(min(LANES, directions.shape[0] - start)):
            for k in range(features + 5):
                out[start + lane, k] = sums[lane, k]


@jit
def spread(  # noqa: ANN201
    columns, origins, directions, enter, length, fractions, steps, is_empty, is_disparity, near, far,  # noqa: ANN001
    warp, origin, axes, nearest, low, inverse, index, rows, out, grad, grad_rows,  # noqa: ANN001
):  # fmt: skip
    """Add the gradient of `composite` for the rows to `grad_rows`, except for row 0, which is empty space; of `composite` it
    needs only the output, with the gradient for it."""
    channels = len(columns)
    features = channels - 1
    group = max(1, directions.shape[0] // max(1, origins.shape[0]))
    last = directions.shape[0] - 1
    grid = index.reshape(-1)
    row, layer = np.uint64(index.shape[2]), np.uint64(index.shape[1] * index.shape[2])
    pack, first = np.zeros((_ROWS, LANES), np.float32), np.zeros(LANES, np.int32)
    values, part = np.zeros((LANES, channels), np.float32), np.empty(channels, np.float32)
    for start in range(0, directions.shape[0], LANES):
        has_light = _begin(start, origins, directions, enter, length, is_empty, pack)
        count = min(LANES, directions.shape[0] - start)
        for lane in range(count):
            # The output's gradient times the output is what all samples together contribute to the loss.
            behind = np.float32(0.0)
            for k in range(features + 5):
                behind += out[start + lane, k] * grad[start + lane, k]
            pack[_BEHIND, lane] = behind
        number = 0
        while has_light and number < fractions.shape[1]:
            _locate(
                start, number, fractions, steps, group, last,
                is_disparity, near, far, warp, origin, axes, nearest, low, inverse, index, pack, first,
            )  # fmt: skip
            _read(columns, pack, first, grid, row, layer, rows, values)
            has_light = _absorb(pack) >= _STOP
            for lane in range(count):
                weight = pack[_WEIGHT, lane]
                if weight == 0:
                    continue
                ray = start + lane
                gain = grad[ray, features] + grad[ray, features + 1] * pack[_FRACTION, lane]
                for axis in range(3):
                    gain += grad[ray, features + 2 + axis] * pack[_POINT + axis, lane]
                for k in range(features):
                    gain += grad[ray, k] * values[lane, 1 + k]
                    part[1 + k] = grad[ray, k] * weight
                pack[_BEHIND, lane] -= gain * weight
                part[0] = (gain * pack[_LIGHT, lane] - pack[_BEHIND, lane]) * pack[_THICKNESS, lane]
                shares = _shares(lane, pack)
                for corner, point in enumerate(_corners(first[lane], grid, row, layer)):
                    for k in range(len(columns)):
                        grad_rows[point, k] += shares[corner] * part[k]
            number += 1
    grad_rows[0] = np.float32(0.0)
