"""The interface of engines: a network with fixed weights, built for one machine in one precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

EngineName = Literal["torch", "inductor", "openvino", "onnxruntime", "tensorrt", "torch-tensorrt", "triton"]
ENGINE_NAMES: tuple[EngineName, ...] = get_args(EngineName)

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PARITY_DB: dict[Precision, float] = {"fp32": 100.0, "bf16": 40.0, "fp16": 55.0}
"""Minimum PSNR in dB against fp32 PyTorch for an engine to be used; see `least_psnr`."""
_TF32_DB = 60.0
"""For fp32 on a GPU, where PyTorch's convolutions round to TF32: 77 dB was measured between two orders of the same sums."""


def least_psnr(precision: Precision, device: torch.device) -> float:
    """Return the minimum PSNR in dB against fp32 PyTorch on a device for an engine to be used there."""
    return min(PARITY_DB[precision], _TF32_DB) if device.type == "cuda" else PARITY_DB[precision]


class Engine(Protocol):
    """A network that is ready to run. Several threads may call it at the same time."""

    name: EngineName
    precision: Precision

    def __call__(self, encoded: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return the values of any number of rays, or of a ray image of any size.

        Args:
            encoded: fp32, on the engine's device: [rays, in_dim] for a ResMLP, [batch, in_dim, rows, columns] for a
                MobileR2L.

        Returns:
            fp32, on the same device: [rays, out_dim], or [batch, out_dim, rows * factor, columns * factor].
        """
        ...


@dataclass(frozen=True)
class BuildSpec:
    """What to build an engine from."""

    network: nn.Module
    """In evaluation mode, its weights not being trained; builders copy what they change."""
    precision: Precision
    device: torch.device
    cache: Path | None = None
    """Folder for compiled artifacts of this network, precision, device and engine version; None to keep none."""


class EngineModule(Protocol):
    """Functions of a module that builds an engine."""

    def version(self) -> str:
        """Return the version of everything that a compiled artifact depends on; part of its name on disk."""
        ...

    def why_not(self, device: torch.device, precision: Precision) -> str | None:
        """Return why the engine cannot run here and what would change that, as the end of a sentence; None if it can.

        It never raises, whatever an import raises.
        """
        ...

    def build(self, spec: BuildSpec) -> Engine:
        """Build the engine, which takes seconds to minutes.

        Raises:
            Exception: of any type, as the library raises it.
        """
        ...


class BrokenEngine(Exception):
    """A library returned nothing, or one of its files is not usable."""
