"""Memory, threads and open files of engines that render at ever new sizes: the soak of `benchmarks/soak.py`, in short."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import student_runs
from fork_server import FORK_SERVER

from benchmarks import soak
from benchmarks.soak import Sample, judge

FRAMES = 160
"""OpenVINO kept about a megabyte for each new size: that would be a fifth of what the process takes."""


@pytest.mark.parametrize("engine", ["torch", "openvino", "onnxruntime"])
def test_rendering_at_new_sizes_leaks_nothing(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(engine)
    run = student_runs.write_run(tmp_path / "run", student_runs.tiny_mobile_r2l())
    with ProcessPoolExecutor(1, mp_context=FORK_SERVER) as pool:
        samples, frames = pool.submit(soak.render, run, engine, 600.0, FRAMES, 0.0).result()
    assert frames == FRAMES == len(samples)
    watched = judge(engine, samples, frames, samples[FRAMES // 4].seconds)
    assert watched.is_flat, watched


def test_growth_is_detected() -> None:
    steady = [Sample(float(second), 500.0, 10, 20) for second in range(100)]
    assert judge("steady", steady, 100, 20.0).is_flat
    for grows in ("megabytes", "threads", "descriptors"):
        growing = [replace(each, **{grows: getattr(each, grows) + int(each.seconds)}) for each in steady]
        assert not judge(grows, growing, 100, 20.0).is_flat
