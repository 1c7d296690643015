"""What a training takes of a GPU: counted as a GPU's allocator would, planned, and refused where it cannot fit."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from rehearsal import Rehearsal
from torch import nn

from r2l_nerfstudio.distillation.trial_step import TrialStep, training_bytes
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.planning.cost import Cost, StudentCost, student_cost
from r2l_nerfstudio.planning.device_use import DeviceUse
from r2l_nerfstudio.planning.fake_cuda import fake_cuda
from r2l_nerfstudio.planning.plan import GPUS, Capture, make_plan, step_seconds, teacher_bytes
from r2l_nerfstudio.scripts import plan as script

GIB = 1 << 30


def config(method: str, **changes):
    from nerfstudio.configs.method_configs import all_methods

    made = copy.deepcopy(all_methods[method])
    for name, value in changes.items():
        setattr(made.pipeline.datamanager, name, value)
    return made


def cost(step: float, frame: float = 0.1, held: float = 0.1) -> StudentCost:
    return StudentCost(int(held * GIB), Cost(int(step * GIB), 10**12, 10**10, 500), Cost(int(frame * GIB), 1, 1, 1))


def test_gradients_without_a_gpu_are_those_of_pytorch() -> None:
    """Which parameters get one, and its shape and type; values there are none."""
    with fake_cuda():
        layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2, bias=False)).to("cuda")
        unused = nn.Linear(2, 2).to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            values = layers(torch.rand(5, 4, device="cuda"))
        assert values.dtype == torch.bfloat16
        (values.float().square().mean() + layers[0].weight.sum()).backward()
        for parameter in layers.parameters():
            assert parameter.grad is not None and parameter.grad.shape == parameter.shape
            assert parameter.grad.dtype == torch.float32 and parameter.grad.device.type == "cuda"
        assert unused.weight.grad is None
        with pytest.raises(RuntimeError, match="same device"):
            layers(torch.rand(5, 4))
    assert not torch.cuda.is_available() or torch.cuda.device_count()


def test_bytes_are_counted_until_they_are_freed() -> None:
    with fake_cuda(), DeviceUse() as use:
        first = torch.zeros(1000, device="cuda")  # 4000 bytes, which an allocator rounds to 4096
        assert use.bytes == use.peak_bytes == 4096
        view = first[10:]
        assert use.bytes == 4096
        second = first + 1
        assert use.bytes == 8192 and use.traffic_bytes == 3 * 4000
        del second
        assert use.bytes == 4096 and use.peak_bytes == 8192
        del first
        assert use.bytes == 4096 and view is not None
        del view
        assert use.bytes == 0
        use.restart()
        matrix = torch.zeros(16, 32, device="cuda")
        torch.mm(matrix, matrix.T)
        assert use.flops == 2 * 16 * 32 * 16 and use.peak_bytes == 2048 + 1024


def test_activations_are_what_a_step_holds() -> None:
    """Of a network whose activations can be counted by hand, and twice as many for twice the batch."""

    def peak(rows: int) -> int:
        with fake_cuda(), DeviceUse() as use:
            layers = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(10)]).to("cuda")
            held = use.bytes
            layers(torch.zeros(rows, 64, device="cuda")).sum().backward()
            return use.peak_bytes - held

    # Ten outputs of ReLU are kept, with the input; in the backward pass a few more come and go.
    one = 4096 * 64 * 4
    assert 11 * one < peak(4096) < 15 * one
    assert peak(8192) == pytest.approx(2 * peak(4096), rel=0.05)


@functools.cache
def lite_cost(method: str, rays: int) -> StudentCost:
    return student_cost(config(method, train_num_rays_per_batch=rays), 96, 96)


@pytest.mark.parametrize("method", ["r2l-lite", "mobile-r2l-lite"])
def test_a_small_method_as_it_is_trained(method: str) -> None:
    small, large = (lite_cost(method, rays) for rays in (4096, 16384))
    assert 0 < small.step.peak_bytes < large.step.peak_bytes < 5 * small.step.peak_bytes
    assert large.step.flops > 3 * small.step.flops
    assert small.held_bytes == pytest.approx(large.held_bytes, rel=0.3)
    assert small.frame == large.frame


@pytest.mark.parametrize("method", ["r2l-lite", "mobile-r2l-lite"])
def test_training_leaves_the_room_that_the_plan_counts(method: str) -> None:
    """The room is measured by PyTorch's allocator during training, and here by the plan's count."""
    made = config(method, train_num_rays_per_batch=4096)
    planned = lite_cost(method, 4096)
    made.pipeline.model.fit_to(96, 96)
    with fake_cuda(), Rehearsal(), DeviceUse() as use:
        counted = {
            "max_memory_allocated": lambda _: use.peak_bytes,
            "memory_allocated": lambda _: use.bytes,
            "reset_peak_memory_stats": lambda _: use.restart(),
        }
        with mock.patch.multiple("torch.cuda", **counted):
            room = training_bytes(made.pipeline, 96, 96, torch.device("cuda:0"))
        assert use.bytes == 0
    needed = planned.held_bytes + max(planned.step.peak_bytes, planned.frame.peak_bytes)
    assert needed <= room < 2 * needed


def test_a_training_step_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(self: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrialStep, "loss", out_of_memory)
    with fake_cuda(), Rehearsal(), pytest.raises(InputError, match="train-num-rays-per-batch"):
        training_bytes(config("r2l-lite").pipeline, 96, 96, torch.device("cuda:0"))


def test_a_plan_fills_the_ring_with_what_is_left() -> None:
    capture, gpu = Capture(800, 800, 100), GPUS[0]
    full = make_plan(config("r2l"), capture, gpu, 20, GIB, cost(2.0))
    assert full.teacher_views == 300 and full.total_bytes < gpu.usable_bytes
    more = make_plan(config("r2l", num_views=5000), capture, gpu, 20, GIB, cost(2.0))
    assert 300 < more.teacher_views < 5000
    spare = gpu.usable_bytes - more.total_bytes  # A fifth of what is left for the ring.
    assert 0 <= 4 * spare - more.ring_bytes < 5 * 800 * 800 * 7
    assert make_plan(config("r2l", num_views=5000), capture, GPUS[-1], 20, GIB, cost(2.0)).teacher_views == 5000
    half = make_plan(config("r2l", view_downscale=2.0), capture, gpu, 20, GIB, cost(2.0))
    assert half.ring_bytes == full.ring_bytes / 4 and half.view_size == (400, 400)
    assert full.iterations == pytest.approx(0.6 * 20 * 60 / full.seconds_per_step, rel=0.01)


@pytest.mark.parametrize(
    ("method", "step", "said"),
    [
        ("r2l", 20.0, r"train-num-rays-per-batch to (\d+) \(now 32768\)"),
        ("mobile-r2l-paper", 20.0, r"whole-images to (\d+) \(now 10\)"),
        ("r2l", 1000.0, r"view-downscale (\d+)"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_flag_to_lower(method: str, step: float, said: str) -> None:
    capture = Capture(800, 800, 100)
    with pytest.raises(InputError, match="GPU of 8 GiB") as refused:
        make_plan(config(method), capture, GPUS[0], 20, GIB, cost(step))
    found = re.search(said, str(refused.value))
    assert found is not None
    if "batch" in said:  # a step is as large as its batch
        share = int(found[1]) / 32768
        made = make_plan(config(method), capture, GPUS[0], 20, GIB, cost(step * share))
        assert made.teacher_views >= 20


def test_the_slowest_of_three_limits_counts() -> None:
    gpu = dataclasses.replace(GPUS[0], tflops=100, gb_per_second=1000)
    assert step_seconds(Cost(0, 45 * 10**12, 0, 0), gpu) == pytest.approx(1.0)
    assert step_seconds(Cost(0, 0, 700 * 10**9, 0), gpu) == pytest.approx(1.0)
    assert step_seconds(Cost(0, 1, 1, 1000), gpu) == pytest.approx(6e-3)


def test_a_size_between_two_listed_ones() -> None:
    assert script.find_gpu(8) == GPUS[0] and script.find_gpu(80) == GPUS[-1]
    assert script.find_gpu(16) == dataclasses.replace(GPUS[1], gigabytes=16)
    assert script.find_gpu(4).name == GPUS[0].name


def test_a_capture_and_a_teacher_of_a_run(tiny_teacher: Path) -> None:
    capture, teacher = script.Plan("r2l-lite", teacher=tiny_teacher)._capture()
    assert (capture.width, capture.height) == (24, 24) and 0 < capture.photos <= 8
    assert 0 < teacher_bytes(teacher, capture.photos) < GIB


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    script.Plan("r2l-lite", gpu_memory=8, width=96, height=72, photos=10).main()
    said = capsys.readouterr().out
    assert "r2l-lite on a GPU of 8 GiB, 96x72 pixels" in said and "--pipeline.datamanager.num-views 300" in said
    with pytest.raises(InputError, match="--whole-images: r2l-lite has no such option"):
        script.Plan("r2l-lite", whole_images=3).main()
