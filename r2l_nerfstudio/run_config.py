"""Find the files of a Nerfstudio run and read its config.yml without running code from it (see `config_builder`)."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from r2l_nerfstudio.config_builder import ConfigBuilder, MarkerLoader, Refused, marked_fields
from r2l_nerfstudio.errors import InputError, one_line
from r2l_nerfstudio.ranges import check_ranges

if TYPE_CHECKING:
    from nerfstudio.engine.trainer import TrainerConfig

LARGEST_CONFIG = 4_000_000
"""Maximum bytes; Nerfstudio's own files are below a hundredth of that."""


SEARCH_DEPTH = 4
SEARCH_FOLDERS = 5000


def resolve_run(path: Path) -> Path:
    """Return the config.yml of a run.

    Args:
        path: a run's config.yml, or the folder that holds it.

    Returns:
        Path of the existing file.

    Raises:
        InputError: if there is none; runs found deeper in the folder are listed.
    """
    path = Path(path)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:  # A name that is too long, or a folder without permission.
        raise InputError(
            f"There is no trained run at {str(path)[:200]} ({error.strerror}): pass another path."
        ) from error
    if is_file:
        return path
    if not is_folder:
        raise InputError(
            f"There is no trained run at {path}: pass the config.yml of a Nerfstudio run, or the folder that holds it."
        )
    if (path / "config.yml").is_file():
        return path / "config.yml"
    runs = sorted(_runs_in(path), key=lambda run: run.stat().st_mtime, reverse=True)
    found = f" It holds these runs, newest first: {', '.join(map(str, runs[:5]))}." if runs else ""
    raise InputError(f"The folder {path} has no config.yml, so it is not a Nerfstudio run.{found} Pass one run.")


def _runs_in(folder: Path) -> list[Path]:
    """Return runs at the depth at which `ns-train` puts them below an output folder, without searching a whole disk."""
    found, seen = [], 0
    for root, folders, files in os.walk(folder):
        seen += 1
        if len(Path(root).relative_to(folder).parts) >= SEARCH_DEPTH or seen > SEARCH_FOLDERS:
            folders.clear()
        if "config.yml" in files and (Path(root) / "config.yml").is_file():
            found.append(Path(root) / "config.yml")
    return found


def load_run_config(path: Path) -> TrainerConfig:
    """Read a run's configuration, building nothing but configuration.

    Args:
        path: a run's config.yml, or the folder that holds it.

    Returns:
        The configuration as it was saved; nothing in it is resolved or checked against the disk.

    Raises:
        InputError: the file is missing or damaged, names a class that is not allowed, or belongs to a method whose
            package is not installed.
    """
    path = resolve_run(path)
    # Plugins first, since they register which names a file may use.
    import nerfstudio.configs.method_configs  # noqa: F401

    text = _read_text(path)
    try:
        config, ignored = _build(text, path)
    except Refused as error:
        method = re.search(r"^method_name: *(\S+)", text, re.MULTILINE)
        run_of = f" (a run of the method '{method[1][:80]}')" if method else ""
        raise InputError(f"The configuration {path}{run_of} cannot be used: {error}") from error
    check_ranges(config, f"The configuration {path}")
    if ignored:
        from nerfstudio.utils.rich_utils import CONSOLE

        CONSOLE.print(
            f"[yellow]Ignoring fields of {path} that the installed version does not have: {', '.join(ignored)[:300]}.",
            soft_wrap=True,
        )
    return config


def _read_text(path: Path) -> str:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"The run's configuration {path} is not an ordinary file: pass the config.yml of a run.")
        if status.st_size > LARGEST_CONFIG:
            raise InputError(
                f"The run's configuration {path} has {status.st_size} bytes, more than any that ns-train writes: pass the"
                " config.yml of a run."
            )
        return path.read_text("utf8")
    except (OSError, ValueError) as error:
        raise InputError(f"The run's configuration {path} cannot be read: {one_line(error)}.") from error


