"""Find a Nerfstudio run's files and read its config.yml without letting it run code.

Nerfstudio writes its configuration as YAML with Python tags and reads it back with a loader that builds and calls
whatever the file names. Here a file may build configuration dataclasses, enums, paths and plain containers, and may
name classes and functions, of Nerfstudio and of the packages registered as its plugins; anything else is refused.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import importlib.util
import os
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import yaml

from r2l_nerfstudio.errors import InputError

if TYPE_CHECKING:
    from nerfstudio.engine.trainer import TrainerConfig

_GROUPS = ("nerfstudio.method_configs", "nerfstudio.dataparser_configs")
_VARIABLES = ("NERFSTUDIO_METHOD_CONFIGS", "NERFSTUDIO_DATAPARSER_CONFIGS")
# Nerfstudio's own command lines: they start programs, and no configuration needs them.
_CLOSED_MODULES = ("nerfstudio.scripts", "nerfstudio.process_data", "nerfstudio.utils.scripts")
# Optimizer configurations name torch's classes.
_OPEN_TORCH_MODULES = ("torch.optim", "torch.nn")
_PATH_CLASSES = {
    f"{module}.{name}"
    for module in ("pathlib", "pathlib._local")
    for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
}


def resolve_run(path: Path) -> Path:
    """The config.yml of a run.

    Args:
        path: a run's config.yml, or the folder that holds it.

    Returns:
        Path of the existing config file.

    Raises:
        InputError: when there is none; runs found deeper in the folder are listed.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(
            f"There is no trained run at {path}: pass the config.yml of a Nerfstudio run, or the folder that holds it."
        )
    if (path / "config.yml").is_file():
        return path / "config.yml"
    runs = sorted(path.glob("**/config.yml"), key=lambda run: run.stat().st_mtime, reverse=True)
    found = f" It holds these runs, newest first: {', '.join(map(str, runs[:5]))}." if runs else ""
    raise InputError(f"The folder {path} holds no config.yml, so it is not one Nerfstudio run.{found} Pass one run.")


