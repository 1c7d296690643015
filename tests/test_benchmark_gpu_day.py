"""Every stage of `benchmarks gpu-day` in miniature on a CPU."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from fork_server import FORK_SERVER
from torch import multiprocessing

from benchmarks import gpu_day
from benchmarks.gpu_day import STAGES, GpuDay, Stage, as_table
from r2l_nerfstudio.distillation import pipeline
from r2l_nerfstudio.errors import InputError


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


def test_all_stages_but_training(day: GpuDay, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a GPU the ranks need not start from nothing.
    start = partial(multiprocessing.start_processes, start_method=FORK_SERVER.get_start_method())
    monkeypatch.setattr(multiprocessing, "spawn", start)
    day.stages = ("smoke", "teachers", "engines", "viewer", "ranks")
    day.main()
    (file,) = day.results_dir.glob("gpu_*.json")
    written = json.loads(file.read_text())
    found = written["stages"]
    assert tuple(found) == day.stages
    assert not [figures["error"] for parts in found.values() for figures in parts.values() if "error" in figures]
    smoke = found["smoke"]["r2l-lite"]
    assert smoke["agrees"] and smoke["step_ms"] > 0 and smoke["planned_step_gib"] > 0
    assert found["teachers"]["splatfacto r2l-lite"]["skipped"] == "needs a GPU"
    engines = found["engines"]["16 r2l-lite"]
    assert {row["engine"] for row in engines["engines"]} == {"torch"}
    assert found["viewer"]["browser"]["passed"]
    assert found["ranks"]["two"]["equal"] and found["ranks"]["two"]["tensors"] > 5
    assert "| engines | r2l-lite 16x16 torch fp32 |" in as_table(written)


def test_learning_curves(day: GpuDay, monkeypatch: pytest.MonkeyPatch) -> None:
    # A teacher of 30 iterations is too blurred to be told from one in another frame.
    monkeypatch.setattr(pipeline, "check_frame", lambda *_: None)
    assert gpu_day.quality(day, "cpu", "lego teacher") == {"run": str(day.teacher)}
    found = gpu_day.quality(day, "cpu", "lego r2l-lite")
    assert found["student_psnr"] > 5 and found["teacher_psnr"] > 5
    with pytest.raises(InputError, match="is a finished curve"):
        gpu_day.quality(day, "cpu", "lego r2l-lite")


def test_goes_on_with_the_first_part_that_has_no_figures(day: GpuDay, monkeypatch: pytest.MonkeyPatch) -> None:
    day.results_dir = day.results_dir.with_name("again")
    calls: list[str] = []
    failing = {"second"}

    def run(day: GpuDay, device: str, part: str) -> dict:
        calls.append(part)
        if part in failing:
            raise SystemExit("no room")
        return {"figure": 1}

    monkeypatch.setitem(STAGES, "smoke", Stage(lambda day: ("first", "second"), run))
    monkeypatch.setitem(STAGES, "ranks", Stage(lambda day: ("third",), run))
    day.stages = ("smoke", "ranks")
    day.main()
    assert calls == ["first", "second", "third"]  # one that fails stops nothing
    (file,) = day.results_dir.glob("gpu_*.json")
    assert "| smoke | second failed | SystemExit: no room |" in as_table(json.loads(file.read_text()))
    failing.clear()
    day.main()
    assert calls[3:] == ["second"]
    day.again = ("ranks",)
    day.main()
    assert calls[4:] == ["third"]
    day.again, day.stop_after = ("smoke",), -1.0
    day.main()
    assert len(calls) == 5
    assert "| smoke | second | figure 1, minutes 0.0 |" in as_table(json.loads(file.read_text()))
