"""Folders that all processes of a test run share: trained runs take long to make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

MadeOnce = Callable[[str, Callable[[Path], Path]], Path]


def make_once(common: Path, name: str, build: Callable[[Path], Path]) -> Path:
    """Return what `build` made in a folder of its own, in this process or in another.

    Args:
        common: existing folder, the same for all processes.
        name: of what is made.
        build: makes it in the folder that it is given, and returns its path.
    """
    folder, done = common / f"made_{name}", common / f"made_{name}.txt"
    with FileLock(common / f"made_{name}.lock"):
        if not done.exists():
            folder.mkdir()
            done.write_text(str(build(folder)))
    return Path(done.read_text())
