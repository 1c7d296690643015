"""Distil many captures on one machine or on a Ray cluster: teacher, students, reports and exports of each."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated

import tyro
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

from r2l_nerfstudio.errors import InputError, exit_on_input_error
from r2l_nerfstudio.fleet.cluster import Capacity, open_cluster
from r2l_nerfstudio.fleet.config import FleetConfig, is_url, load_fleet
from r2l_nerfstudio.fleet.gallery import PAGE, write_gallery
from r2l_nerfstudio.fleet.plan import PLAN, FleetState, Plan, make_plan, read_state
from r2l_nerfstudio.fleet.scheduler import Scheduler, current_state
from r2l_nerfstudio.fleet.storage import Storage
from r2l_nerfstudio.fleet.table import failures, fleet_table, hours, totals

GALLERY_SECONDS = 10.0
"""Seconds between two writes of the gallery while stages run."""
CONSOLE = Console()


@dataclass
class Run:
    """Run all unfinished stages of a fleet. Start it again after an interruption to continue.

    Exit codes: 0, every stage is done; 1, some failed; 130, interrupted.
    """

    file: tyro.conf.Positional[Path]
    """The fleet's YAML file. Options after it override its settings; --help after it shows them all."""
    fleet: Annotated[FleetConfig, tyro.conf.arg(name="")] = field(default_factory=FleetConfig)
    dry_run: bool = False
    """Print the stages and the hours and disk space they need, without running anything."""

    def main(self) -> None:
        """Run the fleet.

        Raises:
            InputError: a setting cannot be used.
            SystemExit: with code 1 if a stage failed, 130 after Ctrl-C or SIGTERM.
        """
        if self.file == Path():
            raise InputError("r2l-fleet run needs the fleet's YAML file: r2l-fleet run FLEET.yaml.")
        storage = Storage(self.fleet.output)
        plan = make_plan(self.fleet, CONSOLE)
        state = current_state(plan, storage)
        if self.dry_run:
            describe(plan, state, storage)
            return
        interrupted = False
        if state.count("waiting"):
            warn_about_shared_output(self.fleet)
            signal.signal(signal.SIGTERM, _interrupt)
            try:
                with open_cluster(self.fleet) as cluster:
                    if cluster.dashboard:
                        say(f"Ray dashboard: http://{cluster.dashboard}")
                    with watch(storage) as (event, look):
                        scheduler = Scheduler(plan, storage, cluster, event, look)
                        state = scheduler.state
                        try:
                            scheduler.run()
                        finally:
                            # The page must not show running stages, whatever ended them.
                            with contextlib.suppress(OSError):
                                write_gallery(storage, state, is_running=False)
            except KeyboardInterrupt:
                interrupted = True
            except OSError as error:
                raise InputError(
                    f"The output {storage.root} cannot be written ({error}): make room or check its permissions, then start"
                    " the fleet again to continue."
                ) from error
        else:
            say("Nothing is left to do.")
            storage.write_json(PLAN, plan.describe())
            write_gallery(storage, state, is_running=False)
        for line in failures(state):
            say(f"Failed: {line}")
        say(totals(state))
        say(f"Gallery: {storage.root}/{PAGE}")
        if interrupted:
            say("Interrupted. The same command continues.")
            raise SystemExit(130)
        if failures(state):
            say("The same command tries the failed stages again.")
            raise SystemExit(1)


@dataclass
class Status:
    """Print the state of a fleet, from any machine that can read its output."""

    fleet: tyro.conf.Positional[str]
    """The fleet's YAML file, or its output folder or URL."""

    def main(self) -> None:
        """Print the table.

        Raises:
            InputError: no fleet has run there.
        """
        is_file = not is_url(self.fleet) and Path(self.fleet).suffix in (".yaml", ".yml")
        storage = Storage(load_fleet(Path(self.fleet)).output if is_file else self.fleet)
        state = read_state(storage)
        CONSOLE.print(fleet_table(state))
        for line in failures(state):
            say(f"Failed: {line}")


