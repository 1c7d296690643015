"""Replacements for what the oldest supported PyTorch (2.1) lacks. Features are detected, never versions."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
