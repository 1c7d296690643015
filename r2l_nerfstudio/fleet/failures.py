"""Reasons of failed stages, and whether another attempt makes sense."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from typing import Literal

Failure = Literal["input", "disk-full", "out-of-memory", "timeout", "crash", "lost", "stopped"]
"""input: the command or its input cannot be used. crash: any other error of the command. lost: the worker process or its
machine is gone. stopped: the fleet was stopped."""

RETRIED: frozenset[Failure] = frozenset({"crash", "lost"})
"""Failures for which another attempt would have the same result."""

_DISK_FULL = re.compile(
    r"No space left on device|Disk quota exceeded|\[Errno 28\]|\[Errno 122\]|PytorchStreamWriter failed writing file",
    re.I,
)
_OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|\bMemoryError\b|bad_alloc|can't allocate memory|Cannot allocate memory"
    r"|No memory on \S+ for a training batch|RESOURCE_EXHAUSTED",
    re.I,
)
_ERROR = re.compile(r"^Error: (.+)")
# The last line of a traceback: SomeError: message, module.SomeError: message.
_EXCEPTION = re.compile(r"^((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit|NotFound|Refused)\b.*)")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_BOX = re.compile(r"[─-╿]+")


def judge(code: int, lines: Sequence[str], is_disk_full: bool, killed_for_memory: bool) -> tuple[Failure, str]:
    """Return kind and reason of a failed command.

    Args:
        code: its exit code; negative: the signal that ended it.
        lines: the end of its output.
        is_disk_full: whether the disk of its results is full now.
        killed_for_memory: whether the kernel killed a process of this machine for lack of memory while it ran.

    Returns:
        the kind, and one sentence without a final period.
    """
    text = "\n".join(lines)
    reason = _reason(code, lines)
    if _DISK_FULL.search(text) or is_disk_full:
        return "disk-full", f"The disk is full ({reason})" if reason else "The disk is full"
    if killed_for_memory and code == -signal.SIGKILL:
        return "out-of-memory", "The kernel killed the command because the machine is out of memory"
    if _OUT_OF_MEMORY.search(text):
        return "out-of-memory", reason
    if any(_ERROR.match(line) for line in lines[-40:]) or code == 2:
        return "input", reason
    return "crash", reason


def clean(line: str) -> str:
    """Return a line of output without colors and box drawing."""
    return _BOX.sub(" ", _ANSI.sub("", line)).strip()


def _reason(code: int, lines: Sequence[str]) -> str:
    for pattern in (_ERROR, _EXCEPTION):
        for line in reversed(lines):
            if match := pattern.match(line):
                return match[1].strip().rstrip(".")[:500]
    if code < 0:
        return f"The command was killed by signal {-code} ({signal.Signals(-code).name})"
    said = [line for line in lines if line]
    if code == 2 and said:
        # A usage message: the error comes first, the help text after it.
        wrong = [line for line in said if re.search(r"unrecogni|invalid|required|missing|must|error", line, re.I)]
        return (wrong or said)[0][:500]
    end = f": {said[-1]}" if said else " without any output"
    return f"The command ended with exit code {code}{end}"[:500]
