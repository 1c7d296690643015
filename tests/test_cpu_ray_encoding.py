"""The ray encoding for rendering on a CPU equals the one of training, to at least 100 dB."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r2l_nerfstudio.models import cpu_ray_encoding
from r2l_nerfstudio.models.cpu_ray_encoding import CpuRayEncoding
from r2l_nerfstudio.psnr import psnr
from r2l_nerfstudio.rays.pinhole import image_rays
from r2l_nerfstudio.rays.ray_encoding import RayEncoding
from r2l_nerfstudio.rays.spacing import SceneBounds
from r2l_nerfstudio.students.ray_features import FeatureVolume


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def ray_encoding(kind: str = "points", spacing: str = "sphere", points: int = 8, octaves: int = 6) -> RayEncoding:
    made = RayEncoding(kind, points, octaves)
    axes, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3)))
    made.set_bounds(SceneBounds(spacing, (0.1, -0.2, 0.3), 1.3, 0.4, 7.0), axes)
    return made


def volume(resolution: int = 9, channels: int = 4, extent: float = 1.05) -> FeatureVolume:
    torch.manual_seed(2)
    made = FeatureVolume(resolution, channels)
    made.extent.fill_(extent)
    return made


def rays(height: int = 50, width: int = 61) -> tuple[Tensor, Tensor]:
    """Of a camera so near and wide that some miss the scene, and points lie outside the volume."""
    pose = torch.cat([torch.eye(3), torch.tensor([[0.3], [0.1], [2.5]])], dim=-1)
    return image_rays(pose, torch.tensor([30.0, 31.0, width / 2, height / 2]), height, width)


def expected(
    encoding: RayEncoding, features: FeatureVolume | None, points: int, origins: Tensor, directions: Tensor
) -> Tensor:
    """The encoding of training."""
    parts = [encoding(origins, directions)]
    if features is not None:
        read = features(encoding.points(origins, directions, points).flatten(0, -3))
        parts.append(read.view(*origins.shape[:-1], -1))
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("spacing", ["sphere", "near-far", "disparity"])
@pytest.mark.parametrize("kind", ["points", "plucker", "two-plane"])
@pytest.mark.parametrize("points", [8, 5])
def test_it_equals_the_encoding_of_training(kind: str, spacing: str, points: int):
    encoding, features = ray_encoding(kind, spacing), volume()
    draw = CpuRayEncoding(encoding, features, points)
    origins, directions = rays()
    truth = expected(encoding, features, points, origins, directions)
    got = draw(origins, directions)
    assert got.shape == truth.shape and got.is_contiguous()
    first = encoding.dim
    assert psnr(got[..., :first], truth[..., :first]) > 110
    assert psnr(got[..., first:], truth[..., first:]) > 110
    # However the rays lie in memory, and however many there are.
    one = draw(origins.contiguous().view(-1, 3)[:1], directions.contiguous().view(-1, 3)[:1])
    torch.testing.assert_close(one[0], got[0, 0], atol=1e-5, rtol=0)
    assert draw(origins[:0], directions[:0]).shape == (0, *truth.shape[1:])


def test_the_published_encodings():
    for points, octaves in ((16, 10), (8, 6)):
        encoding = ray_encoding(points=points, octaves=octaves)
        origins, directions = rays()
        assert psnr(CpuRayEncoding(encoding, None, 16)(origins, directions), encoding(origins, directions)) > 110


@pytest.mark.parametrize("resolution", [1, 2, 40])
@pytest.mark.parametrize("channels", [1, 4, 7])
def test_volumes_of_any_size(resolution: int, channels: int):
    encoding, features = ray_encoding(), volume(resolution, channels, extent=0.5)
    origins, directions = rays(20, 21)
    truth = expected(encoding, features, 8, origins, directions)
    assert psnr(CpuRayEncoding(encoding, features, 8)(origins, directions), truth) > 110


def test_a_volume_in_training_is_not_cached():
    encoding, features = ray_encoding(), volume()
    draw = CpuRayEncoding(encoding, features, 8)
    origins, directions = rays(5, 6)
    before = draw(origins, directions)
    features.grid.add_(1.0)
    torch.testing.assert_close(draw(origins, directions), expected(encoding, features, 8, origins, directions))
    features.load_state_dict(volume().state_dict())
    assert torch.equal(draw(origins, directions), before)


def test_a_volume_at_rest_is_rearranged_once(monkeypatch: pytest.MonkeyPatch):
    encoding, features = ray_encoding(), volume()
    draw = CpuRayEncoding(encoding, features, 8)
    draw(*rays(5, 6))
    rows = draw._rows(features)
    draw(*rays(5, 6))
    assert draw._rows(features) is rows


def test_under_autocast_it_stays_in_fp32():
    encoding, features = ray_encoding(), volume()
    draw = CpuRayEncoding(encoding, features, 8)
    truth = draw(*rays(5, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(draw(*rays(5, 6)), truth)


def test_many_rays_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch):
    draw = CpuRayEncoding(ray_encoding(), volume(), 8)
    whole = draw(*rays(7, 9))
    monkeypatch.setattr(cpu_ray_encoding, "chunk_rows", lambda device: 10)
    torch.testing.assert_close(draw(*rays(7, 9)), whole, atol=1e-5, rtol=0)


def test_non_finite_rays_index_nothing():
    encoding, features = ray_encoding(), volume()
    origins, directions = rays(4, 5)
    clean = CpuRayEncoding(encoding, features, 8)(origins, directions)
    origins, directions = origins.clone(), directions.clone()
    origins[1, 2], directions[3, 4] = float("nan"), float("inf")
    found = CpuRayEncoding(encoding, features, 8)(origins, directions)
    others = torch.ones(4, 5, dtype=torch.bool)
    others[1, 2] = others[3, 4] = False
    torch.testing.assert_close(found[others], clean[others])
