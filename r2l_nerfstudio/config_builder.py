"""Build a run's configuration from the plain data of its config.yml, without calling anything that the file names.

Nerfstudio writes its configuration as YAML with Python tags and reads it back with a loader that builds and calls
whatever the file names. Here the tags become inert markers first. A marker is then resolved only where it fits:

* `!!python/object:` to a configuration dataclass of Nerfstudio or of a registered plugin, with declared fields only,
  each checked against its declared type;
* `!!python/name:` to a class that fits the role of its field (`_target` of a model configuration is a model, ...), or to
  the field's own default;
* `!!python/object/apply:` to a path, an enum member, or a data manager for one kind of dataset.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import functools
import importlib
import importlib.util
import math
import os
import re
import sys
import types
import typing
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import yaml

from r2l_nerfstudio.errors import one_line

_GROUPS = ("nerfstudio.method_configs", "nerfstudio.dataparser_configs")
_VARIABLES = ("NERFSTUDIO_METHOD_CONFIGS", "NERFSTUDIO_DATAPARSER_CONFIGS")
# Nerfstudio's command lines start programs, and no configuration needs them.
_CLOSED_MODULES = ("nerfstudio.scripts", "nerfstudio.process_data", "nerfstudio.utils.scripts")
# Optimizer configurations refer to PyTorch's classes.
_OPEN_TORCH_MODULES = ("torch.optim",)
_PATH_CLASSES = {
    f"{module}.{name}"
    for module in ("pathlib", "pathlib._local")
    for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
}
_NAMED_FUNCTIONS = {
    "nerfstudio.data.utils.nerfstudio_collate.nerfstudio_collate",
    "nerfstudio.data.datamanagers.base_datamanager.variable_res_collate",
}
"""Functions that a configuration may name in a field of callables, beside the field's default."""

TRUST = (
    " Use the config.yml that ns-train wrote, from someone you trust; a method of your own must be registered with "
    "Nerfstudio (entry point nerfstudio.method_configs, or the variable NERFSTUDIO_METHOD_CONFIGS)."
)


class Refused(Exception):
    """A value that a configuration may not hold; the message finishes a sentence about the file."""


@dataclass(eq=False)
class _Name:
    """`!!python/name:`, not looked up."""

    name: str