def load_run_config(path: Path) -> TrainerConfig:
    """Read a run's configuration, building nothing but configuration.

    Args:
        path: a run's config.yml, or the folder that holds it.

    Returns:
        The configuration as it was saved; nothing in it is resolved or checked against the disk.

    Raises:
        InputError: the file is missing, damaged, names a class outside the allowed set, or is the run of a method
            whose package is not installed.
    """
    path = resolve_run(path)
    # Plugins first: what they register is what a file may name.
    import nerfstudio.configs.method_configs  # noqa: F401
    from nerfstudio.engine.trainer import TrainerConfig

    try:
        text = path.read_text("utf8")
        loader = _ConfigLoader(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The run's configuration {path} cannot be read: {_one_line(error)}.") from error
    try:
        config = loader.get_single_data()
    except _Refused as error:
        method = re.search(r"^method_name: *(\S+)", text, re.MULTILINE)
        run_of = f" (a run of the method '{method[1]}')" if method else ""
        raise InputError(f"The configuration {path}{run_of} cannot be used: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(_damaged(path, _one_line(error))) from error
    finally:
        loader.dispose()
    if not isinstance(config, TrainerConfig):
        raise InputError(
            f"The file {path} holds no Nerfstudio training configuration but a {type(config).__name__}: pass the "
            "config.yml that ns-train wrote."
        )
    # ns-train sorts the keys: a file cut between two lines is still YAML, but has lost `vis`, the last.
    missing = [key for key in ("method_name", "pipeline", "relative_model_dir", "vis") if key not in vars(config)]
    if not missing and not all(hasattr(config.pipeline, part) for part in ("datamanager", "model")):
        missing = ["pipeline.datamanager or pipeline.model"]
    if missing:
        raise InputError(_damaged(path, f"it lacks {', '.join(missing)}"))
    return config


def checkpoint_path(config: TrainerConfig, config_path: Path, step: int | None = None) -> Path:
    """A run's checkpoint, looked for beside its config.yml so that a run may be moved.

    Args:
        config: the run's configuration.
        config_path: where it was read from.
        step: training step of the checkpoint; the newest when None.

    Returns:
        Path of the existing checkpoint file.

    Raises:
        InputError: no checkpoint folder, none in it, or none of that step.
    """
    folder = Path(config_path).parent / config.relative_model_dir
    steps = {}
    if folder.is_dir():
        for file in folder.iterdir():
            if match := re.fullmatch(r"step-(\d+)\.ckpt", file.name):
                steps[int(match[1])] = file
    if not steps:
        raise InputError(
            f"The run {config_path} has no checkpoint: {folder} "
            f"{'holds no step-*.ckpt' if folder.is_dir() else 'does not exist'}. Train it until it saves one, or move "
            "the run's folder as a whole, checkpoints included."
        )
    if step is None:
        step = max(steps)
    if step not in steps:
        raise InputError(
            f"The run {config_path} has no checkpoint of step {step} in {folder}, only of {sorted(steps)}: choose one."
        )
    return steps[step]


def capture_path(config: TrainerConfig, config_path: Path) -> Path:
    """Where a run's capture is.

    Args:
        config: the run's configuration.
        config_path: where it was read from.

    Returns:
        The path that the run was trained with. A relative one is looked for in the current folder, then in each folder
        above the run; where none has it, it is returned as it is.

    Raises:
        InputError: the run was not trained on a capture.
    """
    datamanager = config.pipeline.datamanager
    if not hasattr(datamanager, "dataparser"):
        raise InputError(
            f"The run {config_path} was not trained on a capture (its data manager is a {type(datamanager).__name__}): "
            "choose one trained on photographs."
        )
    # Data managers let a path of their own win over their dataparser's.
    data = Path(getattr(datamanager, "data", None) or datamanager.dataparser.data)
    folders = [Path(), *Path(config_path).absolute().parents]
    return next((folder / data for folder in folders if (folder / data).exists()), data)


class _Refused(Exception):
    """Something a configuration may not hold; the message finishes a sentence about the file."""


class _ConfigLoader(yaml.SafeLoader):
    """PyYAML's safe loader, and the few Python tags that Nerfstudio's configurations need."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.packages = _registered_packages()

    def construct_tuple(self, node: yaml.Node) -> tuple:
        return tuple(self.construct_sequence(node, deep=True))

    def construct_name(self, name: str, node: yaml.Node) -> Any:
        return _torch_class(name) if name.startswith("torch.") else self.find(name)

    def construct_config(self, name: str, node: yaml.Node) -> Any:
        from nerfstudio.configs.base_config import PrintableConfig

        cls = self.find(name)
        is_plugins = _package(cls) != "nerfstudio"  # whose configurations need not derive from Nerfstudio's
        if not (dataclasses.is_dataclass(cls) and (is_plugins or issubclass(cls, PrintableConfig))):
            raise _Refused(f"{name} is not a configuration class, so it was not built.{_TRUST}")
        # No code of the class runs: neither __new__ nor __init__ nor __setstate__.
        instance = object.__new__(cls)
        for key, value in self.construct_mapping(node, deep=True).items():
            if not isinstance(key, str) or key.startswith("__") or isinstance(getattr(cls, key, None), property):
                raise _Refused(f"it sets {key!r} of a {name}, which is not a configuration field.{_TRUST}")
            object.__setattr__(instance, key, value)
        return instance

    def construct_call(self, name: str, node: yaml.Node) -> Any:
        args = self.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else []
        if name in _PATH_CLASSES and all(isinstance(arg, str) for arg in args):
            return Path(*args)
        if name == "_operator.getitem" and len(args) == 2 and all(isinstance(arg, type) for arg in args):
            # A data manager for one kind of dataset: VanillaDataManager[DepthDataset].
            if hasattr(args[0], "__class_getitem__"):
                return args[0].__class_getitem__(args[1])
        cls = self.find(name)
        if not (isinstance(cls, type) and issubclass(cls, enum.Enum) and len(args) == 1):
            raise _Refused(f"it calls {name}, and a configuration may call nothing.{_TRUST}")
        try:
            return cls(args[0])
        except ValueError as error:
            raise _Refused(f"{error}: the run was made with another version of the package {_package(cls)}.") from error

    def refuse(self, node: yaml.Node) -> None:
        raise _Refused(f"it holds {node.tag.removeprefix('tag:yaml.org,2002:')}, which is not configuration.{_TRUST}")

    def find(self, name: str) -> Any:
        """The class or function of that dotted name, out of Nerfstudio's and the plugins' packages."""
        module, _, attribute = name.rpartition(".")
        package = module.partition(".")[0]
        if package not in self.packages and not _installed(package):
            raise _Refused(
                f"its class {name} is in the Python package '{package}', which is not installed. Install that package "
                "in this environment (a method's page in Nerfstudio's documentation says how), then try again."
            )
        if package not in self.packages or _inside(module, _CLOSED_MODULES):
            raise _Refused(f"it names {name}, which belongs neither to Nerfstudio's models nor to a plugin.{_TRUST}")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise _Refused(
                f"its class {name} cannot be imported here ({_one_line(error)}): install the version of '{package}' "
                "that the run was trained with, and what it depends on."
            ) from error
        # A package's modules also hold what they import: `os.system` by another name is still `os.system`.
        is_own = isinstance(found, type | FunctionType) and _package(found) in self.packages
        if not is_own or _inside(found.__module__, _CLOSED_MODULES):
            raise _Refused(f"it names {name}, which is no class or function of the package '{package}'.{_TRUST}")
        return found


_PYTHON = "tag:yaml.org,2002:python/"
_ConfigLoader.add_constructor(f"{_PYTHON}tuple", _ConfigLoader.construct_tuple)
_ConfigLoader.add_multi_constructor(f"{_PYTHON}name:", _ConfigLoader.construct_name)
_ConfigLoader.add_multi_constructor(f"{_PYTHON}object:", _ConfigLoader.construct_config)
_ConfigLoader.add_multi_constructor(f"{_PYTHON}object/apply:", _ConfigLoader.construct_call)
_ConfigLoader.add_constructor(None, _ConfigLoader.refuse)

_TRUST = (
    " Use the config.yml that ns-train wrote, from someone you trust; a method of your own must be registered with "
    "Nerfstudio (entry point nerfstudio.method_configs, or the variable NERFSTUDIO_METHOD_CONFIGS)."
)


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
    # Nothing is imported for it: torch has imported all of these by now.
    found = getattr(sys.modules.get(module), attribute, None) if _inside(module, _OPEN_TORCH_MODULES) else None
    if not isinstance(found, type) or not _inside(found.__module__, _OPEN_TORCH_MODULES):
        raise _Refused(f"it names {name}, which is no optimizer or layer of torch.{_TRUST}")
    return found


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # "", or __main__
        return True


def _inside(module: str, parents: tuple[str, ...]) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def _package(found: Any) -> str:
    return (getattr(found, "__module__", None) or "").partition(".")[0]


def _damaged(path: Path, why: str) -> str:
    return f"The configuration {path} is truncated or damaged ({why}): restore it from a copy, or train the run again."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
