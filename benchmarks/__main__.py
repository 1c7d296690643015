"""Prepare captures and measure students: quality, learning curves, recipes, the papers' tables, frame times, training
steps, the web page, memory over time, a GPU."""

from __future__ import annotations

import tyro

from benchmarks.curve import Curve
from benchmarks.distil import Distil
from benchmarks.gpu_day import GpuDay
from benchmarks.hard_scenes import HardScenes
from benchmarks.photo_sizes import PhotoSizes
from benchmarks.prepare_captures import PrepareCaptures
from benchmarks.recipes import Recipes
from benchmarks.render import Render
from benchmarks.size_chart import SizeChart
from benchmarks.soak import Soak
from benchmarks.tables import Tables
from benchmarks.train import Train
from benchmarks.web import Web
from benchmarks.web_renderer import WebRenderer
from r2l_nerfstudio.errors import command_line

COMMANDS = {
    "prepare-captures": PrepareCaptures,
    "hard-scenes": HardScenes,
    "distil": Distil,
    "curve": Curve,
    "recipes": Recipes,
    "render": Render,
    "tables": Tables,
    "train": Train,
    "web": Web,
    "gpu-day": GpuDay,
    "web-renderer": WebRenderer,
    "size-chart": SizeChart,
    "soak": Soak,
    "photo-sizes": PhotoSizes,
}


def main() -> None:
    """Run the benchmark that the command line names."""
    with command_line():
        tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__, prog="python -m benchmarks").main()


if __name__ == "__main__":
    main()
