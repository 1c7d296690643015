"""The engine cache in the user's cache folder: compiled artifacts, and which engine was the fastest.

Compiled artifacts are machine code that runs when it is loaded. They are therefore never read from a run's folder,
which may come from anyone, and only from places where nobody but the user can write.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from r2l_nerfstudio.disk import write_atomically
from r2l_nerfstudio.user_cache import is_private


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the CPU's model and the number of threads that PyTorch uses on it."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} {major}.{minor}"
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else model} {torch.get_num_threads()} threads"


class EngineCache:
    """A cache folder for one network on one device. Unreadable entries count as missing.

    Args:
        folder: the user's cache folder (`user_cache.engine_cache_folder`); created when something is written.
        weights: `weights_hash` of the network.
        device: device that the network runs on.
    """

    def __init__(self, folder: Path, weights: str, device: torch.device) -> None:
        place = hashlib.sha256(device_name(device).encode()).hexdigest()[:12]
        self.folder = folder / f"{weights}-{place}"

    def artifacts(self, name: str, version: str) -> Path | None:
        """Return the folder for artifacts of one version of one engine; None if another user may have written there."""
        folder = self.folder / f"{name}-{hashlib.sha256(version.encode()).hexdigest()[:12]}"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:  # A full disk, or a folder of another user.
            return None
        is_trusted = is_private(self.folder, deep=False) and (is_private(folder) or not os.path.lexists(folder))
        return folder if is_trusted else None

    def read(self, key: str) -> dict[str, Any] | None:
        """Return the record of a key; None if there is none or it cannot be trusted."""
        file = self.folder / f"{key}.json"
        try:
            record = json.loads(file.read_text()) if is_private(file) else None
        except (OSError, ValueError, RecursionError):
            return None
        return record if isinstance(record, dict) else None

    def write(self, key: str, record: dict[str, Any]) -> None:
        """Write a record. A folder that cannot be written to is not an error: the record is only lost."""
        try:
            write_atomically(self.folder / f"{key}.json", json.dumps(record, indent=2) + "\n", is_private=True)
        except OSError:
            return
