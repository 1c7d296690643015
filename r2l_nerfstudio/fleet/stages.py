"""The stages of a capture: their commands, what they depend on, and a key that changes with these."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from dataclasses import dataclass, field
from typing import Any

from r2l_nerfstudio.fleet.captures import Capture
from r2l_nerfstudio.fleet.config import ExportConfig, FleetConfig, StageConfig, StudentConfig, check_options

_TRAIN = "--output-dir {captures} --experiment-name {name} --timestamp {folder} --viewer.quit-on-train-completion True"
COMMANDS = {
    "teacher": "ns-train {method} --data {capture} " + _TRAIN + " --vis tensorboard {options} {dataparser}",
    "student": "ns-train {method} --teacher {teacher} --data {capture} " + _TRAIN + " --vis tensorboard {options}",
    "report": "r2l-report {run} --output {output} {options}",
    "web": "r2l-export web {output} --load-config {run} --data {capture} {options}",
    "onnx": "r2l-export onnx --output {output}/student.onnx --load-config {run} {options}",
    "openvino": "r2l-export openvino --output {output}/student.xml --load-config {run} {options}",
    "coreml": "r2l-export coreml {output}/student.mlpackage --load-config {run} {options}",
    "tensorrt": "r2l-export tensorrt --output {output}/student.plan --load-config {run} {options}",
    "tensorrt-rtx": "r2l-export tensorrt-rtx --output {output}/student.plan --load-config {run} {options}",
    "torch-tensorrt": "r2l-export torch-tensorrt --output {output}/student.ep --load-config {run} {options}",
}
"""Command line of each kind of stage. The first word is a console script or a program; names in braces are replaced
when the stage starts, {options} and {dataparser} by several words."""
TRAINING = ("teacher", "student")
"""Kinds whose result is a Nerfstudio run. Each key has its own run folder, so no training overwrites another."""
GRACE_MINUTES = 10.0
"""Minutes beyond its --max-minutes that a student may take to start and to save."""


@dataclass(frozen=True)
class Stage:
    """One stage of one capture."""

    capture: str
    id: str
    """Unique within the capture: "teacher", a student's name, or "STUDENT-report", "STUDENT-EXPORT"."""
    kind: str
    """A key of `COMMANDS`."""
    key: str
    """Hash of everything that the result depends on."""
    words: tuple[str, ...]
    """Command line with names in braces."""
    values: dict[str, str] = field(hash=False)
    """Replacements that are known before the stage starts; {options} and {dataparser} are split into words."""
    depends: tuple[str, ...]
    """Ids of the stages whose results it reads."""
    minutes: float
    """Maximum minutes expected."""
    limit_minutes: float
    """Minutes after which it is stopped."""
    gpus: float
    cpus: float
    memory_gb: float
    disk_gb: float
    retries: int

    @property
    def is_training(self) -> bool:
        """Whether the result is a Nerfstudio run."""
        return self.kind in TRAINING

    @property
    def folder(self) -> str:
        """Name of the result's folder: a run's timestamp, or the folder of a report or an export."""
        return f"{self.id}-{self.key[:8]}" if self.is_training else self.id

    @property
    def state(self) -> str:
        """Path of its state files, without their endings, in the output."""
        return f"state/{self.capture}/{self.id}-{self.key[:8]}"

    @property
    def log(self) -> str:
        """Path of its log in the output."""
        return f"logs/{self.capture}/{self.id}.log"


def plan_stages(config: FleetConfig, capture: Capture) -> list[Stage]:
    """Return all stages of one readable capture, each after those that it depends on."""
    stages: list[Stage] = []
    if capture.teacher:
        teacher_key, before = capture.fingerprint, ()
    else:
        dataparser = capture.dataparser or config.teacher.dataparser
        stage = _stage(
            capture, "teacher", "teacher", config.teacher, "teacher", (), [capture.fingerprint], dataparser=dataparser
        )
        stages.append(stage)
        teacher_key, before = stage.key, ("teacher",)
    for name, student in config.students.items():
        trained = _stage(capture, name, "student", student, name, before, [teacher_key])
        stages.append(trained)
        after = (*before, name)
        followers: list[tuple[str, str, StageConfig]] = []
        if config.report is not None:
            followers.append(("report", "report", config.report))
        followers += [(export, entry.format, entry) for export, entry in config.exports.items()]
        for follower, kind, settings in followers:
            stages.append(_stage(capture, f"{name}-{follower}", kind, settings, follower, after, [trained.key], name))
    return stages


def _stage(
    capture: Capture,
    stage_id: str,
    kind: str,
    settings: StageConfig,
    option_name: str,
    depends: tuple[str, ...],
    keys: list[str],
    student: str = "",
    dataparser: str = "",
) -> Stage:
    template = settings.command or COMMANDS[kind]
    own = f"{settings.options} {capture.options.get(option_name, '')}".strip()
    minutes, limit = settings.minutes, settings.minutes
    method = getattr(settings, "method", "")
    key = _hash([kind, template, method, own, dataparser, *keys])
    options = own
    if isinstance(settings, StudentConfig) and not settings.command:
        words = check_options(stage_id, own)
        if not any(word.replace("_", "-").startswith(("--max-num-iterations", "--max-minutes")) for word in words):
            options = f"--max-minutes {minutes:g} {options}"
            limit = 1.2 * minutes + GRACE_MINUTES
            key = _hash([key, minutes])
    if kind in TRAINING and settings.gpus == 0 and not settings.command and "--machine.device" not in own:
        # Without a GPU, Nerfstudio's default device and mixed precision fail. Both devices give the same result.
        options = f"--machine.device-type cpu --mixed-precision False {options}"
    values = {
        "name": capture.name,
        "method": method,
        "options": options,
        "dataparser": dataparser,
        "student": student,
        "format": settings.format if isinstance(settings, ExportConfig) else "",
    }
    return Stage(
        capture=capture.name,
        id=stage_id,
        kind=kind,
        key=key,
        words=tuple(shlex.split(template)),
        values=values,
        depends=depends,
        minutes=minutes,
        limit_minutes=limit,
        gpus=settings.gpus,
        cpus=settings.cpus,
        memory_gb=settings.memory_gb,
        disk_gb=settings.disk_gb,
        retries=settings.retries,
    )


def fill_in(words: tuple[str, ...], values: dict[str, str]) -> list[str]:
    """Return a command line with the names in braces replaced.

    Args:
        words: command line; a word that is just {options} or {dataparser} becomes as many words as its value has.
        values: replacements by name. Other names are kept.
    """
    filled: list[str] = []
    for word in words:
        if word in ("{options}", "{dataparser}"):
            filled += shlex.split(values.get(word[1:-1], ""))
        else:
            filled.append(re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), word))
    return filled


def _hash(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
