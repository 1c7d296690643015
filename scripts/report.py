"""Measure a finished student, and write the figures as JSON, Markdown and one self-contained HTML page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from nerfstudio.utils.rich_utils import CONSOLE

from r2l_nerfstudio.engines.protocol import ENGINE_NAMES, EngineName
from r2l_nerfstudio.errors import InputError, command_line
from r2l_nerfstudio.report.measure import measure
from r2l_nerfstudio.report.page import as_html, as_markdown
from r2l_nerfstudio.run_config import resolve_run


@dataclass
class Report:
    """Quality against photos and against the teacher, worst views, stability, frame times by engine, and sizes."""

    run: tyro.conf.Positional[Path]
    """The student's run: its config.yml or folder."""
    output: Path | None = None
    """Folder for report.json, report.md and report.html; `report` in the run's folder by default."""
    data: Path | None = None
    """The capture's location, if it has moved since training."""
    teacher: Path | None = None
    """The teacher's run, if it has moved since training."""
    test_views: int = 25
    """Photos of the test split to measure at most, evenly spaced."""
    unseen_cameras: int = 8
    """Sampled cameras at which student and teacher are compared; 0 for none."""
    engines: tuple[EngineName, ...] = ENGINE_NAMES
    """Engines whose frame times are measured; those that cannot run here are listed with the reason."""

    def main(self) -> None:
        """Measure the student and write the report.

        Raises:
            InputError: a number is out of range, or the run, its capture or its teacher cannot be read.
        """
        if self.test_views < 1:
            raise InputError(f"--test-views must be a positive integer (got {self.test_views}).")
        if self.unseen_cameras < 0:
            raise InputError(f"--unseen-cameras must be 0 or more (got {self.unseen_cameras}).")
        folder = self.output or resolve_run(self.run).parent / "report"
        found = measure(self.run, self.data, self.teacher, self.test_views, self.unseen_cameras, self.engines)
        folder.mkdir(parents=True, exist_ok=True)
        markdown = as_markdown(found)
        (folder / "report.json").write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(markdown, encoding="utf-8")
        (folder / "report.html").write_text(as_html(found), encoding="utf-8")
        CONSOLE.print(markdown, markup=False, highlight=False, soft_wrap=True)
        CONSOLE.print(f"Written: {folder / 'report.html'}, report.md, report.json", markup=False, soft_wrap=True)


def main() -> None:
    """Run `r2l-report`."""
    with command_line():
        tyro.cli(Report, prog="r2l-report", description=__doc__).main()


if __name__ == "__main__":
    main()
