"""Placement, reads and compositing on a CPU, one ray at a time in a single pass, without the large tensors of the
PyTorch version.

Results equal those of `rays.placement.place_samples` and `students.composited.composite`, which are the specification.
Numba compiles the kernels on first use, keeps them in its cache, and releases the GIL, so that Python threads share the
rays.
"""

from __future__ import annotations

import numpy as np
from numba import njit

MAX_PROBES = 256

_jit = njit(nogil=True, cache=True, error_model="numpy", fastmath=True)


@_jit
def _ball(x, y, z, origin, axes, nearest):  # noqa: ANN001, ANN202
    return x, y, z


@_jit
def _contracted(x, y, z, origin, axes, nearest):  # noqa: ANN001, ANN202
    norm = max(np.sqrt(x * x + y * y + z * z), np.float32(1.0))
    scale = (np.float32(2.0) - np.float32(1.0) / norm) / norm
    return x * scale, y * scale, z * scale


@_jit
def _frustum(x, y, z, origin, axes, nearest):  # noqa: ANN001, ANN202
    x, y, z = x - origin[0], y - origin[1], z - origin[2]
    u = x * axes[0, 0] + y * axes[1, 0] + z * axes[2, 0]
    v = x * axes[0, 1] + y * axes[1, 1] + z * axes[2, 1]
    depth = -(x * axes[0, 2] + y * axes[1, 2] + z * axes[2, 2])
    disparity = np.float32(1.0) / max(depth, nearest)
    return u * disparity, v * disparity, disparity


@_jit
def _cell(x, most):  # noqa: ANN001, ANN202
    """Round down to an index. As unsigned, what NaN becomes is clamped too: arrays are read without a bounds check."""
    return np.int32(min(np.uint32(np.int32(x)), most))


@_jit
def _unit(x, low, inverse):  # noqa: ANN001, ANN202
    return min(max((x - low) * inverse, np.float32(0.0)), np.float32(1.0))


@_jit
def _point(distance, group, ray, origins, directions, warp, origin, axes, nearest, low, inverse):  # noqa: ANN001, ANN202
    """Return the unit-cube coordinates of one point of a ray."""
    x = origins[group, 0] + distance * directions[ray, 0]
    y = origins[group, 1] + distance * directions[ray, 1]
    z = origins[group, 2] + distance * directions[ray, 2]
    if warp == 1:
        x, y, z = _contracted(x, y, z, origin, axes, nearest)
    elif warp == 2:
        x, y, z = _frustum(x, y, z, origin, axes, nearest)
    return _unit(x, low[0], inverse[0]), _unit(y, low[1], inverse[1]), _unit(z, low[2], inverse[2])


def _path_along(warped):  # noqa: ANN001, ANN202
    """Compute `_point` at many positions of one ray. There is one function per warp, since a loop without branches is
    vectorized."""

    @_jit
    def path(positions, ray, starts, steps, origin, axes, nearest, low, inverse, xs, ys, zs):  # noqa: ANN001, ANN202
        for j in range(positions.shape[0]):
            x = starts[ray, 0] + positions[j] * steps[ray, 0]
            y = starts[ray, 1] + positions[j] * steps[ray, 1]
            z = starts[ray, 2] + positions[j] * steps[ray, 2]
            x, y, z = warped(x, y, z, origin, axes, nearest)
            xs[j] = _unit(x, low[0], inverse[0])
            ys[j] = _unit(y, low[1], inverse[1])
            zs[j] = _unit(z, low[2], inverse[2])

    return path


_ball_path, _contracted_path, _frustum_path = _path_along(_ball), _path_along(_contracted), _path_along(_frustum)


@_jit
def _position(fraction, is_disparity, near, far):  # noqa: ANN001, ANN202
    """Return the position in steps of the ray's span for a position in [0, 1] of the scene's spacing."""
    if is_disparity:
        return np.float32(1.0) / (np.float32(1.0) / near + (np.float32(1.0) / far - np.float32(1.0) / near) * fraction)
    return near + (far - near) * fraction


@_jit
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
            ix, iy, iz = _cell(xs[j] * sx, mx), _cell(ys[j] * sy, my), _cell(zs[j] * sz, mz)
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


@_jit
def _interpolate(x, y, z, index, rows, value, channels):  # noqa: ANN001, ANN202
    """Read all channels trilinearly at a point of the unit cube."""
    nz, ny, nx = index.shape
    x, y, z = x * np.float32(nx - 1), y * np.float32(ny - 1), z * np.float32(nz - 1)
    ix, iy, iz = _cell(x, np.uint32(nx - 2)), _cell(y, np.uint32(ny - 2)), _cell(z, np.uint32(nz - 2))
    fx, fy, fz = x - np.float32(ix), y - np.float32(iy), z - np.float32(iz)
    gx, gy, gz = np.float32(1.0) - fx, np.float32(1.0) - fy, np.float32(1.0) - fz
    near, far = index[iz], index[iz + 1]
    a, b, c, d = near[iy, ix], near[iy, ix + 1], near[iy + 1, ix], near[iy + 1, ix + 1]
    e, f, g, h = far[iy, ix], far[iy, ix + 1], far[iy + 1, ix], far[iy + 1, ix + 1]
    wa, wb, wc, wd = gz * gy * gx, gz * gy * fx, gz * fy * gx, gz * fy * fx
    we, wf, wg, wh = fz * gy * gx, fz * gy * fx, fz * fy * gx, fz * fy * fx
    # Channels innermost, all corners at once: sums stay in registers, and the loop is vectorized.
    for k in range(channels):
        value[k] = (
            wa * rows[a, k] + wb * rows[b, k] + wc * rows[c, k] + wd * rows[d, k]
            + we * rows[e, k] + wf * rows[f, k] + wg * rows[g, k] + wh * rows[h, k]
        )  # fmt: skip


