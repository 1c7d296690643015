"""Nerfstudio's main branch, where data managers are plain classes: a stand-in for it trains a student, which then draws."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = '''
import importlib.abc, importlib.machinery, importlib.util, sys
from pathlib import Path

CHANGES = {
    "nerfstudio.data.datamanagers.base_datamanager": ("class DataManager(nn.Module):", "class DataManager:"),
    "nerfstudio.pipelines.base_pipeline": ("        self.datamanager.to(device)\\n", ""),
}

class Changed(importlib.machinery.SourceFileLoader):
    """Reads a module of the release as the main branch has it."""

    def get_code(self, name):
        old, new = CHANGES[name]
        source = Path(self.path).read_text()
        assert source.count(old) >= 1, f"{name} has no {old!r}"
        return compile(source.replace(old, new), self.path, "exec")

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in CHANGES:
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path)
        return importlib.util.spec_from_file_location(name, found.origin, loader=Changed(name, found.origin))

sys.meta_path.insert(0, Finder())
sys.path.insert(0, "tests")
from distil import distil, student_config
from nerfstudio.data.datamanagers.base_datamanager import DataManager
from torch import nn

assert not issubclass(DataManager, nn.Module)
teacher, output = Path(sys.argv[1]), Path(sys.argv[2])
for method in ("r2l-lite", "mobile-r2l-lite"):
    run = distil(student_config(teacher, output, method, **{"max_num_iterations": 6}))
config = student_config(teacher, output, method, **{"max_num_iterations": 8, "timestamp": "resumed"})
config.load_dir = run / "nerfstudio_models"
distil(config)

from nerfstudio.utils.eval_utils import eval_setup
from r2l_nerfstudio import load_student

for folder in output.rglob("config.yml"):
    assert not isinstance(eval_setup(folder, test_mode="test")[1].datamanager, nn.Module)
    image = load_student(folder, device="cpu", engine="torch").render(
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 2]], [20, 20, 8, 8], 16, 16
    )
    print("drawn", image.shape)
'''


def test_a_data_manager_that_is_no_module(tiny_teacher: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tiny_teacher / "config.yml"), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("drawn (16, 16, 3)") == 3
