"""Occupancy of a composited ray encoding, from what the teacher shows of the scene."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras, choose_sampler
from r2l_nerfstudio.distillation.view_ring import ViewRing
from r2l_nerfstudio.models.composited_encoding import CompositedEncoding
from r2l_nerfstudio.rays.occupancy import grid_point_index
from r2l_nerfstudio.rays.pinhole import pinhole_rays
from r2l_nerfstudio.rays.scene_grid import GridWarp
from r2l_nerfstudio.students.sparse_volume import moved_rows

SURE = 0.5
"""Accumulation from which a pixel's depth is trusted."""
SEEN = 0.05
"""Accumulation from which a pixel shows anything."""
LEAST_HITS = 2
LEAST_SHARE = 1 / 600_000
"""Pixels that must end in a cell, at least, and as a share of all: fewer are errors of the teacher, which has a fog of them
where a capture has no bounds. What they hide is found again (`_unexplained`)."""
LEAST_WEIGHT = 0.05
"""Rendering weight that a sample point in a cell must have on at least one ray; cells without are pruned."""
PRUNING_RAYS = 1 << 20
"""Number of rays, of all views together, that decide which cells are pruned."""
PIXELS_PER_VIEW = 1 << 16
CARVING_VIEWS = 64
SPARE = 0.15
"""Spare rows for what later views show, as a share of those in use; released when training ends."""
_AT_ONCE = 1 << 15
_STEP = 1.02
"""Factor between the sides of a cell that are tried for the volume."""


