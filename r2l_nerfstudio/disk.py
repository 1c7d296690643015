"""Room on disks, and whether a folder can be written to."""

from __future__ import annotations

import os
import shutil
import stat
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


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-60:]}"
