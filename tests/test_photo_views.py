"""Photos as undistorted views: each pixel has the color of its ray in the photo."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.cameras.cameras import Cameras, CameraType

from r2l_nerfstudio.distillation.photo_views import photo_views
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.models.metrics import detail_energy
from r2l_nerfstudio.rays.pinhole import image_rays

WHITE = torch.ones(3)
LENSES = {
    "pinhole": {},
    "distorted": {"distortion_params": torch.tensor([0.1, -0.03, 0.01, 0.0, 0.01, -0.004])},
    "fisheye": {
        "distortion_params": torch.tensor([0.05, 0.01, 0.0, 0.0, 0.0, 0.0]),
        "camera_type": CameraType.FISHEYE,
    },
}


class Painted:
    """A dataset of photos whose colors are the directions of their own rays, by Nerfstudio's cameras."""

    def __init__(self, width: int = 60, height: int = 44, views: int = 2, **lens) -> None:
        torch.manual_seed(3)
        rotation = torch.linalg.qr(torch.randn(views, 3, 3)).Q
        rotation = rotation * torch.linalg.det(rotation).sign()[:, None, None]
        poses = torch.cat([rotation, torch.randn(views, 3, 1)], dim=-1)
        middle = {"cx": width / 2 + 1.3, "cy": height / 2 - 0.8}
        shared = {key: value.expand(views, -1) if key == "distortion_params" else value for key, value in lens.items()}
        self.cameras = Cameras(poses, fx=0.9 * width, fy=0.92 * width, width=width, height=height, **middle, **shared)
        self.image_filenames = [f"{index}.png" for index in range(views)]
        self.alpha: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None

    def get_data(self, index: int, image_type: str) -> dict[str, torch.Tensor]:
        rays = self.cameras.generate_rays(camera_indices=index, keep_shape=True)
        image = 0.5 + 0.45 * rays.directions
        if self.alpha is not None:
            image = torch.cat([image, self.alpha.expand(*image.shape[:2], 1)], dim=-1)
        return {"image": image, **({} if self.mask is None else {"mask": self.mask})}


def taken(dataset: Painted, focal: float = 50.0, size: tuple[int, int] = (40, 52), corrections=None, background=WHITE):
    wanted = torch.tensor([focal, focal, size[1] / 2 + 0.4, size[0] / 2]).expand(len(dataset.image_filenames), 4)
    return photo_views(dataset, [1], wanted, size, corrections, background, "cpu")


@pytest.mark.parametrize("width", [60, 180], ids=["same pitch", "three times finer"])
@pytest.mark.parametrize("lens", LENSES)
def test_every_pixel_has_the_color_of_its_ray(lens: str, width: int) -> None:
    views = taken(Painted(width, round(width * 44 / 60), **LENSES[lens]))
    assert len(views) == 1 and views.pixels.shape == (1, 40, 52, 4) and not views.has_geometry
    directions = image_rays(views.camera_to_worlds[0], views.intrinsics[0], 40, 52)[1]
    valid = views.pixels[0, ..., 3] == 1
    assert valid.float().mean() > 0.8
    color = views.pixels[0, ..., :3].float() / 255
    torch.testing.assert_close(color[valid], (0.5 + 0.45 * directions)[valid], atol=0.004, rtol=0)


def test_a_view_wider_than_the_photo_ends_at_its_border() -> None:
    views = taken(Painted(), focal=30.0)
    camera = Painted().cameras[1]
    directions = image_rays(views.camera_to_worlds[0], views.intrinsics[0], 40, 52)[1]
    local = directions @ camera.camera_to_worlds[:, :3]
    x = float(camera.cx) - 0.5 + float(camera.fx) * local[..., 0] / -local[..., 2]
    y = float(camera.cy) - 0.5 - float(camera.fy) * local[..., 1] / -local[..., 2]
    depth = torch.stack([x, 59 - x, y, 43 - y]).amin(0)
    valid = views.pixels[0, ..., 3] == 1
    # Half a pixel of the photo after it was shrunk.
    assert valid[depth > 1].all() and not valid[depth < -1].any()
    assert 0.2 < valid.float().mean() < 0.8


def test_a_photo_with_the_views_camera_is_copied() -> None:
    dataset = Painted()
    camera = dataset.cameras[1]
    own = torch.tensor([float(camera.fx), float(camera.fy), float(camera.cx), float(camera.cy)]).expand(2, 4)
    views = photo_views(dataset, [1], own, (44, 60), None, WHITE, "cpu")
    expected = (dataset.get_data(1, "float32")["image"] * 255).round().to(torch.uint8)
    assert torch.equal(views.pixels[0, ..., :3], expected) and (views.pixels[..., 3] == 1).all()
    assert torch.equal(views.camera_to_worlds[0], camera.camera_to_worlds)


