"""Training progress: by iterations, or by the minutes that the user allowed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed

STEPS_BETWEEN_LOOKS = 8
"""Iterations between readings of the clock if several ranks have to agree on it."""


class TrainingProgress:
    """Progress from 0 to 1, on which schedules, the photo stage and the end of training depend.

    Args:
        steps: total number of iterations, including those of an earlier run.
        seconds: end this many seconds from now, regardless of iterations; None to end after `steps`.
        done: share of the whole that earlier runs did; used with `seconds` only.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        steps: int,
        seconds: float | None = None,
        done: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps = steps
        self.seconds = seconds
        self.fraction = done
        self.stopped = False
        """Whether the user ended training early."""
        self._done = done
        self._clock = clock
        self._start = clock()
        self._first_step: int | None = None
        self._stop_asked = False

    def ask_to_stop(self) -> None:
        """End training after the current iteration; safe to call from a signal handler."""
        self._stop_asked = True

    def update(self, step: int) -> None:
        """Update from the iteration about to run, or from the clock. With several ranks, the most advanced one counts
        for all."""
        if self._first_step is None:
            self._first_step = step
        if torch.distributed.is_initialized():
            if (step - self._first_step) % STEPS_BETWEEN_LOOKS == 0:
                self._agree(step)
            elif self.seconds is None:
                self.fraction = self._own(step)
            return
        self.fraction = self._own(step)
        self.stopped = self._stop_asked

    def _own(self, step: int) -> float:
        if self.seconds is None:
            return min(1.0, step / max(1, self.steps))
        elapsed = (self._clock() - self._start) / max(1e-9, self.seconds)
        return min(1.0, self._done + (1 - self._done) * elapsed)

    def _agree(self, step: int) -> None:
        """Agree on one share, the largest, and one end for all ranks, which would otherwise wait for each other
        forever."""
        on_gpu = torch.distributed.get_backend() == "nccl"
        mine = torch.tensor([self._own(step), float(self._stop_asked)], device="cuda" if on_gpu else "cpu")
        torch.distributed.all_reduce(mine, torch.distributed.ReduceOp.MAX)
        self.fraction, stop = mine.tolist()
        self.stopped = stop > 0

    @property
    def finished(self) -> bool:
        """Whether training is over."""
        return self.stopped or self.fraction >= 1.0

    def seconds_left(self, step: int) -> float | None:
        """Return the seconds until the end, as far as known before iteration `step`; None if unknown."""
        if self.seconds is not None:
            return self.seconds * (1 - self.fraction) / (1 - self._done)
        if self._first_step is None or step <= self._first_step:
            return None
        return (self._clock() - self._start) / (step - self._first_step) * (self.steps - step)

    def expected_steps(self, step: int) -> int:
        """Return the total number of iterations, as far as known before iteration `step`."""
        if self.seconds is None:
            return self.steps
        first = step if self._first_step is None else self._first_step
        covered = self.fraction - self._done
        if covered <= 0 or step <= first:
            return max(self.steps, step + 1)
        return max(step + 1, round(step + (1 - self.fraction) * (step - first) / covered))
