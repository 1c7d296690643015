"""The benchmark of engines measures what it reports, on small frames."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from networks import encoded, network
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import render as benchmark_render
from benchmarks.render import Render, fastest, flops, frame_encoding, student
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.models.camera_rays import camera_rays
from r2l_nerfstudio.rays.ray_image import MARGIN

SIDE = 16


@pytest.mark.parametrize("kind", ["r2l", "mobile-r2l"])
def test_bare_products_cover_all_multiplications_of_the_network(kind: str):
    net = network(kind)
    read = encoded(kind, 9, 7)
    with FlopCounterMode(display=False) as counter:
        net(read)
    assert flops(net, read) == counter.get_total_flops()


@pytest.mark.parametrize("method", ["r2l-lite", "mobile-r2l-lite"])
def test_a_student_renders_the_benchmark_frame_without_resampling(method: str):
    model, camera = student(method, SIDE, torch.device("cpu"))
    read = frame_encoding(model, camera)
    if method == "r2l-lite":
        # Those that meet the scene's ball.
        origins, directions = (rays.reshape(-1, 3) for rays in camera_rays(camera, torch.device("cpu")))
        _, is_empty = model.composited.composited(model.composited.span(origins[:, None], directions[:, None]))
        assert len(read) == int((~is_empty).sum()) > SIDE**2 / 4
    else:
        assert read.shape[-2:] == (SIDE // model.factor + 2 * MARGIN,) * 2
    assert float(model.network(read).detach().std()) > 0, "nothing to compare engines on"


def test_the_fastest_of_many_calls_is_reported():
    pauses = iter([0.0] + [0.03, 0.01, 0.02, 0.03, 0.03] * 20)
    taken = fastest({"call": lambda: time.sleep(next(pauses))}, 0.0, torch.device("cpu"))
    assert 10 <= taken["call"] < 20


def test_figures_and_tables_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark_render, "SIZES", {"r2l-lite": SIDE, "mobile-r2l-lite": SIDE})
    Render(
        methods=("r2l-lite", "mobile-r2l-lite"),
        engines=("torch", "openvino", "tensorrt"),
        seconds=0.0,
        teacher=False,
        results_dir=tmp_path,
        cache_dir=tmp_path / "engines",
    ).main()
    (written,) = tmp_path.glob("render_*.json")
    figures = json.loads(written.read_text())
    table = written.with_suffix(".md").read_text()
    assert figures["weights"] == "random" and "random weights" in table
    for found in figures["students"]:
        rows = {(row["engine"], row["precision"]): row for row in found["engines"]}
        assert {("torch", "fp32"), ("openvino", "fp32")} <= set(rows)
        for row in rows.values():
            assert 0 < row["network_ms"]
            assert row["frame_ms"] is None or 0 < row["frame_ms"] == pytest.approx(1e3 / row["fps"], rel=0.05)
            share = found["bare_low_precision_ms"] / row["network_ms"]
            assert row["share_of_bare_low_precision"] == pytest.approx(share, rel=0.3, abs=0.02)
        assert sum(row["frame_ms"] is not None for row in found["engines"]) == 2
        assert "needs an NVIDIA GPU" in found["not_run"]["tensorrt fp32"]
        assert f"## {found['method']}, 16x16 pixels" in table
    assert "| openvino fp32 |" in table


def test_unknown_method_is_an_error():
    with pytest.raises(InputError, match="--methods r3l"):
        Render(methods=("r3l",)).main()
