"""Errors a user can mend: one paragraph that says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Input that cannot be used. The message is one paragraph: what is wrong, which file or flag, the remedy."""


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Boundary for command lines: print an `InputError` as a paragraph, without a traceback, and exit with code 1.

    Raises:
        SystemExit: with code 1, in place of an `InputError`.
    """
    try:
        yield
    except InputError as error:
        # Imported late: the module that declares our methods to Nerfstudio must stay light.
        from nerfstudio.utils.rich_utils import CONSOLE

        CONSOLE.print(f"Error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
