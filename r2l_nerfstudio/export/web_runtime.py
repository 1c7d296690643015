"""ONNX Runtime Web: downloaded once as an npm package, checked, and kept for the next export."""

from __future__ import annotations

import base64
import gzip
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.user_cache import cache_folder

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""SHA-512 of that version's package, in base64."""
PACKED = ".gzip"
"""Ends the names of what is kept compressed, a quarter of its size. File servers take .gz for an encoding, not this."""
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm.gzip")
"""Module, loader and WebAssembly."""
GPU_FILES = (
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm.gzip",
)
"""Files for WebGPU, with which benchmarks compare the page's own renderer."""


def fetch_runtime(package: Path | None = None) -> Path:
    """Folder with the files of `FILES` and `GPU_FILES`.

    Args:
        package: the npm package as a .tgz file; None to download it with npm, unless it was before.

    Raises:
        InputError: it cannot be downloaded, or is not the version that the page is made for.
    """
    folder = cache_folder() / f"{PACKAGE}-{VERSION}"
    if package is None and _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            file = Path(package) if package is not None else _npm_pack(Path(scratch))
            _check(file)
            made = Path(scratch) / "files"
            _unpack(file, made)
            shutil.rmtree(folder, ignore_errors=True)
            made.replace(folder)
    except OSError as error:
        raise InputError(
            f"{PACKAGE} cannot be stored in {folder.parent} ({error}): free space there, or set XDG_CACHE_HOME to a"
            " folder that can be written to."
        ) from error
    return folder


def describe_runtime(folder: str, files: Path) -> dict[str, Any]:
    """What the page has to know of the files, once they are in a subfolder of it."""
    paths = dict(zip(("module", "loader", "wasm"), (f"{folder}/{name}" for name in FILES), strict=True))
    return {"version": VERSION, **paths, "bytes": (files / FILES[2]).stat().st_size}


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (*FILES, *GPU_FILES))


def _npm_pack(folder: Path) -> Path:
    remedy = (
        f"install Node.js, which includes npm, and let it reach its registry; or download {PACKAGE}-{VERSION}.tgz"
        f" elsewhere (npm pack {PACKAGE}@{VERSION}) and pass it with --runtime."
    )
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(f"The page needs the npm package {PACKAGE} {VERSION}, and npm is not installed: {remedy}")
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    files = list(folder.glob("*.tgz"))
    if result.returncode or not files:
        said = " ".join(result.stderr.split())[-300:]
        raise InputError(f"npm could not download {PACKAGE} {VERSION} ({said}): {remedy}")
    return files[0]


def _check(file: Path) -> None:
    if not file.is_file():
        raise InputError(f"--runtime {file} does not exist.")
    digest = base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()
    if digest != INTEGRITY:
        raise InputError(
            f"{file} is not the npm package {PACKAGE} {VERSION}, or it is damaged: download it again with npm pack"
            f" {PACKAGE}@{VERSION}."
        )


def _unpack(file: Path, folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(file) as archive:
        for name in (*FILES, *GPU_FILES):
            member = archive.extractfile(f"package/dist/{name.removesuffix(PACKED)}")
            if member is None:
                raise InputError(f"{file} has a folder in place of {name}: download the package again.")
            content = member.read()
            # Without the time, the same package gives the same files.
            (folder / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(PACKED) else content)
