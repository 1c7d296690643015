"""Dataparsers of runs, pointed at their captures."""

from __future__ import annotations

import copy
from pathlib import Path

from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.engine.trainer import TrainerConfig


def dataparser_of(config: TrainerConfig) -> DataParserConfig | None:
    """Return the dataparser of a run's data manager; None for a data manager without one."""
    return getattr(config.pipeline.datamanager, "dataparser", None)


def dataparser_at(config: TrainerConfig, data: Path) -> DataParserConfig:
    """Return a copy of a run's dataparser that reads the capture at `data`, without the points that only seed splats.

    Args:
        config: configuration of a run whose data manager has a dataparser.
        data: the capture's folder or file.
    """
    dataparser = copy.deepcopy(dataparser_of(config))
    if dataparser is None:
        raise TypeError(f"{type(config.pipeline.datamanager).__name__} has no dataparser")
    dataparser.data = data.absolute()
    if hasattr(dataparser, "load_3D_points"):
        # Reading points is slow and may prompt.
        setattr(dataparser, "load_3D_points", False)  # noqa: B010 - a field of some dataparsers only
    return dataparser
