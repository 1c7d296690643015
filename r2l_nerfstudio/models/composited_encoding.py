"""The composited ray encoding: features gathered along each ray where the scene is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor, nn
from torch.nn.functional import normalize, pad
from torch.utils.checkpoint import checkpoint

from r2l_nerfstudio.engines.weights import weights_state
from r2l_nerfstudio.rays.constants import constant
from r2l_nerfstudio.rays.encoding import encoded_dim, frequency_encode
from r2l_nerfstudio.rays.occupancy import OccupancyGrid, checked_resolution, grid_point_index
from r2l_nerfstudio.rays.placement import Placement, place_samples
from r2l_nerfstudio.rays.ray_encoding import RayEncoding
from r2l_nerfstudio.rays.ray_image import MARGIN, CellPixels
from r2l_nerfstudio.rays.scene_grid import NEAREST, WARPS
from r2l_nerfstudio.students import gpu_march
from r2l_nerfstudio.students.cpu_march import MarchSpace, march
from r2l_nerfstudio.students.sparse_volume import (
    Composited,
    SparseVolume,
    composite,
    int8_rows,
    read_rows,
    rendering_weights,
)

RAYS_AT_ONCE = 1 << 17
"""On a GPU: the points of more rays would take gigabytes, for drawing as for training."""
RAYS_PER_LAUNCH = 1 << 20
"""Where one kernel reads the points, which keeps nothing of them but their coordinates."""
LEAST = 1e-4
"""Accumulation below which a ray's expected point moves to the middle of its span."""

FrequencyEncode = Callable[[Tensor, int], Tensor]


class EncodedRays(NamedTuple):
    """What a network reads of rays, and what is known without the network."""

    encoded: Float[Tensor, "*batch encoded"]
    geometry: Float[Tensor, "*pixels 2"] | None = None
    """Accumulation, and depth as a position in [0, 1] of the scene's spacing; None if the network predicts both."""


class RaySpan(NamedTuple):
    """The part of rays along which the scene is searched, in scene coordinates.

    Rays lie in groups of neighboring rays with one origin; those of a group have their sample points at the same distances.
    """

    origin: Float[Tensor, "groups 1 3"]
    direction: Float[Tensor, "groups group 3"]
    """Per unit of length of the teacher's frame."""
    lead_start: Float[Tensor, "groups 3"]
    """Start of the span on the ray half way between the group's first and last, by which sample points are placed."""
    lead_step: Float[Tensor, "groups 3"]
    """The whole span of a bounded scene, else a unit of length."""
    enter: Float[Tensor, "groups 1"] | None
    """Distance at which the span begins; None where there is no box."""
    length: Float[Tensor, "groups 1"] | None
    is_missed: Bool[Tensor, "groups"] | None
    """Groups that pass by the scene's box; None where every ray meets it."""


@dataclass(frozen=True)
class CompositedSettings:
    """Sizes of a `CompositedEncoding`."""

    channels: int = 4
    """Features per grid point."""
    samples: int = 24
    """Sample points per ray."""
    probes: int = 64
    """Bins per ray in which the scene is searched."""
    point_octaves: int = 4
    """Octaves of the encoding of the expected point."""
    direction_octaves: int = 3
    """Octaves of the encoding of the direction."""


