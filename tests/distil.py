"""Tiny students for tests, configured as `ns-train` configures them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from r2l_nerfstudio.distillation.trainer import DistillationTrainer, DistillationTrainerConfig

TINY_STUDENT = {
    "experiment_name": "tiny",
    "timestamp": "run",
    "max_num_iterations": 12,
    "machine.device_type": "cpu",
    "vis": "tensorboard",
    "logging.local_writer.enable": False,
    "logging.profiler": "none",
    "viewer.quit_on_train_completion": True,
    # A teacher of a few iterations is too blurred to be told from one in another frame.
    "pipeline.check_frame": False,
    "pipeline.datamanager.num_views": 3,
    "pipeline.datamanager.train_num_rays_per_batch": 256,
    "pipeline.datamanager.photo_iterations": 4,
    "pipeline.model.width": 16,
}
"""What makes a student small enough for a test, as dotted names in its configuration."""

TINY_NETWORK = {
    "r2l": {"pipeline.model.depth": 4},
    "mobile": {
        "pipeline.model.blocks": 1,
        "pipeline.datamanager.crop_cells": 3,
        "pipeline.datamanager.single_ray_share": 0.0,  # So few iterations have none to spare.
    },
}
"""The same of each kind of network, by the first word of the method's name."""


def student_config(
    teacher: Path | None, output: Path, method: str = "r2l-lite", **overrides: Any
) -> DistillationTrainerConfig:
    """The configuration of a tiny student, before anything in it is resolved.

    Args:
        teacher: the teacher's config.yml or folder.
        output: where runs go; the run's folder is `output/tiny/METHOD/run`.
        method: as `ns-train` lists it.
        **overrides: configuration by dotted name, as in `**{"pipeline.model.ray_encoding": "plucker"}`.
    """
    from nerfstudio.configs.method_configs import all_methods

    config = copy.deepcopy(all_methods[method])
    return shrunk(config, method, **{"teacher": teacher, "output_dir": output, **overrides})


def shrunk(config: DistillationTrainerConfig, method: str, **overrides: Any) -> DistillationTrainerConfig:
    """A method's configuration, made tiny in place."""
    tiny = {**TINY_STUDENT, **TINY_NETWORK[method.partition("-")[0]]}
    for name, value in {**tiny, **overrides}.items():
        *parents, field = name.split(".")
        holder = config
        for parent in parents:
            holder = getattr(holder, parent)
        if not hasattr(holder, field):
            raise AttributeError(f"a configuration of {method} has no {name}")
        setattr(holder, field, value)
    return config


def distil(config: DistillationTrainerConfig) -> Path:
    """Train in this process by the function behind `ns-train`.

    Returns:
        The run's folder.

    Raises:
        SystemExit: as `ns-train` exits.
    """
    from nerfstudio.scripts.train import main

    with own_writers():
        main(config)
    return config.get_base_dir()


@contextmanager
def set_up(config: DistillationTrainerConfig) -> Iterator[DistillationTrainer]:
    """The trainer of a run, as `ns-train` has it before the first iteration."""
    torch.manual_seed(0)
    config.set_timestamp()
    config.save_config()
    with own_writers():
        trainer = config.setup(local_rank=0, world_size=1)
        trainer.setup()
        yield trainer


@contextmanager
def own_writers() -> Iterator[None]:
    """Nerfstudio's writers are global, and would log the next training into this run too."""
    from nerfstudio.utils import writer

    try:
        yield
    finally:
        writer.EVENT_WRITERS.clear()
        writer.EVENT_STORAGE.clear()
        writer.GLOBAL_BUFFER.clear()
