"""Nerfstudio's own nerfacto in this environment: the first command of the README."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.datamanagers.parallel_datamanager import ParallelDataManagerConfig

OFFLINE_TRAIN = Path(__file__).parents[1] / "offline_train.py"


def test_nerfacto_trains_with_its_own_data_manager(
    tiny_capture: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    # These are started by `multiprocess`, whose wheel may be that of another Python.
    assert isinstance(all_methods["nerfacto"].pipeline.datamanager, ParallelDataManagerConfig)
    options = {
        "data": tiny_capture,
        "output-dir": tmp_path,
        "max-num-iterations": 2,
        "machine.device-type": "cpu",
        "mixed-precision": False,
        "vis": "tensorboard",
        "viewer.quit-on-train-completion": True,
        "pipeline.datamanager.train-num-rays-per-batch": 64,
        "pipeline.model.implementation": "torch",
        "pipeline.model.log2-hashmap-size": 10,
    }
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    found = subprocess.run(
        [sys.executable, str(OFFLINE_TRAIN), "nerfacto", *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, (found.stdout + found.stderr)[-4000:]
    assert [file.name for file in tmp_path.rglob("*.ckpt")] == ["step-000000001.ckpt"]
