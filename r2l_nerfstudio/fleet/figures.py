"""Quality figures from the reports of `r2l-report`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def report_figures(folder: Path) -> dict[str, float]:
    """Return the PSNR of teacher and student against photos, from the JSON files of a report.

    Args:
        folder: the report's folder. Its JSON holds an object "teacher" and an object "student", at any depth, each with
            a number "psnr"; or numbers "teacher_psnr" and "student_psnr".

    Returns:
        "teacher_psnr" and "student_psnr" in dB; missing figures are left out.
    """
    found: dict[str, float] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for who in ("teacher", "student"):
            value = _find(data, who)
            if value is not None and f"{who}_psnr" not in found:
                found[f"{who}_psnr"] = round(value, 3)
    return found


def _find(data: Any, who: str) -> float | None:
    """Search breadth first: the report's summary is above its single views."""
    level = [data]
    while level:
        for entry in level:
            if isinstance(entry, dict):
                holder = entry.get(who)
                for value in (entry.get(f"{who}_psnr"), holder.get("psnr") if isinstance(holder, dict) else None):
                    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                        return float(value)
        level = [
            child
            for entry in level
            if isinstance(entry, dict | list)
            for child in (entry.values() if isinstance(entry, dict) else entry)
        ]
    return None
