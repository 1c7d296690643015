"""Compiled engines are read only from folders that no other user can write to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import student_runs
import torch

from r2l_nerfstudio import load_student
from r2l_nerfstudio.engines.cache import EngineCache
from r2l_nerfstudio.models.r2l import R2LModelConfig
from r2l_nerfstudio.user_cache import cache_folder, engine_cache_folder, is_private


def _loosen(folder: Path, file: Path) -> None:
    file.chmod(0o666)


def _open_folder(folder: Path, file: Path) -> None:
    folder.chmod(0o777)


def _give_away(folder: Path, file: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(file, 12345, -1)


def _link(folder: Path, file: Path) -> None:
    file.rename(folder.parent / "elsewhere")
    file.symlink_to(folder.parent / "elsewhere")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path, "0123abcd" * 4, torch.device("cpu"))


@pytest.mark.parametrize("damage", [_loosen, _open_folder, _give_away, _link])
def test_artifacts_that_others_may_have_written(damage: Callable[[Path, Path], None], cache: EngineCache) -> None:
    folder = cache.artifacts("inductor", "1")
    folder.mkdir(mode=0o700)
    file = folder / "inductor-fp32.pt2"
    file.write_bytes(b"machine code")
    file.chmod(0o600)
    assert cache.artifacts("inductor", "1") == folder
    damage(folder, file)
    assert cache.artifacts("inductor", "1") is None


def test_a_folder_that_is_a_link(cache: EngineCache, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    folder = cache.artifacts("inductor", "1")
    folder.symlink_to(theirs)
    assert cache.artifacts("inductor", "1") is None


def test_records_that_others_may_have_written(cache: EngineCache) -> None:
    cache.write("key", {"engine": "torch"})
    assert cache.read("key") == {"engine": "torch"}
    (cache.folder / "key.json").chmod(0o666)
    assert cache.read("key") is None


def test_the_cache_is_the_users_own(user_cache: Path) -> None:
    assert cache_folder().is_relative_to(user_cache)
    folder = engine_cache_folder()
    assert is_private(folder) and folder.stat().st_mode & 0o777 == 0o700


def test_no_cache_without_a_writable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert engine_cache_folder() is None


def test_engines_in_a_runs_folder_are_ignored(tmp_path: Path, user_cache: Path) -> None:
    run = student_runs.write_run(tmp_path / "run", R2LModelConfig(width=16, depth=4)).parent
    student = load_student(run, engine="torch")
    assert student.model.engines.cache_folder.is_relative_to(user_cache)
    assert not student.model.engines.cache_folder.is_relative_to(run)
