"""The scene: a few solids on a round table before white, ray traced exactly.

World frame: z up, right-handed, everything inside the unit sphere about the origin. Cameras follow the OpenGL convention
(x right, y up, looking along -z), as Nerfstudio's do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from r2l_nerfstudio.scene.shapes import EPSILON, Box, Cylinder, Shape, Sphere
from r2l_nerfstudio.scene.textures import Texture, checker, solid, stripes

RAYS_PER_CHUNK = 1 << 16  # A few MB per temporary stay in the cache of a laptop.


class Picture(NamedTuple):
    """What a ray, or a pixel, sees."""

    rgb: Float[Tensor, "*batch 3"]
    """Color in [0, 1], over the white background."""
    accumulation: Float[Tensor, "*batch 1"]
    """Share of the pixel that the object covers, in [0, 1]."""
    depth: Float[Tensor, "*batch 1"]
    """Distance along the unit ray in world units, mean over the covered part; inf where nothing is hit."""


@dataclass(frozen=True)
class Thing:
    """A solid with its surface."""

    shape: Shape
    texture: Texture
    gloss: float = 0.0
    """Strength of the highlight; 0 is matt."""


def _default_things() -> tuple[Thing, ...]:
    cream, slate = (0.93, 0.88, 0.76), (0.30, 0.42, 0.52)
    return (
        Thing(Cylinder((0.0, 0.0, -0.42), 0.88, 0.06), checker(cream, slate, cell=0.29)),
        Thing(Sphere((0.16, 0.30, 0.02), 0.38), solid((0.80, 0.16, 0.13)), gloss=0.75),
        Thing(
            Box((-0.40, 0.02, -0.06), (0.20, 0.20, 0.30), turn=28.0),
            stripes((0.98, 0.78, 0.20), (0.13, 0.38, 0.33), width=0.12, along=(0.0, 0.0, 1.0)),
        ),
        Thing(
            Sphere((0.22, -0.44, -0.16), 0.20),
            stripes((0.25, 0.50, 0.85), (0.95, 0.95, 0.97), width=0.10, along=(0.6, 0.0, 0.8)),
        ),
    )


@dataclass(frozen=True)
class Scene:
    """Solids under one lamp with a soft shadow. Nothing is random: the same ray always gives the same result."""

    things: tuple[Thing, ...] = field(default_factory=_default_things)
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ambient: float = 0.5
    lamp: tuple[float, float, float] = (0.5, -0.45, 1.1)
    """Direction towards the lamp, any length."""
    lamp_spread: float = 0.07
    """Half width of the lamp, as a slope: softens the shadow's edge."""
    shininess: float = 24.0
    """Blinn-Phong exponent: broad enough for a direction encoding of low degree."""
    name: str = "table"

    def trace(self, origins: Float[Tensor, "rays 3"], directions: Float[Tensor, "rays 3"]) -> Picture:
        """Trace single rays exactly.

        Args:
            origins: starts of the rays, world units.
            directions: unit vectors, world axes.

        Returns:
            Picture of shape (rays, …). Accumulation is 0 or 1.
        """
        parts = [
            self._trace_chunk(o, d)
            for o, d in zip(origins.split(RAYS_PER_CHUNK), directions.split(RAYS_PER_CHUNK), strict=True)
        ]
        return Picture(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def render(self, camera: Cameras, supersample: int = 3) -> Picture:
        """Render one pinhole camera, each pixel the mean of supersample x supersample rays.

        Args:
            camera: one undistorted perspective camera (a batch of one, or a scalar), in the world frame.
            supersample: rays per pixel along each axis.

        Returns:
            Picture of shape (height, width, …).
        """
        camera = camera.reshape((1,))[0] if camera.shape else camera
        height, width = int(camera.height.item()), int(camera.width.item())
        origins, directions = pinhole_rays(camera, supersample)
        fine = self.trace(origins.reshape(-1, 3), directions.reshape(-1, 3))
        rgb, hit, depth = (
            channel.reshape(height, supersample, width, supersample, -1).permute(0, 2, 1, 3, 4).flatten(2, 3)
            for channel in fine
        )
        covered = hit.sum(2)
        mean_depth = torch.where(hit > 0, depth, 0.0).sum(2) / covered.clamp(min=1)
        return Picture(rgb.mean(2), hit.mean(2), torch.where(covered > 0, mean_depth, torch.inf))

    def _nearest(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return distance, normal and index of the first surface on each ray."""
        hits = [thing.shape.intersect(origins, directions) for thing in self.things]
        distance, index = torch.stack([distance for distance, _ in hits]).min(0)
        normals = torch.stack([normal for _, normal in hits])
        return distance, normals[index, torch.arange(len(index), device=index.device)], index

    def _trace_chunk(self, origins: Tensor, directions: Tensor) -> Picture:
        distance, normal, index = self._nearest(origins, directions)
        hit = distance.isfinite()
        rgb = origins.new_tensor(self.background).repeat(len(origins), 1)
        point = origins[hit] + distance[hit, None] * directions[hit]
        rgb[hit] = self._shade(point, normal[hit], -directions[hit], index[hit])
        return Picture(rgb, hit[:, None].to(rgb), distance[:, None])

    def _shade(self, point: Tensor, normal: Tensor, to_eye: Tensor, index: Tensor) -> Tensor:
        """Shade: Lambert with a soft shadow, and a Blinn-Phong highlight for glossy solids."""
        albedo = torch.zeros_like(point)
        gloss = point.new_tensor([thing.gloss for thing in self.things])[index]
        for i, thing in enumerate(self.things):
            mine = index == i
            albedo[mine] = thing.texture(thing.shape.local(point[mine]))
        diffuse, highlight = torch.zeros_like(gloss), torch.zeros_like(gloss)
        lamps = self._lamp_directions(point)
        for lamp in lamps:
            facing = (normal @ lamp).clamp(min=0)
            lit = facing > 0
            lit[lit.clone()] = ~self._blocked(point[lit] + EPSILON * 10 * normal[lit], lamp)
            half = torch.nn.functional.normalize(to_eye + lamp, dim=-1)
            diffuse += lit * facing / len(lamps)
            highlight += lit * ((normal * half).sum(-1).clamp(min=0) ** self.shininess) / len(lamps)
        # A little more light from above than from below keeps the unlit sides from looking flat.
        sky = self.ambient * (0.8 + 0.2 * normal[:, 2])
        return (albedo * (sky + (1 - self.ambient) * diffuse)[:, None] + (gloss * highlight)[:, None]).clamp(0, 1)

    def _lamp_directions(self, like: Tensor) -> Float[Tensor, "lamps 3"]:
        """Five fixed unit directions over the lamp's disc: a penumbra that is still an exact function of the pose."""
        lamp = torch.nn.functional.normalize(like.new_tensor(self.lamp), dim=0)
        side = torch.nn.functional.normalize(torch.linalg.cross(lamp, like.new_tensor([0.0, 0.0, 1.0])), dim=0)
        up = torch.linalg.cross(side, lamp)
        spots = [(0.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)]
        around = torch.stack([lamp + self.lamp_spread * (x * side + y * up) for x, y in spots])
        return torch.nn.functional.normalize(around, dim=-1)

    def _blocked(self, origins: Tensor, lamp: Tensor) -> Tensor:
        """Return whether anything is between the points and the lamp."""
        directions = lamp.expand_as(origins)
        blocked = torch.zeros(len(origins), dtype=torch.bool, device=origins.device)
        for thing in self.things:
            blocked |= thing.shape.intersect(origins, directions)[0].isfinite()
        return blocked


def pinhole_rays(
    camera: Cameras, supersample: int = 1
) -> tuple[Float[Tensor, "rows columns 3"], Float[Tensor, "rows columns 3"]]:
    """Return rays of one undistorted pinhole camera through a regular grid of points in each pixel.

    Args:
        camera: a scalar camera. Pixel (0, 0) is top left and its center is at (0.5, 0.5).
        supersample: grid points per pixel along each axis; 1 gives the pixel centers.

    Returns:
        Origins and unit directions in the camera's frame of reference, rows = height x supersample, columns alike.
    """
    pose = camera.camera_to_worlds
    offsets = [
        (torch.arange(int(size.item()) * supersample, device=pose.device, dtype=pose.dtype) + 0.5) / supersample
        for size in (camera.height, camera.width)
    ]
    y, x = torch.meshgrid(*offsets, indexing="ij")
    local = torch.stack([(x - camera.cx) / camera.fx, (camera.cy - y) / camera.fy, -torch.ones_like(x)], -1)
    directions = torch.nn.functional.normalize(local @ pose[:3, :3].T, dim=-1)
    return pose[:3, 3].expand_as(directions), directions
