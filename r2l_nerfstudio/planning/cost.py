"""What one training step and one frame of a student take of a GPU, by running both on fake CUDA tensors."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from nerfstudio.engine.optimizers import Optimizers
from torch.utils._python_dispatch import _disable_current_modes

from r2l_nerfstudio.distillation.averaging import WeightAverage
from r2l_nerfstudio.distillation.trainer import DistillationTrainerConfig
from r2l_nerfstudio.distillation.trial_step import TrialStep, blank_model
from r2l_nerfstudio.distillation.view_ring import BYTES_PER_PIXEL
from r2l_nerfstudio.engines.weights import FixedNetwork
from r2l_nerfstudio.planning.device_use import DeviceUse
from r2l_nerfstudio.planning.fake_cuda import fake_cuda


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes of a GPU."""

    peak_bytes: int
    """Beyond what is held all the time."""
    flops: int
    """Floating-point operations of matrix products and convolutions, a multiply-add counted as two."""
    traffic_bytes: int
    """Read and written, every operator on its own: a compiler that fuses them moves less."""
    kernels: int


@dataclass(frozen=True)
class StudentCost:
    """What a student takes of a GPU."""

    held_bytes: int
    """Held while training: weights, gradients' moments, the average of the weights, hard rays."""
    step: Cost
    """One training iteration."""
    frame: Cost
    """One frame of the teacher views' size, drawn in fp16."""


class StudentWork(TrialStep):
    """A student with random weights and teacher views without content, ready to train and render on a device.

    Args:
        config: configuration of a method, its batch and network as they would be trained; it is not changed.
        width: width of teacher views in pixels.
        height: height of teacher views in pixels.
        device: `cuda`, within `fake_cuda` or with a GPU; or `cpu`.
    """

    def __init__(self, config: DistillationTrainerConfig, width: int, height: int, device: str) -> None:
        config = copy.deepcopy(config)
        pipeline = config.pipeline
        pipeline.model.fit_to(width, height)
        with _disable_current_modes():  # An empty volume reads how many rows it has.
            model = blank_model(pipeline.model)
            fixed = FixedNetwork(model.network, "fp16")
        super().__init__(model.to(device), pipeline.datamanager, width, height, pipeline.bf16)
        self.fixed = fixed.to(device)
        self.ring_bytes = self.ring.capacity * height * width * BYTES_PER_PIXEL
        self.optimizers = Optimizers(config.optimizers, self.model.get_param_groups())
        decay = pipeline.ema_decay
        self.average = WeightAverage(self.model, decay) if decay > 0 else None

    def step(self) -> None:
        """Run one training iteration as `ns-train` does."""
        self.model.train()
        self.optimizers.zero_grad_all()
        # Nothing of the forward pass has a name here: it is freed while the backward pass goes on.
        self.loss().backward()
        self.optimizers.optimizer_step_all()
        if self.average is not None:
            self.average.update()


def student_cost(config: DistillationTrainerConfig, width: int, height: int) -> StudentCost:
    """Run two training steps and a frame of a student on fake CUDA tensors. Seconds; needs no GPU.

    Args:
        config: of a method, its batch and network as they would be trained.
        width: of teacher views, in pixels.
        height: likewise.
    """
    with fake_cuda(), DeviceUse() as use:
        work = StudentWork(config, width, height, "cuda")
        work.step()  # makes the optimizers' state
        work.optimizers.zero_grad_all()
        held = use.bytes
        use.restart()
        work.step()
        step = _since(use, held)
        work.optimizers.zero_grad_all()
        work.model.eval()
        before = use.bytes
        use.restart()
        with work.model.network_run_by(work.fixed):
            work.frame()
        return StudentCost(held - work.ring_bytes, step, _since(use, before))


def _since(use: DeviceUse, held: int) -> Cost:
    return Cost(use.peak_bytes - held, use.flops, use.traffic_bytes, use.kernels)
