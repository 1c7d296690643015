"""Runs are found and their configurations read, and nothing but configurations."""

from __future__ import annotations

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
        "from os import system\n"
        "@dataclass\n"
        "class BallConfig:\n"
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


def test_every_stock_method_is_read_as_it_was_written(tmp_path: Path) -> None:
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
    config_file.write_text(config_text + f"extra: !!python/object:{plugin}.BallConfig {{radius: 2.0}}\n")
    monkeypatch.delenv("NERFSTUDIO_METHOD_CONFIGS", raising=False)
    message = _error(config_file)
    assert f"{plugin}.BallConfig" in message and "registered" in message
    assert plugin not in sys.modules  # not even imported

    monkeypatch.setenv("NERFSTUDIO_METHOD_CONFIGS", f"ball={plugin}:method")
    assert load_run_config(config_file).extra.radius == 2.0

    config_file.write_text(config_text + f"extra: !!python/name:{plugin}.system\n")
    assert f"{plugin}.system" in _error(config_file)  # os.system under the plugin's name


@pytest.mark.parametrize("part", [0.0, 0.003, 0.1, 0.25, 0.4, 0.5, 0.65, 0.8, 0.9, 0.95])
def test_truncated_files(part: float, config_file: Path, config_text: str) -> None:
    config_file.write_text(config_text[: int(part * len(config_text))])
    assert "config.yml" in _error(config_file)


def test_cut_between_two_lines_is_noticed(config_file: Path, config_text: str) -> None:
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
    with pytest.raises(InputError, match="holds no config.yml"):
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
