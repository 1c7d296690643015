"""Errors that a user can fix: one paragraph with the problem, its place and the remedy."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

ZIP_ERRORS = (zipfile.BadZipFile, ValueError, EOFError, RuntimeError)
"""What `zipfile` raises for a file that is no whole archive: RuntimeError for an encrypted part, an unknown compression or
version."""


class InputError(Exception):
    """Input that cannot be used. The message is one paragraph: what is wrong, which file or flag, what to do."""


def one_line(error: object, most: int = 300) -> str:
    """Return the text of an error, or other text, on one line of at most `most` characters."""
    return " ".join(str(error).split())[:most]


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or the name of its type if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Print an `InputError` as a paragraph, without a traceback, and exit with code 1: for command lines.

    Raises:
        SystemExit: with code 1, in place of an `InputError`.
    """
    try:
        yield
    except InputError as error:
        # Imported late: the module that declares our methods to Nerfstudio must import little.
        from nerfstudio.utils.rich_utils import CONSOLE

        # A path may have bytes that are not text.
        said = str(error).encode("utf8", "replace").decode()
        CONSOLE.print(f"Error: {said}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error


@contextmanager
def command_line() -> Iterator[None]:
    """Do the same for files that cannot be read or written: for whole commands.

    Raises:
        SystemExit: with code 1, in place of an `InputError` or `OSError`.
    """
    with exit_on_input_error():
        try:
            yield
        except OSError as error:
            name = str(error.filename or "")
            shown = name if len(name) <= 200 else f"{name[:100]}...{name[-60:]}"
            raise InputError(
                f"{f'The path {shown}' if name else 'A file'} cannot be used ({error.strerror or error}): check it,"
                " its permissions and the free space on its disk, or give another one."
            ) from error
