"""Runs saved under former names of configuration fields and weights load, in our loader and in Nerfstudio's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
import yaml

from r2l_nerfstudio.models.mobile_r2l import MobileR2LModelConfig
from r2l_nerfstudio.run_config import load_run_config
from r2l_nerfstudio.student import load_student

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
    assert "holdout_fraction: 0.1" in text and "steps_per_holdout: 500" in text
    assert (pipeline.datamanager.photo_iterations, pipeline.datamanager.photo_fraction) == (2000, 0.5)
    assert (pipeline.datamanager.held_out_fraction, pipeline.steps_per_eval_held_out) == (0.1, 500)
    assert not hasattr(pipeline.datamanager, "holdout_fraction") and not hasattr(pipeline, "steps_per_holdout")
    if method == "mobile-r2l-lite":
        assert "factor: 4" in text and pipeline.model.upsampling_factor == 4
    assert not hasattr(pipeline.model, "ray_code")
    assert "Ignoring fields" not in capsys.readouterr().out


def test_copies_keep_every_field() -> None:
    config = MobileR2LModelConfig(upsampling_factor=8, ray_encoding="plucker")
    assert copy.deepcopy(config) == config


def test_former_flags_still_work() -> None:
    from nerfstudio.configs.method_configs import all_methods

    default = all_methods["mobile-r2l-lite"]
    former = {"model.ray-code": "plucker", "model.factor": "8"}
    former |= {"datamanager.real-iterations": "7", "datamanager.real-fraction": "0.25"}
    former |= {"datamanager.holdout-fraction": "0.2", "steps-per-holdout": "50"}
    args = [word for name, value in former.items() for word in (f"--pipeline.{name}", value)]
    pipeline = tyro.cli(type(default), default=copy.deepcopy(default), args=args).pipeline
    assert (pipeline.model.ray_encoding, pipeline.model.upsampling_factor) == ("plucker", 8)
    assert (pipeline.datamanager.photo_iterations, pipeline.datamanager.photo_fraction) == (7, 0.25)
    assert (pipeline.datamanager.held_out_fraction, pipeline.steps_per_eval_held_out) == (0.2, 50)


def test_weights_under_former_names_load_in_nerfstudios_commands() -> None:
    model = load_student(OLD_RUNS / "r2l-lite", device="cpu").model
    former = {key.replace("ray_encoding.", "ray_code."): value for key, value in model.state_dict().items()}
    former["ray_code.radius"] = torch.tensor(3.0)
    model.load_state_dict(former, strict=True)
    assert float(model.ray_encoding.radius) == 3
