"""The user's cache folder, and whether its content can be trusted to be the user's."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """Return this package's folder for what can be made or downloaded again; it may not exist."""
    return user_cache_path("r2l-nerfstudio", appauthor=False)


def engine_cache_folder() -> Path | None:
    """Return the folder for compiled engines, which are machine code: only this user may write to it.

    Returns:
        The existing folder; None if only this user must be able to write to it and that cannot be ensured.
    """
    folder = cache_folder() / "engines"
    try:
        make_private(folder)
    except OSError:
        return None
    return folder if is_private(folder, deep=False) else None


def make_private(folder: Path) -> None:
    """Make a folder that only this user may enter, and the folders above it.

    Raises:
        OSError: from `Path.mkdir`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def is_private(path: Path, deep: bool = True) -> bool:
    """Return whether a file or folder belongs to this user and nobody else may write to it; with `deep`, also
    everything in it.

    Symbolic links are not followed and never count as private. On Windows, where the folder's access list decides who
    may write, everything counts.
    """
    if not hasattr(os, "getuid"):
        return True
    try:
        found = [path, *path.rglob("*")] if deep and path.is_dir() and not path.is_symlink() else [path]
        return all(_is_own(entry.lstat()) for entry in found)
    except OSError:
        return False


def _is_own(status: os.stat_result) -> bool:
    is_plain = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    return is_plain and status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
