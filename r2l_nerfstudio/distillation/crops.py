"""Crops of views, with the rays of their cells."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float, Int, UInt8
from nerfstudio.cameras.rays import RayBundle
from torch import Tensor

from r2l_nerfstudio.distillation.datamanager import Batch
from r2l_nerfstudio.distillation.foreground import TRIES, first_in_foreground
from r2l_nerfstudio.distillation.ray_sample import RaySample
from r2l_nerfstudio.rays.conventions import OURS, RayConventions
from r2l_nerfstudio.rays.pinhole import pinhole_rays, pixel_centers
from r2l_nerfstudio.rays.ray_image import MARGIN, ray_image_intrinsics


class Views(Protocol):
    """Pinhole views of one size: a ring of teacher views, or undistorted photos."""

    pixels: UInt8[Tensor, "capacity height width channels"]
    """rgb, accumulation if known, and 1 where the color is learned."""
    depth: Float[Tensor, "capacity height width"]
    camera_to_worlds: Float[Tensor, "capacity 3 4"]
    intrinsics: Float[Tensor, "capacity 4"]
    has_geometry: bool
    """Whether accumulation and depth are known."""
    crop_views: Int[Tensor, "views"] | None
    """Numbers of the views to draw from; None for all."""

    def __len__(self) -> int:
        """Number of views, from the first, that can be drawn from."""
        ...


def sample_crops(
    views: Views,
    num_crops: int,
    cells: int | tuple[int, int],
    factor: int,
    generator: torch.Generator | None = None,
    foreground_fraction: float = 0.0,
    margin: int = MARGIN,
    conventions: RayConventions = OURS,
    rays_per_cell: int = 1,
) -> Batch:
    """Draw crops at random places of random views.

    A crop may begin at any pixel, so the student learns every alignment of its grid of cells, and the grid does not
    show when a camera moves by a pixel.

    Args:
        views: views to draw from.
        num_crops: number of crops.
        cells: cells along each side of a square crop, or rows and columns.
        factor: upsampling factor, pixels along each side of a cell.
        generator: for a repeatable draw.
        foreground_fraction: share of the crops with foreground in their middle.
        margin: cells around a crop.
        conventions: how the student's ray encoding reads rays.
        rays_per_cell: rays along each side of a cell.

    Returns:
        Rays of the cells with their margin (crops rows+2*margin columns+2*margin, times `rays_per_cell`), and the
        pixels inside it (crops rows*factor columns*factor).
    """
    device = views.pixels.device
    rows_of_cells, columns_of_cells = (cells, cells) if isinstance(cells, int) else cells
    down, across = rows_of_cells * factor, columns_of_cells * factor
    height, width = views.pixels.shape[1:3]
    drawn_on = device if generator is None else generator.device

    def draw(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
        def below(end: int) -> Tensor:
            return torch.randint(end, shape, generator=generator, device=drawn_on).to(device)

        view = below(len(views)) if views.crop_views is None else views.crop_views[below(len(views.crop_views))]
        return view, below(height - down + 1), below(width - across + 1)

    num_foreground = int(foreground_fraction * num_crops)
    places = draw(num_crops - num_foreground)
    if num_foreground:
        tries = draw(TRIES, num_foreground)
        taken = first_in_foreground(views.pixels[tries[0], tries[1] + down // 2, tries[2] + across // 2, 3])
        places = [torch.cat([place, more.gather(0, taken[None])[0]]) for place, more in zip(places, tries, strict=True)]
    chosen, top, left = places
    poses = views.camera_to_worlds[chosen][:, None, None]
    intrinsics = views.intrinsics[chosen]
    corner = torch.stack([left, top], dim=-1)
    rows_of_rays, columns_of_rays = (
        (count + 2 * margin) * rays_per_cell for count in (rows_of_cells, columns_of_cells)
    )
    grid = pixel_centers(rows_of_rays, columns_of_rays, device) + (conventions.pixel_offset - 0.5)
    in_cells = ray_image_intrinsics(intrinsics, factor, corner, rays_per_cell, margin)
    origins, directions = pinhole_rays(
        poses, in_cells[:, None, None], grid.expand(num_crops, -1, -1, -1), conventions.is_planar
    )
    bundle = RayBundle(origins=origins, directions=directions, pixel_area=torch.zeros_like(origins[..., :1]))

    rows = (top[:, None] + torch.arange(down, device=device))[:, :, None]
    columns = (left[:, None] + torch.arange(across, device=device))[:, None, :]
    pixels = views.pixels[chosen[:, None, None], rows, columns]
    at = torch.stack([columns.expand(-1, down, -1), rows.expand(-1, -1, across)], dim=-1) + 0.5
    pixel_origins, pixel_directions = pinhole_rays(poses, intrinsics[:, None, None], at)
    weight = pixels[..., -1:].float()
    target = RaySample(
        origins=pixel_origins,
        directions=pixel_directions,
        rgb=pixels[..., :3].float() / 255,
        accumulation=pixels[..., 3:4].float() / 255 if pixels.shape[-1] == 5 else torch.ones_like(weight),
        depth=views.depth[chosen[:, None, None], rows, columns].float()[..., None],
        weight=weight,
        geometry_weight=weight if views.has_geometry else torch.zeros_like(weight),
    )
    return Batch(bundle, target)


def joined(first: Batch, second: Batch) -> Batch:
    """Concatenate the crops of two batches, which have the same size."""
    bundles = [first.ray_bundle, second.ray_bundle]
    origins, directions, areas = (
        torch.cat([getattr(bundle, name) for bundle in bundles]) for name in ("origins", "directions", "pixel_area")
    )
    target = RaySample(*(torch.cat([a, b]) for a, b in zip(first.target.fields(), second.target.fields(), strict=True)))
    return Batch(RayBundle(origins=origins, directions=directions, pixel_area=areas), target)
