"""R2L behind Nerfstudio's Model interface: one network evaluation per pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

import torch
from jaxtyping import Float
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor
from torch.nn.functional import interpolate

from r2l_nerfstudio.engines.sizes import chunk_rows
from r2l_nerfstudio.models.any_camera import render_by_faces
from r2l_nerfstudio.models.camera_rays import CameraRays
from r2l_nerfstudio.models.composited_encoding import CompositedEncoding, EncodedRays, encode_single_rays
from r2l_nerfstudio.models.light_field import LightFieldModel, LightFieldModelConfig
from r2l_nerfstudio.ranges import IntRange
from r2l_nerfstudio.rays.constants import constant
from r2l_nerfstudio.students.resmlp import ResMLP
from r2l_nerfstudio.students.sparse_volume import Composited

MAX_RAYS = 1 << 20
"""Rays of one frame; if averaging would take more, fewer rays are averaged."""
COMPOSITED_AT_ONCE = 1 << 16
"""Rays composited at once: sample points of more would take gigabytes on a GPU."""


@dataclass
class R2LModelConfig(LightFieldModelConfig):
    """R2L: one network evaluation per pixel."""

    _target: type = field(default_factory=lambda: R2LModel)
    eval_num_rays_per_chunk: Annotated[int, IntRange(1)] = 65536
    """Rays per network evaluation when rendering."""
    depth: Annotated[int, IntRange(2, 1024)] = 88
    """Number of linear layers."""


class R2LModel(LightFieldModel):
    """A residual MLP from an encoded ray to color, accumulation and depth."""

    config: R2LModelConfig
    network: ResMLP

    def build_network(self, in_dim: int) -> ResMLP:
        return ResMLP(in_dim, self.out_dim, self.config.width, self.config.depth, zero_init=self.config.zero_init)

    # Rays only, like Nerfstudio's models of rays: cameras go through `get_outputs_for_camera`.
    def get_outputs(self, ray_bundle: RayBundle) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return color, accumulation and depth of rays.

        Returns:
            `rgb` (*batch 3), `accumulation` (*batch 1), `depth` (*batch 1, distance along the ray), and
            `depth_fraction`, the position in [0, 1] along the ray that encodes the depth. Of a student of color only, `rgb`
            and an infinite `depth`.
        """
        origins, directions = self.bundle_rays(ray_bundle)
        encoded, geometry = self.encode_rays(origins, directions, jitter=self.training and self.config.jitter_points)
        values = self.finish(self.network(encoded).float(), geometry)
        if values.shape[-1] == 3:
            return {"rgb": values, "depth": self.unknown_depth(values[..., :1].detach())}
        fraction = values[..., 4:5]
        return {
            "rgb": values[..., :3],
            "accumulation": values[..., 3:4],
            "depth": self.ray_encoding.to_distance(origins, directions, fraction),
            "depth_fraction": fraction,
        }

    def encode_composited(
        self,
        encoding: CompositedEncoding,
        origins: Float[Tensor, "*batch 3"],
        directions: Float[Tensor, "*batch 3"],
        jitter: bool,
    ) -> EncodedRays:
        return encode_single_rays(encoding, origins, directions, jitter)

    def render_pinhole(
        self,
        pose: Float[Tensor, "3 4"],
        intrinsics: Float[Tensor, "4"],
        height: int,
        width: int,
        camera: CameraRays | None = None,
    ) -> Float[Tensor, "height width 5"]:
        """Render images coarser than the training views at the pitch of those, and average: features as fine as their
        pixels would flicker otherwise."""
        across, down = self._supersampling(intrinsics, height, width)
        drawn_height, drawn_width = math.ceil(height * down), math.ceil(width * across)
        if (drawn_height, drawn_width) == (height, width):
            if camera is not None and self.ray_encoding.reads_pixel_centers:
                return self.render_rays(*camera.rays)
            return self.render_rays(*self.ray_encoding.image_rays(pose, intrinsics, height, width))
        scale = constant(intrinsics, [drawn_width / width, drawn_height / height] * 2)
        values = self.render_rays(*self.ray_encoding.image_rays(pose, intrinsics * scale, drawn_height, drawn_width))
        values = interpolate(values.permute(2, 0, 1)[None], (height, width), mode="bilinear", antialias=True)
        return values[0].permute(1, 2, 0)

    def _supersampling(self, intrinsics: Float[Tensor, "4"], height: int, width: int) -> tuple[float, float]:
        """Return the rays per pixel across and down."""
        if self.focal is None:
            return 1.0, 1.0
        across, down = ((float(self.focal) / intrinsics[:2]).clamp_min(1.0)).tolist()
        shrink = min(1.0, math.sqrt(MAX_RAYS / (across * down * height * width)))
        return max(1.0, across * shrink), max(1.0, down * shrink)

    def render_values(self, camera: CameraRays) -> Float[Tensor, "height width 5"]:
        if not camera.is_pinhole:
            if self.ray_encoding.conventions.is_planar:  # Only pinholes are planar.
                return render_by_faces(camera, float(camera.camera.fx[0]), self.render_pinhole)
            return self.render_rays(*camera.rays)
        return self.render_pinhole(*camera.pinhole, camera.height, camera.width, camera)

    def native_focal(self, focal: float) -> float:
        # Composited features are as fine as the views it was trained on: images of a shorter focal length are averaged.
        return focal if self.focal is None else max(focal, float(self.focal))

    def encoding_for_camera(
        self, pose: Float[Tensor, "3 4"], intrinsics: Float[Tensor, "4"], height: int, width: int
    ) -> EncodedRays:
        origins, directions = self.ray_encoding.image_rays(pose, intrinsics, height, width)
        return self.encode_rays(origins.reshape(-1, 3), directions.reshape(-1, 3))

    def render_rays(
        self, origins: Float[Tensor, "*batch 3"], directions: Float[Tensor, "*batch 3"]
    ) -> Float[Tensor, "*batch 5"]:
        """Return five numbers per ray, with the network evaluated in chunks of at most `eval_num_rays_per_chunk`; zeros
        for rays that miss a bounded scene, or the background for those that meet nothing in it.

        On a CPU the chunks are small multiples of the engines' own: an encoding of four kilobytes per ray should stay in
        cache, and threads of PyTorch and of an engine slow each other down at every change.
        """
        if self.composited is not None:
            parts = zip(*(t.reshape(-1, 3).split(COMPOSITED_AT_ONCE) for t in (origins, directions)), strict=True)
            return torch.cat([self._render_composited(self.composited, *part) for part in parts]).view(
                *origins.shape[:-1], 5
            )
        flat = [tensor.reshape(-1, 3) for tensor in (origins, directions)]
        seen: Tensor | None = None
        if self.ray_encoding.spacing == "sphere":
            seen = (~self.ray_encoding.misses_scene(origins, directions)).flatten().nonzero()[:, 0]
            flat = [tensor[seen] for tensor in flat]
        size = min(self.config.eval_num_rays_per_chunk, 4 * chunk_rows(origins.device))
        parts = [self.run_network(self.encode(o, d)) for o, d in zip(*(t.split(size) for t in flat), strict=True)]
        values = torch.cat(parts)
        if seen is not None:
            values = values.new_zeros(origins[..., 0].numel(), values.shape[-1]).index_copy_(0, seen, values)
        return values.view(*origins.shape[:-1], -1)

    def _render_composited(
        self, encoding: CompositedEncoding, origins: Float[Tensor, "rays 3"], directions: Float[Tensor, "rays 3"]
    ) -> Float[Tensor, "rays 5"]:
        """Return five numbers per ray; around a bounded scene the network is evaluated only for rays that meet
        something."""
        rays = (origins[:, None], directions[:, None])
        span = encoding.span(*rays)
        found, is_empty = encoding.composited(span)
        geometry = encoding.geometry(found, span, *rays)
        met: Tensor | None = None
        if encoding.is_bounded:
            met = (~is_empty).nonzero()[:, 0]
            found = Composited(*(part[met] for part in found))
            directions = directions[met]
        chunk = min(self.config.eval_num_rays_per_chunk, 4 * chunk_rows(origins.device))
        values = torch.cat([self.run_network(part) for part in encoding.encoded(found, directions).split(chunk)])
        if met is not None:
            values = values.new_zeros(len(origins), 3).index_copy_(0, met, values)
        return self.finish(values, geometry)
