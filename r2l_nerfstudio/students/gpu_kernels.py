"""Triton kernels of `gpu_march`, whose `march` says what their arguments are.

`nx`, `ny`, `nz` are grid points along each axis, `width` the values of a row, and `group` the rays that share their
sample points.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _light(raw, length, is_empty, optical, shift, most, stop):
    """Thickness of a sample, the light that reaches it, and whether it counts."""
    thickness = tl.exp(tl.minimum(raw + shift, most)) * length * (1.0 - is_empty)
    light = tl.exp(-optical)
    return thickness, light, tl.where(light >= stop, 1.0, 0.0)


@triton.jit
def _cell(point, is_ray, nx, ny, nz):
    """First grid point around a point of the unit cube, and the shares of the far ones."""
    x = tl.load(point, mask=is_ray, other=0.0) * (nx - 1)
    y = tl.load(point + 1, mask=is_ray, other=0.0) * (ny - 1)
    z = tl.load(point + 2, mask=is_ray, other=0.0) * (nz - 1)
    low_x, low_y, low_z = (
        tl.minimum(tl.floor(x), nx - 2.0),
        tl.minimum(tl.floor(y), ny - 2.0),
        tl.minimum(tl.floor(z), nz - 2.0),
    )
    first = (low_z.to(tl.int32) * ny + low_y.to(tl.int32)) * nx + low_x.to(tl.int32)
    return first, x - low_x, y - low_y, z - low_z


@triton.jit
def _corner(corner: tl.constexpr, first, x, y, z, nx, ny):
    """Grid point of a corner of the cell, and its weight."""
    far_x: tl.constexpr = corner & 1
    far_y: tl.constexpr = (corner >> 1) & 1
    far_z: tl.constexpr = (corner >> 2) & 1
    weight = (x if far_x else 1.0 - x) * (y if far_y else 1.0 - y) * (z if far_z else 1.0 - z)
    return first + (far_z * ny + far_y) * nx + far_x, weight


@triton.jit
def _read(rows, index, first, x, y, z, nx, ny, is_ray, columns, width):
    """Values of the volume at points, read trilinearly."""
    read = tl.zeros((is_ray.shape[0], columns.shape[0]), dtype=tl.float32)
    for corner in tl.static_range(8):  # pyright: ignore[reportGeneralTypeIssues]
        at, weight = _corner(corner, first, x, y, z, nx, ny)
        row = tl.load(index + at, mask=is_ray, other=0)
        mask = is_ray[:, None] & (columns < width)[None, :]
        read += weight[:, None] * tl.load(rows + row[:, None] * width + columns[None, :], mask=mask, other=0.0)
    return read


@triton.jit
def forward(
    rows, index, points, lengths, fractions, empty, out,
    rays, samples, group, nx, ny, nz, width, shift, most, stop,
    RAYS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Composite one block of rays."""
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    is_ray = ray < rays
    columns = tl.arange(0, COLUMNS)
    placed = ray // group
    is_empty = tl.load(empty + placed, mask=is_ray, other=1).to(tl.float32)
    optical = tl.zeros((RAYS,), dtype=tl.float32)
    total, fraction, x_mean, y_mean, z_mean = optical, optical, optical, optical, optical
    features = tl.zeros((RAYS, COLUMNS), dtype=tl.float32)
    for sample in range(samples):
        point = points + (ray * samples + sample) * 3
        first, x, y, z = _cell(point, is_ray, nx, ny, nz)
        values = _read(rows, index, first, x, y, z, nx, ny, is_ray, columns, width)
        raw = tl.sum(tl.where((columns == 0)[None, :], values, 0.0), axis=1)
        at = placed * samples + sample
        length = tl.load(lengths + at, mask=is_ray, other=0.0)
        thickness, light, counts = _light(raw, length, is_empty, optical, shift, most, stop)
        weight = light * (1.0 - tl.exp(-thickness)) * counts
        optical += thickness
        total += weight
        fraction += weight * tl.load(fractions + at, mask=is_ray, other=0.0)
        x_mean += weight * tl.load(point, mask=is_ray, other=0.0)
        y_mean += weight * tl.load(point + 1, mask=is_ray, other=0.0)
        z_mean += weight * tl.load(point + 2, mask=is_ray, other=0.0)
        features += weight[:, None] * values
    start = out + ray * (width + 4)
    mask = is_ray[:, None] & ((columns > 0) & (columns < width))[None, :]
    tl.store(start[:, None] + columns[None, :] - 1, features, mask=mask)
    tl.store(start + width - 1, total, mask=is_ray)
    tl.store(start + width, fraction, mask=is_ray)
    tl.store(start + width + 1, x_mean, mask=is_ray)
    tl.store(start + width + 2, y_mean, mask=is_ray)
    tl.store(start + width + 3, z_mean, mask=is_ray)


