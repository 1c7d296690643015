"""Chart of the bytes that a visitor of a web page loads against PSNR: our measured students, and published figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nerfstudio.utils.rich_utils import CONSOLE

from benchmarks.figures import RESULTS
from benchmarks.published_figures import PAGE_SIZES
from r2l_nerfstudio.errors import InputError

PAGE_MEGABYTES = 0.04
"""HTML, CSS, JavaScript and WGSL of our page, gzipped; a test holds them to it."""
CHART = "size_chart.png"


@dataclass
class SizeChart:
    """Draw the measurements of `distil` and the published figures into one chart. Scenes and resolutions differ, and are
    written beside each point."""

    results_dir: Path = RESULTS
    """Folder with the figures of `distil`; the chart is written there."""

    def main(self) -> None:
        """Write `size_chart.png`.

        Raises:
            InputError: if nothing was measured yet.
        """
        points = measured(self.results_dir)
        if not points:
            raise InputError(
                f"There are no distil_*.json in {self.results_dir}: run python -m benchmarks distil first."
            )
        draw(points, self.results_dir / CHART)
        CONSOLE.print(f"Written: {self.results_dir / CHART}")


def measured(folder: Path) -> list[tuple[str, float, float]]:
    """Return label, megabytes with the page in fp16, and PSNR in dB on test views of every student in a folder."""
    found = []
    for file in sorted(folder.glob("distil_*.json")):
        row = json.loads(file.read_text())
        label = f"{row['method']}, {row['capture']} {row['resolution']}"
        found.append((label, row["network_megabytes_fp16"] + PAGE_MEGABYTES, row["student_psnr"]))
    return found


def draw(points: list[tuple[str, float, float]], file: Path) -> None:
    """Draw the chart of labelled (megabytes, dB) and of `PAGE_SIZES`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    published = [(f"{one.method}, {one.scenes}", one.megabytes, one.psnr) for one in PAGE_SIZES]
    for group, color, name in ((points, "tab:blue", "ours, measured"), (published, "tab:gray", "published")):
        axes.scatter([x for _, x, _ in group], [y for *_, y in group], color=color, label=name)
        for number, (label, x, y) in enumerate(sorted(group, key=lambda point: point[2])):
            # In turns above and below: neighbors would cover each other.
            axes.annotate(label, (x, y), xytext=(4, 3 if number % 2 else -9), textcoords="offset points", fontsize=6.5)
    axes.set(xscale="log", xlabel="megabytes that a visitor loads", ylabel="PSNR on test views, dB", xlim=(0.5, 600))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.suptitle("Scenes and resolutions differ: compare bytes, and dB only within one source", fontsize=9)
    figure.savefig(file, dpi=120)
