"""The training benchmarks compare what they report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.recipes import as_table, configured, draw_curves, rows_of
from benchmarks.train import BareStep


@pytest.mark.parametrize("method", ["r2l", "mobile-r2l"])
def test_every_recipe_is_a_configuration_and_no_two_are_the_same(method: str) -> None:
    recipes = rows_of(method)
    assert {"paper", "ours"} <= set(recipes)
    seen: dict[str, str] = {}
    for name, (base, changes) in recipes.items():
        config = configured(base, changes)
        described = repr((config.pipeline, config.optimizers))
        assert described not in seen, f"{name} is {seen.get(described)}"
        seen[described] = name


def test_changes_reach_every_key_and_do_not_modify_the_method() -> None:
    from nerfstudio.configs.method_configs import all_methods

    before = repr(all_methods["r2l-lite"])
    config = configured("r2l-lite", {"optimizers.*.scheduler": None, "pipeline.model.width": 7})
    assert config.pipeline.model.width == 7
    assert [group["scheduler"] for group in config.optimizers.values()] == [None] * 3
    assert repr(all_methods["r2l-lite"]) == before


@pytest.mark.parametrize("first_input", [False, True])
def test_bare_step_multiplies_as_a_training_step_does(first_input: bool) -> None:
    shapes = [(8, 3, 5), (8, 5, 2)]
    step = BareStep(shapes, torch.float32, first_input, torch.device("cpu"))
    step()
    forward = 2 * 8 * (3 * 5 + 5 * 2)
    assert step.flops == 3 * forward - (0 if first_input else 2 * 8 * 3 * 5)
    inputs, weights, outputs = step.matrices[(8, 5, 2)]
    torch.testing.assert_close(outputs, inputs @ weights)
    input_gradient, weight_gradient = step.gradients[(8, 5, 2)]
    torch.testing.assert_close(input_gradient, outputs @ weights.T)
    torch.testing.assert_close(weight_gradient, inputs.T @ outputs)


def run(recipe: str, seconds: float, psnrs: list[float], rays: int) -> dict[str, Any]:
    def points(psnr: float) -> list[dict[str, float]]:
        half = {"seconds": seconds / 2, "steps": 1, "rays": rays // 2, "psnr": psnr - 1}
        return [half, {"seconds": seconds, "steps": 2, "rays": rays, "psnr": psnr}]

    seeds = {str(seed): points(psnr) for seed, psnr in enumerate(psnrs)}
    return {"recipe": recipe, "seconds": seconds, "seeds": seeds, "megabytes_in_fp16": 1.0}


def test_ratio_uses_our_shortest_run_of_equal_quality(tmp_path: Path) -> None:
    rows = [
        run("paper", 30, [15.0], 10**6),
        run("paper", 400, [20.0, 22.0], 8 * 10**6),
        run("ours", 10, [20.5], 10**5),
        run("ours", 20, [21.0, 21.5], 2 * 10**5),
        run("ours", 40, [25.0], 10**6),
    ]
    figures = {"capture": "lego", "method": "r2l", "resolution": "100x100", "teacher_views": 5}
    figures["rows"] = {str(number): row for number, row in enumerate(rows)}
    table = as_table(figures)
    assert "| paper | 21.00 ± 1.41 | 8.00 | 400 | 1.0 |" in table
    assert "21.25 dB after 20 s: 20 times less time, 40 times fewer pixels." in table
    draw_curves(figures, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    figures["rows"] = {"0": rows[1], "1": rows[2]}
    assert "times less" not in as_table(figures)
