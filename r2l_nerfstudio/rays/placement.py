"""Placement of sample points along rays: inside occupied cells, at equal steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from r2l_nerfstudio.rays.occupancy import OccupancyGrid


class Placement(NamedTuple):
    """Sample points of rays."""

    fractions: Float[Tensor, "rays samples"]
    """Positions in [0, 1] of the ray's span, increasing."""
    lengths: Float[Tensor, "rays samples"]
    """Length of the ray that each point stands for, in cells of the feature volume."""
    is_empty: Bool[Tensor, "rays"]
    """Rays on which no probe is occupied: they meet nothing."""


def place_samples(
    occupancy: OccupancyGrid,
    start: Float[Tensor, "rays 3"],
    step: Float[Tensor, "rays 3"],
    probes: Float[Tensor, "probes"],
    num_samples: int,
    volume_cells: Float[Tensor, "3"],
    jitter: bool = False,
    is_graph: bool = False,
) -> Placement:
    """Place sample points at equal steps of the occupied part of each ray.

    A ray's span is divided into equal bins, one per probe. A bin counts if the cell at its middle is occupied, and the
    sample points divide the bins that count into equal shares. On a ray where none counts, all do. There is no gradient
    and, without `jitter`, no randomness: the same ray always has the same points.

    `students.cpu_kernels.place` is the same function for a CPU; exported graphs contain this one.

    Args:
        occupancy: where the scene is.
        start: start of the rays, in scene coordinates.
        step: step of the rays, in scene coordinates.
        probes: middle of each bin, in steps.
        num_samples: points per ray.
        volume_cells: cells of the feature volume along x, y, z.
        jitter: draw each point at random inside its share (training), else take the middle.
        is_graph: use only what every runtime of exported graphs has.
    """
    bins = len(probes)
    points = occupancy.scene(start[:, None] + probes[:, None] * step[:, None])
    weight = occupancy(points)
    is_empty = weight.sum(-1) == 0
    weight = torch.maximum(weight, is_empty[:, None].to(weight.dtype))
    # Central differences along the path: each bin's own length in cells.
    inner = (points[:, 2:] - points[:, :-2]) / 2
    sides = torch.cat([points[:, 1:2] - points[:, :1], inner, points[:, -1:] - points[:, -2:-1]], dim=1)
    length = (sides * volume_cells).square().sum(-1).sqrt()
    ends = weight.cumsum(-1)
    share = ends[:, -1:] / num_samples
    draws = torch.rand(len(start), num_samples, device=start.device) if jitter else 0.5
    wanted = share * (torch.arange(num_samples, device=start.device, dtype=torch.float32) + draws)
    # The bins that end before each sample: every runtime can count them, few have a binary search.
    if is_graph:
        before = torch.stack([(ends <= wanted[:, i : i + 1]).float().sum(-1) for i in range(num_samples)], dim=-1)
    else:
        before = torch.searchsorted(ends, wanted, right=True)
    number = before.clamp(max=bins - 1).long()
    fractions = (number + wanted - (ends - weight).gather(-1, number)) / bins
    return Placement(fractions, length.gather(-1, number) * share, is_empty)
