"""Measure students: quality, learning curves, recipes, frame times, training steps, the web page, a GPU."""

from __future__ import annotations

import tyro

from benchmarks.curve import Curve
from benchmarks.distil import Distil
from benchmarks.gpu_day import GpuDay
from benchmarks.recipes import Recipes
from benchmarks.render import Render
from benchmarks.train import Train
from benchmarks.web import Web
from r2l_nerfstudio.errors import command_line

COMMANDS = {
    "distil": Distil,
    "curve": Curve,
    "recipes": Recipes,
    "render": Render,
    "train": Train,
    "web": Web,
    "gpu-day": GpuDay,
}


def main() -> None:
    """Run the benchmark that the command line names."""
    with command_line():
        tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__, prog="python -m benchmarks").main()


if __name__ == "__main__":
    main()
