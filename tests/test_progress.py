"""How far training is, by iterations and by the clock."""

from __future__ import annotations

import pytest
import torch

from r2l_nerfstudio.distillation.optimization import (
    PublishedSchedulerConfig,
    ScheduledRate,
    WarmupCosineScheduler,
    WarmupCosineSchedulerConfig,
)
from r2l_nerfstudio.distillation.progress import TrainingProgress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_by_iterations() -> None:
    progress = TrainingProgress(10)
    assert progress.expected_steps(0) == 10
    for step in range(10):
        progress.update(step)
        assert progress.fraction == step / 10 and not progress.finished
    progress.update(10)
    assert progress.finished and not progress.stopped


def test_by_the_clock() -> None:
    clock = Clock()
    progress = TrainingProgress(10, seconds=20.0, clock=clock)
    progress.update(0)
    assert progress.fraction == 0 and progress.expected_steps(0) == 10
    clock.now += 5
    progress.update(50)
    assert progress.fraction == 0.25 and progress.seconds_left(50) == 15
    assert progress.expected_steps(50) == 200
    clock.now += 15
    progress.update(200)
    assert progress.finished


def test_a_resumed_run_has_the_remaining_time() -> None:
    clock = Clock()
    progress = TrainingProgress(10, seconds=8.0, done=0.6, clock=clock)
    progress.update(90)
    assert progress.fraction == 0.6
    clock.now += 4
    progress.update(100)
    assert progress.fraction == pytest.approx(0.8)
    assert progress.seconds_left(100) == pytest.approx(4)
    assert progress.expected_steps(100) == 110


def test_time_left_by_iterations() -> None:
    clock = Clock()
    progress = TrainingProgress(100, clock=clock)
    progress.update(0)
    assert progress.seconds_left(0) is None
    clock.now += 10
    assert progress.seconds_left(20) == 40


def test_the_user_may_stop_it() -> None:
    progress = TrainingProgress(10)
    progress.update(0)
    progress.ask_to_stop()
    assert not progress.finished  # the iteration available is finished first
    progress.update(1)
    assert progress.finished and progress.stopped


def rates(config: WarmupCosineSchedulerConfig | PublishedSchedulerConfig, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosineScheduler(config).get_scheduler(optimizer, 2.0)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_cosine_ends_where_training_ends() -> None:
    found = rates(WarmupCosineSchedulerConfig(warmup_steps=10, final_share=0.1, max_steps=100), 101)
    assert found[0] == pytest.approx(0.4)  # a fifth
    assert max(found) == pytest.approx(2.0, rel=0.03) and found.index(max(found)) == 10
    assert found[100] == pytest.approx(0.2)


def test_published_schedule_does_not_depend_on_the_length_of_training() -> None:
    short, long = (PublishedSchedulerConfig(warmup_steps=4, decay_steps=100, max_steps=m) for m in (10, 1000))
    assert rates(short, 200) == rates(long, 200)
    found = rates(long, 200)
    assert found[0] == pytest.approx(0.4) and found[100] == pytest.approx(0.2)


def test_schedule_by_the_clock_and_its_saved_state() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = ScheduledRate(optimizer, WarmupCosineSchedulerConfig(warmup_steps=1, final_share=0.0, max_steps=10**9))
    schedule.progress = lambda: 0.5
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.0)
    assert schedule.state_dict() == {"last_epoch": 1}
    other = ScheduledRate(optimizer, WarmupCosineSchedulerConfig())
    other.load_state_dict({"last_epoch": 7, "base_lrs": [1.0], "lr_lambdas": [None]})  # as older runs saved it
    assert other.last_epoch == 7
