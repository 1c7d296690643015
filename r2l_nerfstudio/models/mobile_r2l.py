"""MobileR2L behind Nerfstudio's Model interface: a low-resolution ray image, then upsampling."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
import tyro
from jaxtyping import Float
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor
from torch.nn.functional import interpolate, pad

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.models.any_camera import render_by_faces
from r2l_nerfstudio.models.camera_rays import CameraRays, distorted_rays
from r2l_nerfstudio.models.composited_encoding import (
    CompositedEncoding,
    EncodedRays,
    encode_pixels,
    encode_ray_image,
)
from r2l_nerfstudio.models.light_field import LightFieldModel, LightFieldModelConfig
from r2l_nerfstudio.ranges import IntRange
from r2l_nerfstudio.rays.constants import constant
from r2l_nerfstudio.rays.pinhole import pixel_centers
from r2l_nerfstudio.rays.ray_image import MARGIN, ray_image_intrinsics, ray_image_size
from r2l_nerfstudio.rays.sphere_window import Window, sphere_window
from r2l_nerfstudio.students.mobile import MobileR2L, up_steps

FACTORS = (4, 8, 12)
BLOCKS = (4, 2, 1)
_CELLS_PER_SIDE = 1.4
"""Cells along the longest side of a scene's box, of which few are cubes, by the cube root of all its cells."""
CELLS_ACROSS = 100
"""Approximate cells along the ray image's longer side: the published networks have 100 for 800 pixels and 84 for
1008."""

MAX_CELLS = 1 << 16
"""Cells of one frame; if the trained pitch needs more, as for very wide views, it is rendered coarser."""

LENS_PITCH = 0.15
"""Logarithm of how much closer or farther apart a lens's pixels may be than those of the training views."""

WINDOW_STEP = 4
"""Cells; sides of a window are rounded up to a multiple of it, since engines are slow at the first image of each
size."""


@dataclass
class MobileR2LModelConfig(LightFieldModelConfig):
    """MobileR2L: one network evaluation per cell of a ray image, and upsampling."""

    RENAMED: ClassVar[dict[str, str]] = {**LightFieldModelConfig.RENAMED, "factor": "upsampling_factor"}

    _target: type = field(default_factory=lambda: MobileR2LModel)
    zero_init: bool = False
    """Start every residual block as the identity. With BatchNorm it does not help: 23.0 dB with it, 23.7 without it
    (lego, 100x100, 60 s on one core)."""
    num_points: Annotated[int, IntRange(1, 4096)] = 8
    """Points per ray."""
    num_frequencies: Annotated[int, IntRange(0, 64)] = 6
    """Octaves of the frequency encoding."""
    blocks: Annotated[int, IntRange(1, 1024)] = 29
    """Residual blocks of the body."""
    upsampling_factor: Annotated[int, IntRange(0, 64), tyro.conf.arg(aliases=["--pipeline.model.factor"])] = 0
    """Upsampling factor: pixels along each side of a cell; 0: 4, 8 or 12, whichever gives about 100 cells across."""
    up_width: Annotated[int, IntRange(1, 8192)] = 64
    """Channels of all upsampling steps but the last."""
    last_width: Annotated[int, IntRange(1, 8192)] = 16
    """Channels of the last upsampling step."""
    margin: int = MARGIN
    """Cells around an image that are evaluated and dropped, so that its border pixels have neighbors; 0, as published:
    none, and zeros beyond the border."""
    pixel_samples: int = 12
    """composited: sample points per pixel; cells have `num_samples`."""
    placement_block: Annotated[int, IntRange(0, 64)] = 0
    """composited: pixels along each side of the blocks that share the placement of their sample points; 0: 4, 2 or 1,
    whichever divides the upsampling factor and is at most two cells of the occupancy wide."""
    join_width: int = 32
    """composited: channels of the layer that joins the pixels' own features."""
    join_blocks: Annotated[int, IntRange(0, 64)] = 0
    """composited: residual blocks after it, at every pixel. Without them the student shows less fine detail of
    captures with much of it."""

    def fit_to(self, width: int, height: int) -> None:
        """Choose the upsampling factor for views of this size, unless it is set.

        Raises:
            InputError: for an invalid factor or margin.
        """
        if self.upsampling_factor == 0:
            self.upsampling_factor = next((f for f in FACTORS if max(width, height) <= CELLS_ACROSS * f), FACTORS[-1])
        up_steps(self.upsampling_factor)
        if self.placement_block == 0:
            most = 2 * max(width, height) / (_CELLS_PER_SIDE * self.occupancy_cells)
            self.placement_block = next(b for b in BLOCKS if self.upsampling_factor % b == 0 and b <= max(1, most))
        if self.upsampling_factor % self.placement_block:
            raise InputError(
                f"--pipeline.model.placement-block {self.placement_block} does not divide the upsampling factor"
                f" {self.upsampling_factor}: choose one that does, or 0."
            )
        if self.margin not in (0, 1):
            raise InputError(
                f"--pipeline.model.margin must be 0 or 1 (got {self.margin}): a pixel depends on its own cell and the"
                " eight around it."
            )
        if self.margin == 0 and self.ray_encoding == "composited":
            raise InputError("--pipeline.model.margin 0: composited features need a margin; set it to 1.")


