"""Captures and teachers shared by many tests."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from made_once import MadeOnce, make_once
from teachers import train_teacher, write_capture

# Tensors here are so small that a second thread costs more than it gives, tens of times more on a busy machine.
torch.set_num_threads(1)

_CAPTURES = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own in place of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def capture_data() -> Callable[[str], Path]:
    """A function from a development capture's name to its folder; it skips the test where the capture is absent."""

    def find(name: str) -> Path:
        if not (_CAPTURES / name).is_dir():
            pytest.skip(f"the capture '{name}' is not beside the repository, in ../shared/data")
        return _CAPTURES / name

    return find


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """`make_once` for all processes of this test run."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    common = tmp_path_factory.getbasetemp().parent if is_worker else tmp_path_factory.getbasetemp()

    return functools.partial(make_once, common)


@pytest.fixture(scope="session")
def tiny_capture(made_once: MadeOnce) -> Path:
    """A synthetic capture: 8 views of 24x24 pixels, in Nerfstudio's format. Read only."""
    return made_once("capture", lambda folder: write_capture(folder / "ball"))


@pytest.fixture(scope="session")
def tiny_teacher(tiny_capture: Path, made_once: MadeOnce) -> Path:
    """Folder of a run: a tiny nerfacto trained for 30 iterations on `tiny_capture`. Read only: copy it to change it."""
    return made_once("teacher", lambda folder: train_teacher("nerfacto", tiny_capture, folder, iterations=30).parent)
