"""Files that are there whole and checked, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from r2l_nerfstudio.errors import InputError


@contextmanager
def whole_files(output: Path, overwrite: bool, also: tuple[str, ...] = ()) -> Iterator[Path]:
    """Give a place to write files to; they move to where they belong only if the block ends without an error.

    Args:
        output: the file that is asked for; its folder is made.
        overwrite: whether it may be there.
        also: endings of further files beside it, as ".bin".

    Yields:
        where to write `output`: a file of its name in a folder beside it.

    Raises:
        InputError: a file is there and may not be replaced, or cannot be written.
    """
    output = Path(output)
    names = [output.name, *(output.with_suffix(suffix).name for suffix in also)]
    for name in names:
        taken = output.with_name(name)
        if taken.is_dir():
            raise InputError(f"{taken} is a folder: name a file with --output.")
        if taken.exists() and not overwrite:
            raise InputError(
                f"{taken} is there already: name another file with --output, or replace it with --overwrite."
            )
    partial = output.with_name(f".{output.name}.partial")
    try:
        # What a killed export left.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial / output.name
        for name in names:
            (partial / name).replace(output.with_name(name))
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error}): name another place with --output.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