def test_masked_pixels_are_not_learned() -> None:
    dataset = Painted()
    dataset.mask = torch.ones(44, 60, 1, dtype=torch.bool)
    dataset.mask[10:30, 10:30] = False
    whole, masked = taken(Painted()), taken(dataset)
    lost = (whole.pixels[0, ..., 3] == 1) & (masked.pixels[0, ..., 3] == 0)
    assert 300 < lost.sum() < 500
    kept = masked.pixels[0, ..., 3] == 1
    far = -torch.nn.functional.max_pool2d(-kept[None, None].float(), 13, stride=1, padding=6)[0, 0] > 0
    assert far.float().mean() > 0.05
    assert torch.equal(masked.pixels[0][far], whole.pixels[0][far])
    # Beside the mask fewer pixels are read.
    assert (masked.pixels[0][kept].int() - whole.pixels[0][kept].int()).abs().max() <= 1


def test_photos_stay_sharp() -> None:
    dataset = Painted()
    noise = torch.rand(1, 3, 44, 60, generator=torch.Generator().manual_seed(0))
    photo = torch.nn.functional.avg_pool2d(noise, 2, stride=1, padding=1)[0, :, :44, :60].permute(1, 2, 0)
    dataset.get_data = lambda index, image_type: {"image": photo}
    camera = dataset.cameras[1]
    fx, fy, cx, cy = (float(value) for value in (camera.fx, camera.fy, camera.cx, camera.cy))
    shifted = torch.tensor([fx, fy, cx + 0.5, cy + 0.5]).expand(2, 4)
    view = photo_views(dataset, [1], shifted, (44, 60), None, WHITE, "cpu").pixels[0]
    inside = np.s_[8:-8, 8:-8]
    assert detail_energy(view[..., :3].float()[inside] / 255) > 0.85 * detail_energy(photo[inside])


def test_transparent_photos_are_blended_with_the_background() -> None:
    dataset = Painted()
    dataset.alpha = torch.tensor(0.25)
    background = torch.tensor([0.1, 0.9, 0.3])
    opaque, thin = taken(Painted()), taken(dataset, background=background)
    expected = 0.25 * opaque.pixels[..., :3].float() / 255 + 0.75 * background
    valid = opaque.pixels[..., 3] == 1
    torch.testing.assert_close((thin.pixels[..., :3].float() / 255)[valid], expected[valid], atol=0.005, rtol=0)


def test_pose_corrections_match_the_teachers_training() -> None:
    dataset = Painted()
    optimizer = CameraOptimizerConfig(mode="SO3xR3").setup(num_cameras=2, device="cpu")
    torch.nn.init.normal_(optimizer.pose_adjustment, std=0.2)
    views = taken(dataset, corrections=optimizer(torch.arange(2)).detach())
    coords = torch.tensor([[3.5, 7.5], [30.5, 20.5]])
    rays = dataset.cameras.generate_rays(camera_indices=torch.tensor([[1], [1]]), coords=coords)
    optimizer.apply_to_raybundle(rays)
    pinhole = dataset.cameras[1]
    own = torch.tensor([float(pinhole.fx), float(pinhole.fy), float(pinhole.cx), float(pinhole.cy)])
    origins, directions = image_rays(views.camera_to_worlds[0], own, 44, 60)
    for index, (row, column) in enumerate([(3, 7), (30, 20)]):
        torch.testing.assert_close(origins[row, column], rays.origins[index], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(directions[row, column], rays.directions[index], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "lens",
    [
        {"camera_type": CameraType.EQUIRECTANGULAR},
        {"distortion_params": torch.tensor([0.1, 0.0, 0.0, 0.02, 0.0, 0.0])},
    ],
    ids=["panorama", "fourth radial parameter"],
)
def test_a_lens_that_cannot_be_undistorted_is_an_error_with_a_remedy(lens: dict) -> None:
    with pytest.raises(InputError, match=r"1\.png cannot be undistorted.*--pipeline.datamanager.photo-iterations 0"):
        taken(Painted(**lens))


def test_mixed_resolutions_become_one_size() -> None:
    small, large = Painted(60, 44), Painted(120, 88)
    for dataset in (small, large):
        dataset.cameras = copy.deepcopy(dataset.cameras)
    mixed = SimpleNamespace(
        cameras=Cameras(
            small.cameras.camera_to_worlds,
            *(
                torch.cat([getattr(small.cameras, name)[:1], getattr(large.cameras, name)[1:]])
                for name in ("fx", "fy", "cx", "cy", "width", "height")
            ),
        ),
        image_filenames=["0.png", "1.png"],
        get_data=lambda index, image_type: (small, large)[index].get_data(index, image_type),
    )
    wanted = torch.tensor([50.0, 50.0, 26.0, 20.0]).expand(2, 4)
    views = photo_views(mixed, [0, 1], wanted, (40, 52), None, WHITE, "cpu")
    for index in range(2):
        directions = image_rays(views.camera_to_worlds[index], views.intrinsics[index], 40, 52)[1]
        valid = views.pixels[index, ..., 3] == 1
        color = views.pixels[index, ..., :3].float() / 255
        torch.testing.assert_close(color[valid], (0.5 + 0.45 * directions)[valid], atol=0.004, rtol=0)
