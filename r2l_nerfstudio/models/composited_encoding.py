"""The composited ray encoding: features gathered along each ray where the scene is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import normalize, pad
from torch.utils.checkpoint import checkpoint

from r2l_nerfstudio.engines.weights import weights_state
from r2l_nerfstudio.rays.constants import constant
from r2l_nerfstudio.rays.encoding import encoded_dim, frequency_encode
from r2l_nerfstudio.rays.occupancy import OccupancyGrid, grid_point_index
from r2l_nerfstudio.rays.placement import place_samples
from r2l_nerfstudio.rays.ray_code import RayCode
from r2l_nerfstudio.rays.ray_image import MARGIN, CellPixels
from r2l_nerfstudio.rays.scene_grid import NEAREST, WARPS
from r2l_nerfstudio.students.cpu_march import MarchSpace, march
from r2l_nerfstudio.students.sparse_volume import Composited, SparseVolume, composite, read_rows

RAYS_AT_ONCE = 1 << 17
"""On a GPU: the points of more rays would take gigabytes, for drawing as for training."""
LEAST = 1e-4
"""Accumulation below which a ray's expected point moves to the middle of its span."""


FrequencyEncode = Callable[[Tensor, int], Tensor]


class EncodedRays(NamedTuple):
    """What a network reads of rays, and what is known without it."""

    code: Float[Tensor, "*batch code"]
    geometry: Float[Tensor, "*pixels 2"] | None = None
    """Accumulation, and depth as a position in [0, 1] of the scene's spacing; None where the network gives both."""


class RaySpan(NamedTuple):
    """The part of rays along which a scene is looked for, in scene coordinates."""

    start: Float[Tensor, "rays 3"]
    step: Float[Tensor, "rays 3"]
    is_missed: Bool[Tensor, "rays"] | None
    """Rays that pass by the scene's box; None where every ray meets it."""


@dataclass(frozen=True)
class CompositedSettings:
    """Sizes of a `CompositedEncoding`."""

    channels: int = 4
    """Features per grid point."""
    samples: int = 24
    """Sample points per ray."""
    probes: int = 64
    """Bins per ray in which the scene is looked for."""
    point_octaves: int = 4
    """Octaves of the encoding of the expected point."""
    direction_octaves: int = 3
    """Octaves of the encoding of the direction."""


