"""Muon, for every PyTorch and for CPUs without bf16 arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from jaxtyping import Float
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
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                self._update(group, matrices)
        return loss

    def _update(self, group: dict[str, Any], matrices: list[Tensor]) -> None:
        # All of a shape at once: one by one, launching their kernels took 56 ms of an `r2l`'s step of 98 ms on an H100.
        lr, momentum = group["lr"], group["momentum"]
        gradients = [cast(Tensor, matrix.grad) for matrix in matrices]
        averages = []
        for matrix, gradient in zip(matrices, gradients, strict=True):
            state = self.state[matrix]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            averages.append(state["momentum_buffer"])
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        updates = self.orthogonalized(torch.stack(torch._foreach_lerp(gradients, averages, momentum)), group["eps"])
        rows, columns = matrices[0].shape
        if group["adjust_lr_fn"] == "match_rms_adamw":
            scale = 0.2 * math.sqrt(max(rows, columns))
        else:
            scale = math.sqrt(max(1.0, rows / columns))
        torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
        torch._foreach_add_(matrices, [*updates.to(matrices[0].dtype).unbind()], alpha=-lr * scale)

    def orthogonalized(
        self, matrices: Float[Tensor, "matrices rows columns"], eps: float
    ) -> Float[Tensor, "matrices rows columns"]:
        """Return matrices with the same singular vectors and singular values near 1."""
        a, b, c = self.COEFFICIENTS
        tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.mT if tall else matrices
        x = x.to(torch.bfloat16 if is_bf16_fast(matrices.device) else torch.float32)
        x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
        for _ in range(self.ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x
