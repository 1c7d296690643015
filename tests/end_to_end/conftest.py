"""Shared by the end-to-end tests: students, and commands that train them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from distil import distil, student_config
from made_once import MadeOnce
from teachers import train_teacher


def short_r2l_run(teacher: Path, folder: Path, iterations: int) -> Path:
    changes = {
        "max_num_iterations": iterations,
        "pipeline.datamanager.num_views": 4,
        "pipeline.datamanager.train_num_rays_per_batch": 512,
        "pipeline.datamanager.photo_iterations": 10,
        "pipeline.model.width": 32,
        "pipeline.model.depth": 6,
    }
    return distil(student_config(teacher, folder, **changes))


def short_mobile_run(teacher: Path, folder: Path, iterations: int) -> Path:
    changes = {"max_num_iterations": iterations, "pipeline.datamanager.photo_iterations": 10}
    return distil(student_config(teacher, folder, "mobile-r2l-lite", **changes))


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Variables for commands: one thread each, for what they compute here is tiny."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def command() -> Callable[..., list[str]]:
    """A function from a console command's name and arguments to the command line that runs it."""
    return lambda name, *arguments: [str(Path(sys.executable).with_name(name)), *map(str, arguments)]


@pytest.fixture(scope="session")
def train_student(command: Callable[..., list[str]], tiny_teacher: Path) -> Callable[..., list[str]]:
    """A function from an output folder and further flags to the command that distils `tiny_teacher` into a tiny student.

    The run's folder is `output/tiny/r2l-lite/run`; without flags it trains 30 iterations, 10 of them with photos.
    """

    def build(output: Path, *flags: object) -> list[str]:
        return command(
            "ns-train",
            "r2l-lite",
            *("--teacher", tiny_teacher / "config.yml"),
            *("--output-dir", output),
            *("--experiment-name", "tiny"),
            *("--timestamp", "run"),
            *("--max-num-iterations", 30),
            *("--pipeline.datamanager.num-views", 4),
            *("--pipeline.datamanager.train-num-rays-per-batch", 512),
            *("--pipeline.datamanager.photo-iterations", 10),
            *("--pipeline.model.width", 32),
            *("--pipeline.model.depth", 6),
            # 30 iterations leave the teacher too blurred to be told from one in another frame.
            *("--pipeline.check-frame", False),
            *("--vis", "tensorboard"),
            *("--viewer.quit-on-train-completion", True),
            *flags,
        )

    return build


@pytest.fixture(scope="session")
def tiny_student(tiny_teacher: Path, made_once: MadeOnce) -> Path:
    """Folder of a run: `r2l-lite` distilled from `tiny_teacher`. Read only: copy it to change it."""
    return made_once("student", lambda folder: short_r2l_run(tiny_teacher, folder, 30))


@pytest.fixture(scope="session")
def tiny_mobile_student(tiny_teacher: Path, made_once: MadeOnce) -> Path:
    """Folder of a run: `mobile-r2l-lite` distilled from `tiny_teacher`. Read only: copy it to change it."""
    return made_once("mobile_student", lambda folder: short_mobile_run(tiny_teacher, folder, 30))


@pytest.fixture(scope="session")
def visible_teacher(tiny_capture: Path, made_once: MadeOnce) -> Path:
    """Folder of a run: `tiny_teacher`, trained ten times as long, so that its images and its students' show something."""
    return made_once(
        "visible_teacher", lambda folder: train_teacher("nerfacto", tiny_capture, folder, iterations=300).parent
    )


@pytest.fixture(scope="session")
def visible_student(visible_teacher: Path, made_once: MadeOnce) -> Path:
    """Folder of a run: `r2l-lite` distilled from `visible_teacher`. Read only: copy it to change it."""
    return made_once("visible_student", lambda folder: short_r2l_run(visible_teacher, folder, 60))


@pytest.fixture(scope="session")
def visible_mobile_student(visible_teacher: Path, made_once: MadeOnce) -> Path:
    """Folder of a run: `mobile-r2l-lite` distilled from `visible_teacher`. Read only: copy it to change it."""
    return made_once("visible_mobile_student", lambda folder: short_mobile_run(visible_teacher, folder, 60))
