"""Muon, for every PyTorch and for CPUs without bf16 arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from r2l_nerfstudio.engines.torch_engine import is_bf16_fast


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with the update of `torch.optim.Muon`.

    Nesterov momentum, orthogonalized by five Newton-Schulz iterations, with decoupled weight decay. PyTorch has it from 2.9
    on, in bf16 only: ten times slower than fp32 on a CPU without bf16 arithmetic.

    Args:
        params: matrices.
        lr: learning rate before it is adjusted to a matrix's shape.
        weight_decay: decoupled, per unit of learning rate.
        momentum: share of the average gradient that is kept at each step.
        eps: least norm that a matrix is divided by.
        adjust_lr_fn: "match_rms_adamw": `0.2 * sqrt(max(rows, columns))` (Liu et al. 2025, sec. 2.2); "original":
            `sqrt(max(1, rows / columns))`.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    ITERATIONS = 5

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        eps: float = 1e-7,
        adjust_lr_fn: str = "original",
    ) -> None:
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eps": eps}
        super().__init__(params, {**settings, "adjust_lr_fn": adjust_lr_fn})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all matrices that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                average = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                update = self.orthogonalized(matrix.grad.lerp(average, momentum), group["eps"])
                rows, columns = matrix.shape
                if group["adjust_lr_fn"] == "match_rms_adamw":
                    scale = 0.2 * math.sqrt(max(rows, columns))
                else:
                    scale = math.sqrt(max(1.0, rows / columns))
                matrix.mul_(1 - lr * group["weight_decay"])
                matrix.add_(update, alpha=-lr * scale)
        return loss

    def orthogonalized(self, matrix: Tensor, eps: float) -> Tensor:
        """Return a matrix with the singular vectors of `matrix` [rows, columns] and singular values near 1."""
        a, b, c = self.COEFFICIENTS
        tall = matrix.shape[0] > matrix.shape[1]
        x = (matrix.T if tall else matrix).to(torch.bfloat16 if is_bf16_fast(matrix.device) else torch.float32)
        x = x / x.norm().clamp(min=eps)
        for _ in range(self.ITERATIONS):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.T if tall else x
