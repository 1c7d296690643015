"""Engines by name, each imported on first use."""

from __future__ import annotations

import math
import threading
from importlib import import_module
from pathlib import Path
from typing import cast

import torch
from torch import nn

from r2l_nerfstudio.engines.parity import parity
from r2l_nerfstudio.engines.protocol import ENGINE_NAMES, BuildSpec, Engine, EngineModule, Precision, least_psnr
from r2l_nerfstudio.errors import InputError

_MODULES = {
    "torch": "torch_engine",
    "inductor": "inductor",
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
    "tensorrt": "tensorrt",
    "torch-tensorrt": "torch_tensorrt",
    "triton": "triton_engine",
}


_ONE_AT_A_TIME = threading.Lock()


def engine_module(name: str) -> EngineModule:
    """Return the module that builds an engine.

    Raises:
        InputError: for an unknown name.
    """
    if name not in _MODULES:
        raise InputError(f"Unknown engine {name!r}: choose one of auto, {', '.join(ENGINE_NAMES)}.")
    return cast(EngineModule, import_module(f"r2l_nerfstudio.engines.{_MODULES[name]}"))


def make(module: EngineModule, spec: BuildSpec) -> Engine:
    """Build an engine, one at a time per process: PyTorch's exporters and tracers keep their state in globals.

    Raises:
        Exception: of any type, as the library raises it.
    """
    with _ONE_AT_A_TIME:
        return module.build(spec)


def build_engine(
    name: str,
    network: nn.Module,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    margin: int = 0,
) -> Engine:
    """Build a named engine and check it against the network before returning it.

    Args:
        name: one of `ENGINE_NAMES`.
        network: a `ResMLP` or `MobileR2L` on `device`, in evaluation mode, its weights not being trained.
        precision: precision of the arithmetic; inputs and outputs are always fp32.
        device: device of inputs and outputs.
        cache: folder for compiled artifacts of this network, precision and device; None to keep none.
        margin: as of `parity`.

    Raises:
        InputError: for an unknown name, an engine that cannot run here, that fails to build, or whose values differ
            from the network's by more than its precision allows.
    """
    module = engine_module(name)
    device = torch.device(device)
    reason = module.why_not(device, precision)
    if reason is not None:
        raise InputError(f"The engine {name} cannot run in {precision} on {device.type}: {reason}")
    try:
        engine = make(module, BuildSpec(network, precision, device, cache))
        found = parity(engine, network, device, margin=margin)
    except InputError:
        raise
    except Exception as error:  # Each library raises its own exceptions.
        raise InputError(
            f"The engine {name} could not be built in {precision} ({type(error).__name__}: {error}): choose another"
            " engine, or auto."
        ) from error
    least = least_psnr(precision, device)
    if not found >= least:
        said = "non-finite values" if found == -math.inf else f"only {found:.0f} dB"
        raise InputError(
            f"The engine {name} gives {said} against fp32 PyTorch in {precision}, and {least:.0f} dB"
            " are needed: choose a higher precision, another engine, or auto."
        )
    return engine