def describe(plan: Plan, state: FleetState, storage: Storage) -> None:
    """Print what `run` would do."""
    table = Table(
        "stage", "to do", "done", "minutes each", "GPU hours", "core hours", "GB", title="Plan", title_justify="left"
    )
    all_stages = [stage for capture in state.captures for stage in capture.stages]
    gpu_minutes = cpu_minutes = disk = 0.0
    for name in dict.fromkeys(stage.id for stage in all_stages):
        stages = [stage for stage in all_stages if stage.id == name]
        done = [stage for stage in stages if stage.status == "done"]
        left = [stage for stage in stages if stage.status != "done"]
        # Measured times of this fleet are better than defaults.
        size = sum(stage.details["bytes"] for stage in done) / len(done) / 1e9 if done else stages[0].disk_gb
        gpu, cpu = (sum(stage.minutes * getattr(stage, kind) for stage in left) for kind in ("gpus", "cpus"))
        gpu_minutes, cpu_minutes, disk = gpu_minutes + gpu, cpu_minutes + cpu, disk + size * len(left)
        table.add_row(
            name,
            str(len(left)),
            str(len(done)),
            f"{stages[0].minutes:g}",
            f"{gpu / 60:.1f}",
            f"{cpu / 60:.1f}",
            f"{size * len(left):.2f}",
        )
    CONSOLE.print(table)
    unreadable = [capture for capture in state.captures if capture.error]
    say(f"{len(state.captures)} captures, {len(unreadable)} of them unreadable; {len(all_stages)} stages.")
    for capture in unreadable:
        say(f"Unreadable: {capture.name}: {capture.error}")
    say(
        f"At most {gpu_minutes / 60:.1f} GPU hours and {cpu_minutes / 60:.1f} core hours, if every stage takes as"
        " long as configured."
    )
    if not plan.config.address:
        capacity = this_machine(plan.config)
        left = state.minutes_left(capacity)
        say(
            f"On this machine ({capacity.gpus:g} GPUs, {capacity.cpus:g} cores): "
            + (f"at most about {hours(left)}." if left < 1e9 else "stages that need a GPU cannot run.")
        )
    free = free_disk(storage)
    say(
        f"Disk space: about {disk:.1f} GB"
        + (f", and {free:.1f} GB are free in {storage.root}." if free is not None else ".")
    )
    if free is not None and free < disk:
        say("The disk is likely to run full.", "yellow")


def this_machine(config: FleetConfig) -> Capacity:
    """Return the resources that Ray will find."""
    import os

    import torch

    gpus = torch.cuda.device_count() if config.num_gpus < 0 else config.num_gpus
    return Capacity(float(config.num_cpus or os.cpu_count() or 1), float(gpus))


def free_disk(storage: Storage) -> float | None:
    """Return the free space of a local output in GB; None for a remote one."""
    if not storage.is_local:
        return None
    import shutil

    folder = Path(storage.root)
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 1e9


def warn_about_shared_output(config: FleetConfig) -> None:
    """On a cluster, local paths work only if every machine has them."""
    local = [config.output, *(capture.path or capture.teacher for capture in config.captures)]
    if config.address and any(not is_url(path) for path in local):
        say(
            "Captures or output are local paths: every machine of the cluster must have them at the same path.",
            "yellow",
        )


@contextlib.contextmanager
def watch(storage: Storage) -> Iterator[tuple[Callable[[str], None], Callable[[FleetState, Capacity], None]]]:
    """Show a live table in a terminal, or a line for each event elsewhere, and keep the gallery up to date.

    Yields:
        a function for events and one for states, as `Scheduler` calls them.
    """
    written = 0.0
    latest: list[tuple[FleetState, Capacity]] = []

    def gallery(state: FleetState) -> None:
        nonlocal written
        if time.monotonic() - written > GALLERY_SECONDS:
            written = time.monotonic()
            try:
                write_gallery(storage, state, is_running=True)
            except OSError as error:
                say(f"The gallery cannot be written ({error}).", "yellow")

    if not CONSOLE.is_terminal:
        yield say, lambda state, capacity: gallery(state)
        return
    # Lines printed meanwhile appear above the table.
    with Live(console=CONSOLE, get_renderable=lambda: _live(latest), refresh_per_second=2):

        def look(state: FleetState, capacity: Capacity) -> None:
            latest[:] = [(state, capacity)]
            gallery(state)

        def event(line: str) -> None:
            # The table already shows finished stages.
            if ": done in" not in line:
                say(line)

        yield event, look


def say(line: str, style: str = "") -> None:
    """Print a line without wrapping it, so that paths can be copied."""
    CONSOLE.print(line, style=style, soft_wrap=True, markup=False, highlight=False)


def _live(latest: list[tuple[FleetState, Capacity]]) -> RenderableType:
    return fleet_table(*latest[0], height=CONSOLE.height) if latest else ""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run `r2l-fleet`."""
    arguments = sys.argv[1:]
    with exit_on_input_error():
        default = Run(Path(), FleetConfig())
        if arguments[:1] == ["run"]:
            file = next((word for word in arguments[1:] if Path(word).suffix in (".yaml", ".yml")), None)
            if file is not None:
                default = Run(Path(file), load_fleet(Path(file)))
            elif any(not word.startswith("-") for word in arguments[1:]):
                raise InputError(f"r2l-fleet run needs a .yaml file first (got {' '.join(arguments[1:])}).")
        run = Annotated[Run, tyro.conf.subcommand("run", default=default)]
        status = Annotated[Status, tyro.conf.subcommand("status")]
        command = tyro.cli(
            run | status,  # type: ignore  # made at run time, since the file gives the defaults
            prog="r2l-fleet",
            description=__doc__,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.ConsolidateSubcommandArgs),
        )
        command.main()


if __name__ == "__main__":
    main()
