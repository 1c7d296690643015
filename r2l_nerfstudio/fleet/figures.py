"""Quality figures from the reports of `r2l-report`."""

from __future__ import annotations

import json
import math
from pathlib import Path


def report_figures(folder: Path) -> dict[str, float]:
    """Return the PSNR of teacher and student against photos, means over the test views, from a report's report.json.

    Args:
        folder: the report's folder.

    Returns:
        "teacher_psnr" and "student_psnr" in dB; missing figures are left out.
    """
    found: dict[str, float] = {}
    try:
        means = json.loads((folder / "report.json").read_text(encoding="utf-8"))["mean"]
        for who in ("teacher", "student"):
            value = means[who]["psnr"]
            if isinstance(value, int | float) and math.isfinite(value):
                found[f"{who}_psnr"] = round(float(value), 3)
    except (OSError, ValueError, LookupError, TypeError):  # no report, or none of r2l-report's
        pass
    return found
