"""Ranges of configuration fields, declared beside each field as `Annotated[int, IntRange(1, 4096)]`.

tyro refuses other values when it parses a command line and shows the range in `--help`; `check_ranges` refuses values
from a file or from Python.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import typing
from typing import Any

import tyro

from r2l_nerfstudio.errors import InputError


class _Range(tyro.constructors.PrimitiveConstructorSpec):
    """A range of numbers, with what tyro needs to parse one."""

    low: float
    high: float
    above: bool

    def __init__(self, kind: type, low: float, high: float, above: bool) -> None:
        super().__init__(
            nargs=1,
            metavar=f"{kind.__name__.upper()} {_interval(low, high, above)}",
            instance_from_str=lambda args: self._parse(kind, args[0]),
            is_instance=lambda value: isinstance(value, int | float) and not isinstance(value, bool),
            str_from_instance=lambda value: [str(value)],
        )
        for name, value in {"low": low, "high": high, "above": above}.items():
            object.__setattr__(self, name, value)  # The base class is frozen.

    def _parse(self, kind: type, text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise ValueError(f"{text[:60]!r} is not {'an integer' if kind is int else 'a number'}") from None
        if not self.holds(value):
            raise ValueError(f"{self.describe()} (got {text[:60]})")
        return value

    def __repr__(self) -> str:
        return self.metavar

    def holds(self, value: float) -> bool:
        """Return whether a number is in the range; NaN never is."""
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def describe(self) -> str:
        """Return the range in words, to follow the name of a field."""
        if self.high >= sys.float_info.max:
            return f"must be {'above' if self.above else 'at least'} {self.low}"
        if self.above:
            return f"must be above {self.low} and at most {self.high}"
        return f"must be between {self.low} and {self.high}"


def _interval(low: float, high: float, above: bool) -> str:
    if high >= sys.float_info.max:
        return f"{'>' if above else '>='}{low}"
    return f"{'(' if above else '['}{low}..{high}]"


class IntRange(_Range):
    """An integer in [low, high]."""

    def __init__(self, low: int, high: float = math.inf) -> None:
        super().__init__(int, low, high, above=False)


class FloatRange(_Range):
    """A finite number in [low, high], or in (low, high] with `above`."""

    def __init__(self, low: float, high: float = sys.float_info.max, above: bool = False) -> None:
        super().__init__(float, low, high, above)


@functools.cache
def _stock_ranges() -> dict[type, dict[str, _Range]]:
    """Ranges of fields that Nerfstudio declares and does not check."""
    from nerfstudio.configs.base_config import LoggingConfig, MachineConfig, ViewerConfig
    from nerfstudio.configs.experiment_config import ExperimentConfig
    from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
    from nerfstudio.engine.optimizers import OptimizerConfig
    from nerfstudio.engine.schedulers import SchedulerConfig
    from nerfstudio.models.base_model import ModelConfig

    return {
        MachineConfig: {
            "seed": IntRange(0, 2**32 - 1025),  # NumPy's limit; the rank is added to it.
            "num_devices": IntRange(1, 1024),
            "num_machines": IntRange(1, 1024),
            "machine_rank": IntRange(0, 1023),
        },
        LoggingConfig: {"steps_per_log": IntRange(1), "max_buffer_size": IntRange(1, 10**6)},
        ViewerConfig: {
            "websocket_port": IntRange(0, 65535),
            "websocket_port_default": IntRange(0, 65535),
            "num_rays_per_chunk": IntRange(1),
            "max_num_display_images": IntRange(-1),
            "jpeg_quality": IntRange(0, 100),
            "camera_frustum_scale": FloatRange(0),
        },
        ExperimentConfig: {
            "max_num_iterations": IntRange(0, 10**9),
            "steps_per_save": IntRange(0),
            "steps_per_eval_batch": IntRange(0),
            "steps_per_eval_image": IntRange(0),
            "steps_per_eval_all_images": IntRange(0),
            "load_step": IntRange(0),
        },
        VanillaDataManagerConfig: {
            "train_num_rays_per_batch": IntRange(1),
            "eval_num_rays_per_batch": IntRange(1),
            "camera_res_scale_factor": FloatRange(0, above=True),
            "patch_size": IntRange(1),
        },
        OptimizerConfig: {
            "lr": FloatRange(0),
            "eps": FloatRange(0),
            "weight_decay": FloatRange(0),
            "max_norm": FloatRange(0),
        },
        SchedulerConfig: {"warmup_steps": IntRange(0), "max_steps": IntRange(0), "decay_steps": IntRange(0)},
        ModelConfig: {"eval_num_rays_per_chunk": IntRange(1)},
    }


def check_ranges(config: Any, source: str | None = None) -> None:
    """Check every declared range of a configuration and of configurations in it.

    Args:
        config: a configuration dataclass; other values are skipped.
        source: the file it was read from, in words; None for a command line.

    Raises:
        InputError: a value is out of its range; the message names its flag, or the file and the field.
    """
    _check(config, "", source)


def _check(config: Any, where: str, source: str | None) -> None:
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return
    hints = _hints(type(config))
    stock = {k: r for cls, ranges in _stock_ranges().items() if isinstance(config, cls) for k, r in ranges.items()}
    for declared in dataclasses.fields(config):
        name = declared.name
        value = getattr(config, name, None)
        place = f"{where}.{name}" if where else name
        ranges = _ranges(hints.get(name)) or ([stock[name]] if name in stock else [])
        for single in value if isinstance(value, tuple | list) else [value]:
            if isinstance(single, int | float) and not isinstance(single, bool):
                for wanted in ranges:
                    if not wanted.holds(single):
                        raise InputError(_complaint(place, wanted, single, source))
            else:
                _check(single, place, source)
        if isinstance(value, dict):
            for key, item in value.items():
                _check(item, f"{place}.{key}", source)
                if isinstance(item, dict):
                    for inner, part in item.items():
                        _check(part, f"{place}.{key}.{inner}", source)


def _complaint(place: str, wanted: _Range, value: float, source: str | None) -> str:
    if source is None:
        return f"--{place.replace('_', '-')} {wanted.describe()} (got {value:.6g})."
    return f"{source} cannot be used: {place} {wanted.describe()} (got {value:.6g}). Restore the value, or correct it."


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except Exception:  # A name that exists only for type checkers.
        return {}


def _ranges(hint: Any) -> list[_Range]:
    """Return the ranges declared anywhere in a type."""
    found = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, _Range)]
    for arg in typing.get_args(hint):
        found += _ranges(arg)
    return found
