"""The terminal table of a fleet: captures by stages."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from r2l_nerfstudio.fleet.cluster import Capacity
from r2l_nerfstudio.fleet.plan import CaptureState, FleetState, StageState

_ORDER = {"running": 0, "failed": 1, "waiting": 2, "done": 3, "blocked": 4}
_OTHER_LINES = 8
"""Lines that rows cannot use: title, header, borders and the lines below the table."""


def fleet_table(state: FleetState, capacity: Capacity | None = None, height: int = 10**6) -> RenderableType:
    """Return a table of captures by stages, with PSNR and minutes left, and totals below.

    Args:
        state: the fleet.
        capacity: resources of the machines, for an estimate of the time to the end; left out if None.
        height: lines of the terminal. If there are more captures, running and failed ones come first.
    """
    columns = list(dict.fromkeys(stage.id for capture in state.captures for stage in capture.stages))
    table = Table(
        "capture", *columns, "PSNR teacher", "PSNR student", "minutes left", title="Fleet", title_justify="left"
    )
    rows = max(3, height - _OTHER_LINES)
    shown = state.captures if len(state.captures) <= rows else sorted(state.captures, key=_urgency)[:rows]
    for capture in shown:
        stages = {stage.id: stage for stage in capture.stages}
        cells = [_cell(stages.get(column)) for column in columns]
        if capture.error:
            cells = [Text("failed", "red"), *cells[1:]] if cells else []
        left = sum(stage.minutes_left for stage in capture.stages)
        table.add_row(
            Text(capture.name),
            *cells,
            _decibels(capture.figure("teacher_psnr")),
            _decibels(_student_psnr(capture)),
            f"{left:.0f}" if left else "",
        )
    lines: list[RenderableType] = [table]
    if len(shown) < len(state.captures):
        lines.append(Text(f"… and {len(state.captures) - len(shown)} more captures"))
    lines.append(Text(totals(state, capacity)))
    return Group(*lines)


def totals(state: FleetState, capacity: Capacity | None = None) -> str:
    """Return one line: how many stages are done, running, failed and waiting."""
    line = f"{state.count('done')} of {state.total} stages done, {state.count('running')} running"
    unreadable = sum(bool(capture.error) for capture in state.captures)
    for count, what in (
        (state.count("failed"), "failed"),
        (state.count("blocked"), "blocked by failed ones"),
        (state.count("waiting"), "waiting"),
        (unreadable, "capture unreadable" if unreadable == 1 else "captures unreadable"),
    ):
        line += f", {count} {what}" if count else ""
    if capacity is not None and (state.count("running") or state.count("waiting")):
        line += f"; at most about {hours(state.minutes_left(capacity))} left"
    return f"{line}."


def failures(state: FleetState) -> list[str]:
    """Return one line on each failure."""
    lines = []
    for capture in state.captures:
        if capture.error:
            lines.append(f"{capture.name}: {capture.error}")
        for stage in capture.stages:
            if stage.status == "failed":
                details = stage.details
                kind, reason = details.get("failure"), details.get("reason")
                lines.append(f"{capture.name} {stage.id} ({kind}): {reason}. Log: {details.get('log')}")
    return lines


def hours(minutes: float) -> str:
    """Return a duration in words."""
    if minutes < 90:
        return f"{minutes:.0f} minutes"
    return f"{minutes / 60:.1f} hours" if minutes < 72 * 60 else f"{minutes / 1440:.1f} days"


def _urgency(capture: CaptureState) -> int:
    return 1 if capture.error else min((_ORDER[stage.status] for stage in capture.stages), default=5)


def _student_psnr(capture: CaptureState) -> float | None:
    """PSNR against photos from the report; until it exists, against the teacher from training."""
    final = capture.figure("student_psnr")
    if final is not None:
        return final
    running = [
        stage.details["psnr"] for stage in capture.stages if stage.status == "running" and "psnr" in stage.details
    ]
    return running[-1] if running else capture.figure("psnr_against_teacher")


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _cell(stage: StageState | None) -> Text:
    if stage is None:
        return Text("-", "dim")
    if stage.status == "done":
        seconds = stage.details.get("seconds", 0.0)
        return Text(f"done {seconds:.0f} s" if seconds < 100 else f"done {seconds / 60:.0f} min", "green")
    if stage.status == "running":
        return Text(f"running, {stage.minutes_left:.0f} min left", "cyan")
    return Text(stage.status, {"failed": "red", "blocked": "yellow"}.get(stage.status, "dim"))
