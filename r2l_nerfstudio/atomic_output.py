"""Output files and folders that appear complete and checked, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from r2l_nerfstudio.errors import InputError


@contextmanager
def atomic_files(output: Path, overwrite: bool, also: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield a temporary place to write files to; they move to their final place only if the block ends without an
    error.

    Args:
        output: final path of the file; its folder is made.
        overwrite: whether it may exist.
        also: suffixes of further files beside it, as ".bin".

    Yields:
        Where to write `output`: a file of its name in a folder beside it.

    Raises:
        InputError: a file exists and may not be replaced, or cannot be written.
    """
    output = _named(output, "a file")
    names = [output.name, *(output.with_suffix(suffix).name for suffix in also)]
    for name in names:
        taken = output.with_name(name)
        if taken.is_dir():
            raise InputError(f"{taken} is a folder: give a file with --output.")
        if taken.exists() and not overwrite:
            raise InputError(
                f"{taken} already exists: give another file with --output, or replace it with --overwrite."
            )
    with _partial(output, "give another place with --output") as partial:
        yield partial / output.name
        for name in names:
            (partial / name).replace(output.with_name(name))


@contextmanager
def atomic_folder(output: Path, overwrite: bool, mark: str, what: str) -> Iterator[Path]:
    """Do the same as `atomic_files` for a folder.

    Args:
        output: final path of the folder; its parent is made.
        overwrite: whether one of its kind may exist.
        mark: a file that every folder of its kind contains.
        what: the kind, in words.

    Yields:
        Where to write: an existing folder beside `output`.

    Raises:
        InputError: something exists and may not be replaced, or cannot be written.
    """
    output = _named(output, "a folder")
    if output.is_file():
        raise InputError(f"{output} is a file: give a new folder.")
    if output.is_dir() and any(output.iterdir()):
        if not (output / mark).is_file():
            raise InputError(f"The folder {output} is not empty and is not a {what}: give another one.")
        if not overwrite:
            raise InputError(
                f"The folder {output} already holds a {what}: give another one, or replace it with --overwrite."
            )
    with _partial(output, "name another folder") as partial:
        made = partial / output.name
        made.mkdir()
        yield made
        if output.exists():
            shutil.rmtree(output)
        made.replace(output)


def _named(output: Path, kind: str) -> Path:
    """Check that a path can be written.

    Raises:
        InputError: it is empty, the root of a disk, or not a valid path.
    """
    output = Path(output)
    shown = str(output) if len(str(output)) <= 200 else f"{str(output)[:100]}..."
    if output.name in ("", ".."):
        raise InputError(f"{shown!r} is not a file name: give {kind} to write.")
    try:
        output.exists()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{shown} cannot be written ({getattr(error, 'strerror', None) or error}): give {kind}."
        ) from error
    if output.exists() and not (output.is_file() or output.is_dir()):
        raise InputError(f"{shown} is a device or a pipe: give {kind} to write.")
    return output


@contextmanager
def _partial(output: Path, remedy: str) -> Iterator[Path]:
    """Yield an empty folder beside the output, which is removed afterwards.

    Raises:
        InputError: something cannot be written.
    """
    partial = output.with_name(f".{output.name}.partial")
    try:
        # Left by an interrupted export.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error}): {remedy}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
