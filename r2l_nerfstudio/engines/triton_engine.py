"""The R2L network as one Triton kernel; see `triton_kernel`."""

from __future__ import annotations

import os
from importlib import import_module

import torch
from jaxtyping import Float
from torch import Tensor, nn

from r2l_nerfstudio.engines.protocol import DTYPES, BrokenEngine, BuildSpec, EngineName, Precision
from r2l_nerfstudio.engines.sizes import chunk_rows
from r2l_nerfstudio.students.resmlp import ResMLP

WIDTHS = (64, 128, 256)
"""Widths of hidden layers whose activations a program holds on the chip."""


def version() -> str:
    return f"{import_module('triton').__version__}, tile {import_module('r2l_nerfstudio.engines.triton_kernel').TILE}"


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on a CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device, precision: Precision) -> str | None:
    if device.type != "cuda" and not is_interpreted():
        return "its kernel needs an NVIDIA GPU: choose torch or openvino."
    if precision != "fp16":  # Triton's interpreter, which the tests need, multiplies no bf16
        return "its kernel multiplies in fp16: choose that, or torch."
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernel needs compute capability 8.0 or newer: choose torch or tensorrt."
    try:
        import_module("triton")
    except Exception as error:  # ImportError, or whatever a broken installation raises
        return f"Triton does not import ({type(error).__name__}: {error}): install the torch build that has it."
    return None


def build(spec: BuildSpec) -> TritonEngine:
    """Lay the weights out; the kernel is compiled at the first call.

    Raises:
        BrokenEngine: the kernel does not evaluate this network.
    """
    network = spec.network
    if not isinstance(network, ResMLP):
        raise BrokenEngine("its kernel is for r2l students: choose torch, inductor or tensorrt")
    width = network.head.out_features
    if width not in WIDTHS or network.tail.out_features > 16:
        raise BrokenEngine(f"its kernel is for hidden layers of {', '.join(map(str, WIDTHS))} features, not {width}")
    return TritonEngine(network, spec.precision)


class TritonEngine:
    """A `ResMLP` whose hidden activations never leave the chip.

    Args:
        network: in fp32 and evaluation mode; its device is the engine's.
        precision: of the weights and products; sums are fp32.
    """

    name: EngineName = "triton"

    def __init__(self, network: ResMLP, precision: Precision) -> None:
        from r2l_nerfstudio.engines.triton_kernel import OUTPUTS, residual_mlp

        self.precision: Precision = precision
        self._kernel = residual_mlp
        dtype = DTYPES[precision]

        def transposed(layer: nn.Linear) -> tuple[Tensor, Tensor]:
            return layer.weight.detach().T.to(dtype).contiguous(), layer.bias.detach().float()

        layers = [transposed(layer) for layer in network.blocks.modules() if isinstance(layer, nn.Linear)]
        self._head = transposed(network.head)
        self._hidden = torch.stack([w for w, _ in layers]), torch.stack([b for _, b in layers])
        weight, bias = transposed(network.tail)
        self._out_dim = weight.shape[1]
        spare = OUTPUTS - self._out_dim
        self._tail = nn.functional.pad(weight, (0, spare)), nn.functional.pad(bias, (0, spare))
        self._rows = chunk_rows(torch.device("cuda"))

    def __call__(self, encoded: Float[Tensor, "rays in_dim"]) -> Float[Tensor, "rays out_dim"]:
        encoded = encoded.detach().contiguous()
        # Offsets in the kernel are 32 bits.
        parts = [
            self._kernel(part, self._head, self._hidden, self._tail, self._out_dim)
            for part in encoded.split(self._rows)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
