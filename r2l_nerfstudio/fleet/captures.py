"""The captures of a fleet, and a fingerprint of each that changes with its content."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.fleet.config import CaptureConfig, is_url
from r2l_nerfstudio.fleet.storage import open_url

MEDIA = {".jpg", ".jpeg", ".png", ".webp", ".heic", ".tif", ".tiff", ".exr", ".hdr", ".mp4", ".mov", ".npy", ".npz"}
"""Files that count by name and size only: reading all photos of a thousand captures takes hours."""
PHOTOS = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff"}
_WHOLE_BYTES = 64 << 20


@dataclass
class Capture:
    """One capture of a fleet."""

    name: str
    source: str
    """Folder or URL of the capture; empty if it could not be found."""
    teacher: str = ""
    """Config.yml of an existing teacher run, as path or URL; empty if a teacher is to be trained."""
    dataparser: str = ""
    options: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    error: str = ""
    """Why the capture cannot be used; empty if it can."""


def find_captures(entries: list[CaptureConfig]) -> list[Capture]:
    """Expand patterns and name the captures, without reading their content.

    Raises:
        InputError: a pattern matches nothing, or two captures have the same name.
    """
    found: list[tuple[CaptureConfig, str]] = []
    for entry in entries:
        pattern = entry.teacher or entry.path
        matches = _expand(pattern, is_run=bool(entry.teacher))
        if len(matches) > 1 and entry.name:
            raise InputError(f"{pattern} matches {len(matches)} captures, so they cannot all be named {entry.name!r}.")
        if len(matches) > 1 and entry.teacher and entry.path:
            raise InputError(
                f"{pattern} matches {len(matches)} runs, and {entry.path} is one capture: list them singly."
            )
        found += [(entry, match) for match in matches]
    names = _names([(entry.name, match) for entry, match in found])
    captures = []
    for (entry, match), name in zip(found, names, strict=True):
        captures.append(
            Capture(
                name,
                source=entry.path if entry.teacher else match,
                teacher=match if entry.teacher else "",
                dataparser=entry.dataparser,
                options=dict(entry.options),
            )
        )
    return captures


def read_capture(capture: Capture) -> None:
    """Set `fingerprint`, and for an existing run its config.yml and capture; or `error` if it cannot be read."""
    try:
        run = _read_run(capture) if capture.teacher else ""
        capture.fingerprint = _digest(run, folder_fingerprint(capture.source))
    except InputError as error:
        capture.error = str(error)
    except OSError as error:
        # fsspec's own exceptions for missing buckets and denied access are OSErrors too.
        capture.error = f"The capture {capture.source} cannot be read: {error}."
    except Exception as error:  # A driver's own exception: one unreadable capture must not stop the others.
        capture.error = f"The capture {capture.source} cannot be read: {type(error).__name__}: {error}."


def folder_fingerprint(folder: str) -> str:
    """Return a hash of a folder's relative paths and sizes, and of the content of all files but photos and videos.

    The folder's own path and modification times do not count, so a copied or moved capture keeps its fingerprint.

    Args:
        folder: local path, or fsspec URL.

    Raises:
        InputError: the folder is missing or empty, or its transforms.json is damaged or without frames.
        OSError: it cannot be read.
    """
    fs, base = open_url(folder)
    base = base.rstrip("/")
    if not fs.exists(base):
        raise InputError(f"There is no capture at {folder}.")
    files = cast(dict[str, dict[str, Any]], fs.find(base, detail=True))
    if not files:
        raise InputError(f"The capture {folder} is an empty folder.")
    hasher = hashlib.sha256()
    for path in sorted(files):
        name, size = path[len(base) :].lstrip("/"), files[path]["size"]
        hasher.update(f"{name}\0{size}\0".encode())
        if PurePosixPath(name).suffix.lower() not in MEDIA and size <= _WHOLE_BYTES:
            content = cast(bytes, fs.cat_file(path))
            hasher.update(content)
            if re.fullmatch(r"transforms(_\w+)?\.json", name):
                _check_transforms(f"{folder.rstrip('/')}/{name}", content)
    return hasher.hexdigest()


def first_photo(folder: Path) -> Path | None:
    """Return the first photo of a local capture by path, at full resolution; None if there is none."""
    photos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTOS)
    # Nerfstudio keeps smaller copies in images_2, images_4, …, and masks and depth maps beside the photos.
    other = re.compile(r"(_\d+|.*(mask|depth|normal|semantic).*)$")
    best = [p for p in photos if not any(other.search(part) for part in p.relative_to(folder).parts[:-1])]
    return next(iter(best or photos), None)


def _expand(pattern: str, is_run: bool) -> list[str]:
    if not re.search(r"[*?\[]", pattern):
        return [pattern]
    fs, path = open_url(pattern)
    found = cast(dict[str, dict[str, Any]], fs.glob(path, detail=True))
    protocol = pattern.partition("://")[0] + "://" if is_url(pattern) else ""
    matches = sorted(name for name, info in found.items() if info["type"] == "directory" or is_run)
    matches = [name for name in matches if not PurePosixPath(name).name.startswith(".")]
    if not matches:
        raise InputError(f"The pattern {pattern} matches no {'run' if is_run else 'folder'}.")
    return [f"{protocol}{name.rstrip('/')}" for name in matches]


def _names(wanted: list[tuple[str, str]]) -> list[str]:
    """Return a name for each capture: the given one, or the shortest end of the path that no other capture has."""
    parts = []
    for name, path in wanted:
        steps = [part for part in re.split(r"[/\\]", path.partition("://")[2] or path) if part not in ("", ".")]
        if steps and steps[-1] == "config.yml":
            # outputs/EXPERIMENT/METHOD/TIMESTAMP: the experiment is the name that the user gave.
            steps = steps[:-3] if len(steps) > 3 else steps[:-1]
        steps = [re.sub(r"[^A-Za-z0-9._-]+", "-", step).strip("-._") or "capture" for step in steps]
        parts.append([name] if name else steps or ["capture"])
    lengths = [1] * len(parts)
    while True:
        names = ["-".join(steps[-length:]) for steps, length in zip(parts, lengths, strict=True)]
        counts = Counter(names)
        longer = [
            length + 1 if counts[name] > 1 and length < len(steps) else length
            for name, steps, length in zip(names, parts, lengths, strict=True)
        ]
        if longer == lengths:
            break
        lengths = longer
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        paths = [path for (_, path), name in zip(wanted, names, strict=True) if name == twice]
        raise InputError(
            f"{len(paths)} captures are named {twice!r} ({paths[0]}, {paths[1]}): give each its own `name`, or list it once."
        )
    return names


def _read_run(capture: Capture) -> str:
    """Resolve an existing run, and its capture unless that is given. Return a hash of its configuration and weights."""
    # Imported late, since it imports every method that Nerfstudio knows.
    from r2l_nerfstudio.run_config import capture_path, checkpoint_path, load_run_config, resolve_run

    if not is_url(capture.teacher):
        run = resolve_run(Path(capture.teacher)).absolute()
        config = load_run_config(run)
        checkpoint = checkpoint_path(config, run)
        capture.teacher = str(run)
        if not capture.source:
            capture.source = str(capture_path(config, run).absolute())
        return _digest(run.read_text("utf8"), checkpoint.name, checkpoint.stat().st_size)
    fs, path = open_url(capture.teacher)
    if not path.endswith("config.yml"):
        path, capture.teacher = f"{path.rstrip('/')}/config.yml", f"{capture.teacher.rstrip('/')}/config.yml"
    if not fs.exists(path):
        raise InputError(f"There is no trained run at {capture.teacher}.")
    if not capture.source:
        raise InputError(f"The run {capture.teacher} is remote: give the URL of its capture with `path`.")
    text = cast(bytes, fs.cat_file(path))
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / "config.yml"
        local.write_bytes(text)
        config = load_run_config(local)
    folder = f"{path.rpartition('/')[0]}/{config.relative_model_dir}"
    checkpoints = cast(dict[str, dict[str, Any]], fs.find(folder, detail=True))
    sizes = sorted((PurePosixPath(name).name, info["size"]) for name, info in checkpoints.items())
    if not any(name.endswith(".ckpt") for name, _ in sizes):
        raise InputError(f"The run {capture.teacher} has no checkpoint.")
    return _digest(text.decode("utf8"), sizes)


def _check_transforms(path: str, content: bytes) -> None:
    try:
        transforms = json.loads(content)
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): restore it, or process the capture again.") from error
    if not isinstance(transforms, dict) or not transforms.get("frames"):
        raise InputError(f"{path} lists no frames: restore it, or process the capture again.")


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
