"""Files below one folder or fsspec URL, with JSON files that are written atomically."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any, cast

import fsspec
from fsspec.core import url_to_fs

from r2l_nerfstudio.disk import write_atomically
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.fleet.config import is_url


def open_url(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path or URL, and its path there.

    Raises:
        InputError: the URL's protocol is unknown, or its fsspec driver is not installed.
    """
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url} cannot be opened ({error}): install the fsspec driver of its protocol.") from error


class Storage:
    """Files below one folder or URL, by relative path with "/".

    Args:
        root: local folder, or fsspec URL.

    Raises:
        InputError: the URL's protocol is unknown, or its fsspec driver is not installed.
    """

    def __init__(self, root: str) -> None:
        self.root = root if is_url(root) else str(Path(root).expanduser().absolute())
        self.is_local = not is_url(root)
        self._fs, self._path = open_url(self.root)

    def read(self, name: str) -> bytes | None:
        """Return a file's content; None if there is no file."""
        try:
            return cast(bytes, self._fs.cat_file(self._at(name)))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically. Object stores do this themselves."""
        target = self._at(name)
        if not self.is_local:
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(target, data)
            return
        write_atomically(Path(target), data)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return a JSON object; None if there is no file or it is damaged."""
        data = self.read(name)
        try:
            found = None if data is None else json.loads(data)
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def write_json(self, name: str, data: dict[str, Any]) -> None:
        """Write a JSON object atomically."""
        self.write(name, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())

    def read_all_json(self, folder: str) -> dict[str, dict[str, Any]]:
        """Return all JSON objects below a folder, by path relative to it. Damaged files are skipped."""
        base = self._at(folder)
        try:
            self._fs.invalidate_cache()
            paths = [path for path in self._fs.find(base) if path.endswith(".json")]
        except (FileNotFoundError, NotADirectoryError):
            return {}
        # One call: object stores answer many requests at once.
        contents = cast(dict[str, bytes], self._fs.cat(paths, on_error="omit")) if paths else {}
        found = {}
        for path, data in contents.items():
            try:
                entry = json.loads(data)
            except ValueError:
                continue
            if isinstance(entry, dict):
                found[path[len(base) :].lstrip("/")] = entry
        return found

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        try:
            self._fs.rm_file(self._at(name))
        except (FileNotFoundError, NotADirectoryError):
            pass

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder; none if there is no folder."""
        try:
            self._fs.invalidate_cache()
            return [path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._at(folder), detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, name: str) -> bool:
        """Return whether a file or folder exists."""
        return self._fs.exists(self._at(name))

    def upload(self, local: Path, name: str) -> None:
        """Replace a folder by the files of a local one."""
        target = self._at(name)
        if self._fs.exists(target):
            self._fs.rm(target, recursive=True)
        for file in sorted(path for path in local.rglob("*") if path.is_file()):
            place = f"{target}/{file.relative_to(local).as_posix()}"
            self._fs.makedirs(place.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(file), place)

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path


def download(url: str, folder: Path) -> Path:
    """Copy a remote folder to a local one, unless it is there already. An interrupted copy is not kept.

    Raises:
        FileNotFoundError: nothing is at the URL.
    """
    if folder.exists():
        return folder
    fs, path = open_url(url)
    path = path.rstrip("/")
    files = fs.find(path)
    if not files:
        raise FileNotFoundError(f"there is nothing at {url}")
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        for file in files:
            target = partial / file[len(path) :].lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(file, str(target))
        try:
            partial.replace(folder)
        except OSError:
            # Another stage on this machine was faster.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
