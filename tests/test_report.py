"""The report of a finished student: figures in standard JSON, and a self-contained page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch

from r2l_nerfstudio.distillation.learning_curve import FILE, CurvePoint, LearningCurveWriter, read_learning_curve
from r2l_nerfstudio.report.measure import (
    ComparedView,
    EngineTime,
    Measurements,
    UnseenScores,
    ViewScore,
    between_sizes,
)
from r2l_nerfstudio.report.page import as_html, as_markdown


def measurements(has_teacher: bool = True) -> Measurements:
    """Three test views, the second one the worst."""
    teacher = {"psnr": 28.0, "ssim": 0.95} if has_teacher else None
    views = [
        ViewScore(f"photo_{index}.png", {"psnr": psnr, "ssim": 0.9}, teacher, 30.0 if has_teacher else None, 0.8)
        for index, psnr in enumerate((25.0, 22.0, 26.5))
    ]
    image = torch.rand(30, 40, 3, generator=torch.Generator().manual_seed(0))
    return Measurements(
        run="outputs/<scene>/run",
        method="mobile-r2l-lite",
        device="a CPU",
        resolution=(40, 30),
        photos_in_test_split=10,
        views=views,
        teacher={"method": "nerfacto", "iterations": 100, "checkpoint_megabytes": 5.0} if has_teacher else None,
        unseen=UnseenScores(8, 28.0, 25.0, {"0.5": 27.0, "2": 24.0}) if has_teacher else None,
        between_sizes=41.0,
        teacher_between_sizes=33.0 if has_teacher else None,
        engines=[
            EngineTime("torch", "fp32", 12.5, math.inf),
            EngineTime("openvino", "bf16", 8.0, 57.0),
            EngineTime("tensorrt", skipped="it needs an NVIDIA GPU."),
        ],
        frame_milliseconds={"student": 12.0},
        sizes={
            "network_parameters": 1000,
            "network_megabytes_fp16": 0.002,
            "checkpoint_megabytes": 0.1,
            "flop_per_pixel": 2000.0,
        },
        learning_curve=[
            CurvePoint("Held-out PSNR (teacher views)", step, step / 100, 20 + step / 100) for step in (1, 500)
        ],
        shown=[ComparedView(view.name, image, image if has_teacher else None, image) for view in views],
    )


def test_figures_are_plain_json_and_name_the_worst_views_first() -> None:
    figures = json.loads(json.dumps(measurements().as_dict(), allow_nan=False))
    assert figures["worst_views"] == ["photo_1.png", "photo_0.png", "photo_2.png"]
    assert figures["mean"]["student"] == {"psnr": 24.5, "ssim": 0.9, "lpips": None, "gmsd": None}
    assert figures["detail"] == 0.8
    assert figures["engines"][0]["parity"] is None  # infinite: equal values
    assert "shown" not in figures


def test_markdown_has_every_engine_with_its_time_or_the_reason() -> None:
    text = as_markdown(measurements())
    assert "| openvino | bf16 | 8.0 ms | 57 dB | 125.0 frames per second |" in text
    assert "not available: it needs an NVIDIA GPU." in text
    assert "| PSNR against photos, mean | 24.50 dB | 28.00 dB |" in text


def test_the_page_loads_nothing_and_escapes_what_it_shows() -> None:
    page = as_html(measurements())
    assert not re.search(r"(?:src|href)=\"(?!data:)", page) and "http" not in page
    assert "outputs/&lt;scene&gt;/run" in page and "<scene>" not in page
    assert page.count('class="slider"') == 3 and page.count("<polyline") == 1
    assert 'value="photo|teacher"' in page


def test_without_a_teacher_the_student_is_compared_with_photos() -> None:
    found = measurements(has_teacher=False)
    page = as_html(found)
    assert 'value="photo|student"' in page and "photo|teacher" not in page
    assert "unseen cameras" not in as_markdown(found)


def test_a_renderer_that_ignores_the_size_is_found_unstable() -> None:
    from nerfstudio.cameras.cameras import Cameras

    camera = Cameras(torch.eye(4)[None, :3], 40.0, 40.0, 20.0, 15.0, width=40, height=30)

    def smooth(view: Cameras) -> torch.Tensor:
        across = (torch.arange(int(view.width)) + 0.5) / int(view.width)
        return across[None, :, None].expand(int(view.height), -1, 3)

    def by_pixels(view: Cameras) -> torch.Tensor:
        return (torch.arange(int(view.width)) / 60)[None, :, None].expand(int(view.height), -1, 3)

    assert min(between_sizes(smooth, camera)) > 35 > 25 > min(between_sizes(by_pixels, camera))


def test_the_learning_curve_is_saved_and_continues_after_a_resume(tmp_path: Path) -> None:
    first = LearningCurveWriter(tmp_path)
    first.write_scalar("Held-out PSNR (teacher views)", torch.tensor(21.5), 10)
    first.write_scalar("Train Loss", 0.1, 10)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"name": "cut sho\n')
    LearningCurveWriter(tmp_path, resumed=5.0).write_scalar("Held-out PSNR (teacher views)", 23.0, 20)
    points = read_learning_curve(tmp_path)
    assert [(point.step, point.psnr) for point in points] == [(10, 21.5), (20, 23.0)]
    assert points[1].minutes >= 5.0
    assert read_learning_curve(tmp_path / "nowhere") == []
