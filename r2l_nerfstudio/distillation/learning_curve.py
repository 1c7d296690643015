"""The learning curve of a run: PSNR on held-out views over training time, kept in the run's folder whatever `--vis` is."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import nerfstudio.configs.base_config  # noqa: F401 - the writer and it import each other, in this order only
import torch
from jaxtyping import Float
from nerfstudio.utils.writer import Writer
from torch import Tensor

FILE = "learning_curve.jsonl"
HELD_OUT = "Held-out PSNR"
"""Start of the names of the scalars that the pipeline logs for held-out views."""


@dataclass(frozen=True)
class CurvePoint:
    """One measurement on held-out views."""

    name: str
    """Name of the scalar."""
    step: int
    """Training iteration."""
    minutes: float
    """Minutes of training, those of the run that it resumed included."""
    psnr: float
    """PSNR in dB."""


class LearningCurveWriter(Writer):
    """Event writer of Nerfstudio that appends every PSNR on held-out views to a file.

    Args:
        run: the run's folder.
        resumed: minutes of training of the run that this one resumes.
    """

    def __init__(self, run: Path, resumed: float = 0.0) -> None:
        self.file = run / FILE
        self._start = time.monotonic() - 60 * resumed

    def write_scalar(self, name: str, scalar: float | Tensor, step: int) -> None:
        """Append a scalar if it is a PSNR on held-out views. Errors in writing do not stop training."""
        if not name.startswith(HELD_OUT):
            return
        minutes = round((time.monotonic() - self._start) / 60, 3)
        point = CurvePoint(name, step, minutes, round(float(torch.as_tensor(scalar)), 4))
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(point)) + "\n")
        except OSError:
            return

    def write_image(self, name: str, image: Float[Tensor, "height width channels"], step: int) -> None:
        """Images are not part of the curve."""

    def write_config(self, name: str, config_dict: dict, step: int) -> None:
        """Configurations are not part of the curve."""


def read_learning_curve(run: Path) -> list[CurvePoint]:
    """Return a run's learning curve, oldest measurement first; empty if there is none. Damaged lines are skipped.

    Args:
        run: the run's folder.
    """
    try:
        lines = (run / FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    points = []
    for line in lines:
        try:
            point = json.loads(line)
            # Runs of earlier versions have the scalars' former names.
            point["name"] = point["name"].replace("Holdout PSNR (photographs)", "Holdout PSNR (photos)")
            point["name"] = point["name"].replace("Holdout PSNR", HELD_OUT)
            points.append(CurvePoint(**point))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return points
