"""Console commands that start in seconds: `fork_server` has imported Nerfstudio for them."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from fork_server import FORK_SERVER


def start_command(command: list[str], environment: dict[str, str], folder: Path, log: Path) -> BaseProcess:
    """Run a console script of this environment, on one thread.

    Args:
        command: the script and its arguments.
        environment: of the process.
        folder: current folder of the process.
        log: file for its output.
    """
    process = FORK_SERVER.Process(target=_run, args=(command, environment, folder, log))
    process.start()
    return process


def _run(command: list[str], environment: dict[str, str], folder: Path, log: Path) -> None:
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = command
    (script,) = entry_points(group="console_scripts", name=Path(command[0]).name)
    sys.exit(script.load()())