@triton.jit
def backward(
    rows, index, points, lengths, fractions, empty, out, gradient, gradient_rows,
    rays, samples, group, nx, ny, nz, width, shift, most, stop,
    RAYS: tl.constexpr, COLUMNS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Add the gradients of one block of rays to those of the rows."""
    ray = tl.program_id(0) * RAYS + tl.arange(0, RAYS)
    is_ray = ray < rays
    columns = tl.arange(0, COLUMNS)
    is_feature = is_ray[:, None] & ((columns > 0) & (columns < width))[None, :]
    placed = ray // group
    is_empty = tl.load(empty + placed, mask=is_ray, other=1).to(tl.float32)
    start = ray * (width + 4)
    into = tl.load(gradient + start[:, None] + columns[None, :] - 1, mask=is_feature, other=0.0)
    made = tl.load(out + start[:, None] + columns[None, :] - 1, mask=is_feature, other=0.0)
    # What the samples behind one add up to: all of it, less those in front.
    behind = tl.sum(into * made, axis=1)
    for field in tl.static_range(5):  # pyright: ignore[reportGeneralTypeIssues]
        at = start + width - 1 + field
        behind += tl.load(gradient + at, mask=is_ray, other=0.0) * tl.load(out + at, mask=is_ray, other=0.0)
    into_total = tl.load(gradient + start + width - 1, mask=is_ray, other=0.0)
    into_fraction = tl.load(gradient + start + width, mask=is_ray, other=0.0)
    into_x = tl.load(gradient + start + width + 1, mask=is_ray, other=0.0)
    into_y = tl.load(gradient + start + width + 2, mask=is_ray, other=0.0)
    into_z = tl.load(gradient + start + width + 3, mask=is_ray, other=0.0)
    optical = tl.zeros((RAYS,), dtype=tl.float32)
    for sample in range(samples):
        point = points + (ray * samples + sample) * 3
        first, x, y, z = _cell(point, is_ray, nx, ny, nz)
        values = _read(rows, index, first, x, y, z, nx, ny, is_ray, columns, width)
        raw = tl.sum(tl.where((columns == 0)[None, :], values, 0.0), axis=1)
        at = placed * samples + sample
        length = tl.load(lengths + at, mask=is_ray, other=0.0)
        thickness, light, counts = _light(raw, length, is_empty, optical, shift, most, stop)
        through = tl.exp(-thickness)
        weight = light * (1.0 - through) * counts
        optical += thickness
        worth = tl.sum(into * values, axis=1) + into_total
        worth += into_fraction * tl.load(fractions + at, mask=is_ray, other=0.0)
        worth += into_x * tl.load(point, mask=is_ray, other=0.0)
        worth += into_y * tl.load(point + 1, mask=is_ray, other=0.0)
        worth += into_z * tl.load(point + 2, mask=is_ray, other=0.0)
        behind -= weight * worth
        into_raw = (counts * light * through * worth - behind) * thickness * tl.where(raw + shift <= most, 1.0, 0.0)
        into_values = tl.where((columns == 0)[None, :], into_raw[:, None], weight[:, None] * into)
        for corner in tl.static_range(8):  # pyright: ignore[reportGeneralTypeIssues]
            grid_point, share = _corner(corner, first, x, y, z, nx, ny)
            row = tl.load(index + grid_point, mask=is_ray, other=0)
            added = share[:, None] * into_values
            mask = (is_ray & (row > 0))[:, None] & (columns < width)[None, :] & (added != 0.0)
            tl.atomic_add(gradient_rows + row[:, None] * width + columns[None, :], added, mask=mask)
