"""Shared by the end-to-end tests: a student trained with `ns-train`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from distil import distil, student_config

TRAIN_TIMEOUT = 600
"""Seconds for a tiny training, most of them imports; a busy machine takes minutes."""


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
def tiny_student(
    train_student: Callable[..., list[str]],
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folder of a run: `r2l-lite` distilled from `tiny_teacher` by `ns-train`. Read only: copy it to change it."""
    output = tmp_path_factory.mktemp("students")
    result = subprocess.run(
        train_student(output),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TRAIN_TIMEOUT,
    )
    assert result.returncode == 0, f"ns-train r2l-lite failed:\n{result.stdout[-4000:]}"
    return output / "tiny" / "r2l-lite" / "run"


@pytest.fixture(scope="session")
def tiny_mobile_student(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run: `mobile-r2l-lite` distilled from `tiny_teacher`. Read only: copy it to change it."""
    config = student_config(
        tiny_teacher,
        tmp_path_factory.mktemp("students"),
        "mobile-r2l-lite",
        **{"max_num_iterations": 30, "pipeline.datamanager.photo_iterations": 10},
    )
    return distil(config)
