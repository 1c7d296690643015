"""The settings of a fleet, and the YAML file that holds them."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml

from r2l_nerfstudio.errors import InputError, one_line

ExportFormat = Literal["web", "onnx", "openvino", "coreml", "tensorrt", "tensorrt-rtx", "torch-tensorrt"]

INSTALL = "install it with pip install 'r2l-nerfstudio[fleet]'."
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MOST = 1_000_000
"""Largest number of GPUs, CPUs, gigabytes, minutes or retries: Ray counts them in 64 bits, in smaller units."""
_RESERVED_OPTIONS = {
    "--output-dir",
    "--experiment-name",
    "--timestamp",
    "--data",
    "--teacher",
    "--load-dir",
    "--load-checkpoint",
    # Nerfstudio reads this file with a loader that can run code.
    "--load-config",
    "--load_config",
}
"""Options that `r2l-fleet` sets itself, in the spelling of tyro's help."""


@dataclass
class StageConfig:
    """Settings that every stage has."""

    __pydantic_config__ = {"extra": "forbid"}

    options: str = ""
    """Further options of the command, as on a command line."""
    minutes: float = 10.0
    """Time limit. A stage that takes longer is stopped and listed as failed."""
    gpus: float = 0.0
    """GPUs that one stage occupies. 0.25 lets four stages share one GPU; 0 hides all GPUs from the command."""
    cpus: float = 1.0
    """CPU cores that one stage occupies. Its math libraries use as many threads."""
    memory_gb: float = 0.0
    """Memory that one stage reserves, in GB. 0 reserves none."""
    disk_gb: float = 0.1
    """Expected size of the results in GB, for the estimate of --dry-run."""
    retries: int = 2
    """Further attempts after a crash or the loss of a machine."""
    command: str = ""
    """Command line to run instead of the usual one. {capture}, {teacher}, {run}, {output}, {options} and the other names
    listed in docs/fleet.md are replaced."""


@dataclass
class TeacherConfig(StageConfig):
    """Training of a teacher."""

    method: str = "nerfacto"
    """Any method that `ns-train` lists."""
    dataparser: str = ""
    """Dataparser of `ns-train` and its options, for example "blender-data" or "nerfstudio-data --downscale-factor 2".
    Empty for the method's default."""
    minutes: float = 60.0
    gpus: float = 1.0
    cpus: float = 4.0
    disk_gb: float = 0.5


@dataclass
class StudentConfig(StageConfig):
    """Training of a student."""

    method: str = "mobile-r2l"
    """A method of this package, for example mobile-r2l or r2l."""
    minutes: float = 30.0
    """Training time: the student is trained with --max-minutes of this value. With --max-num-iterations in `options`, it
    is a time limit instead."""
    gpus: float = 1.0
    cpus: float = 4.0
    disk_gb: float = 0.2


@dataclass
class ReportConfig(StageConfig):
    """Report of each student by `r2l-report`."""

    disk_gb: float = 0.01


@dataclass
class ExportConfig(StageConfig):
    """Export of each student by `r2l-export`."""

    format: ExportFormat = "web"
    """Subcommand of `r2l-export`."""
    disk_gb: float = 0.05


@dataclass
class CaptureConfig:
    """One capture, or several by a pattern."""

    __pydantic_config__ = {"extra": "forbid"}

    path: str = ""
    """Folder of the capture, a pattern such as captures/*, or a URL such as s3://bucket/captures/*."""
    teacher: str = ""
    """Config.yml, or folder, of an existing teacher run to use instead of training one. A pattern gives one capture per
    run."""
    name: str = ""
    """Name in tables and paths; the folder's name by default."""
    dataparser: str = ""
    """Dataparser for this capture, instead of the teacher stage's."""
    options: dict[str, str] = field(default_factory=dict)
    """Further options for this capture, by stage ("teacher", a student's name, "report", an export's name)."""


@dataclass
class FleetConfig:
    """A fleet: captures, and what is done with each."""

    __pydantic_config__ = {"extra": "forbid"}

    output: str = "outputs/fleet"
    """Folder or fsspec URL (s3://…, gs://…) of all results."""
    captures: tyro.conf.Suppress[list[CaptureConfig]] = field(default_factory=list)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    students: dict[str, StudentConfig] = field(default_factory=lambda: {"mobile": StudentConfig()})
    """Students by name. Every student is trained from the capture's teacher."""
    report: ReportConfig | None = field(default_factory=ReportConfig)
    """Settings of the report stage; null for no reports."""
    exports: dict[str, ExportConfig] = field(default_factory=lambda: {"web": ExportConfig()})
    """Exports by name. Every student gets each of these exports."""
    address: str = ""
    """Ray cluster: "auto", HOST:PORT or ray://HOST:PORT. Empty for this machine only."""
    num_cpus: int = 0
    """CPU cores of this machine to use; 0 for all. Ignored with an address."""
    num_gpus: int = -1
    """GPUs of this machine to use; -1 for all. Ignored with an address."""
    dashboard: bool = True
    """Start Ray's dashboard on http://127.0.0.1:8265. Ignored with an address."""
    work_dir: str = "~/.cache/r2l-fleet"
    """Folder on each machine for copies of remote files; unused where captures and output are local."""


