"""Every stage of `benchmarks gpu-day` in miniature on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_day
from benchmarks.gpu_day import STAGES, GpuDay, as_table
from r2l_nerfstudio.distillation import pipeline


@pytest.fixture(scope="module")
def day(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> GpuDay:
    folder = tmp_path_factory.mktemp("day")
    return GpuDay(
        data_dir=folder,
        methods=("r2l-lite",),
        minutes=0.02,
        teacher=tiny_teacher / "config.yml",
        view_size=48,
        sides=(16,),
        engines=("torch",),
        seconds=0.0,
        tests=("--version",),
        output_dir=folder / "outputs",
        results_dir=folder / "results",
    )


def test_all_stages_but_training(day: GpuDay) -> None:
    day.stages = ("smoke", "teachers", "engines", "viewer", "ranks")
    day.main()
    (file,) = day.results_dir.glob("gpu_*.json")
    written = json.loads(file.read_text())
    found = written["stages"]
    assert {stage: figures.get("error") for stage, figures in found.items()} == dict.fromkeys(day.stages)
    smoke = found["smoke"]["r2l-lite"]
    assert smoke["agrees"] and smoke["step_ms"] > 0 and smoke["planned_step_gib"] > 0
    assert found["teachers"]["splatfacto"] == {"skipped": "needs a GPU"}
    (engines,) = found["engines"]["16"]
    assert {row["engine"] for row in engines["engines"]} == {"torch"}
    assert found["viewer"]["passed"]
    assert found["ranks"]["equal"] and found["ranks"]["tensors"] > 5
    assert "| engines | r2l-lite 16x16 torch fp32 |" in as_table(written)


def test_learning_curves(day: GpuDay, monkeypatch: pytest.MonkeyPatch) -> None:
    # A teacher of 30 iterations is too blurred to be told from one in another frame.
    monkeypatch.setattr(pipeline, "check_frame", lambda *_: None)
    found = gpu_day.quality(day, "cpu")["r2l-lite"]
    assert found["student_psnr"] > 5 and found["teacher_psnr"] > 5
    # Figures that are there are not trained again.
    before = {file: file.stat().st_mtime_ns for file in day.output_dir.rglob("*.ckpt")}
    assert before and gpu_day.quality(day, "cpu")["r2l-lite"] == found
    assert {file: file.stat().st_mtime_ns for file in day.output_dir.rglob("*.ckpt")} == before


def test_goes_on_with_the_first_stage_that_has_no_figures(day: GpuDay, monkeypatch: pytest.MonkeyPatch) -> None:
    day.results_dir = day.results_dir.with_name("again")
    calls: list[str] = []

    def stage(name: str, fails: bool = False):
        def run(day: GpuDay, device: str) -> dict:
            calls.append(name)
            if fails:
                raise SystemExit("no room")
            return {"figure": 1}

        return run

    monkeypatch.setitem(STAGES, "smoke", stage("smoke"))
    monkeypatch.setitem(STAGES, "quality", stage("quality", fails=True))
    monkeypatch.setitem(STAGES, "ranks", stage("ranks"))
    day.stages = ("smoke", "quality", "ranks")
    day.main()
    assert calls == ["smoke", "quality", "ranks"]  # one that fails stops nothing
    monkeypatch.setitem(STAGES, "quality", stage("quality"))
    day.main()
    assert calls[3:] == ["quality"]
    day.again = ("ranks",)
    day.main()
    assert calls[4:] == ["ranks"]
    (file,) = day.results_dir.glob("gpu_*.json")
    assert "| quality | figure | 1 |" in as_table(json.loads(file.read_text()))