@_jit
def march(  # noqa: ANN201
    origins, directions, enter, length, fractions, deltas, is_empty, is_disparity, near, far,  # noqa: ANN001
    warp, origin, axes, nearest, low, inverse,  # noqa: ANN001
    index, rows, shift, stop, out, keep, values, weights,  # noqa: ANN001
):  # fmt: skip
    """Composite along rays: out [n, C + 5] = features C, accumulation, fraction, point 3 (unit cube), each times weight.

    rows [R, 1 + C]: raw density, features. With `keep`, values [n, K, 1 + C] and weights [n, K] are written for `unmarch`.
    `directions` has equally many consecutive rays for each row of `origins`, `fractions`, `deltas` and `is_empty`.
    """
    channels = rows.shape[1]
    features = channels - 1
    one = np.float32(1.0)
    group = max(1, directions.shape[0] // max(1, origins.shape[0]))
    value = np.empty(channels, np.float32)
    for ray in range(directions.shape[0]):
        for c in range(out.shape[1]):
            out[ray, c] = np.float32(0.0)
        placed = ray // group
        if is_empty[placed]:
            if keep:
                for i in range(fractions.shape[1]):
                    weights[ray, i] = np.float32(0.0)
                    for c in range(channels):
                        values[ray, i, c] = np.float32(0.0)
            continue
        through = one
        for i in range(fractions.shape[1]):
            s = fractions[placed, i]
            if through < stop:
                if not keep:
                    break
                weights[ray, i] = np.float32(0.0)
                for c in range(channels):
                    values[ray, i, c] = np.float32(0.0)
                continue
            distance = enter[placed] + length[placed] * _position(s, is_disparity, near, far)
            x, y, z = _point(distance, placed, ray, origins, directions, warp, origin, axes, nearest, low, inverse)
            _interpolate(x, y, z, index, rows, value, channels)
            thick = np.exp(min(value[0] + shift, np.float32(10.0))) * deltas[placed, i]
            left = np.exp(-thick)
            w = through * (one - left)
            through *= left
            for c in range(features):
                out[ray, c] += w * value[1 + c]
            out[ray, features] += w
            out[ray, features + 1] += w * s
            out[ray, features + 2] += w * x
            out[ray, features + 3] += w * y
            out[ray, features + 4] += w * z
            if keep:
                weights[ray, i] = w
                for c in range(channels):
                    values[ray, i, c] = value[c]


@_jit
def unmarch(  # noqa: ANN201
    origins, directions, enter, length, fractions, deltas, is_empty, is_disparity, near, far,  # noqa: ANN001
    warp, origin, axes, nearest, low, inverse,  # noqa: ANN001
    index, rows, shift, values, weights, grad, grad_rows,  # noqa: ANN001
):  # fmt: skip
    """Add the gradient of `march` for the rows to `grad_rows`. Row 0 stands for empty space and gets none."""
    channels = rows.shape[1]
    features = channels - 1
    count = fractions.shape[1]
    nz, ny, nx = index.shape
    one = np.float32(1.0)
    group = max(1, directions.shape[0] // max(1, origins.shape[0]))
    points = np.empty((count, 3), np.float32)
    gain = np.empty(count, np.float32)
    part = np.empty(channels, np.float32)
    for ray in range(directions.shape[0]):
        placed = ray // group
        if is_empty[placed]:
            continue
        behind = np.float32(0.0)
        for i in range(count):
            s = fractions[placed, i]
            if weights[ray, i] == 0:
                gain[i] = np.float32(0.0)
                continue
            distance = enter[placed] + length[placed] * _position(s, is_disparity, near, far)
            x, y, z = _point(distance, placed, ray, origins, directions, warp, origin, axes, nearest, low, inverse)
            points[i, 0], points[i, 1], points[i, 2] = x, y, z
            gain[i] = grad[ray, features] + s * grad[ray, features + 1]
            for axis in range(3):
                gain[i] += points[i, axis] * grad[ray, features + 2 + axis]
            for c in range(features):
                gain[i] += values[ray, i, 1 + c] * grad[ray, c]
            behind += gain[i] * weights[ray, i]
        through = one
        for i in range(count):
            w = weights[ray, i]
            if w == 0:
                continue
            thick = np.exp(min(values[ray, i, 0] + shift, np.float32(10.0))) * deltas[placed, i]
            through *= np.exp(-thick)
            behind -= gain[i] * w
            part[0] = (gain[i] * through - behind) * thick
            for c in range(features):
                part[1 + c] = w * grad[ray, c]
            x = points[i, 0] * np.float32(nx - 1)
            y = points[i, 1] * np.float32(ny - 1)
            z = points[i, 2] * np.float32(nz - 1)
            ix, iy, iz = min(int(x), nx - 2), min(int(y), ny - 2), min(int(z), nz - 2)
            fx, fy, fz = x - np.float32(ix), y - np.float32(iy), z - np.float32(iz)
            for dz in range(2):
                wz = fz if dz else one - fz
                for dy in range(2):
                    wzy = wz * (fy if dy else one - fy)
                    for dx in range(2):
                        share = wzy * (fx if dx else one - fx)
                        number = index[iz + dz, iy + dy, ix + dx]
                        if number > 0:
                            for c in range(channels):
                                grad_rows[number, c] += share * part[c]
