"""Image metrics against cases computed by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torchmetrics.image.lpip

from r2l_nerfstudio.models import metrics


def flat(value: float, height: int = 16, width: int = 20) -> torch.Tensor:
    return torch.full((height, width, 3), value)


def test_psnr_of_a_constant_difference() -> None:
    assert metrics.psnr(flat(0.6), flat(0.5)) == pytest.approx(20.0, abs=1e-4)
    assert metrics.psnr(flat(0.51), flat(0.5)) == pytest.approx(40.0, abs=1e-3)


def test_psnr_of_a_few_pixels() -> None:
    truth = torch.zeros(10, 10, 3)
    image = truth.clone()
    image[0, :5, 0] = 1.0  # 5 of 300 numbers are off by 1
    assert metrics.psnr(image, truth) == pytest.approx(10 * math.log10(60), abs=1e-4)


def test_images_are_clamped() -> None:
    assert metrics.psnr(flat(1.7), flat(0.9)) == pytest.approx(20.0, abs=1e-4)
    assert metrics.psnr(flat(-3.0), flat(0.1)) == pytest.approx(20.0, abs=1e-4)


def test_psnr_is_of_each_image_and_then_the_mean() -> None:
    """Not that of the mean error, which one bad image decides."""
    images = [metrics.image_metrics(flat(value), flat(0.5), networks=()) for value in (0.6, 0.51)]
    assert metrics.mean_metrics(images)["psnr"] == pytest.approx(30.0, abs=1e-3)
    pooled = -10 * math.log10((0.1**2 + 0.01**2) / 2)
    assert abs(pooled - 30) > 7


def test_means_need_the_same_figures_of_every_image() -> None:
    with pytest.raises(ValueError, match="at least one"):
        metrics.mean_metrics([])
    with pytest.raises(ValueError, match="same figures"):
        metrics.mean_metrics([{"psnr": 1.0}, {"psnr": 1.0, "ssim": 0.5}])


def test_ssim_of_flat_images_is_their_luminance_term() -> None:
    c1 = 0.01**2
    expected = (2 * 0.6 * 0.5 + c1) / (0.6**2 + 0.5**2 + c1)
    assert metrics.ssim(flat(0.6), flat(0.5)) == pytest.approx(expected, abs=1e-5)
    assert metrics.ssim(flat(0.5), flat(0.5)) == pytest.approx(1.0, abs=1e-6)


def test_ssim_by_hand() -> None:
    """The definition of Wang et al. 2004, written out: a window around every pixel, then the mean."""
    generator = np.random.default_rng(0)
    truth = generator.random((15, 17, 3))
    image = np.clip(truth + 0.1 * generator.standard_normal(truth.shape), 0, 1)
    steps = np.arange(11) - 5
    window = np.exp(-(steps**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    c1, c2 = 0.01**2, 0.03**2
    values = []
    wide = [np.pad(array, ((5, 5), (5, 5), (0, 0)), mode="reflect") for array in (image, truth)]
    for y in range(15):
        for x in range(17):
            for channel in range(3):
                a, b = (array[y : y + 11, x : x + 11, channel] for array in wide)
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a = (window * a**2).sum() - mean_a**2
                var_b = (window * b**2).sum() - mean_b**2
                both = (window * a * b).sum() - mean_a * mean_b
                values.append(
                    (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
                )
    found = metrics.ssim(torch.from_numpy(image), torch.from_numpy(truth))
    assert found == pytest.approx(np.mean(values), abs=1e-4)


def test_ssim_distinguishes_height_from_channels() -> None:
    """The published code read height as channels, which gives .99 for anything."""
    generator = torch.Generator().manual_seed(0)
    truth, image = (torch.rand(32, 32, 3, generator=generator) for _ in range(2))
    assert metrics.ssim(image, truth) < 0.1


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the LPIPS networks that were built; VGG's weights cannot be loaded."""
    built: list[str] = []

    class Distance(torch.nn.Module):
        def __init__(self, net: str, **kwargs) -> None:
            super().__init__()
            built.append(net)
            if net == "vgg":
                raise OSError("no network")

        def forward(self, first: torch.Tensor, second: torch.Tensor, normalize: bool = False) -> torch.Tensor:
            assert normalize
            return (first - second).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(torchmetrics.image.lpip, "_NoTrainLpips", Distance)
    metrics._lpips.cache_clear()
    yield built
    metrics._lpips.cache_clear()


def test_lpips_of_both_networks_where_their_weights_can_be_loaded(
    networks: list[str], capsys: pytest.CaptureFixture
) -> None:
    for _ in range(2):
        found = metrics.image_metrics(flat(0.6), flat(0.5), networks=("alex", "vgg"))
        assert set(found) == {"psnr", "ssim", "lpips"} and found["lpips"] == pytest.approx(0.1, abs=1e-5)
    assert networks == ["alex", "vgg"]  # tried once each
    assert "Skipping LPIPS (vgg)" in " ".join(capsys.readouterr().out.split())


def test_blur_loses_detail_and_edges() -> None:
    sharp = (torch.rand(40, 48, 1, generator=torch.Generator().manual_seed(0)) > 0.5).float().expand(-1, -1, 3)
    blurred = torch.nn.functional.avg_pool2d(sharp.permute(2, 0, 1), 3, 1, 1).permute(1, 2, 0)
    assert metrics.gmsd(sharp, sharp) == pytest.approx(0.0, abs=1e-6)
    assert metrics.gmsd(blurred, sharp) > 0.05
    assert metrics.detail_energy(blurred) < 0.3 * metrics.detail_energy(sharp)
    flat = torch.full((8, 8, 3), 0.4)
    assert metrics.detail_energy(flat) == pytest.approx(0.0, abs=1e-9)
    assert metrics.detail_share(sharp, flat) is None
    assert metrics.detail_share(blurred, sharp) == metrics.detail_energy(blurred) / metrics.detail_energy(sharp)
