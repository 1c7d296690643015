"""Muon for convolutions, and the moving average of weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from r2l_nerfstudio.distillation.averaging import WeightAverage
from r2l_nerfstudio.distillation.optimization import MuonOptimizerConfig


def steps(module: nn.Module, settings: MuonOptimizerConfig, count: int = 3) -> None:
    optimizer = settings.setup(params=[module.weight])
    torch.manual_seed(0)
    for _ in range(count):
        optimizer.zero_grad()
        assert module.weight.grad is None
        module.weight.grad = torch.randn(6, 5).view_as(module.weight)
        optimizer.step()


def test_muon_treats_a_1x1_convolution_as_a_matrix() -> None:
    linear, convolution = nn.Linear(5, 6), nn.Conv2d(5, 6, 1)
    convolution.weight.data.copy_(linear.weight.data[..., None, None])
    start = linear.weight.detach().clone()
    for module in (linear, convolution):
        steps(module, MuonOptimizerConfig(lr=0.1))
    assert torch.equal(convolution.weight[..., 0, 0], linear.weight)
    assert (linear.weight - start).abs().max() > 0.01


def test_muon_resumes_from_its_saved_state() -> None:
    straight, resumed = nn.Conv2d(5, 6, 1), nn.Conv2d(5, 6, 1)
    resumed.load_state_dict(straight.state_dict())
    gradients = torch.randn(4, 6, 5, 1, 1, generator=torch.Generator().manual_seed(1))

    def run(module: nn.Module, grads: torch.Tensor, state: dict | None) -> dict:
        optimizer = MuonOptimizerConfig(lr=0.1).setup(params=[module.weight])
        if state is not None:
            optimizer.load_state_dict(state)
        for grad in grads:
            module.weight.grad = grad
            optimizer.step()
        return copy.deepcopy(optimizer.state_dict())

    run(straight, gradients, None)
    run(resumed, gradients[2:], run(resumed, gradients[:2], None))
    assert torch.equal(straight.weight, resumed.weight)


def test_average_follows_early_training_and_then_moves_slowly() -> None:
    module = nn.Linear(1, 1)
    module.weight.data.fill_(100.0)
    average = WeightAverage(module, decay=0.9)
    for value in [1.0] * 200 + [2.0]:
        module.weight.data.fill_(value)
        average.update()
    average.swap()
    assert abs(float(module.weight) - 1.1) < 1e-3
    average.swap()
    assert float(module.weight) == 2.0


def test_average_is_saved_completely_and_can_be_restarted() -> None:
    module = nn.Linear(3, 2)
    average = WeightAverage(module, decay=0.9)
    for _ in range(5):
        module.weight.data.add_(1.0)
        average.update()
    other = WeightAverage(nn.Linear(3, 2), decay=0.9)
    other.load_state_dict(average.state_dict())
    assert int(other.updates) == 5
    for ours, theirs in zip(other.buffers(), average.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    average.reset()
    expected = module.weight.detach().clone()
    average.swap()
    assert torch.equal(module.weight, expected) and int(average.updates) == 0
