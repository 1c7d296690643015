"""A learning curve in slices: stopped, resumed, and measured once at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distil import own_writers
from torch.utils.tensorboard import SummaryWriter

from benchmarks.curve import Curve, read_curve
from r2l_nerfstudio.distillation.pipeline import DistillationPipeline
from r2l_nerfstudio.errors import InputError


def end_after_iterations(count: int, patch: pytest.MonkeyPatch) -> None:
    """End slices after some iterations instead of minutes, which on a busy machine pass before the first one."""
    timers: list[tuple[Callable[..., None], tuple]] = []

    class Timer:
        def __init__(self, seconds: float, function: Callable[..., None], args: tuple) -> None:
            assert seconds == 600.0
            self.ending = (function, args)

        def start(self) -> None:
            timers.append(self.ending)

        def cancel(self) -> None:
            timers.clear()

    train = DistillationPipeline.get_train_loss_dict

    def train_and_count(self: DistillationPipeline, step: int) -> Any:
        if step == count:
            (function, args), *_ = timers
            function(*args)
        return train(self, step)

    patch.setattr("benchmarks.curve.threading", SimpleNamespace(Timer=Timer))
    patch.setattr(DistillationPipeline, "get_train_loss_dict", train_and_count)


def test_curve_continues_where_a_slice_ended(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nerfstudio.configs.method_configs import all_methods

    pipeline = all_methods["mobile-r2l-lite"].pipeline
    monkeypatch.setattr(pipeline, "check_frame", False)  # this teacher is barely trained
    monkeypatch.setattr(pipeline.model, "width", 16)
    monkeypatch.setattr(pipeline.datamanager, "crop_cells", 3)
    curve = Curve(
        capture="lego",
        data_dir=tmp_path,
        teacher=tiny_teacher,
        method="mobile-r2l-lite",
        minutes=0.5,
        slice_minutes=10.0,
        test_views=1,
        output_dir=tmp_path,
        results_dir=tmp_path / "results",
    )
    file = tmp_path / "results" / "curve_lego_mobile-r2l-lite.json"
    with monkeypatch.context() as patch:
        # No checkpoint yet.
        patch.setattr("nerfstudio.scripts.train.main", lambda config: None)
        with pytest.raises(InputError, match="--slice-minutes"):
            curve.main()
    with own_writers(), monkeypatch.context() as patch:
        end_after_iterations(8, patch)  # a busy machine makes few in half a minute
        curve.main()
    first = json.loads(file.read_text())
    assert "student_psnr" not in first  # test views are for the end
    curve.slice_minutes = None
    with own_writers():
        curve.main()
    whole = json.loads(file.read_text())
    assert whole["student_psnr"] > 0 and file.with_suffix(".png").exists()
    assert whole["curve"][: len(first["curve"])] == first["curve"]
    minutes = [point["minutes"] for point in whole["curve"]]
    assert len(minutes) > len(first["curve"]) and minutes == sorted(minutes) and minutes[-1] <= 0.5
    assert all(point["teacher_views"] > 0 for point in whole["curve"])
    with pytest.raises(InputError, match="finished curve"):
        curve.main()


def test_photos_and_teacher_views_are_separate_curves(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as log:
        log.add_scalar("Held-out PSNR (teacher views)", 30.0, 20)
        log.add_scalar("Held-out PSNR (photos)", 25.0, 20)
        log.add_scalar("Training done", 0.5, 20)
    assert read_curve(tmp_path, 8.0) == [{"step": 20, "teacher_views": 30.0, "photos": 25.0, "minutes": 4.0}]
