"""The engines by name, each imported when it is first asked for."""

from __future__ import annotations

import math
import threading
from importlib import import_module
from pathlib import Path
from typing import cast

import torch
from torch import nn

from r2l_nerfstudio.engines.parity import parity
from r2l_nerfstudio.engines.protocol import ENGINE_NAMES, PARITY_DB, Engine, EngineModule, Order, Precision
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
    """The module that makes an engine.

    Raises:
        InputError: for an unknown name.
    """
    if name not in _MODULES:
        raise InputError(f"There is no engine {name!r}: choose one of auto, {', '.join(ENGINE_NAMES)}.")
    return cast(EngineModule, import_module(f"r2l_nerfstudio.engines.{_MODULES[name]}"))


def make(module: EngineModule, order: Order) -> Engine:
    """Build an engine, one at a time in a process: torch's exporters and tracers keep what they are doing in globals.

    Raises:
        Exception: of any kind, as the library beneath raises it.
    """
    with _ONE_AT_A_TIME:
        return module.build(order)


def build_engine(
    name: str,
    network: nn.Module,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
    cache: Path | None = None,
) -> Engine:
    """A named engine, checked against the network itself before it is handed out.

    Args:
        name: one of `ENGINE_NAMES`.
        network: a `ResMLP` or `MobileR2L` on `device`, in evaluation mode, its weights at rest.
        precision: of the arithmetic; code and values are fp32 in any case.
        device: where code and values are.
        cache: folder for compiled artefacts of this very network, precision and device; None to keep none.

    Raises:
        InputError: for an unknown name, an engine that cannot run here, that fails to build, or whose values differ from
            the network's by more than its precision explains.
    """
    module = engine_module(name)
    device = torch.device(device)
    reason = module.why_not(device, precision)
    if reason is not None:
        raise InputError(f"The engine {name} cannot run in {precision} on {device.type}: {reason}")
    try:
        engine = make(module, Order(network, precision, device, cache))
        found = parity(engine, network, device)
    except InputError:
        raise
    except Exception as error:  # each library raises its own
        raise InputError(
            f"The engine {name} could not be built in {precision} ({type(error).__name__}: {error}): choose another one,"
            " or auto."
        ) from error
    if not found >= PARITY_DB[precision]:
        said = "values that are not finite" if found == -math.inf else f"only {found:.0f} dB"
        raise InputError(
            f"The engine {name} gives {said} against fp32 torch in {precision}, and {PARITY_DB[precision]:.0f} dB are"
            " needed: choose a higher precision, another engine, or auto."
        )
    return engine
