"""Replacements for what the oldest supported PyTorch (2.1) lacks. Features are detected, never versions."""

from __future__ import annotations

import inspect
import math
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

OutOfMemoryError: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
"""Raised if a device has no memory left; `torch.OutOfMemoryError` from torch 2.5 on."""

_ALLOWED_GLOBALS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch", "device"),
    *(("torch", name) for name in ("float16", "float32", "float64", "bfloat16", "int32", "int64", "uint8", "bool")),
    *(("torch", f"{kind}Storage") for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Byte", "Bool")),
    ("_codecs", "encode"),  # Bytes in pickle protocol 2, as PyTorch itself allows.
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
}


class _TensorsOnly:
    """A pickle module for `torch.load` that builds tensors, plain containers and NumPy scalars, and nothing else."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in _ALLOWED_GLOBALS:
                raise pickle.UnpicklingError(f"Unsupported GLOBAL {module}.{name}")
            return super().find_class(module, name)

    @staticmethod
    def load(file: Any, **settings: Any) -> Any:
        return _TensorsOnly.Unpickler(file, **settings).load()


def has_graph_export() -> bool:
    """Return whether `torch.onnx.export` takes a traced program with dynamic shapes, as exports of a whole student need."""
    return "dynamic_shapes" in inspect.signature(torch.onnx.export).parameters


def load_tensors(checkpoint: Path) -> dict[str, Any]:
    """Load a checkpoint of tensors and NumPy scalars without running code from it; the tensors are mapped, not read.

    Schedulers that work in NumPy leave its scalars beside the tensors.

    Raises:
        pickle.UnpicklingError: it names something else. RuntimeError, OSError, EOFError, ...: it is damaged.
    """
    if hasattr(torch.serialization, "safe_globals"):
        scalar = np.float64(0).__reduce__()[0]
        allowed: list[Any] = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype]
        allowed += [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
        with torch.serialization.safe_globals(allowed):
            return torch.load(str(checkpoint), map_location="cpu", weights_only=True, mmap=True)
    return torch.load(str(checkpoint), map_location="cpu", weights_only=False, mmap=True, pickle_module=_TensorsOnly)


class PlainMuon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with `torch.optim.Muon`'s update, for PyTorch before 2.9.

    Nesterov momentum, orthogonalized by five Newton-Schulz iterations in bf16, with decoupled weight decay.

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
        """Return a matrix with the singular vectors of `matrix` [rows, columns] and singular values near 1, in bf16."""
        a, b, c = self.COEFFICIENTS
        tall = matrix.shape[0] > matrix.shape[1]
        x = (matrix.T if tall else matrix).bfloat16()
        x = x / x.norm().clamp(min=eps)
        for _ in range(self.ITERATIONS):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.T if tall else x


if TYPE_CHECKING:
    Muon = PlainMuon
else:
    Muon = getattr(torch.optim, "Muon", PlainMuon)
