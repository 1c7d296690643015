"""What engines leave in the user's cache folder: compiled artefacts, and which engine was the fastest.

Compiled artefacts are machine code that loading runs. So they are never read from a run's folder, which may come from
anybody, and only where nobody but the user can have written them.
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
    """Of the GPU, or the CPU's model and how many threads torch uses of it."""
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
    """A folder for one network on one device. What does not read as it was written is as good as absent.

    Args:
        folder: the user's own (`user_cache.engine_cache_folder`); made when something is written.
        weights: `weights_hash` of the network.
        device: where it runs.
    """

    def __init__(self, folder: Path, weights: str, device: torch.device) -> None:
        place = hashlib.sha256(device_name(device).encode()).hexdigest()[:12]
        self.folder = folder / f"{weights}-{place}"

    def artefacts(self, name: str, version: str) -> Path | None:
        """Folder for what one version of one engine compiles; None where somebody else may have written there."""
        folder = self.folder / f"{name}-{hashlib.sha256(version.encode()).hexdigest()[:12]}"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:  # a full disk, or none of this user's
            return None
        is_trusted = is_private(self.folder, deep=False) and (is_private(folder) or not os.path.lexists(folder))
        return folder if is_trusted else None

    def read(self, key: str) -> dict[str, Any] | None:
        """What was remembered under a key; None for nothing, or nothing that can be trusted."""
        file = self.folder / f"{key}.json"
        try:
            record = json.loads(file.read_text()) if is_private(file) else None
        except (OSError, ValueError, RecursionError):
            return None
        return record if isinstance(record, dict) else None

    def write(self, key: str, record: dict[str, Any]) -> None:
        """Remember; a folder that cannot be written to is no reason to fail."""
        try:
            write_atomically(self.folder / f"{key}.json", json.dumps(record, indent=2) + "\n", is_private=True)
        except OSError:
            return
