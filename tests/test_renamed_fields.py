"""Runs that were saved under former names of configuration fields open, by our loader and by Nerfstudio's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from r2l_nerfstudio.models.mobile_r2l import MobileR2LModelConfig
from r2l_nerfstudio.run_config import load_run_config

OLD_RUNS = Path(__file__).parent / "data" / "before_composited"


def by_nerfstudio(run: Path) -> Any:
    """As `ns-viewer` reads it."""
    return yaml.load((run / "config.yml").read_text(), Loader=yaml.Loader)


@pytest.mark.parametrize("load", [load_run_config, by_nerfstudio])
@pytest.mark.parametrize("method", ["r2l-lite", "mobile-r2l-lite"])
def test_a_run_under_former_names_opens(load, method: str, capsys: pytest.CaptureFixture) -> None:
    text = (OLD_RUNS / method / "config.yml").read_text()
    assert "ray_code: points" in text and "real_iterations: 2000" in text and "real_fraction: 0.5" in text
    pipeline = load(OLD_RUNS / method).pipeline
    assert pipeline.model.ray_encoding == "points"
    assert (pipeline.datamanager.photo_iterations, pipeline.datamanager.photo_fraction) == (2000, 0.5)
    if method == "mobile-r2l-lite":
        assert "factor: 4" in text and pipeline.model.upsampling_factor == 4
    assert not hasattr(pipeline.model, "ray_code")
    assert "Ignoring fields" not in capsys.readouterr().out


def test_copies_keep_every_field() -> None:
    config = MobileR2LModelConfig(upsampling_factor=8, ray_encoding="plucker")
    assert copy.deepcopy(config) == config
