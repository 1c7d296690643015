"""Progress bars on Nerfstudio's console."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Return a progress bar on Nerfstudio's console, so that its messages appear above it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=CONSOLE) as bar:
        yield bar
