"""The methods that `ns-train` lists, and that listing them imports nothing heavy."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import tyro
import yaml

from r2l_nerfstudio.run_config import load_run_config

METHODS = {"r2l", "r2l-lite", "r2l-paper", "mobile-r2l", "mobile-r2l-lite", "mobile-r2l-paper"}

_IMPORT_PROBE = """
import json, sys
import nerfstudio.engine.trainer, nerfstudio.models.nerfacto, nerfstudio.plugins.types
import nerfstudio.data.datamanagers.base_datamanager, nerfstudio.data.dataparsers.nerfstudio_dataparser
before = set(sys.modules)
import r2l_nerfstudio.method_configs
print(json.dumps(sorted(set(sys.modules) - before)))
"""
# Whatever else a method of ours needs is imported when it is needed.
_LIGHT = {"r2l_nerfstudio", "nerfstudio", "psutil", "platformdirs"}


def test_importing_the_methods_imports_nothing_heavy() -> None:
    result = subprocess.run(
        [sys.executable, "-c", _IMPORT_PROBE],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    imported = json.loads(result.stdout.splitlines()[-1])
    assert "r2l_nerfstudio.method_configs.r2l" in imported
    packages = {name.partition(".")[0] for name in imported}
    packages = {name for name in packages if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert not packages - _LIGHT
    # These list the methods themselves: from ours it would go round in a circle.
    assert not {"nerfstudio.configs.method_configs", "nerfstudio.utils.eval_utils"} & set(imported)


def test_entry_points_are_named_as_their_methods() -> None:
    ours = [entry for entry in entry_points(group="nerfstudio.method_configs") if entry.module.startswith("r2l_nerf")]
    assert {entry.name for entry in ours} == METHODS
    for entry in ours:
        specification = entry.load()
        assert specification.config.method_name == entry.name
        assert specification.description


@pytest.mark.parametrize("method", sorted(METHODS))
def test_ns_train_lists_it_and_requires_a_teacher(method: str, capsys: pytest.CaptureFixture) -> None:
    from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion, all_descriptions, all_methods

    assert all_methods[method].method_name == method and "R2L" in all_descriptions[method]
    with pytest.raises(SystemExit) as caught:
        tyro.cli(AnnotatedBaseConfigUnion, args=[method, "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for flag in ("--teacher", "--pipeline.model.ray-encoding", "--pipeline.datamanager.pose-sampler.kind"):
        assert flag in said
    assert "--pipeline.datamanager.dataparser" not in said  # the teacher's


def test_command_line_reaches_the_configuration() -> None:
    from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion

    flags = {
        "--teacher": "outputs/run/config.yml",
        "--max-num-iterations": "77",
        "--pipeline.model.width": "64",
        "--pipeline.model.ray-encoding": "two-plane",
        "--pipeline.datamanager.photo-iterations": "0",
        "--pipeline.datamanager.pose-sampler.kind": "box",
        "--optimizers.hidden.optimizer.lr": "0.5",
    }
    config = tyro.cli(AnnotatedBaseConfigUnion, args=["r2l", *(part for pair in flags.items() for part in pair)])
    assert config.teacher == Path("outputs/run/config.yml") and config.max_num_iterations == 77
    assert config.pipeline.model.width == 64 and config.pipeline.model.ray_encoding == "two-plane"
    assert config.pipeline.datamanager.photo_iterations == 0
    assert config.pipeline.datamanager.pose_sampler.kind == "box"
    assert config.optimizers["hidden"]["optimizer"].lr == 0.5
    assert config.optimizers["ends"]["optimizer"].lr != 0.5


@pytest.mark.parametrize("method", sorted(METHODS))
def test_configuration_is_read_back_unchanged(method: str, tmp_path: Path) -> None:
    from nerfstudio.configs.method_configs import all_methods

    text = yaml.dump(all_methods[method])
    (tmp_path / "config.yml").write_text(text)
    assert yaml.dump(load_run_config(tmp_path)) == text


def test_sizes_of_the_methods() -> None:
    from nerfstudio.configs.method_configs import all_methods

    full, lite, paper = (all_methods[name].pipeline.model for name in ("r2l", "r2l-lite", "r2l-paper"))
    assert (paper.width, paper.depth, paper.num_points, paper.num_frequencies) == (256, 88, 16, 10)
    assert lite.width**2 * lite.depth < full.width**2 * full.depth / 10


@pytest.mark.parametrize(
    ("name", "megabytes"), [("r2l", 12.0), ("mobile-r2l", 8.7), ("r2l-lite", 2.5), ("mobile-r2l-lite", 2.5)]
)
def test_students_are_no_larger_than_the_papers(name: str, megabytes: float) -> None:
    from nerfstudio.configs.method_configs import all_methods

    config = copy.deepcopy(all_methods[name].pipeline.model)
    config.fit_to(800, 800)
    model = config.setup(scene_box=None, num_train_data=1, metadata={}, device="cpu", grad_scaler=None)
    features = config.max_grid_points * (1 + config.feature_channels)
    assert 2 * (sum(p.numel() for p in model.network.parameters()) + features) < megabytes * 1e6
    if name == "mobile-r2l":
        assert model.network.flops_per_cell * 100**2 < 101e9


def test_methods_share_no_state() -> None:
    from nerfstudio.configs.method_configs import all_methods

    full, lite = all_methods["r2l"], all_methods["r2l-lite"]
    for group in full.optimizers:
        assert full.optimizers[group]["optimizer"] is not lite.optimizers[group]["optimizer"]
        assert full.optimizers[group]["scheduler"] is not lite.optimizers[group]["scheduler"]
    assert full.pipeline.datamanager.pose_sampler is not lite.pipeline.datamanager.pose_sampler
