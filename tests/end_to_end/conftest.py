"""What end-to-end tests share: a student trained as a user trains one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN_TIMEOUT = 600
"""Seconds for a tiny training, most of them imports; a busy machine takes minutes."""


@pytest.fixture(scope="session")
def tiny_student(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run: `r2l-lite` distilled from `tiny_teacher` by `ns-train`. Read only: copy it to change it."""
    output = tmp_path_factory.mktemp("students")
    command = [
        Path(sys.executable).with_name("ns-train"),
        "r2l-lite",
        *("--teacher", tiny_teacher / "config.yml"),
        *("--output-dir", output),
        *("--experiment-name", "tiny"),
        *("--timestamp", "run"),
        *("--max-num-iterations", "30"),
        *("--pipeline.datamanager.num-views", "4"),
        *("--pipeline.datamanager.train-num-rays-per-batch", "512"),
        *("--pipeline.datamanager.real-iterations", "10"),
        *("--pipeline.model.width", "32"),
        *("--pipeline.model.depth", "6"),
        # 30 iterations leave the teacher too blurred to be told from one in another frame.
        *("--pipeline.check-frame", "False"),
        *("--vis", "tensorboard"),
        *("--viewer.quit-on-train-completion", "True"),
    ]
    result = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TRAIN_TIMEOUT,
    )
    assert result.returncode == 0, f"ns-train r2l-lite failed:\n{result.stdout[-4000:]}"
    return output / "tiny" / "r2l-lite" / "run"
