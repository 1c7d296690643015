"""Processes forked from one that has imported Nerfstudio, which takes most of the time that a command needs to start."""

from __future__ import annotations

import multiprocessing

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    ["nerfstudio.configs.method_configs", "nerfstudio.scripts.train", "nerfstudio.scripts.viewer.run_viewer"]
)