class SceneOccupancy:
    """Marks the cells in which teacher views end.

    A cell is occupied if enough pixels end there, and so are its neighbors. Pixels that show something although no occupied
    cell lies on their ray (a wire thinner than a pixel, depth that is missing or wrong) then claim all cells along it that
    no view shows to be empty. No ray on which a teacher view shows something is left without an occupied cell.

    Args:
        encoding: encoding whose occupancy is set.
        occupancy_cells: about this many cells cubed.
        max_grid_points: grid points of the feature volume, at most.
        has_depth: whether teacher views have depth.
    """

    def __init__(
        self, encoding: CompositedEncoding, occupancy_cells: int, max_grid_points: int, has_depth: bool
    ) -> None:
        self.encoding = encoding
        self.occupancy_cells = occupancy_cells
        self.max_grid_points = max_grid_points
        self.has_depth = has_depth
        self._counts: Int32[Tensor, "z y x"] | None = None
        self._pruned: UInt8[Tensor, "z y x"] | None = None
        self._views_seen = 0

    @torch.no_grad()
    def start(self, ring: ViewRing, cameras: CaptureCameras) -> None:
        """Choose coordinates and box, mark what the ring shows, lay out the volume. Ranks agree on the union.

        Args:
            ring: ring of teacher views.
            cameras: the training cameras as pinholes.
        """
        encoding, scene = self.encoding, self.encoding.occupancy.scene
        warp = self._warp(cameras)
        views = [self._surface(ring, index) for index in range(len(ring))] if self.has_depth else []
        points = torch.cat([points for points, _ in views]) if views else encoding.ray_encoding.center.new_zeros(0, 3)
        origin, axes = self._apex(cameras)
        axes = axes.to(points)
        if warp == "ball":
            # The box must also contain things that are too thin for their depth to be trusted: search the whole ball
            # first.
            scene.fit(warp, points[:0], origin, axes)
            self._mark_afresh(ring, points)
            claimed = self._claimed_points()
            scene.fit(warp, points, origin, axes)
            scene.include(claimed)
        else:
            scene.fit(warp, points, origin, axes)
        if _ranks() > 1:  # One box for all ranks: the first rank's.
            for tensor in (scene.low, scene.extent):
                torch.distributed.broadcast(tensor, 0)
        self._mark_afresh(ring, points)
        cell = scene.cell_of(self.occupancy_cells)
        if len(points):
            footprints = torch.cat([footprints for _, footprints in views])
            keep = slice(None, None, max(1, len(points) // 100_000))
            cell = scene.pixel_cell(points[keep], footprints[keep])
        if _ranks() > 1:
            shared = points.new_tensor([cell])
            torch.distributed.broadcast(shared, 0)
            cell = float(shared)
        self._cell = cell
        encoding.lay_out(self._resolution(cell, self.max_grid_points), SPARE)
        self._views_seen = ring.views_put

    @torch.no_grad()
    def grow(self, ring: ViewRing, least: float = 0.05) -> Callable[[Tensor], Tensor] | None:
        """Mark what views show that were added to the ring since the last call. If there are not enough rows,
        only cells of rays without any cell are added; if that is still too many, the volume's cells become larger.

        Args:
            ring: the same as before.
            least: share of the ring that must be new.

        Returns:
            Converts what has a value per row of the volume; None if nothing changed.
        """
        assert self._counts is not None, "start() must be called first"
        new = range(self._views_seen, ring.views_put)
        if len(new) < least * ring.capacity:
            return None
        self._views_seen = ring.views_put
        indices = sorted({number % ring.capacity for number in new})
        before = self.encoding.occupancy.cells
        if self.has_depth:
            for index in indices:
                self._counts += self.encoding.occupancy.counts(self._surface(ring, index)[0])
        self._mark(ring, indices)
        occupancy, volume = self.encoding.occupancy, self.encoding.volume
        if not self._has_room(volume.cells):
            occupancy.cells = before
            self._mark_unexplained(ring, indices)
        if torch.equal(before, occupancy.cells):
            return None
        if not self._has_room(volume.cells):
            return self._at_fitting_resolution()
        return partial(moved_rows, self.encoding.lay_out(volume.cells))

    def _has_room(self, resolution: tuple[int, int, int]) -> bool:
        return int(grid_point_index(self.encoding.occupancy.cells, resolution).max()) <= self._room

    @torch.no_grad()
    def prune(self, ring: ViewRing) -> Callable[[Tensor], Tensor]:
        """Remove the cells that contribute to no ray, and use their grid points for smaller cells of the volume.

        A teacher's depth is blurred across edges, and noisy where it saw no photo; the student's own density is more
        precise once it has been trained. A ray keeps all of its cells if it would lose every one of them.

        Args:
            ring: the same as before.

        Returns:
            Converts what has a value per row of the volume.
        """
        encoding, occupancy = self.encoding, self.encoding.occupancy
        before = occupancy.cells.flatten()
        heaviest = torch.zeros_like(before, dtype=torch.float32)
        dim: list[Int32[Tensor, "rays samples"]] = []
        for origins, directions in self._pruning_rays(ring):
            placing, containing, weights = encoding.sample_weights(origins, directions)
            for numbers in (placing, containing):
                heaviest.scatter_reduce_(0, numbers.flatten().long(), weights.flatten(), "amax")
            dim.append(placing[weights.amax(-1) < LEAST_WEIGHT])
        kept = before * (heaviest >= LEAST_WEIGHT).to(before.dtype)
        for numbers in dim:
            lost = numbers[kept[numbers].sum(-1) == 0].flatten()
            kept[lost] = before[lost]
        if not bool(kept.any()):  # No view shows anything.
            kept = before
        occupancy.cells = kept.view_as(occupancy.cells)
        pruned = (before - kept).view_as(occupancy.cells)
        self._pruned = pruned if self._pruned is None else self._pruned | pruned
        encoding.prunings += 1
        return self._at_fitting_resolution()

    @property
    def _room(self) -> int:
        rows = len(self.encoding.volume.rows) - 1
        # Spare rows are for the first views.
        return min(self.max_grid_points, rows) if self.encoding.prunings else rows

    def _at_fitting_resolution(self) -> Callable[[Tensor], Tensor]:
        return self.encoding.resample(self._resolution(self._cell, self._room))

    def _pruning_rays(self, ring: ViewRing) -> Iterator[tuple[Float[Tensor, "rays 3"], Float[Tensor, "rays 3"]]]:
        for index in range(len(ring)):
            origins, directions, accumulation, _, valid = _pixels(ring, index, max(1, PRUNING_RAYS // len(ring)))
            for part in (valid & (accumulation >= SEEN)).nonzero()[:, 0].split(_AT_ONCE):
                yield origins[part], directions[part]

    @torch.no_grad()
    def resume(self, ring: ViewRing) -> None:
        """Continue from the occupancy of a checkpoint that was loaded into the encoding, counting the ring's pixels
        again."""
        occupancy = self.encoding.occupancy
        self._counts = torch.zeros_like(occupancy.cells, dtype=torch.int32)
        if self.has_depth:
            for index in range(len(ring)):
                self._counts += occupancy.counts(self._surface(ring, index)[0])
        self._pruned = None
        if self.encoding.prunings:
            kept = occupancy.cells
            self._mark_ends()
            self._pruned = occupancy.cells - kept
            occupancy.cells = kept

    def describe(self) -> str:
        """Return one line on the occupancy."""
        occupancy, volume = self.encoding.occupancy, self.encoding.volume
        return (
            f"{occupancy.share():.0%} of {'x'.join(map(str, occupancy.resolution))} cells occupied;"
            f" features at {volume.num_grid_points:,} of {volume.index.numel():,} grid points"
        )

    def _warp(self, cameras: CaptureCameras) -> GridWarp:
        if self.encoding.ray_encoding.spacing == "sphere":
            return "ball"
        return "frustum" if choose_sampler(cameras) == "box" else "contracted"

    def _apex(self, cameras: CaptureCameras) -> tuple[Float[Tensor, "3"], Float[Tensor, "3 3"]]:
        """Return origin (scene coordinates) and axes of a camera behind all cameras, with their mean direction."""
        encoding, axes = self.encoding.ray_encoding, cameras.mean_axes
        backward = axes[:, 2]
        along = cameras.positions @ backward
        middle = cameras.positions.mean(0)
        position = middle + (along.max() - middle @ backward + 0.05 * float(encoding.radius)) * backward
        return (position.to(encoding.center) - encoding.center) / encoding.radius, axes

    def _surface(self, ring: ViewRing, index: int) -> tuple[Float[Tensor, "points 3"], Float[Tensor, "points"]]:
        """Return points in scene coordinates at which a view's pixels end, and sides of the pixels there."""
        encoding = self.encoding.ray_encoding
        origins, directions, accumulation, depth, valid = _pixels(ring, index)
        ends = valid & (accumulation >= SURE) & (depth > 0)
        depth = depth[ends, None]
        points = (origins[ends] + depth * directions[ends] - encoding.center) / encoding.radius
        focal = ring.intrinsics[index, :2].mean()
        return points, depth[:, 0] / (focal * encoding.radius)

    def _mark_afresh(self, ring: ViewRing, points: Float[Tensor, "points 3"]) -> None:
        scene, occupancy = self.encoding.occupancy.scene, self.encoding.occupancy
        occupancy.clear(scene.resolution(scene.cell_of(self.occupancy_cells)))
        self._claimed = torch.zeros_like(occupancy.cells)
        self._counts = occupancy.counts(points)
        self._mark(ring, range(len(ring)))

    def _claimed_points(self) -> Float[Tensor, "points 3"]:
        """Return corners of a ball's cells that are occupied although no depth is trusted there, in scene
        coordinates."""
        occupancy = self.encoding.occupancy
        cells = self._claimed.nonzero().flip(-1)
        unit = torch.cat([cells, cells + 1]) / cells.new_tensor(occupancy.resolution)
        return unit * occupancy.scene.extent + occupancy.scene.low

    def _mark(self, ring: ViewRing, indices: range | list[int]) -> None:
        occupancy = self.encoding.occupancy
        self._mark_ends()
        self._mark_unexplained(ring, indices)
        if _ranks() > 1:
            cells = occupancy.cells.int()
            torch.distributed.all_reduce(cells, torch.distributed.ReduceOp.MAX)
            occupancy.cells = cells.to(torch.uint8)
        if not bool(occupancy.cells.any()):  # A teacher that shows nothing, or nothing that can be located.
            occupancy.mark(torch.ones_like(occupancy.cells))

    def _mark_unexplained(self, ring: ViewRing, indices: range | list[int]) -> None:
        occupancy = self.encoding.occupancy
        for cells in self._unexplained(ring, indices):
            # Carving leaves little of a bounded scene; elsewhere whole rays, which need no neighbors.
            occupancy.mark(cells, dilation=int(self.encoding.is_bounded))
            self._claimed = cells

    def _mark_ends(self) -> None:
        """Mark the cells in which enough pixels end, and their neighbors, except those that were pruned."""
        occupancy = self.encoding.occupancy
        assert self._counts is not None
        counts = _sum_of_ranks(self._counts.clone())
        least = (LEAST_SHARE * counts.sum()).clamp_min(LEAST_HITS)
        kept = occupancy.cells
        occupancy.mark((counts >= least).to(torch.uint8))
        if self._pruned is not None:
            occupancy.cells = kept | (occupancy.cells & (1 - self._pruned))

    def _unexplained(self, ring: ViewRing, indices: range | list[int]) -> Iterator[UInt8[Tensor, "z y x"]]:
        """Return cells along rays that show something although nothing is marked on them, where no view shows empty
        space."""
        encoding = self.encoding
        claimed = torch.zeros_like(encoding.occupancy.cells).flatten()
        for index in indices:
            origins, directions, accumulation, _, valid = _pixels(ring, index)
            seen = valid & (accumulation >= SEEN)
            for part in seen.nonzero()[:, 0].split(_AT_ONCE):
                span = encoding.span(origins[part, None], directions[part, None])
                probes = encoding.positions(encoding.middles(origins.device))
                points = encoding.occupancy.scene(span.lead_start[:, None] + probes[:, None] * span.lead_step[:, None])
                numbers = encoding.occupancy.flat_cell(points)
                lost = encoding.occupancy.cells.flatten()[numbers].sum(-1) == 0
                if span.is_missed is not None:
                    lost &= ~span.is_missed
                claimed[numbers[lost].flatten()] = 1
        if bool(claimed.any()):
            claimed &= 1 - self._empty(ring, claimed)
            yield claimed.view_as(encoding.occupancy.cells)

    def _empty(self, ring: ViewRing, wanted: UInt8[Tensor, "cells"]) -> UInt8[Tensor, "cells"]:
        """Return which of these cells a view looks through without seeing anything (space carving, with
        accumulation)."""
        occupancy = self.encoding.occupancy
        numbers = wanted.nonzero()[:, 0]
        empty = torch.zeros_like(wanted)
        if occupancy.scene.warp != "ball":  # There is always something behind.
            return empty
        x, y, _ = occupancy.resolution
        cell = torch.stack([numbers % x, numbers // x % y, numbers // (x * y)], dim=-1)
        size = cell.new_tensor(occupancy.resolution)
        encoding, scene = self.encoding.ray_encoding, occupancy.scene
        points = (((cell + 0.5) / size) * scene.extent + scene.low) * encoding.radius + encoding.center
        for index in torch.linspace(0, len(ring) - 1, min(CARVING_VIEWS, len(ring))).round().long().unique().tolist():
            pose, (fx, fy, cx, cy) = ring.camera_to_worlds[index], ring.intrinsics[index]
            local = (points - pose[:, 3]) @ pose[:, :3]
            depth = -local[:, 2]
            column = (local[:, 0] / depth * fx + cx).floor().long()
            row = (cy - local[:, 1] / depth * fy).floor().long()
            # One pixel from the border, so that its neighbors exist: a cell may be as wide as a few pixels.
            inside = (depth > 0) & (column >= 1) & (row >= 1) & (column < ring.width - 1) & (row < ring.height - 1)
            accumulation = ring.pixels[index, ..., 3].float()[None, None]
            around = torch.nn.functional.max_pool2d(accumulation, 3, stride=1, padding=1)[0, 0]
            looked = inside.nonzero()[:, 0]
            free = around[row[looked], column[looked]] < 255 * SEEN
            empty[numbers[looked[free]]] = 1
        return empty

    def _resolution(self, cell: float, most: int) -> tuple[int, int, int]:
        """Return the volume's cells: of this side, or larger if there would be more grid points than this."""
        scene, occupancy = self.encoding.occupancy.scene, self.encoding.occupancy
        floor = scene.cell_of(4 * self.occupancy_cells)
        cell = max(cell, floor)
        while True:
            resolution = scene.resolution(cell)
            count = int(grid_point_index(occupancy.cells, resolution).max())
            if count <= most or max(resolution) <= 4:
                return resolution
            # Their number falls at most with the cube of the side: so many steps are needed at least.
            cell *= _STEP ** max(1, int(math.log(count / most) / (3 * math.log(_STEP))))


def _pixels(ring: ViewRing, index: int, most: int = PIXELS_PER_VIEW) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return origins, directions, accumulation, depth and validity of a view's pixels, evenly subsampled to at most so
    many."""
    stride = math.ceil(ring.height * ring.width / most)
    chosen = torch.arange(0, ring.height * ring.width, stride, device=ring.device)
    x, y = (chosen % ring.width).float() + 0.5, (chosen // ring.width).float() + 0.5
    pose, intrinsics = ring.camera_to_worlds[index], ring.intrinsics[index]
    origins, directions = pinhole_rays(
        pose.expand(len(chosen), 3, 4), intrinsics.expand(len(chosen), 4), torch.stack([x, y], dim=-1)
    )
    pixels = ring.pixels[index].view(-1, 5)[chosen]
    depth = ring.depth[index].flatten()[chosen].float()
    return origins, directions, pixels[:, 3].float() / 255, depth, pixels[:, 4] > 0


def _ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _sum_of_ranks(tensor: Tensor) -> Tensor:
    if _ranks() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor
