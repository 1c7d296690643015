"""Continue the training of an interrupted teacher from its newest checkpoint.

It runs as a command before `ns-train`, so that a Ray worker need not import torch.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

UNUSABLE = ".unusable"
"""Ending of a checkpoint that cannot be continued from."""


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint. Truncated files are renamed, so that nothing else reads them."""
    for path in sorted(folder.glob("step-*.ckpt"), reverse=True):
        # The directory of a zip file comes last.
        if zipfile.is_zipfile(path):
            return path
        path.replace(path.with_name(path.name + UNUSABLE))
    return None


def make_loadable(path: Path) -> None:
    """Replace NumPy scalars in a checkpoint by Python numbers.

    Nerfstudio's schedulers leave such scalars in checkpoints, and `torch.load` of torch 2.6 and newer refuses them.
    """
    import numpy as np
    import torch

    from r2l_nerfstudio.torch_compat import load_tensors

    loaded = load_tensors(path)

    def plain(value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, dict):
            return type(value)((key, plain(entry)) for key, entry in value.items())
        if isinstance(value, list | tuple):
            return type(value)(plain(entry) for entry in value)
        return value

    partial = path.with_name(path.name + ".partial")
    torch.save(plain(loaded), partial)
    partial.replace(path)


if __name__ == "__main__":
    make_loadable(Path(sys.argv[1]))
