"""The quickstart's miniature, end to end, and the set-up script's decisions."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.scripts.contact_sheet import contact_sheet
from r2l_nerfstudio.scripts.quickstart import Quickstart, Stages

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-W", "ignore", "-m", "r2l_nerfstudio.scripts.quickstart", "--fast", "--folder", "quick"]


def run_quickstart(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(COMMAND, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that the quickstart was run from, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    done = run_quickstart(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


def test_miniature_writes_image_table_and_runs(finished):
    folder, printed = finished
    root = folder / "quick" / "fast"
    for stage in ("Capture", "Teacher", "R2L student", "MobileR2L student", "Evaluation"):
        assert re.search(rf"^{stage}: \d+ s\.", printed, re.MULTILINE)
    figures = json.loads((root / "result.json").read_text())
    table = (root / "result.md").read_text()
    assert "minutes in all" in table
    for name in ("r2l-lite", "mobile-r2l-lite"):
        score = figures["methods"][name]
        assert 5 < figures["methods"]["teacher"]["psnr"] < 60 and 5 < score["psnr"] < 60
        assert f"{score['psnr_against_teacher']:.2f} dB" in table
        assert f"{score['psnr_against_teacher']:.2f} dB" in printed
    # The second student finds what the teacher rendered for the first.
    assert len(list((root / "teacher_views").iterdir())) == 1
    with Image.open(root / "result.png") as picture:
        # Two poses, six columns, and the margins for labels.
        assert picture.width > 6 * 192 and picture.height > 2 * 192
        assert len(picture.getcolors(maxcolors=1 << 20)) > 100


def test_printed_commands_name_existing_runs(finished):
    folder, printed = finished
    last = printed.rstrip().splitlines()[-2:]
    for method, line in zip(("r2l-lite", "mobile-r2l-lite"), last, strict=True):
        found = re.fullmatch(
            rf"Open the viewer on {method}: (\S*ns-viewer) --load-config (\S+/{method}/\S+/config\.yml)", line
        )
        assert found, line
        assert (folder / found[2]).exists()
        checkpoints = list((folder / found[2]).parent.glob("nerfstudio_models/*.ckpt"))
        assert len(checkpoints) == 1


def test_rerun_trains_nothing(finished, monkeypatch, capsys):
    folder, printed = finished
    runs = sorted((folder / "quick").rglob("*.ckpt"))
    stamps = [path.stat().st_mtime_ns for path in runs]
    monkeypatch.chdir(folder)
    Quickstart(folder=Path("quick"), fast=True).main()
    again = capsys.readouterr().out
    assert again.count("Found: ") == 5
    assert again.rstrip().splitlines()[-2:] == printed.rstrip().splitlines()[-2:]
    assert sorted((folder / "quick").rglob("*.ckpt")) == runs
    assert [path.stat().st_mtime_ns for path in runs] == stamps


def test_foreign_folder_is_refused_in_a_paragraph(tmp_path):
    mine = tmp_path / "quick" / "fast" / "capture"
    mine.mkdir(parents=True)
    (mine / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="thesis.tex"):
        Quickstart(folder=tmp_path / "quick", fast=True).main()
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]
    assert not (tmp_path / "quick" / "fast" / "stages.json").exists()


def test_stages_run_once_and_again_if_forced_or_changed(tmp_path):
    result = tmp_path / "result"
    calls = []

    def work() -> Path:
        calls.append(1)
        result.write_text("done")
        return result

    assert Stages(tmp_path, force=False).run("Student", "key", work) == result
    Stages(tmp_path, force=False).run("Student", "key", work)
    assert len(calls) == 1
    Stages(tmp_path, force=False).run("Student", "other settings", work)
    assert len(calls) == 2
    Stages(tmp_path, force=True).run("Student", "other settings", work)
    assert len(calls) == 3
    result.unlink()
    Stages(tmp_path, force=False).run("Student", "other settings", work)
    assert len(calls) == 4

    def fail() -> Path:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path, force=False).run("Teacher", "key", fail)
    assert "Teacher" not in json.loads((tmp_path / "stages.json").read_text())


def test_error_column_matches_its_title():
    tiles = [torch.full((8, 8, 3), value) for value in (0.0, 0.25, 0.5, 1.0)]
    sheet = contact_sheet([("12.3 dB", tiles)], ["truth", "teacher", "student", "error"], tile=32)
    middles = [sheet.getpixel((64 + column * 38 + 16, 24 + 16)) for column in range(4)]
    assert [pixel[0] for pixel in middles] == [0, 64, 128, 255]


@pytest.fixture
def dev(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """dev.py, as a fresh clone in a temporary folder would load it."""
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "installed")
    monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
    return module


def test_set_up_happens_once_per_pyproject(dev, monkeypatch, tmp_path):
    steps = []
    monkeypatch.setattr(dev, "run", lambda command, what, environment=None: steps.append(what))
    monkeypatch.setattr(dev.venv, "create", lambda path, **options: path.mkdir(exist_ok=True))
    checks = []
    for check in ("check_multiprocess", "check_nerfacto"):
        monkeypatch.setattr(dev, check, lambda check=check: checks.append(check))
    dev.install()
    assert len(steps) == 2 and checks == ["check_multiprocess", "check_nerfacto"]
    dev.install()
    assert len(steps) == 2 == len(checks)
    with (tmp_path / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    dev.install()
    assert len(steps) == 4


@pytest.mark.parametrize("code", [0, 1])
def test_an_environment_without_a_working_nerfacto_is_refused(code: int, dev, monkeypatch, tmp_path, capsys):
    program = tmp_path / "ns-train"
    program.write_text(f"#!/bin/sh\necho fork_exec takes exactly 23 arguments, not $*\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(dev, "BIN", tmp_path)
    if code == 0:
        dev.check_nerfacto()
        return
    with pytest.raises(dev.InstallError, match="ns-train nerfacto does not start"):
        dev.check_nerfacto()
    assert "exactly 23 arguments, not nerfacto --help" in capsys.readouterr().err


def test_failed_set_up_is_reported_and_tried_again(dev, monkeypatch, capsys):
    monkeypatch.setattr(dev.venv, "create", lambda path, **options: path.mkdir(exist_ok=True))
    monkeypatch.setattr(dev.subprocess, "call", lambda *arguments, **options: 2)
    assert dev.main(["test"]) == 1
    assert "failed (exit code 2" in capsys.readouterr().err
    assert not dev.STAMP.exists()


def test_old_python_is_an_error(dev, monkeypatch, capsys):
    monkeypatch.setattr(dev.sys, "version_info", (3, 9, 1))
    assert dev.main(["test"]) == 1
    assert "Python 3.10 or newer is needed" in capsys.readouterr().err


def test_pips_settings_reach_uv_but_never_over_its_own(dev, monkeypatch, tmp_path):
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://pip.example/simple\nextra-index-url = https://a.example\n    https://b.example\n"
    )
    for name in [*os.environ]:
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_FIND_LINKS", "wheels more")
    environment = dev.uv_environment()
    assert environment["UV_DEFAULT_INDEX"] == "https://pip.example/simple"
    assert environment["UV_INDEX"] == "https://a.example https://b.example"
    assert environment["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    assert environment["UV_FIND_LINKS"] == "wheels,more"
    monkeypatch.setenv("PIP_INDEX_URL", "https://variable.example/simple")
    assert dev.uv_environment()["UV_DEFAULT_INDEX"] == "https://variable.example/simple"
    monkeypatch.setenv("UV_INDEX_URL", "https://uv.example/simple")
    assert "UV_DEFAULT_INDEX" not in dev.uv_environment()


def test_set_up_script_needs_only_the_standard_library():
    text = (ROOT / "dev.py").read_text()
    modules = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    assert modules <= sys.stdlib_module_names