class CompositedEncoding(nn.Module):
    """Encode a ray by what it meets: features and accumulation composited along it, the expected point, the direction.

    Occupancy, box and features are part of the checkpoint; the grid points that have features follow from the occupancy.

    Args:
        ray_encoding: the model's encoding, which has the scene's bounds.
        settings: sizes.
    """

    def __init__(self, ray_encoding: RayEncoding, settings: CompositedSettings) -> None:
        super().__init__()
        self.settings = settings
        self._ray_encoding = (ray_encoding,)  # In a tuple, since it is the model's submodule, not this module's.
        self.occupancy = OccupancyGrid()
        self.volume = SparseVolume(settings.channels)
        self._volume_cells = (1, 1, 1)
        self.prunings = 0
        """Number of times the occupancy was pruned."""
        self._space: tuple[int, MarchSpace] | None = None
        self._is_graph = False
        self._widths: Tensor | None = None
        self.register_load_state_dict_post_hook(CompositedEncoding._index_again)

    def get_extra_state(self) -> dict[str, Any]:
        return {"volume_cells": list(self._volume_cells), "prunings": self.prunings}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._volume_cells = checked_resolution(state["volume_cells"])
        prunings = state.get("prunings", 0)  # Former versions had none.
        self.prunings = prunings if isinstance(prunings, int) else 0

    def _index_again(self, _: Any) -> None:
        """Restore after loading which rows belong to which grid points.

        Raises:
            ValueError: the scene's box is empty, or there are fewer rows than grid points.
        """
        scene = self.occupancy.scene
        if not bool((scene.extent > 0).all()):
            raise ValueError(f"its scene's box has sides of {scene.extent.tolist()}")
        index = grid_point_index(self.occupancy.cells, self._volume_cells)
        if int(index.max()) >= len(self.volume.rows):
            raise ValueError(f"it holds {len(self.volume.rows) - 1} features for {int(index.max())} grid points")
        self.volume.index = index.to(self.volume.rows.device)
        self._load_kernels()

    def _load_kernels(self) -> None:
        """March one ray, which imports and compiles what that needs. The viewer interrupts its render threads at any
        line, and a half-done import of Numba stays broken for the whole process."""
        if self.volume.rows.device.type == "cpu":
            ray = torch.zeros(1, 1, 3), torch.ones(1, 1, 3).div(3**0.5)
            with torch.no_grad():
                self.composited(self.span(*ray))
        else:
            self._has_kernel()

    def _has_kernel(self) -> bool:
        rows = self.volume.rows.data  # of another type while a training is planned on fake tensors
        return rows.device.type == "cuda" and type(rows) is Tensor and gpu_march.works(rows.device)

    def for_graph(self, dtype: torch.dtype) -> CompositedEncoding:
        """Return a copy in plain PyTorch operators on any device, for exporters.

        Args:
            dtype: in which features are kept, int8 included; they are weighted and summed in fp32.
        """
        made = copy.deepcopy(self).requires_grad_(False)
        made.add_module("graph_ray_encoding", made.ray_encoding)  # Moves with the copy: here no model does it.
        if dtype == torch.int8:
            made.volume.rows.data, made._widths = int8_rows(made.volume.rows.data)
        else:
            made.volume.rows.data = made.volume.rows.data.to(dtype)
        made._is_graph = True
        return made

    @contextmanager
    def in_int8(self) -> Iterator[None]:
        """Inside, features are what remains of them in int8."""
        kept = self.volume.rows.data
        rows, widths = int8_rows(kept)
        self.volume.rows.data = rows * widths
        try:
            yield
        finally:
            self.volume.rows.data = kept

    @property
    def ray_encoding(self) -> RayEncoding:
        """The encoding that knows where rays start and end."""
        return self._ray_encoding[0]

    @property
    def is_bounded(self) -> bool:
        """Whether only background surrounds the scene."""
        return self.occupancy.scene.warp == "ball"

    @property
    def dim(self) -> int:
        """Numbers per encoded ray."""
        s = self.settings
        return s.channels + 1 + encoded_dim(3, s.point_octaves) + encoded_dim(3, s.direction_octaves)

    def lay_out(self, volume_cells: tuple[int, int, int], spare: float = 0.0) -> Int64[Tensor, "rows"]:
        """Hold features where the occupancy is set; as `SparseVolume.lay_out`, `spare` being a share of the rows."""
        self._volume_cells = volume_cells
        index = grid_point_index(self.occupancy.cells, volume_cells)
        rows = self.volume.lay_out(index, int(spare * int(index.max())))
        self._load_kernels()
        return rows

    def resample(self, volume_cells: tuple[int, int, int]) -> Callable[[Tensor], Tensor]:
        """Hold features where the occupancy is set, at another resolution; as `SparseVolume.resample`."""
        self._volume_cells = volume_cells
        return self.volume.resample(grid_point_index(self.occupancy.cells, volume_cells))

    def sample_weights(
        self, origins: Float[Tensor, "rays 3"], directions: Float[Tensor, "rays 3"]
    ) -> tuple[Int32[Tensor, "rays samples"], Int32[Tensor, "rays samples"], Float[Tensor, "rays samples"]]:
        """Return the weights of sample points in the color of their rays.

        Args:
            origins: in the teacher's frame.
            directions: unit length.

        Returns:
            For each sample point the cell of the occupancy that placed it, the cell that contains it, and its weight.
        """
        span = self.span(origins[:, None], directions[:, None])
        placed = self._placed(span, self.settings.samples, jitter=False)
        points = self._points(span, placed)
        density = read_rows(self.volume.rows.detach()[:, :1], self.volume.index, points)[..., 0]
        middles = self.positions(self.middles(points.device))
        bins = (placed.fractions * len(middles)).long().clamp(max=len(middles) - 1)
        placing = self.occupancy.scene(span.lead_start[:, None] + middles[bins][..., None] * span.lead_step[:, None])
        cells = self.occupancy.flat_cell(placing), self.occupancy.flat_cell(points)
        return *cells, rendering_weights(density, placed.lengths, placed.is_empty)

    def span(self, origins: Float[Tensor, "groups 1 3"], directions: Float[Tensor, "groups group 3"]) -> RaySpan:
        """Return where the scene is searched: inside its box if it is bounded, else between the nearest and farthest
        depth.

        Args:
            origins: in the teacher's frame.
            directions: unit length; those of a group are less than about a cell of the occupancy apart.
        """
        encoding, scene = self.ray_encoding, self.occupancy.scene
        origin, direction = (origins.float() - encoding.center) / encoding.radius, directions.float() / encoding.radius
        start, step = origin[:, 0], direction[:, 0]
        if direction.shape[1] > 1:
            step = _between(step, direction[:, -1])
        if not self.is_bounded:
            return RaySpan(origin, direction, start, step, None, None, None)
        enter, leave = scene.box_span(start, step)
        length = leave - enter
        return RaySpan(origin, direction, start + enter * step, length * step, enter, length, (length <= 0)[:, 0])

    def positions(self, fractions: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """In steps of a `RaySpan`, of positions in [0, 1]."""
        return fractions if self.is_bounded else self.ray_encoding.distance(fractions, None)

    def distances(self, span: RaySpan, fractions: Float[Tensor, "groups *n"]) -> Float[Tensor, "groups *n"]:
        """From the origins, in the teacher's unit of length, of positions in [0, 1] of a span."""
        if span.enter is None or span.length is None:
            return self.positions(fractions)
        shape = (-1, *[1] * (fractions.ndim - 1))
        return span.enter.view(shape) + fractions * span.length.view(shape)

    def composited(
        self, span: RaySpan, jitter: bool = False, samples: int | None = None
    ) -> tuple[Composited, Bool[Tensor, "groups"]]:
        """What rays meet, one group after the other, and which groups meet nothing; always in fp32.

        Args:
            span: of the rays.
            jitter: draw the sample points at random inside their shares (training).
            samples: points per ray; the settings' by default.
        """
        samples = samples or self.settings.samples
        with torch.autocast(device_type=span.origin.device.type, enabled=False):
            if span.origin.device.type != "cpu" or self._is_graph:
                return self.in_torch(span, jitter, samples)
            found, is_empty = march(self.volume.rows, span, self.march_space(), samples, jitter)
            return Composited(*found.split((self.settings.channels, 1, 1, 3), dim=-1)), is_empty

    def in_torch(self, span: RaySpan, jitter: bool, samples: int) -> tuple[Composited, Bool[Tensor, "groups"]]:
        """Compute `composited` on a GPU, with Triton's kernels where they work, and in exported graphs.

        Without the kernels, the backward pass of many rays recomputes what is read at the sample points instead of
            keeping it.
        """
        is_fused = not self._is_graph and self._has_kernel()
        at_once = max(1, (RAYS_PER_LAUNCH if is_fused else RAYS_AT_ONCE) // span.direction.shape[1])
        if self._is_graph or len(span.direction) <= at_once:
            return self._in_one_go(span, jitter, samples, is_kept=True)
        fields = (repeat(None) if field is None else field.split(at_once) for field in span)
        is_kept = is_fused or not torch.is_grad_enabled()
        parts = [self._in_one_go(RaySpan(*part), jitter, samples, is_kept) for part in zip(*fields, strict=False)]
        found = (torch.cat(values) for values in zip(*(found for found, _ in parts), strict=True))
        return Composited(*found), torch.cat([is_empty for _, is_empty in parts])

    def _in_one_go(
        self, span: RaySpan, jitter: bool, samples: int, is_kept: bool
    ) -> tuple[Composited, Bool[Tensor, "groups"]]:
        placed = self._placed(span, samples, jitter)
        rows, is_empty = self.volume.rows, placed.is_empty
        if is_kept:
            return self._gathered(rows, span, placed), is_empty
        found = checkpoint(
            lambda rows: tuple(self._gathered(rows, span, placed)),
            rows,
            use_reentrant=True,
            preserve_rng_state=False,  # points are placed already
        )
        return Composited(*cast(tuple[Tensor, ...], found)), is_empty

    def _placed(self, span: RaySpan, samples: int, jitter: bool) -> Placement:
        probes = self.positions(self.middles(span.origin.device))
        cells = constant(span.origin, self.volume.cells)
        placed = place_samples(
            self.occupancy, span.lead_start, span.lead_step, probes, samples, cells, jitter, is_graph=self._is_graph
        )
        return placed if span.is_missed is None else placed._replace(is_empty=placed.is_empty | span.is_missed)

    def _points(self, span: RaySpan, placed: Placement) -> Float[Tensor, "rays samples 3"]:
        distances = self.distances(span, placed.fractions)[:, None, :, None]
        return self.occupancy.scene(span.origin[:, None] + distances * span.direction[:, :, None]).flatten(0, 1)

    def _gathered(self, rows: Float[Tensor, "rows values"], span: RaySpan, placed: Placement) -> Composited:
        """Read rows of the volume at the sample points of rays, and composite them."""
        points = self._points(span, placed)
        if not self._is_graph:
            if self._has_kernel():
                sums = gpu_march.march(
                    rows, self.volume.index, points, placed.lengths, placed.fractions, placed.is_empty
                )
                return Composited(*sums.split((self.settings.channels, 1, 1, 3), dim=-1))
            rows = torch.cat([rows[:1].detach(), rows[1:]])  # empty space gets no gradient
        values = read_rows(rows, self.volume.index, points)
        if self._widths is not None:
            values = values * self._widths
        lengths, fractions, empty = (
            t[:, None].expand(-1, span.direction.shape[1], *t.shape[1:]).flatten(0, 1)
            for t in (placed.lengths, placed.fractions, placed.is_empty)
        )
        return composite(values, lengths, fractions, points, empty)

    def encoded(
        self, found: Composited, directions: Float[Tensor, "rays 3"], encode: FrequencyEncode = frequency_encode
    ) -> Float[Tensor, "rays encoded"]:
        """Return what a network reads of composited rays.

        Args:
            found: what the rays meet.
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
        self,
        found: Composited,
        span: RaySpan,
        origins: Float[Tensor, "groups 1 3"],
        directions: Float[Tensor, "groups group 3"],
    ) -> Float[Tensor, "rays 2"]:
        """Accumulation, and depth as the position in [0, 1] of the scene's spacing that encodes a student's depth."""
        fraction = _mean(found.fraction, found.accumulation)
        if self.is_bounded:
            distance = self.distances(span, fraction.view(*directions.shape[:2], 1))
            fraction = self.ray_encoding.to_fraction(origins, directions, distance).flatten(0, 1)
        return torch.cat([found.accumulation, fraction], dim=-1)

    def middles(self, device: torch.device | str = "cpu") -> Float[Tensor, "probes"]:
        """Return the middles of the bins of a ray's span, in [0, 1]."""
        probes = self.settings.probes
        return (torch.arange(probes, device=device, dtype=torch.float32) + 0.5) / probes

    def march_space(self) -> MarchSpace:
        """Return bounds, occupancy and grid points in the form of the CPU kernels."""
        encoding, scene = self.ray_encoding, self.occupancy.scene
        inputs = [self.occupancy.cells, self.volume.index, encoding.near, encoding.far, *scene.buffers()]
        state = weights_state(inputs)
        if self._space is None or self._space[0] != state:
            space = MarchSpace(
                is_disparity=encoding.spacing == "disparity" and not self.is_bounded,
                near=np.float32(0.0 if self.is_bounded else float(encoding.near)),
                far=np.float32(1.0 if self.is_bounded else float(encoding.far)),
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
    """Encode rays for a network that reads rays one by one (R2L).

    Args:
        encoding: the scene's encoding.
        origins: in the teacher's frame.
        directions: unit length.
        jitter: draw the sample points at random inside their shares (training).
        encode: as `frequency_encode`.

    Returns:
        encoded (*batch encoded), geometry (*batch 2).
    """
    shape = origins.shape[:-1]
    directions = directions.reshape(-1, 3).float()
    found, geometry = _single_rays(encoding, origins.reshape(-1, 3), directions, jitter)
    encoded = encoding.encoded(found, directions, encode)
    return EncodedRays(encoded.view(*shape, encoding.dim), geometry.view(*shape, 2))


def encode_pixels(
    encoding: CompositedEncoding,
    pixel_samples: int,
    origins: Float[Tensor, "pixels 3"],
    directions: Float[Tensor, "pixels 3"],
    jitter: bool = False,
) -> EncodedRays:
    """Encode single pixels as `encode_ray_image` does those of a cell, each with sample points of its own.

    Args:
        encoding: the scene's encoding.
        pixel_samples: sample points per pixel.
        origins: in the teacher's frame.
        directions: unit length.
        jitter: draw the sample points at random inside their shares (training).

    Returns:
        features and accumulation (pixels joined), geometry (pixels 2).
    """
    found, geometry = _single_rays(encoding, origins, directions, jitter, pixel_samples)
    return EncodedRays(torch.cat([found.features, found.accumulation], dim=-1), geometry)


def _single_rays(
    encoding: CompositedEncoding,
    origins: Float[Tensor, "rays 3"],
    directions: Float[Tensor, "rays 3"],
    jitter: bool,
    samples: int | None = None,
) -> tuple[Composited, Float[Tensor, "rays 2"]]:
    rays = origins[:, None].float(), directions[:, None].float()
    span = encoding.span(*rays)
    found, _ = encoding.composited(span, jitter, samples)
    return found, encoding.geometry(found, span, *rays)


def encode_ray_image(
    encoding: CompositedEncoding,
    factor: int,
    pixel_samples: int,
    block: int,
    origins: Float[Tensor, "*batch height width 3"],
    directions: Float[Tensor, "*batch height width 3"],
    jitter: bool = False,
    encode: FrequencyEncode = frequency_encode,
) -> EncodedRays:
    """Encode ray images with a ray for every pixel, margin included, for a network of cells (MobileR2L).

    A cell's own ray passes half way between those of its pixels in opposite corners. Features and accumulation of a cell's
    pixels follow the cell's own encoding, channel by channel, as `pixel_shuffle` takes them; sample points are placed once
    for each block of pixels. Pixels of the margin have none: they are not drawn.

    Args:
        encoding: the scene's encoding.
        factor: upsampling factor, pixels along each side of a cell.
        pixel_samples: sample points per pixel; cells have the settings'.
        block: pixels along each side of a block; it divides `factor`.
        origins: in the teacher's frame; one for all pixels of a cell, as of a pinhole camera.
        directions: unit length.
        jitter: draw the sample points at random inside their shares (training).
        encode: as `frequency_encode`.

    Returns:
        encoded (*batch rows columns encoded), geometry (*batch, height and width without the margin, 2).
    """
    origins, directions = origins.float(), directions.float()
    corners = (directions[..., at::factor, at::factor, :] for at in (0, factor - 1))
    middles = normalize(_between(*corners), dim=-1)
    shape = middles.shape[:-1]
    rays = (origins[..., ::factor, ::factor, :].reshape(-1, 1, 3), middles.reshape(-1, 1, 3))
    found, _ = encoding.composited(encoding.span(*rays), jitter)
    encoded = encoding.encoded(found, rays[1][:, 0], encode).view(*shape, encoding.dim)

    edge, blocks = MARGIN * factor, CellPixels(block)
    inner = blocks.by_cell(directions[..., edge:-edge, edge:-edge, :])
    shape = inner.shape[:-1]
    rays = (origins[..., edge:-edge:block, edge:-edge:block, :].reshape(-1, 1, 3), inner.reshape(-1, block**2, 3))
    span = encoding.span(*rays)
    found, _ = encoding.composited(span, jitter, pixel_samples)
    geometry = encoding.geometry(found, span, *rays).view(*shape, 2)
    own = blocks.to_image(torch.cat([found.features, found.accumulation], dim=-1).view(*shape, -1))
    own = CellPixels(factor).by_cell(own).transpose(-1, -2).flatten(-2)
    own = pad(own, (0, 0, MARGIN, MARGIN, MARGIN, MARGIN))
    return EncodedRays(torch.cat([encoded, own], dim=-1), blocks.to_image(geometry))


def finished(
    values: Float[Tensor, "*pixels 3"], geometry: Float[Tensor, "*pixels 2"], background: Float[Tensor, "3"] | None
) -> Float[Tensor, "*pixels 5"]:
    """Return the five numbers of pixels: rgb, accumulation, depth as a position in [0, 1] of the scene's spacing.

    Args:
        values: colors of the network.
        geometry: geometry of `EncodedRays`.
        background: background around a bounded scene, where colors are weighted by accumulation; None elsewhere.
    """
    if background is not None:
        accumulation = geometry[..., :1]
        values = values * accumulation + background * (1.0 - accumulation)
    return torch.cat([values, geometry], dim=-1)


def _between(first: Float[Tensor, "*n"], last: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Half way."""
    return (first + last) / 2


def _mean(summed: Float[Tensor, "rays n"], accumulation: Float[Tensor, "rays 1"]) -> Float[Tensor, "rays n"]:
    """Return the weighted mean of a sum, 0.5 where there is nothing."""
    return (summed + 0.5 * LEAST) / (accumulation + LEAST)