class CompositedEncoding(nn.Module):
    """Encode a ray by what it meets: features and accumulation composited along it, the expected point, the direction.

    Occupancy, box and features are part of the checkpoint; the grid points that have features follow from the occupancy.

    Args:
        ray_code: the model's, which holds the scene's bounds.
        settings: sizes.
    """

    def __init__(self, ray_code: RayCode, settings: CompositedSettings) -> None:
        super().__init__()
        self.settings = settings
        self._ray_code = (ray_code,)  # in a tuple: it is the model's part, not this module's
        self.occupancy = OccupancyGrid()
        self.volume = SparseVolume(settings.channels)
        self._volume_cells = (1, 1, 1)
        self._space: tuple[int, MarchSpace] | None = None
        self._is_graph = False
        self.register_load_state_dict_post_hook(CompositedEncoding._index_again)

    def get_extra_state(self) -> dict[str, Any]:
        return {"volume_cells": list(self._volume_cells)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._volume_cells = tuple(state["volume_cells"])

    def _index_again(self, _: Any) -> None:
        """After loading: which rows belong to which grid points."""
        self.volume.index = grid_point_index(self.occupancy.cells, self._volume_cells).to(self.volume.rows.device)

    def for_graph(self, dtype: torch.dtype) -> CompositedEncoding:
        """A copy in plain operators of torch on any device, for exporters.

        Args:
            dtype: in which features are kept; they are weighted and summed in fp32.
        """
        made = copy.deepcopy(self).requires_grad_(False)
        made.volume.rows.data = made.volume.rows.data.to(dtype)
        made._is_graph = True
        return made

    @property
    def ray_code(self) -> RayCode:
        """Where rays start and end."""
        return self._ray_code[0]

    @property
    def is_bounded(self) -> bool:
        """Whether there is nothing but background around the scene."""
        return self.occupancy.scene.warp == "ball"

    @property
    def dim(self) -> int:
        """Numbers per encoded ray."""
        s = self.settings
        return s.channels + 1 + encoded_dim(3, s.point_octaves) + encoded_dim(3, s.direction_octaves)

    def lay_out(self, volume_cells: tuple[int, int, int], spare: float = 0.0) -> Int64[Tensor, "rows"]:
        """Hold features where the occupancy says; as `SparseVolume.lay_out`, `spare` being a share of the rows."""
        self._volume_cells = volume_cells
        index = grid_point_index(self.occupancy.cells, volume_cells)
        return self.volume.lay_out(index, int(spare * int(index.max())))

    def span(self, origins: Float[Tensor, "rays 3"], directions: Float[Tensor, "rays 3"]) -> RaySpan:
        """Where the scene is looked for: inside its box if it is bounded, else between the nearest and farthest depth."""
        code, scene = self.ray_code, self.occupancy.scene
        start, step = (origins - code.center) / code.radius, directions / code.radius
        if not self.is_bounded:
            return RaySpan(start, step, None)
        enter, leave = scene.box_span(start, step)
        return RaySpan(start + enter * step, (leave - enter) * step, (leave <= enter)[..., 0])

    def positions(self, fractions: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """In steps of `span`, of positions in [0, 1]."""
        return fractions if self.is_bounded else self.ray_code.distance(fractions, None)

    def depth_fraction(
        self, origins: Float[Tensor, "rays 3"], directions: Float[Tensor, "rays 3"], fractions: Float[Tensor, "rays 1"]
    ) -> Float[Tensor, "rays 1"]:
        """Positions in the span as the position in [0, 1] of the scene's spacing that codes a student's depth."""
        code = self.ray_code
        if not self.is_bounded:
            return fractions
        enter, leave = self.occupancy.scene.box_span((origins - code.center) / code.radius, directions / code.radius)
        return code.to_fraction(origins, directions, enter + fractions * (leave - enter))

    def composited(
        self,
        origins: Float[Tensor, "rays 3"],
        directions: Float[Tensor, "rays 3"],
        jitter: bool = False,
        samples: int | None = None,
    ) -> tuple[Composited, Bool[Tensor, "rays"]]:
        """What rays meet, and which of them meet nothing; always in fp32.

        Args:
            origins: in the teacher's frame.
            directions: unit length.
            jitter: draw the sample points at random inside their shares (training).
            samples: points per ray; the settings' by default.
        """
        samples = samples or self.settings.samples
        with torch.autocast(device_type=origins.device.type, enabled=False):
            span = self.span(origins.float(), directions.float())
            if origins.device.type == "cpu" and not self._is_graph:
                found, is_empty = march(self.volume.rows, *span, self.march_space(), samples, jitter)
                return Composited(*found.split((self.settings.channels, 1, 1, 3), dim=-1)), is_empty
            return self.in_torch(span, jitter, samples)

    def in_torch(self, span: RaySpan, jitter: bool, samples: int) -> tuple[Composited, Bool[Tensor, "rays"]]:
        """`composited` in operators of torch: on a GPU, and in exported graphs.

        Of many rays at once, what the points hold is computed again for gradients instead of kept.
        """
        if self._is_graph or len(span.start) <= RAYS_AT_ONCE:
            return self._in_one_go(span, jitter, samples)
        missed = [None] * len(span.start) if span.is_missed is None else span.is_missed.split(RAYS_AT_ONCE)
        spans = map(RaySpan, span.start.split(RAYS_AT_ONCE), span.step.split(RAYS_AT_ONCE), missed)
        parts = [self._in_one_go(part, jitter, samples, is_kept=not torch.is_grad_enabled()) for part in spans]
        found = (torch.cat(values) for values in zip(*(found for found, _ in parts), strict=True))
        return Composited(*found), torch.cat([is_empty for _, is_empty in parts])

    def _in_one_go(
        self, span: RaySpan, jitter: bool, samples: int, is_kept: bool = True
    ) -> tuple[Composited, Bool[Tensor, "rays"]]:
        probes = self.positions(self.middles(span.start.device))
        cells = constant(span.start, self.volume.cells)
        placed = place_samples(self.occupancy, span.start, span.step, probes, samples, cells, jitter)
        is_empty = placed.is_empty if span.is_missed is None else placed.is_empty | span.is_missed
        if is_kept:
            return self._gather(self.volume.rows, span.start, span.step, *placed[:2], is_empty), is_empty
        found = checkpoint(
            lambda *tensors: tuple(self._gather(*tensors)),
            *(self.volume.rows, span.start, span.step, *placed[:2], is_empty),
            use_reentrant=True,
            preserve_rng_state=False,  # points are placed already
        )
        return Composited(*found), is_empty

    def _gather(
        self, rows: Tensor, start: Tensor, step: Tensor, fractions: Tensor, lengths: Tensor, is_empty: Tensor
    ) -> Composited:
        """Read the volume at the points of rays and composite what it holds."""
        points = self.occupancy.scene(start[:, None] + self.positions(fractions)[..., None] * step[:, None])
        if not self._is_graph:
            rows = torch.cat([rows[:1].detach(), rows[1:]])  # empty space gets no gradient
        return composite(read_rows(rows, self.volume.index, points), lengths, fractions, points, is_empty)

    def code(
        self, found: Composited, directions: Float[Tensor, "rays 3"], encode: FrequencyEncode = frequency_encode
    ) -> Float[Tensor, "rays code"]:
        """What a network reads of composited rays.

        Args:
            found: what they meet.
            directions: unit length.
            encode: as `frequency_encode`.
        """
        s = self.settings
        point = _mean(found.point, found.accumulation)
        return torch.cat(
            [
                found.features,
                found.accumulation,
                encode(2 * point - 1, s.point_octaves),
                encode(directions, s.direction_octaves),
            ],
            dim=-1,
        )

    def geometry(
        self, found: Composited, origins: Float[Tensor, "rays 3"], directions: Float[Tensor, "rays 3"]
    ) -> Float[Tensor, "rays 2"]:
        """Accumulation, and depth as a position in [0, 1] of the scene's spacing."""
        fraction = self.depth_fraction(origins, directions, _mean(found.fraction, found.accumulation))
        return torch.cat([found.accumulation, fraction], dim=-1)

    def middles(self, device: torch.device | str = "cpu") -> Float[Tensor, "probes"]:
        """Middles of the bins of a ray's span, in [0, 1]."""
        probes = self.settings.probes
        return (torch.arange(probes, device=device, dtype=torch.float32) + 0.5) / probes

    def march_space(self) -> MarchSpace:
        """Bounds, occupancy and grid points as the CPU's kernels take them."""
        code, scene = self.ray_code, self.occupancy.scene
        watched = [self.occupancy.cells, self.volume.index, code.near, code.far, *scene.buffers()]
        state = weights_state(watched)
        if self._space is None or self._space[0] != state:
            space = MarchSpace(
                is_disparity=code.spacing == "disparity" and not self.is_bounded,
                near=np.float32(0.0 if self.is_bounded else float(code.near)),
                far=np.float32(1.0 if self.is_bounded else float(code.far)),
                warp=WARPS.index(scene.warp),
                origin=scene.origin.numpy(),
                axes=scene.axes.numpy(),
                nearest=np.float32(NEAREST),
                low=scene.low.numpy(),
                inverse=(1.0 / scene.extent).numpy(),
                positions=self.positions(self.middles()).numpy(),
                occupied=self.occupancy.cells.contiguous().numpy(),
                index=self.volume.index.contiguous().numpy(),
                cells=np.array(self.volume.cells, np.float32),
            )
            self._space = (state, space)
        return self._space[1]


def encode_single_rays(
    encoding: CompositedEncoding,
    origins: Float[Tensor, "*batch 3"],
    directions: Float[Tensor, "*batch 3"],
    jitter: bool = False,
    encode: FrequencyEncode = frequency_encode,
) -> EncodedRays:
    """Encode rays for a network that reads each by itself (R2L).

    Args:
        encoding: of the scene.
        origins: in the teacher's frame.
        directions: unit length.
        jitter: draw the sample points at random inside their shares (training).
        encode: as `frequency_encode`.

    Returns:
        code (*batch code), geometry (*batch 2).
    """
    shape = origins.shape[:-1]
    origins, directions = origins.reshape(-1, 3).float(), directions.reshape(-1, 3).float()
    found, _ = encoding.composited(origins, directions, jitter)
    code, geometry = encoding.code(found, directions, encode), encoding.geometry(found, origins, directions)
    return EncodedRays(code.view(*shape, encoding.dim), geometry.view(*shape, 2))


def encode_ray_image(
    encoding: CompositedEncoding,
    factor: int,
    pixel_samples: int,
    origins: Float[Tensor, "*batch height width 3"],
    directions: Float[Tensor, "*batch height width 3"],
    jitter: bool = False,
    encode: FrequencyEncode = frequency_encode,
) -> EncodedRays:
    """Encode ray images with a ray for every pixel, margin included, for a network of cells (MobileR2L).

    A cell's own ray is the mean of its pixels' rays. Features and accumulation of a cell's pixels follow the cell's own
    code, channel by channel, as `pixel_shuffle` takes them. Pixels of the margin have none: they are not drawn.

    Args:
        encoding: of the scene.
        factor: pixels along each side of a cell.
        pixel_samples: sample points per pixel; cells have the settings'.
        origins: in the teacher's frame.
        directions: unit length.
        jitter: draw the sample points at random inside their shares (training).
        encode: as `frequency_encode`.

    Returns:
        code (*batch rows columns code), geometry (*batch, height and width without the margin, 2).
    """
    pixels = CellPixels(factor)
    origins, directions = pixels.by_cell(origins.float()), pixels.by_cell(directions.float())
    shape = directions.shape[:-2]
    rays = (origins[..., 0, :].reshape(-1, 3), normalize(directions.mean(-2), dim=-1).reshape(-1, 3))
    found, _ = encoding.composited(*rays, jitter)
    code = encoding.code(found, rays[1], encode).view(*shape, encoding.dim)
    inner = [t[..., MARGIN:-MARGIN, MARGIN:-MARGIN, :, :] for t in (origins, directions)]
    shape = inner[0].shape[:-1]
    rays = (inner[0].reshape(-1, 3), inner[1].reshape(-1, 3))
    found, _ = encoding.composited(*rays, jitter, pixel_samples)
    own = torch.cat([found.features, found.accumulation], dim=-1).view(*shape, encoding.settings.channels + 1)
    own = pad(own.transpose(-1, -2).flatten(-2), (0, 0, MARGIN, MARGIN, MARGIN, MARGIN))
    geometry = encoding.geometry(found, *rays).view(*shape, 2)
    return EncodedRays(torch.cat([code, own], dim=-1), pixels.to_image(geometry))


def finished(
    values: Float[Tensor, "*pixels 3"], geometry: Float[Tensor, "*pixels 2"], background: Float[Tensor, "3"] | None
) -> Float[Tensor, "*pixels 5"]:
    """The five numbers of pixels: rgb, accumulation, depth as a position in [0, 1] of the scene's spacing.

    Args:
        values: colors of the network.
        geometry: of `EncodedRays`.
        background: around a bounded scene, where colors count as far as there is something; None elsewhere.
    """
    if background is not None:
        accumulation = geometry[..., :1]
        values = values * accumulation + background * (1.0 - accumulation)
    return torch.cat([values, geometry], dim=-1)


def _mean(summed: Float[Tensor, "rays n"], accumulation: Float[Tensor, "rays 1"]) -> Float[Tensor, "rays n"]:
    """Weighted mean of what was summed, 0.5 where there is nothing."""
    return (summed + 0.5 * LEAST) / (accumulation + LEAST)
