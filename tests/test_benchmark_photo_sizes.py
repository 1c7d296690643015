"""Photos of different sizes are compared as the report compares renders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from teachers import write_capture

from benchmarks.photo_sizes import PhotoSizes, averaged, between
from r2l_nerfstudio.errors import InputError


def test_pixels_are_means_of_what_they_cover() -> None:
    photo = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert torch.allclose(averaged(photo, 2.0)[0, 0], torch.tensor([7.5, 8.5, 9.5]) / 255)
    # Three pixels become two: each covers one and a half.
    row = np.repeat(np.array([0, 90, 240], np.uint8), 9).reshape(1, 3, 3, 3)[0].transpose(1, 0, 2)
    assert torch.allclose(averaged(row, 1.5)[0, :, 0] * 255, torch.tensor([30.0, 190.0]), atol=1e-3)


def test_detail_is_what_sets_two_sizes_apart() -> None:
    across = np.linspace(0, 6, 120)
    smooth = np.repeat((127 + 120 * np.sin(across)).astype(np.uint8)[None, :, None], 120, 0).repeat(3, 2)
    fine = np.random.default_rng(0).integers(0, 256, (120, 120, 3), dtype=np.uint8)
    assert between(smooth, 4.0, 1.5) > 40 > 35 > between(fine, 4.0, 1.5)


def test_a_capture_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    PhotoSizes("ball", data=write_capture(tmp_path / "ball", views=20), photos=1, smaller=(2.0,)).main()
    printed = capsys.readouterr().out
    assert printed.count(" dB") == 6 and "ball at 12x12 and at 1.5 times the size" in printed
    with pytest.raises(InputError, match="There is no capture"):
        PhotoSizes("gone", data=tmp_path / "gone").main()
    for options, name in (
        ({"photos": 0}, "--photos"),
        ({"smaller": (1.2,)}, "--smaller"),
        ({"smaller": (float("nan"),)}, "--smaller"),
    ):
        with pytest.raises(InputError, match=name):
            PhotoSizes("gone", data=tmp_path / "gone", **options).main()