class MobileR2LModel(LightFieldModel):
    """A convolutional student. It renders at the angular pitch it was trained at; images of another pitch, fisheyes and
    panoramas are resampled."""

    config: MobileR2LModelConfig
    network: MobileR2L
    reads_ray_image = True
    focal: Tensor
    """Focal length in pixels of the views it was trained on; it renders at a pitch of 1 / focal."""

    def build_network(self, in_dim: int) -> MobileR2L:
        config = self.config
        self.factor = config.upsampling_factor or FACTORS[0]
        self.margin = self.crop_margin = config.margin
        # Runs from before this setting placed points once per 2x2 pixels.
        self.block = config.placement_block or next(b for b in BLOCKS[1:] if self.factor % b == 0)
        # Features and accumulation of each pixel of a cell join the last step.
        joined = 0 if self.composited is None else config.feature_channels + 1
        return MobileR2L(
            in_dim + joined * self.factor**2,
            self.out_dim,
            config.width,
            config.blocks,
            self.factor,
            config.up_width,
            config.last_width,
            zero_init=config.zero_init,
            joined=joined,
            join_width=config.join_width,
            join_blocks=config.join_blocks,
        )

    # Rays only, like Nerfstudio's models of rays: cameras go through `get_outputs_for_camera`.
    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return color, accumulation and encoded depth of the pixels of ray images, without their margins.

        Args:
            ray_bundle: rays of the cells, margin included (crops rows columns), `rays_per_cell` times as many along
                each side; or single rays (rays): of pixels to learn from (training), or those with which `ns-render`
                finds out what hides a camera.

        Returns:
            `rgb` (crops height width 3), `accumulation` and `depth_fraction` (crops height width 1); for single rays
            without height and width, and except in training with `depth`, the distance along the ray.
        """
        if ray_bundle.origins.ndim == 2:
            answer = self._pixels_alone if self.training else self._answer_rays
            return answer(ray_bundle.origins, ray_bundle.directions)
        jitter = self.training and self.config.jitter_points
        encoded, geometry = self.encode_rays(*self.bundle_rays(ray_bundle), jitter)
        values = self.network(encoded.permute(0, 3, 1, 2), self.crop_margin).float().permute(0, 2, 3, 1)
        values = self.finish(values, geometry)
        return {"rgb": values} if values.shape[-1] == 3 else _named(values)

    def begin_with_single_rays(self) -> None:
        self.network.silence_cells()

    def _pixels_alone(
        self, origins: Float[Tensor, "pixels 3"], directions: Float[Tensor, "pixels 3"]
    ) -> dict[str, Tensor]:
        """What pixels show if their cells have nothing to say."""
        assert self.composited is not None, "only pixels with features of their own can be learned alone"
        encoded = encode_pixels(
            self.composited, self.config.pixel_samples, origins, directions, self.config.jitter_points
        )
        return _named(self.finish(self.network.forward_pixels(encoded.encoded).float(), encoded.geometry))

    def encode_composited(
        self,
        encoding: CompositedEncoding,
        origins: Float[Tensor, "*batch height width 3"],
        directions: Float[Tensor, "*batch height width 3"],
        jitter: bool,
    ) -> EncodedRays:
        samples = self.config.pixel_samples
        return encode_ray_image(encoding, self.factor, samples, self.block, origins, directions, jitter)

    @torch.no_grad()
    def _answer_rays(self, origins: Float[Tensor, "rays 3"], directions: Float[Tensor, "rays 3"]) -> dict[str, Tensor]:
        """Render each ray as an image of one pixel, with an upright camera that looks along it."""
        right = torch.linalg.cross(directions, self.ray_encoding.axes[:, 1].expand_as(directions))
        # Straight up or down any right will do.
        other = torch.linalg.cross(directions, self.ray_encoding.axes[:, 0].expand_as(directions))
        right = torch.where(right.norm(dim=-1, keepdim=True) > 1e-3, right, other)
        right = right / right.norm(dim=-1, keepdim=True)
        axes = torch.stack([right, torch.linalg.cross(right, directions), -directions, origins], dim=-1)
        intrinsics = torch.stack([self.focal, self.focal, *torch.full_like(self.focal.expand(2), 0.5)])
        side = (1 + 2 * self.margin) * self.rays_per_cell
        grid = pixel_centers(side, side, self.device)
        in_cells = ray_image_intrinsics(intrinsics, self.factor, None, self.rays_per_cell, self.margin)
        encoded, geometry = self.encode_rays(*self.ray_encoding.pinhole_rays(axes[:, None, None], in_cells, grid))
        first = self.margin * self.factor
        values = self.run_network(encoded.permute(0, 3, 1, 2))[:, :, first, first]
        values = self.finish(values, None if geometry is None else geometry[:, 0, 0])
        if values.shape[-1] == 3:
            return {"rgb": values, "depth": self.unknown_depth(values[:, :1])}
        named = _named(values)
        return named | {"depth": self.ray_encoding.to_distance(origins, directions, named["depth_fraction"])}

    def render_pinhole(
        self, pose: Float[Tensor, "3 4"], intrinsics: Float[Tensor, "4"], height: int, width: int
    ) -> Float[Tensor, "height width 5"]:
        """Render at the trained pitch, rounded to whole pixels across, and resample if that is another size."""
        fx, fy = intrinsics[:2].tolist()
        drawn_width, drawn_height = self.drawn_size(fx, fy, width, height)
        across, down = drawn_width / width, drawn_height / height
        # The pixels from which one resampled pixel is read, and one more.
        spill = math.ceil(max(1.0, across, down)) + 1
        drawn_intrinsics = intrinsics * constant(intrinsics, [across, down] * 2)
        values = self._draw(pose, drawn_intrinsics, drawn_height, drawn_width, spill)
        if (drawn_height, drawn_width) != (height, width):
            values = interpolate(values, (height, width), mode="bilinear", antialias=True)
        return values[0].permute(1, 2, 0)

    def drawn_size(self, fx: float, fy: float, width: int, height: int) -> tuple[int, int]:
        """Return the width and height in pixels at which a camera's image is rendered before it is resampled."""
        focal = float(self.focal)
        drawn_width, drawn_height = width * focal / fx, height * focal / fy
        cells = drawn_width * drawn_height / self.factor**2
        shrink = min(1.0, math.sqrt(MAX_CELLS / cells))
        return max(1, round(drawn_width * shrink)), max(1, round(drawn_height * shrink))

    def _draw(
        self, pose: Tensor, intrinsics: Tensor, height: int, width: int, spill: int
    ) -> Float[Tensor, "1 5 height width"]:
        """Return the network's numbers at the trained pitch; on a CPU zeros where a bounded scene is out of sight,
        except for some pixels around it."""
        window = Window(0, 0, width, height)
        # On GPUs a new size costs more than it saves: engines are planned, and graphs captured, for each.
        if self.ray_encoding.spacing == "sphere" and self.device.type == "cpu":
            encoding = self.ray_encoding
            window = sphere_window(pose, intrinsics, height, width, encoding.center, float(encoding.radius), spill)
        left, columns = self._cells(window.left, window.right, width)
        top, rows = self._cells(window.top, window.bottom, height)
        corner = constant(intrinsics, [left, top])
        margin = self.margin * self.factor
        encoded, geometry = self._encoding(pose, intrinsics, rows, columns, corner)
        values = self.run_network(encoded)
        values = values[..., margin : values.shape[-2] - margin, margin : values.shape[-1] - margin]
        if geometry is not None:
            values = self.finish(values[0].permute(1, 2, 0), geometry).permute(2, 0, 1)[None]
        values = values[..., : height - top, : width - left]
        beyond = (left, width - left - values.shape[-1], top, height - top - values.shape[-2])
        return pad(values, beyond) if any(beyond) else values

    def _cells(self, start: int, end: int, size: int) -> tuple[int, int]:
        """Return where to begin, in pixels, and how many cells to evaluate, margin included, along one side of a
        window."""
        most = math.ceil(size / self.factor)
        first, last = start // self.factor, math.ceil(end / self.factor)
        count = min(most, max(1, math.ceil((last - first) / WINDOW_STEP)) * WINDOW_STEP)
        return min(first, most - count) * self.factor, count + 2 * self.margin

    def render_values(self, camera: CameraRays) -> Float[Tensor, "height width 5"]:
        if camera.is_pinhole:
            return self.render_pinhole(*camera.pinhole, camera.height, camera.width)
        values = self._render_distorted(camera) if camera.is_distorted else None
        return render_by_faces(camera, float(self.focal), self.render_pinhole) if values is None else values

    def _render_distorted(self, camera: CameraRays) -> Float[Tensor, "height width 5"] | None:
        """Render a lens whose pixels are about as far apart as those of the training views, without resampling, which
        would blur it. Features composited for each pixel are as sharp on its own rays.

        Returns:
            The network's numbers; None for other lenses, and without composited features.
        """
        rows, columns = (math.ceil(size / self.factor) for size in (camera.height, camera.width))
        if self.composited is None or rows * columns > MAX_CELLS:
            return None
        border = self.margin * self.factor
        size = rows * self.factor, columns * self.factor
        origins, directions = distorted_rays(camera.camera, *size, border, self.device)
        local = directions @ camera.camera.camera_to_worlds[0, :, :3].to(directions)
        tangents = local[..., :2] / -local[..., 2:]
        pitches = torch.cat([(tangents.diff(dim=axis) * self.focal).norm(dim=-1).flatten() for axis in (0, 1)])
        # What is no number, beyond the reach of a lens's distortion, compares as false.
        if not bool((local[..., 2] < 0).all() & (pitches.log().abs() < LENS_PITCH).all()):
            return None
        encoded, geometry = self.encode_rays(origins, directions)
        values = self.run_network(encoded.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
        values = self.finish(values[border : border + size[0], border : border + size[1]], geometry)
        return values[: camera.height, : camera.width]

    def native_focal(self, focal: float) -> float:
        return float(self.focal)

    def encoding_for_camera(
        self, pose: Float[Tensor, "3 4"], intrinsics: Float[Tensor, "4"], height: int, width: int
    ) -> EncodedRays:
        return self._encoding(pose, intrinsics, *ray_image_size(height, width, self.factor, self.margin), None)

    def _encoding(
        self, pose: Tensor, intrinsics: Tensor, rows: int, columns: int, corner: Float[Tensor, "2"] | None
    ) -> EncodedRays:
        """Return `encoding_for_camera` for a window of cells, margin included, that begins at a pixel (x, y)."""
        in_cells = ray_image_intrinsics(intrinsics, self.factor, corner, self.rays_per_cell, self.margin)
        rays = self.ray_encoding.image_rays(pose, in_cells, rows * self.rays_per_cell, columns * self.rays_per_cell)
        encoded, geometry = self.encode_rays(*rays)
        return EncodedRays(encoded.permute(2, 0, 1)[None], geometry)


def _named(values: Float[Tensor, "*pixels 5"]) -> dict[str, Tensor]:
    """The five numbers of pixels by the names of a model's outputs."""
    return {"rgb": values[..., :3], "accumulation": values[..., 3:4], "depth_fraction": values[..., 4:5]}
