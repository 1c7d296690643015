"""Free space on disks, writable folders, and files that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from pathlib import Path

from r2l_nerfstudio.errors import InputError


def free_bytes(folder: Path) -> int | None:
    """Free bytes on the disk that a folder is on, or will be; None where that cannot be known."""
    for place in (folder, *folder.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return None
    return None


def check_writable(flag: str, folder: Path) -> None:
    """See that a folder exists or can be made, and that this user may write in it; nothing is made.

    Args:
        flag: that named the folder, for the message.
        folder: may not exist yet.

    Raises:
        InputError: if not.
    """
    try:
        place = folder.absolute()
        while not os.path.lexists(place):
            place = place.parent
        kind = place.stat().st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{flag} {_short(folder)} cannot be used ({reason}): name another folder.") from error
    if not stat.S_ISDIR(kind):
        raise InputError(f"{flag} {_short(folder)} cannot be used: {_short(place)} is not a folder. Name another one.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(
            f"{flag} {_short(folder)} cannot be used: this user may not write in {_short(place)}. Name another folder."
        )


def write_atomically(file: Path, content: bytes | str, is_private: bool = False) -> None:
    """Write a file whole or not at all: readers and a killed process see the old content or the new one.

    Args:
        file: to write; its folder is made.
        content: bytes, or text to write as UTF-8.
        is_private: allow only this user to read and write the file, whatever the process's umask.

    Raises:
        OSError: the file cannot be written; nothing is left beside it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # Two threads may write one file. With the process's number, a later one can check whether the writer still runs.
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.{os.getpid()}.partial")
    try:
        with open(
            os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if is_private else 0o666), "wb"
        ) as opened:
            opened.write(content.encode() if isinstance(content, str) else content)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-60:]}"
