"""Conventions of ray encodings: ours, or those of the published code. They are part of every student's checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

NDC_NEAR = 1.0
"""Distance of the plane at which normalized device coordinates begin, in units of the encoding's frame."""
FLATTEST = 1e-3
"""Slope to which rays that do not look along -z of a forward-facing frame are bent, so that their encoding stays finite."""


@dataclass(frozen=True)
class RayConventions:
    """Conventions of a ray encoding.

    The defaults are ours: unit directions through pixel centers, points relative to the scene's center in units of its
    radius, contracted where the scene is unbounded. The published code differs in every one of them.
    """

    is_planar: bool = False
    """Directions have a component of 1 along the camera's viewing axis instead of length 1: positions along the ray are
    then planar depths."""
    pixel_offset: float = 0.5
    """Position of a ray in its pixel, in pixels from the upper left corner: 0.5 is the center, 0 the corner. For
    MobileR2L the cells of its ray image count as pixels."""
    is_contracted: bool = True
    """Whether points outside the unit ball are contracted (mip-NeRF 360); bounded scenes never are."""
    frame: tuple[tuple[float, float, float, float], ...] | None = None
    """Similarity, three rows of four, from the run's frame to the frame whose coordinates are encoded; None: relative to
    the scene's center, in units of its radius. Near and far then count in units of that frame."""
    ndc: tuple[float, float] | None = None
    """2 focal / width and 2 focal / height of the normalized device coordinates in which points are spaced; None:
    spaced in space. Needs `frame`, whose cameras look along -z."""

    @property
    def scale(self) -> float:
        """Lengths in the encoding's frame per length in the run's frame."""
        if self.frame is None:
            return 1.0
        matrix = torch.tensor(self.frame, dtype=torch.float64)[:, :3]
        return float(torch.linalg.det(matrix)) ** (1 / 3)

    def to_state(self) -> dict[str, Any]:
        """Return plain values, for a checkpoint that loads with `weights_only`."""
        return {
            "is_planar": self.is_planar,
            "pixel_offset": self.pixel_offset,
            "is_contracted": self.is_contracted,
            "frame": None if self.frame is None else [list(row) for row in self.frame],
            "ndc": None if self.ndc is None else list(self.ndc),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> RayConventions:
        """Return the conventions of a state from `to_state`; an empty state, as in checkpoints without conventions,
        means ours."""
        state = dict(state)
        if state.get("frame") is not None:
            state["frame"] = tuple(tuple(float(value) for value in row) for row in state["frame"])
        if state.get("ndc") is not None:
            state["ndc"] = (float(state["ndc"][0]), float(state["ndc"][1]))
        return cls(**state)


OURS = RayConventions()


def ndc_rays(
    origins: Float[Tensor, "*#batch 3"], directions: Float[Tensor, "*#batch 3"], ndc: Float[Tensor, "2"]
) -> tuple[Float[Tensor, "*batch 3"], Float[Tensor, "*batch 3"]]:
    """Return rays in normalized device coordinates: position 0 lies on the near plane, 1 at infinity (NeRF, app. C).

    Args:
        origins: in a frame whose cameras look along -z.
        directions: of any length; it does not matter here.
        ndc: 2 focal / width and 2 focal / height of the camera's image.

    Returns:
        origins on the near plane and directions, both in normalized device coordinates.
    """
    backward = directions[..., 2:].clamp_max(-FLATTEST)
    slope = directions[..., :2] / backward
    # On the near plane z is -NDC_NEAR.
    at_plane = origins[..., :2] - (NDC_NEAR + origins[..., 2:]) * slope
    scale = ndc / NDC_NEAR
    start = torch.cat([scale * at_plane, torch.full_like(at_plane[..., :1], -1.0)], dim=-1)
    step = torch.cat([-scale * (NDC_NEAR * slope + at_plane), torch.full_like(at_plane[..., :1], 2.0)], dim=-1)
    return start, step
