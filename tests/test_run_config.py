"""Runs are found, and only plain configurations are read."""

from __future__ import annotations

import copy
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.run_config import capture_path, checkpoint_path, load_run_config, resolve_run


def _stock_config(method: str):
    from nerfstudio.configs.method_configs import all_methods

    return all_methods[method]


@pytest.fixture
def config_text() -> str:
    return yaml.dump(_stock_config("nerfacto"))


@pytest.fixture
def config_file(tmp_path: Path, config_text: str) -> Path:
    file = tmp_path / "config.yml"
    file.write_text(config_text)
    return file


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of a method plugin that can be imported but is not registered; its name."""
    folder = tmp_path / "site" / "ball_method"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(
        "from dataclasses import dataclass\n"
        "from nerfstudio.models.nerfacto import NerfactoModelConfig\n"
        "from os import system\n"
        "@dataclass\n"
        "class BallConfig(NerfactoModelConfig):\n"
        "    radius: float = 1.0\n"
        "    def __post_init__(self):\n"
        "        raise RuntimeError('code of the plugin ran')\n"
    )
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.delitem(sys.modules, "ball_method", raising=False)
    return "ball_method"


def _error(path: Path) -> str:
    """The one paragraph that reading that file gives."""
    with pytest.raises(InputError) as caught:
        load_run_config(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_every_stock_method_is_read_back_unchanged(tmp_path: Path) -> None:
    from nerfstudio.configs.external_methods import ExternalMethodDummyTrainerConfig
    from nerfstudio.configs.method_configs import all_methods

    names = [name for name, config in all_methods.items() if not isinstance(config, ExternalMethodDummyTrainerConfig)]
    named = {"nerfacto", "splatfacto", "instant-ngp", "vanilla-nerf", "tensorf", "mipnerf", "depth-nerfacto"}
    assert named <= set(names)
    for name in names:
        text = yaml.dump(_stock_config(name))
        (tmp_path / "config.yml").write_text(text)
        assert yaml.dump(load_run_config(tmp_path)) == text, name


def test_paths_of_another_system_are_read(config_file: Path, config_text: str) -> None:
    windows = "output_dir: !!python/object/apply:pathlib.WindowsPath\n- runs\n- here\n"
    posix = "output_dir: !!python/object/apply:pathlib.PosixPath\n- outputs\n"
    assert posix in config_text
    config_file.write_text(config_text.replace(posix, windows))
    assert load_run_config(config_file).output_dir == Path("runs/here")


@pytest.mark.parametrize(
    ("evil", "named"),
    [
        ("!!python/object/apply:os.system [touch MARK]", "os.system"),
        ("!!python/object/apply:subprocess.check_output [[touch, MARK]]", "subprocess.check_output"),
        ("!!python/object/apply:nerfstudio.utils.scripts.run_command [touch MARK]", "run_command"),
        ("!!python/object/new:os.system [touch MARK]", "python/object/new:os.system"),
        ("!!python/object/new:nerfstudio.models.nerfacto.NerfactoModelConfig []", "python/object/new"),
        ("!!python/object/apply:eval [1]", "eval"),
        ("!!python/module:os", "python/module:os"),
        ("!!python/name:os.system", "os.system"),
        ("!!python/name:eval", "eval"),
        ("!!python/name:builtins.exec", "builtins.exec"),
        ("!!python/name:__main__.run", "__main__.run"),
        # Inside an allowed package, but not its own.
        ("!!python/name:nerfstudio.utils.scripts.run_command", "run_command"),
        ("!!python/name:nerfstudio.engine.trainer.os", "nerfstudio.engine.trainer.os"),
        ("!!python/name:nerfstudio.models.nerfacto.dataclass", "nerfstudio.models.nerfacto.dataclass"),
        ("!!python/name:nerfstudio.engine.trainer.GradScaler", "nerfstudio.engine.trainer.GradScaler"),
        ("!!python/name:torch.load", "torch.load"),
        ("!!python/name:torch.optim.os", "torch.optim.os"),
        ("!!python/name:torch.optim.nowhere.Adam", "torch.optim.nowhere.Adam"),
        # Allowed classes, but not as configuration, or called.
        ("!!python/object:nerfstudio.models.nerfacto.NerfactoModel {}", "NerfactoModel"),
        ("!!python/object:nerfstudio.cameras.cameras.Cameras {}", "Cameras"),
        ("!!python/object/apply:nerfstudio.models.nerfacto.NerfactoModelConfig []", "NerfactoModelConfig"),
        ("!!python/object/apply:torch.optim.adam.Adam [[]]", "torch.optim.adam.Adam"),
        ("!!python/object/apply:_operator.getitem [{a: 1}, a]", "_operator.getitem"),
        ("!!python/object/apply:pathlib.PosixPath [[a]]", "pathlib.PosixPath"),
        ("!!python/object:nerfstudio.configs.base_config.MachineConfig {__class__: 1}", "__class__"),
    ],
)
def test_anything_but_configuration_is_refused(
    evil: str, named: str, config_file: Path, config_text: str, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    config_file.write_text(config_text + f"evil: {evil.replace('MARK', str(mark))}\n")
    message = _error(config_file)
    assert named in message
    assert "config.yml that ns-train wrote" in message
    assert not mark.exists()


def test_enum_of_another_version(config_file: Path, config_text: str) -> None:
    config_file.write_text(config_text.replace("- Test PSNR", "- Test Beauty"))
    assert "Test Beauty" in _error(config_file)


def test_class_of_another_version(config_file: Path, config_text: str) -> None:
    config_file.write_text(config_text.replace("NerfactoModelConfig", "NerfactoTwoModelConfig"))
    message = _error(config_file)
    assert "NerfactoTwoModelConfig" in message and "version of 'nerfstudio'" in message


def test_method_that_is_not_installed(config_file: Path, config_text: str) -> None:
    text = config_text.replace("nerfstudio.models.nerfacto.", "absent_method.model.")
    config_file.write_text(text.replace("method_name: nerfacto", "method_name: absent"))
    message = _error(config_file)
    assert "'absent'" in message and "'absent_method'" in message and "not installed" in message


def test_plugins_are_read_once_registered(
    plugin: str, config_file: Path, config_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = "model: !!python/object:nerfstudio.models.nerfacto.NerfactoModelConfig"
    assert model in config_text
    text = config_text.replace(model, f"model: !!python/object:{plugin}.BallConfig\n    radius: 2.0")
    config_file.write_text(text)
    monkeypatch.delenv("NERFSTUDIO_METHOD_CONFIGS", raising=False)
    message = _error(config_file)
    assert f"{plugin}.BallConfig" in message and "registered" in message
    assert plugin not in sys.modules  # not even imported

    monkeypatch.setenv("NERFSTUDIO_METHOD_CONFIGS", f"ball={plugin}:method")
    assert load_run_config(config_file).pipeline.model.radius == 2.0

    config_file.write_text(config_text + f"extra: !!python/name:{plugin}.system\n")
    assert f"{plugin}.system" in _error(config_file)  # os.system under the plugin's name


MODEL = "_target: !!python/name:nerfstudio.models.nerfacto.NerfactoModel ''"
DATAPARSER = "_target: !!python/name:nerfstudio.data.dataparsers.nerfstudio_dataparser.Nerfstudio ''"
DATAMANAGER = "_target: !!python/name:nerfstudio.data.datamanagers.parallel_datamanager.ParallelDataManager ''"


def _named(name: str) -> str:
    return f"_target: !!python/name:{name} ''"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        # Functions of allowed packages, and classes of another role.
        (DATAPARSER, _named("nerfstudio.utils.install_checks.check_colmap_installed"), "check_colmap_installed"),
        (MODEL, _named("r2l_nerfstudio.engines.inductor.build"), "r2l_nerfstudio.engines.inductor.build"),
        (MODEL, _named("nerfstudio.utils.eval_utils.eval_setup"), "eval_setup"),
        (MODEL, _named("nerfstudio.data.dataparsers.nerfstudio_dataparser.Nerfstudio"), "a Model is expected"),
        (MODEL, _named("nerfstudio.models.base_model.ModelConfig"), "a Model is expected"),
        (MODEL, _named("nerfstudio.configs.external_methods.ExternalMethodDummyTrainerConfig"), "a Model is expected"),
        (MODEL, "_target: null", "not a class"),
        (MODEL, "_target: 5", "not a class"),
        (DATAMANAGER, _named("nerfstudio.models.nerfacto.NerfactoModel"), "a DataManager is expected"),
        (
            "_target: &id001 !!python/name:torch.optim.adam.Adam ''",
            _named("torch.optim.swa_utils.AveragedModel").replace("_target:", "_target: &id001"),
            "Optimizer",
        ),
        (
            "relative_model_dir:",
            "setup: !!python/name:nerfstudio.utils.eval_utils.eval_setup ''\nrelative_model_dir:",
            "'setup'",
        ),
        ("relative_model_dir:", "save_config: 5\nrelative_model_dir:", "'save_config'"),
        ("relative_model_dir:", "__dict__: {}\nrelative_model_dir:", "'__dict__'"),
        (
            "collate_fn: !!python/name:nerfstudio.data.utils.nerfstudio_collate.nerfstudio_collate ''",
            "collate_fn: !!python/name:nerfstudio.utils.install_checks.check_ffmpeg_installed ''",
            "check_ffmpeg_installed",
        ),
        # A dataparser that unpickles what it reads.
        (DATAPARSER, _named("nerfstudio.data.dataparsers.minimal_dataparser.MinimalDataParser"), "unpickles"),
        (
            "dataparser: !!python/object:nerfstudio.data.dataparsers.nerfstudio_dataparser.NerfstudioDataParserConfig",
            "dataparser: !!python/object:nerfstudio.data.dataparsers.minimal_dataparser.MinimalDataParserConfig",
            "unpickles",
        ),
    ],
)
def test_targets_and_fields_of_another_role(
    old: str, new: str, named: str, config_file: Path, config_text: str
) -> None:
    assert old in config_text
    config_file.write_text(config_text.replace(old, new, 1))
    assert named in _error(config_file)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("timestamp", "2001-99-99", "damaged"),
        ("timestamp", "2001-01-01", "timestamp"),
        ("max_num_iterations", "1" + "0" * 5000, "damaged"),
        ("max_num_iterations", "many", "max_num_iterations is 'many', and int is expected"),
        ("max_num_iterations", "-1", "max_num_iterations must be between 0"),
        ("experiment_name", "[" * 900 + "]" * 900, "damaged"),
        ("experiment_name", "&a [*a]", "damaged"),
        ("experiment_name", "{[1]: 2}", "damaged"),
        ("vis", "hologram", "'viewer' or 'wandb'"),
        ("relative_model_dir", "null", "relative_model_dir is None, and Path is expected"),
        ("load_dir", "5", "load_dir is 5"),
        ("machine", "3", "MachineConfig"),
        ("optimizers", "[]", "optimizers"),
        ("optimizers", "{fields: 1}", "optimizers.fields"),
        ("pipeline.datamanager.dataparser", "nerfstudio-data", "DataParserConfig"),
        ("pipeline.datamanager.data", "5", "pipeline.datamanager.data is 5"),
        ("pipeline.datamanager.camera_res_scale_factor", "0", "camera_res_scale_factor must be above 0"),
        ("pipeline.datamanager.camera_res_scale_factor", ".nan", "camera_res_scale_factor is nan"),
        ("pipeline.model.background_color", "beige", "'last_sample'"),
        ("pipeline.model.eval_num_rays_per_chunk", "0", "eval_num_rays_per_chunk must be at least 1"),
        ("pipeline.model.num_levels", "1.5", "num_levels is 1.5, and int is expected"),
        ("machine.seed", "-1", "machine.seed must be between 0"),
        ("viewer.websocket_port", "70000", "viewer.websocket_port must be between 0 and 65535"),
    ],
)
def test_invalid_values(field: str, value: str, named: str, config_file: Path) -> None:
    config_file.write_text(_with_value(field, value))
    assert named in _error(config_file)


def _with_value(field: str, value: str) -> str:
    """The YAML of nerfacto's configuration with one field's value replaced by other text."""
    config = copy.deepcopy(_stock_config("nerfacto"))
    *parents, name = field.split(".")
    holder = config
    for parent in parents:
        holder = getattr(holder, parent)
    assert hasattr(holder, name)
    setattr(holder, name, "PLACEHOLDER")
    return yaml.dump(config).replace("PLACEHOLDER", value)


def test_fields_of_another_version_are_dropped(
    config_file: Path, config_text: str, capsys: pytest.CaptureFixture
) -> None:
    config_file.write_text(config_text + "of_the_future: {a: [1, 2]}\n")
    assert not hasattr(load_run_config(config_file), "of_the_future")
    assert "of_the_future" in capsys.readouterr().out


def test_missing_fields_have_their_defaults(config_file: Path, config_text: str) -> None:
    text = re.sub(r"^logging: .*?^(?=\w)", "", config_text, flags=re.MULTILINE | re.DOTALL)
    assert text != config_text
    config_file.write_text(text)
    assert load_run_config(config_file).logging.steps_per_log == 10


def test_paths_written_by_hand(config_file: Path) -> None:
    config_file.write_text(_with_value("pipeline.datamanager.data", "/captures/ball"))
    assert load_run_config(config_file).pipeline.datamanager.data == Path("/captures/ball")


def test_aliases_that_multiply(config_file: Path, config_text: str) -> None:
    lines = ["bomb0: &b0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"bomb{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 12)]
    config_file.write_text(config_text + "\n".join(lines) + "\n")
    assert load_run_config(config_file).method_name == "nerfacto"


def test_not_an_ordinary_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yml")
    with pytest.raises(InputError):
        load_run_config(tmp_path / "config.yml")
    with pytest.raises(InputError):
        load_run_config(tmp_path)


def test_pinned_checkpoint(config_file: Path, config_text: str) -> None:
    folder = config_file.parent / "nerfstudio_models"
    folder.mkdir()
    for step in (10, 2000):
        (folder / f"step-{step:09d}.ckpt").touch()
    config_file.write_text(config_text.replace("load_step: null", "load_step: 10"))
    config = load_run_config(config_file)
    assert checkpoint_path(config, config_file).name == "step-000000010.ckpt"
    assert checkpoint_path(config, config_file, step=2000).name == "step-000002000.ckpt"
    config.load_step = 11
    with pytest.raises(InputError, match=r"load_step.*\[10, 2000\].*null for the newest"):
        checkpoint_path(config, config_file)


@pytest.mark.parametrize("part", [0.0, 0.003, 0.1, 0.25, 0.4, 0.5, 0.65, 0.8, 0.9, 0.95])
def test_truncated_files(part: float, config_file: Path, config_text: str) -> None:
    config_file.write_text(config_text[: int(part * len(config_text))])
    assert "config.yml" in _error(config_file)


def test_truncation_between_two_lines_is_detected(config_file: Path, config_text: str) -> None:
    lines = config_text.splitlines(keepends=True)
    for key in ("vis:", "pipeline:", "relative_model_dir:"):
        cut = next(index for index, line in enumerate(lines) if line.startswith(key))
        config_file.write_text("".join(lines[:cut]))
        assert "truncated" in _error(config_file)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00garbage", b"a: [1, 2", b"- just\n- a list\n", b"\x00"])
def test_other_files(content: bytes, config_file: Path) -> None:
    config_file.write_bytes(content)
    _error(config_file)


def test_runs_are_found(config_file: Path) -> None:
    assert resolve_run(config_file) == config_file
    assert resolve_run(config_file.parent) == config_file


def test_runs_are_not_found(tmp_path: Path, config_text: str) -> None:
    with pytest.raises(InputError, match="no trained run at .*nowhere"):
        resolve_run(tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no config.yml"):
        resolve_run(tmp_path)
    run = tmp_path / "nerfacto" / "today"
    run.mkdir(parents=True)
    (run / "config.yml").write_text(config_text)
    with pytest.raises(InputError, match=str(run / "config.yml")):
        resolve_run(tmp_path)


def test_checkpoints(config_file: Path) -> None:
    config = load_run_config(config_file)
    folder = config_file.parent / "nerfstudio_models"
    with pytest.raises(InputError, match=f"{folder} does not exist"):
        checkpoint_path(config, config_file)
    folder.mkdir()
    (folder / "step-000000009.ckpt.part").touch()
    with pytest.raises(InputError, match=f"{folder} holds no"):
        checkpoint_path(config, config_file)
    for step in (2000, 999, 10000):
        (folder / f"step-{step:09d}.ckpt").touch()
    assert checkpoint_path(config, config_file) == folder / "step-000010000.ckpt"
    assert checkpoint_path(config, config_file, step=999) == folder / "step-000000999.ckpt"
    with pytest.raises(InputError, match=r"step 5 .*\[999, 2000, 10000\]"):
        checkpoint_path(config, config_file, step=5)


def test_checkpoints_move_with_their_run(config_file: Path, tmp_path: Path) -> None:
    config = load_run_config(config_file)
    moved = tmp_path / "moved" / "config.yml"
    (moved.parent / "nerfstudio_models").mkdir(parents=True)
    (moved.parent / "nerfstudio_models" / "step-000000001.ckpt").touch()
    assert checkpoint_path(config, moved).parent.parent == moved.parent


def test_captures(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_run_config(config_file)
    datamanager = config.pipeline.datamanager
    datamanager.dataparser.data = tmp_path / "parsed"
    assert capture_path(config, config_file) == tmp_path / "parsed"
    datamanager.data = Path("captures/ball")  # wins
    assert capture_path(config, config_file) == Path("captures/ball")
    run = tmp_path / "outputs" / "ball" / "config.yml"
    (tmp_path / "captures" / "ball").mkdir(parents=True)
    assert capture_path(config, run) == tmp_path / "captures" / "ball"
    here = tmp_path / "here"
    (here / "captures" / "ball").mkdir(parents=True)
    monkeypatch.chdir(here)
    assert capture_path(config, run).samefile(here / "captures" / "ball")
    del datamanager.dataparser
    with pytest.raises(InputError, match="not trained on a capture"):
        capture_path(config, run)