def load_fleet(path: Path) -> FleetConfig:
    """Read a fleet's YAML file with PyYAML's safe loader.

    Args:
        path: the file. Relative paths in it start at its folder.

    Raises:
        InputError: the file is missing or not YAML, or a setting is unknown or has a value that does not fit.
    """
    try:
        from pydantic import TypeAdapter, ValidationError
    except ImportError as error:
        raise InputError(f"r2l-fleet needs pydantic ({error}): {INSTALL}") from error

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The fleet file {path} cannot be read: {one_line(error)}.") from error
    if not isinstance(data, dict):
        raise InputError(f"The fleet file {path} holds no settings: see docs/fleet.md for an example.")
    if isinstance(data.get("captures"), list):
        data["captures"] = [{"path": entry} if isinstance(entry, str) else entry for entry in data["captures"]]
    for group in ("teacher", "students", "exports"):
        # `teacher:` with nothing below it is null in YAML, and stands for the defaults.
        if group in data and data[group] is None:
            data[group] = {}
    for group in ("students", "exports"):
        if isinstance(data.get(group), dict):
            data[group] = {name: {} if entry is None else entry for name, entry in data[group].items()}
    try:
        config = TypeAdapter(FleetConfig).validate_python(data)
    except ValidationError as error:
        raise InputError(f"The fleet file {path} cannot be used: {_first_fault(error.errors()[0])}") from error
    base = path.absolute().parent
    for capture in config.captures:
        capture.path, capture.teacher = _from_folder(capture.path, base), _from_folder(capture.teacher, base)
    config.output = _from_folder(config.output, base)
    return config


def check_fleet(config: FleetConfig) -> None:
    """Check values beyond their types.

    Raises:
        InputError: a value is out of range, or a name or an option cannot be used.
    """
    if not config.captures:
        raise InputError("The fleet has no captures: list folders or patterns under `captures` in the fleet file.")
    stages: dict[str, StageConfig] = {"teacher": config.teacher}
    stages |= {f"students.{name}": stage for name, stage in config.students.items()}
    stages |= {"report": config.report} if config.report is not None else {}
    stages |= {f"exports.{name}": stage for name, stage in config.exports.items()}
    for setting, stage in stages.items():
        name = setting.partition(".")[2] or setting
        if not NAME.fullmatch(name) or (name != setting and name in ("teacher", "report")):
            raise InputError(f"`{setting}`: {name!r} cannot name a stage; use letters, digits, '.', '_' and '-'.")
        for key in ("gpus", "memory_gb", "disk_gb", "retries"):
            if not 0 <= getattr(stage, key) <= MOST:
                raise InputError(f"`{setting}.{key}` must be 0 or more, at most {MOST:,} (got {getattr(stage, key)}).")
        for key in ("minutes", "cpus"):
            if not 0 < getattr(stage, key) <= MOST:
                raise InputError(f"`{setting}.{key}` must be above 0, at most {MOST:,} (got {getattr(stage, key)}).")
        if stage.gpus > 1 and stage.gpus != int(stage.gpus):
            raise InputError(f"`{setting}.gpus` must be a share of one GPU or a whole number (got {stage.gpus}).")
        check_options(setting, stage.options)
        try:
            shlex.split(stage.command)
        except ValueError as error:
            raise InputError(f"`{setting}.command`: {stage.command!r} is not a command line ({error}).") from error
    if twice := set(config.students) & set(config.exports):
        raise InputError(f"{sorted(twice)[0]!r} names a student and an export: rename one of them.")
    known = {name.partition(".")[2] or name for name in stages}
    for capture in config.captures:
        where = capture.name or capture.path or capture.teacher
        if not (capture.path or capture.teacher):
            raise InputError("An entry of `captures` has neither `path` nor `teacher`: give one of them.")
        if capture.name and not NAME.fullmatch(capture.name):
            raise InputError(f"The capture name {capture.name!r} must consist of letters, digits, '.', '_' and '-'.")
        for stage_name, options in capture.options.items():
            if stage_name not in known:
                raise InputError(
                    f"The capture {where} has options for {stage_name!r}, which is not a stage: use one of"
                    f" {sorted(known)}."
                )
            check_options(f"options.{stage_name} of {where}", options)


def check_options(setting: str, options: str) -> list[str]:
    """Return the words of a string of options.

    Raises:
        InputError: a quote is left open, or an option is one that `r2l-fleet` sets itself.
    """
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise InputError(f"`{setting}`: {options!r} is not a command line ({error}).") from error
    for word in words:
        if word.partition("=")[0].replace("_", "-") in _RESERVED_OPTIONS:
            raise InputError(f"`{setting}` contains {word}, which r2l-fleet sets itself or refuses: remove it.")
    return words


def is_url(path: str) -> bool:
    """Return whether it needs more of fsspec than the local file system."""
    return "://" in path and not path.startswith("file://")


def _from_folder(path: str, folder: Path) -> str:
    path = path.removeprefix("file://")
    return path if not path or is_url(path) else str(folder / Path(path).expanduser())


def _first_fault(error: Mapping[str, Any]) -> str:
    """Return one sentence on the first error that pydantic found."""
    import difflib

    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "unexpected_keyword_argument":
        known: dict[str, Any] = {}
        for cls in (FleetConfig, TeacherConfig, StudentConfig, ReportConfig, ExportConfig, CaptureConfig):
            known |= {entry.name: None for entry in dataclasses.fields(cls)}
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        return f"`{place}` is not a setting." + (f" Did you mean `{close[0]}`?" if close else " See docs/fleet.md.")
    message = error["msg"][:1].lower() + error["msg"][1:]
    return f"`{place}`: {message} (got {error['input']!r})."