@dataclass(eq=False)
class _Object:
    """`!!python/object:`, not built."""

    name: str
    values: dict[Any, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Call:
    """`!!python/object/apply:`, not called."""

    name: str
    args: list[Any] = field(default_factory=list)


class MarkerLoader(yaml.SafeLoader):
    """PyYAML's safe loader; Python tags of Nerfstudio's configurations become markers, all others are refused."""

    def construct_tuple(self, node: yaml.SequenceNode) -> tuple:
        return tuple(self.construct_sequence(node, deep=True))

    def construct_name(self, name: str, node: yaml.Node) -> _Name:
        return _Name(name)

    def construct_object_marker(self, name: str, node: yaml.MappingNode) -> _Object:
        return _Object(name, self.construct_mapping(node, deep=True))

    def construct_call(self, name: str, node: yaml.Node) -> _Call:
        return _Call(name, self.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else [])

    def refuse(self, node: yaml.Node) -> None:
        raise Refused(f"it holds {node.tag.removeprefix('tag:yaml.org,2002:')}, which is not configuration.{TRUST}")


_PYTHON = "tag:yaml.org,2002:python/"
MarkerLoader.add_constructor(f"{_PYTHON}tuple", MarkerLoader.construct_tuple)
MarkerLoader.add_multi_constructor(f"{_PYTHON}name:", MarkerLoader.construct_name)
MarkerLoader.add_multi_constructor(f"{_PYTHON}object:", MarkerLoader.construct_object_marker)
MarkerLoader.add_multi_constructor(f"{_PYTHON}object/apply:", MarkerLoader.construct_call)
MarkerLoader.add_constructor(cast(str, None), MarkerLoader.refuse)  # None stands for any other tag.


def marked_fields(value: Any) -> dict[Any, Any] | None:
    """Return the fields that the file sets in an object it describes; None if it describes something else."""
    return value.values if isinstance(value, _Object) else None


class ConfigBuilder:
    """Resolves the markers of one file."""

    def __init__(self) -> None:
        self._packages = _registered_packages()
        self._built: dict[int, Any] = {}
        self._open: set[int] = set()
        self.ignored: list[str] = []
        """Fields that the installed version of a class does not declare; their plain values were dropped."""

    def build(self, value: Any, where: str = "", hint: Any = Any, default: Any = None) -> Any:
        """Resolve a value and everything in it.

        Args:
            value: value from `MarkerLoader`.
            where: dotted name of the field, for messages.
            hint: the field's declared type.
            default: the field's default, which is accepted whatever the declared type.

        Raises:
            Refused: for anything that is not configuration.
        """
        if isinstance(value, _Name):
            return self._class_or_function(value.name, where, hint, default)
        if not isinstance(value, _Object | _Call | list | tuple | dict | set):
            return value
        key = id(value)
        if key in self._built:
            return self._built[key]
        if key in self._open:
            raise Refused(f"its field {where or 'at the top'} contains itself, which no configuration does.{TRUST}")
        self._open.add(key)
        try:
            built = self._build(value, where, hint)
        finally:
            self._open.discard(key)
        self._built[key] = built
        return built

    def _build(self, value: Any, where: str, hint: Any) -> Any:
        if isinstance(value, _Object):
            return self._config(value, where)
        if isinstance(value, _Call):
            return self._call(value, where)
        if isinstance(value, dict):
            return {self.build(k, where): self.build(v, f"{where}.{k}") for k, v in value.items()}
        return type(value)(self.build(item, where, _item_hint(hint)) for item in value)

    def _config(self, marker: _Object, where: str) -> Any:
        cls = self._find(marker.name)
        if not _is_config_class(cls):
            raise Refused(f"{marker.name} is not a configuration class, so it was not built.{TRUST}")
        self._check_safe(cls)
        declared = {f.name: f for f in dataclasses.fields(cls)}
        hints = _hints(cls)
        # No code of the class runs: neither __new__ nor __init__ nor __setstate__.
        instance = object.__new__(cls)
        renamed = getattr(cls, "RENAMED", {})
        values = {renamed.get(key, key) if isinstance(key, str) else key: value for key, value in marker.values.items()}
        for key, value in values.items():
            inside = f"{where}.{key}" if where else str(key)
            if key not in declared:
                if not isinstance(key, str) or key.startswith("_") or hasattr(cls, key):
                    raise Refused(f"it sets {key!r} of a {marker.name}, which is not a configuration field.{TRUST}")
                self.build(value, inside)  # Values that no version may hold are refused here.
                self.ignored.append(inside)
                continue
            default = _default(declared[key])
            if key == "_target":
                built = self._target(cls, value, default)
            else:
                hint = hints.get(key, Any)
                built = _as_declared(self.build(value, inside, hint, default), hint)
                if not (_conforms(built, hint, _is_plugins(cls)) or _same(built, default)):
                    raise Refused(
                        f"its field {inside} is {_short(built)}, and {_describe(hint)} is expected there. Restore the"
                        " value that ns-train wrote, or correct it."
                    )
            object.__setattr__(instance, key, built)
        for name, missing in declared.items():
            factory = missing.default_factory
            is_left_out = name not in values
            # Missing values are not guessed.
            is_made = name in ("pipeline", "datamanager", "dataparser", "model")
            if is_left_out and not is_made and factory is not dataclasses.MISSING:
                object.__setattr__(instance, name, factory())
        return instance

    def _target(self, cls: type, value: Any, default: Any) -> Any:
        """Return the class that a configuration sets up, if it has the role of its kind of configuration."""
        if value is None and default is None:
            return None
        if isinstance(value, _Name):
            name = value.name
            found = _torch_class(name) if name.startswith("torch.") else self._find(name)
        elif isinstance(value, _Call):
            name = value.name
            found = self._call(value, "_target")
        else:
            raise Refused(f"the _target of a {cls.__name__} is {_short(value)} and not a class.{TRUST}")
        base = typing.get_origin(found) or found
        role = _role(cls) or (default if isinstance(default, type) else None)
        is_default = found is default
        if not isinstance(base, type) or not (is_default or (role is not None and issubclass(base, role))):
            wanted = f"a {role.__name__}" if role is not None else "its own class"
            raise Refused(f"the _target of a {cls.__name__} is {name}, and {wanted} is expected there.{TRUST}")
        self._check_safe(base)
        return found

    def _call(self, marker: _Call, where: str) -> Any:
        args = [self.build(arg, where, type) for arg in marker.args]
        if marker.name in _PATH_CLASSES and all(isinstance(arg, str) for arg in args):
            return Path(*args)
        if marker.name == "_operator.getitem" and len(args) == 2 and all(isinstance(arg, type) for arg in args):
            # A data manager for one kind of dataset: VanillaDataManager[DepthDataset].
            from nerfstudio.data.datamanagers.base_datamanager import DataManager
            from nerfstudio.data.datasets.base_dataset import InputDataset

            manager, dataset = args
            if issubclass(manager, DataManager) and issubclass(dataset, InputDataset):
                return cast(Any, manager).__class_getitem__(dataset)  # Those with one argument.
        cls = self._find(marker.name)
        if not (isinstance(cls, type) and issubclass(cls, enum.Enum) and len(args) == 1):
            raise Refused(f"it calls {marker.name}, and a configuration may call nothing.{TRUST}")
        try:
            return cls(args[0])
        except (ValueError, TypeError) as error:
            raise Refused(
                f"{one_line(error)}: the run was made with another version of the package {_package(cls)}."
            ) from error

    def _class_or_function(self, name: str, where: str, hint: Any, default: Any) -> Any:
        if name.startswith("torch."):
            found = _torch_class(name)
        else:
            found = self._find(name)
        if found is default or (isinstance(found, FunctionType) and name in _NAMED_FUNCTIONS and _takes_call(hint)):
            return found
        if isinstance(found, type) and _takes_class(hint):
            self._check_safe(found)
            return found
        raise Refused(f"its field {where} names {name}, which does not belong there.{TRUST}")

    def _find(self, name: str) -> Any:
        """Return the class or function with that dotted name, from the packages of Nerfstudio and the plugins."""
        module, _, attribute = name.rpartition(".")
        package = module.partition(".")[0]
        if package not in self._packages and not _installed(package):
            raise Refused(
                f"its class {name} is in the Python package '{package}', which is not installed. Install that package "
                "in this environment (see the method's page in Nerfstudio's documentation), then try again."
            )
        if package not in self._packages or _inside(module, _CLOSED_MODULES):
            raise Refused(f"it names {name}, which belongs neither to Nerfstudio's models nor to a plugin.{TRUST}")
        if not re.fullmatch(r"[\w.]+", name):
            raise Refused(f"it names {name[:200]!r}, which is not a class.{TRUST}")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # A module may raise anything while it is imported.
            raise Refused(
                f"its class {name} cannot be imported here ({one_line(error)}): install the version of '{package}' "
                "that the run was trained with, and what it depends on."
            ) from error
        # A package's modules also hold what they import: `os.system` by another name is still `os.system`.
        is_own = isinstance(found, type | FunctionType) and _package(found) in self._packages
        if not is_own or _inside(found.__module__, _CLOSED_MODULES):
            raise Refused(f"it names {name}, which is not a class or function of the package '{package}'.{TRUST}")
        return found

    def _check_safe(self, cls: type) -> None:
        reason = unsafe_dataparser(cls)
        if reason is not None:
            raise Refused(reason)


def unsafe_dataparser(cls: type) -> str | None:
    """Return why a dataparser, or its configuration, may not read a capture; None if it may.

    Of the dataparsers of Nerfstudio 1.1.5 only one unpickles its input.
    """
    from nerfstudio.data.dataparsers.minimal_dataparser import MinimalDataParser, MinimalDataParserConfig

    if issubclass(cls, MinimalDataParser | MinimalDataParserConfig):
        return (
            "its dataparser is Nerfstudio's MinimalDataParser, which unpickles the capture's .npz files, and a pickle "
            "can run any code. Convert the capture to Nerfstudio's format (transforms.json) and train the teacher on that."
        )
    return None


def _is_config_class(cls: Any) -> bool:
    from nerfstudio.configs.base_config import PrintableConfig

    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        return False
    # A plugin's configurations need not derive from Nerfstudio's.
    return issubclass(cls, PrintableConfig) or _is_plugins(cls) or cls.__name__.endswith("Config")


def _is_plugins(cls: type) -> bool:
    return _package(cls) not in ("nerfstudio", __name__.partition(".")[0])


@functools.cache
def _roles() -> dict[type, type]:
    """Return what kind of class each kind of configuration sets up."""
    from nerfstudio.cameras.camera_optimizers import CameraOptimizer, CameraOptimizerConfig
    from nerfstudio.data.datamanagers.base_datamanager import DataManager, DataManagerConfig
    from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig
    from nerfstudio.data.pixel_samplers import PixelSampler, PixelSamplerConfig
    from nerfstudio.engine.optimizers import OptimizerConfig
    from nerfstudio.engine.schedulers import Scheduler, SchedulerConfig
    from nerfstudio.engine.trainer import Trainer, TrainerConfig
    from nerfstudio.fields.base_field import Field, FieldConfig
    from nerfstudio.models.base_model import Model, ModelConfig
    from nerfstudio.pipelines.base_pipeline import Pipeline, VanillaPipelineConfig
    from torch.optim import Optimizer

    return {
        TrainerConfig: Trainer,
        VanillaPipelineConfig: Pipeline,
        DataManagerConfig: DataManager,
        DataParserConfig: DataParser,
        ModelConfig: Model,
        OptimizerConfig: Optimizer,
        SchedulerConfig: Scheduler,
        CameraOptimizerConfig: CameraOptimizer,
        PixelSamplerConfig: PixelSampler,
        FieldConfig: Field,
    }


def _role(cls: type) -> type | None:
    kind = _kind(cls)
    return None if kind is None else _roles()[kind]


def _kind(cls: type) -> type | None:
    """Return which kind of configuration a class is."""
    return next((base for base in cls.__mro__ if base in _roles()), None)


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except Exception:  # A name that exists only for type checkers.
        return {}


def _default(declared: dataclasses.Field) -> Any:
    if declared.default is not dataclasses.MISSING:
        default = declared.default
        return default.__func__ if isinstance(default, staticmethod) else default
    if declared.default_factory is not dataclasses.MISSING:
        return declared.default_factory()
    return None


def _same(value: Any, default: Any) -> bool:
    try:
        return type(value) is type(default) and bool(value == default)
    except Exception:  # Arrays.
        return False


def _plain(hint: Any) -> Any:
    """Remove `Annotated` and similar wrappers from a type."""
    while typing.get_origin(hint) in (typing.Annotated, typing.ClassVar, typing.Final):
        hint = typing.get_args(hint)[0]
    return hint


def _choices(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, nested unions included."""
    hint = _plain(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(choice for arg in typing.get_args(hint) for choice in _choices(arg))
    return (hint,)


def _item_hint(hint: Any) -> Any:
    for choice in _choices(hint):
        args = typing.get_args(choice)
        if typing.get_origin(choice) in (list, tuple, set) and args:
            return args[0]
    return Any


def _takes_class(hint: Any) -> bool:
    return any(choice is type or typing.get_origin(choice) is type for choice in _choices(hint))


def _takes_call(hint: Any) -> bool:
    return any((typing.get_origin(choice) or choice) is collections.abc.Callable for choice in _choices(hint))


def _as_declared(value: Any, hint: Any) -> Any:
    """Convert a path that was written as a string by hand."""
    choices = _choices(hint)
    return Path(value) if isinstance(value, str) and Path in choices and str not in choices else value


def _conforms(value: Any, hint: Any, is_lenient: bool = False) -> bool:
    """Return whether a value fits a declared type.

    Args:
        value: resolved.
        hint: as declared.
        is_lenient: take any number for a number, since plugins often declare `int` and mean `float`.
    """
    if isinstance(value, float) and math.isnan(value):
        return False
    return any(_fits(value, choice, is_lenient) for choice in _choices(hint))


def _fits(value: Any, hint: Any, is_lenient: bool) -> bool:
    if hint is Any or isinstance(hint, typing.TypeVar | str | typing.ForwardRef):
        return True
    if hint is None or hint is type(None):
        return value is None
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is type or hint is type:
        base = typing.get_origin(value) or value
        wanted = tuple(arg for arg in args if isinstance(arg, type))
        return isinstance(base, type) and (not wanted or issubclass(base, wanted))
    if (origin or hint) is collections.abc.Callable:
        return callable(value)
    if hint in (int, float):
        numbers = int if hint is int and not is_lenient else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    if origin in (list, tuple, set) or hint in (list, tuple, set):
        if not isinstance(value, list | tuple | set):
            return False
        if origin is tuple and args and args[-1] is not Ellipsis:
            pairs = zip(value, args, strict=False)
            return len(value) == len(args) and all(_conforms(v, a, is_lenient) for v, a in pairs)
        return not args or all(_conforms(item, args[0], is_lenient) for item in value)
    if origin in (dict, collections.abc.Mapping) or hint is dict:
        return isinstance(value, dict) and (
            not args
            or all(_conforms(k, args[0], is_lenient) and _conforms(v, args[1], is_lenient) for k, v in value.items())
        )
    cls = origin or hint
    if not isinstance(cls, type):
        return True
    if isinstance(value, cls):
        return True
    # A plugin's dataparser is not one of those that Nerfstudio's union lists.
    kind = _kind(cls)
    return kind is not None and isinstance(value, kind)


def _registered_packages() -> frozenset[str]:
    packages = {"nerfstudio", __name__.partition(".")[0]}
    for group in _GROUPS:
        for entry in entry_points(group=group):
            packages.add(entry.module.partition(".")[0])
            # A plugin's distribution may hold its models in a second package.
            packages.update(((entry.dist and entry.dist.read_text("top_level.txt")) or "").split())
    for variable in _VARIABLES:
        for definition in filter(None, os.environ.get(variable, "").split(",")):
            packages.add(re.split(r"[.:]", definition.partition("=")[2])[0])
    return frozenset(packages)


def _torch_class(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    # Nothing is imported for it: PyTorch has imported all of these by now.
    found = getattr(sys.modules.get(module), attribute, None) if _inside(module, _OPEN_TORCH_MODULES) else None
    if not isinstance(found, type) or not _inside(found.__module__, _OPEN_TORCH_MODULES):
        raise Refused(f"it names {name}, which is not an optimizer or layer of PyTorch.{TRUST}")
    return found


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ValueError, ImportError):  # "" or __main__.
        return True


def _inside(module: str, parents: tuple[str, ...]) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def _package(found: Any) -> str:
    return (getattr(found, "__module__", None) or "").partition(".")[0]


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # Recursion, or a number with too many digits.
        text = type(value).__name__
    text = one_line(text, 81)
    return f"{text[:80]}..." if len(text) > 80 else text


def _describe(hint: Any) -> str:
    """Return a declared type in words."""
    names = []
    for choice in _choices(hint):
        if choice is type(None):
            names.append("null")
        elif typing.get_origin(choice) is typing.Literal:
            names.extend(repr(arg) for arg in typing.get_args(choice))
        else:
            cls = typing.get_origin(choice) or choice
            kind = _kind(cls) if isinstance(cls, type) else None
            names.append((kind or cls).__name__ if isinstance(cls, type) else str(cls))
    return " or ".join(dict.fromkeys(names))