def _build(text: str, path: Path) -> tuple[TrainerConfig, list[str]]:
    """Return the configuration, and which of the file's fields were dropped.

    Raises:
        InputError: the file is damaged.
        Refused: it has values that do not belong into a configuration.
    """
    from nerfstudio.engine.trainer import TrainerConfig

    try:
        loader = MarkerLoader(text)
        try:
            data = loader.get_single_data()
        finally:
            loader.dispose()
    except Refused:
        raise
    except Exception as error:  # PyYAML raises many exceptions for numbers, dates, keys and nesting.
        raise InputError(_damaged(path, f"{type(error).__name__}: {one_line(error)}")) from error
    top = marked_fields(data)
    pipeline = None if top is None else marked_fields(top.get("pipeline"))
    if top is not None:
        # ns-train sorts the keys: a file truncated between two lines is still YAML, but lacks `vis`, the last key.
        missing = [key for key in ("method_name", "pipeline", "relative_model_dir", "vis") if key not in top]
        if not missing:
            missing = [f"pipeline.{key}" for key in ("datamanager", "model") if key not in (pipeline or {})]
        if missing:
            raise InputError(_damaged(path, f"it lacks {', '.join(missing)}"))
    builder = ConfigBuilder()
    try:
        config = builder.build(data)
    except RecursionError as error:
        raise InputError(_damaged(path, "its values are nested too deeply")) from error
    if not isinstance(config, TrainerConfig):
        raise InputError(
            f"The file {path} holds a {type(config).__name__} instead of a Nerfstudio training configuration: pass"
            " the config.yml that ns-train wrote."
        )
    _check_optimizers(config)
    return config, builder.ignored


def _check_optimizers(config: TrainerConfig) -> None:
    from nerfstudio.engine.optimizers import OptimizerConfig
    from nerfstudio.engine.schedulers import SchedulerConfig

    for name, group in config.optimizers.items():
        parts = group if isinstance(group, dict) else {}
        if not isinstance(parts.get("optimizer"), OptimizerConfig) or not isinstance(
            parts.get("scheduler"), SchedulerConfig | None
        ):
            raise Refused(
                f"its field optimizers.{name} does not hold an optimizer and a scheduler. Restore the value that ns-train"
                " wrote."
            )


def checkpoint_path(config: TrainerConfig, config_path: Path, step: int | None = None) -> Path:
    """Return a run's checkpoint, which is searched beside its config.yml so that a run may be moved.

    Args:
        config: the run's configuration.
        config_path: file it was read from.
        step: training step of the checkpoint; if None, the configuration's `load_step`, else the newest.

    Returns:
        Path of the existing checkpoint file.

    Raises:
        InputError: there is no checkpoint folder, no checkpoint in it, or none of that step.
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
    if step is None and config.load_step is not None and config.load_step not in steps:
        raise InputError(
            f"The configuration {config_path} names the checkpoint of step {config.load_step} (load_step), and {folder} has"
            f" only those of {sorted(steps)}: set load_step to one of them, or to null for the newest."
        )
    if step is None:
        step = max(steps) if config.load_step is None else config.load_step
    if step not in steps:
        raise InputError(
            f"The run {config_path} has no checkpoint of step {step} in {folder}, only of {sorted(steps)}: choose one."
        )
    return steps[step]


def capture_path(config: TrainerConfig, config_path: Path) -> Path:
    """Return the path of a run's capture.

    Args:
        config: the run's configuration.
        config_path: file it was read from.

    Returns:
        The path that the run was trained with. A relative one is searched in the current folder, then in each folder
        above the run; if it is in none, it is returned unchanged.

    Raises:
        InputError: the run was not trained on a capture.
    """
    datamanager = config.pipeline.datamanager
    dataparser = getattr(datamanager, "dataparser", None)
    if dataparser is None:
        raise InputError(
            f"The run {config_path} was not trained on a capture (its data manager is a"
            f" {type(datamanager).__name__}): choose one trained on photos."
        )
    # A data manager's own path takes precedence over its dataparser's.
    data = Path(getattr(datamanager, "data", None) or dataparser.data)
    folders = [Path(), *Path(config_path).absolute().parents]
    return next((folder / data for folder in folders if (folder / data).exists()), data)


def _damaged(path: Path, why: str) -> str:
    return f"The configuration {path} is truncated or damaged ({why}): restore it from a copy, or train the run again."
