"""Where benchmarks write their figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from r2l_nerfstudio.disk import write_atomically

RESULTS = Path("benchmarks/results")
"""Folder of the figures that the documentation shows, from the repository's root."""


def results_stem(results_dir: Path, kind: str, device: str) -> Path:
    """Return the path, without a suffix, of the figures of one kind on one device."""
    return results_dir / f"{kind}_{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}"


def write_figures(stem: Path, figures: Any, table: str) -> None:
    """Write figures as JSON and as a Markdown table.

    Args:
        stem: path without a suffix; its folder is made.
        figures: to write as JSON.
        table: the same figures in Markdown.
    """
    write_atomically(stem.with_name(stem.name + ".json"), json.dumps(figures, indent=2) + "\n")
    write_atomically(stem.with_name(stem.name + ".md"), table)
