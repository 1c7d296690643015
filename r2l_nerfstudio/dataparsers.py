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
    dataparser = dataparser_of(config)
    if dataparser is None:
        raise TypeError(f"{type(config.pipeline.datamanager).__name__} has no dataparser")
    dataparser = without_points(dataparser)
    dataparser.data = data.absolute()
    return dataparser


def without_points(dataparser: DataParserConfig) -> DataParserConfig:
    """Return a copy of a dataparser that does not read the points that only seed splats.

    Reading them is slow, and Nerfstudio may prompt at the terminal before it creates a missing one.
    """
    dataparser = copy.deepcopy(dataparser)
    if hasattr(dataparser, "load_3D_points"):
        setattr(dataparser, "load_3D_points", False)  # noqa: B010 - a field of some dataparsers only
    return dataparser
