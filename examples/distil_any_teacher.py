"""Distil a trained model of any Nerfstudio method, of another plugin too, from Python.

    python examples/distil_any_teacher.py outputs/…/your-method/… outputs

The teacher's plugin must be installed, or named in NERFSTUDIO_METHOD_CONFIGS as for `ns-train`. Nothing else about it has to
be known: rays are rendered through Nerfstudio's `Model` interface.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import cast

from nerfstudio.scripts.train import main as train

from r2l_nerfstudio import load_student
from r2l_nerfstudio.distillation.trainer import DistillationTrainerConfig
from r2l_nerfstudio.method_configs import r2l_lite


def student_config(teacher: Path, output: Path) -> DistillationTrainerConfig:
    """Return the configuration of a student: that of `ns-train r2l-lite --teacher TEACHER`, here with a time limit."""
    config = cast(DistillationTrainerConfig, copy.deepcopy(r2l_lite.config))
    config.teacher, config.output_dir = teacher, output
    config.max_minutes = 20.0
    config.vis = "tensorboard"
    return config


def distil(config: DistillationTrainerConfig) -> Path:
    """Train, and return the student's run folder."""
    train(config)
    return config.get_base_dir()


if __name__ == "__main__":
    run = distil(student_config(Path(sys.argv[1]), Path(sys.argv[2])))
    print(f"{run}: outputs {', '.join(load_student(run).outputs)}")
