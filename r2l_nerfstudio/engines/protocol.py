"""What every engine is: a network with fixed weights, made ready for one machine in one precision."""

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
"""Least PSNR, in dB against fp32 torch, of an engine that may be used."""


class Engine(Protocol):
    """A network made ready to run. Calls may come from several threads at once."""

    name: EngineName
    precision: Precision

    def __call__(self, code: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Values of any number of rays, or of a ray image of any size.

        Args:
            code: fp32, on the engine's device: [rays, in_dim] for a ResMLP, [batch, in_dim, rows, columns] for a MobileR2L.

        Returns:
            fp32, on the same device: [rays, out_dim], or [batch, out_dim, rows * factor, columns * factor].
        """
        ...


@dataclass(frozen=True)
class Order:
    """What to build."""

    network: nn.Module
    """In evaluation mode, its weights at rest; builders copy what they change."""
    precision: Precision
    device: torch.device
    cache: Path | None = None
    """Folder for compiled artefacts of exactly this network, precision, device and engine version; None to keep none."""


class EngineModule(Protocol):
    """What a module of this package that makes an engine offers."""

    def version(self) -> str:
        """Of everything a compiled artefact depends on; part of its name on disk."""
        ...

    def why_not(self, device: torch.device, precision: Precision) -> str | None:
        """Why the engine cannot run here and what would change that, as the end of a sentence; None if it can.

        Never raises, whatever an import does.
        """
        ...

    def build(self, order: Order) -> Engine:
        """Make the engine; seconds to minutes.

        Raises:
            Exception: of any kind, as the library beneath raises it.
        """
        ...


class BrokenEngine(Exception):
    """A library gave back nothing, or a file of its is not what it should be."""
