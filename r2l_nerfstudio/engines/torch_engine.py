"""Eager PyTorch: always available, immediately, and the only engine that can follow weights during training."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from r2l_nerfstudio.engines.cuda_graph import CudaGraphs
from r2l_nerfstudio.engines.protocol import BuildSpec, EngineName, Precision
from r2l_nerfstudio.engines.sizes import (
    GRID_STEP,
    chunk_rows,
    device_of,
    from_bucket,
    reads_ray_image,
    to_bucket,
    upsampling_factor,
)
from r2l_nerfstudio.engines.weights import FixedNetwork, weights_of, weights_state

CPU_ROWS = 4096
"""Rays per call on a CPU: the hidden layers of more rays exceed its caches."""
_LEAST_ROWS = 4096
"""Least rays of a CUDA graph: fewer rays take a GPU the same time."""


def version() -> str:
    return torch.__version__


def why_not(device: torch.device, precision: Precision) -> str | None:
    if precision == "fp16" and device.type != "cuda":
        return "CPUs are slow in fp16: choose bf16 or fp32."
    if precision == "bf16" and not is_bf16_fast(device):
        return "this machine has no bf16 arithmetic: choose fp32."
    return None


def is_bf16_fast(device: torch.device) -> bool:
    """Return whether the machine multiplies bf16 natively, rather than in several steps of fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Private functions, absent from some builds; a CPU of unknown abilities stays with fp32.
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(check is not None and check() for check in checks)


def build(spec: BuildSpec) -> TorchEngine:
    return TorchEngine(spec.network, spec.precision)


class TorchEngine:
    """Eager PyTorch on a copy of the weights: norms folded, channels last for convolutions; in fp16, which is for GPUs,
    its kernels are launched as CUDA graphs.

    Args:
        network: in fp32 and evaluation mode; its device is the engine's.
        precision: precision of weights and arithmetic.
    """

    name: EngineName = "torch"

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        self.precision: Precision = precision
        self._fixed = FixedNetwork(network, precision)
        self._reads_image = reads_ray_image(network)
        self._seen: int | None = None
        self._weights = weights_of(network)
        # `refresh` writes in place, so the graphs read the new weights.
        self._graphs = CudaGraphs(self._network, device_of(network)) if precision == "fp16" else None

    def follow(self, network: nn.Module) -> None:
        """Set the network whose weights `refresh` copies: one of the same shape; by default the one it was built
        from."""
        self._fixed.follow(network)
        self._weights, self._seen = weights_of(network), None

    def refresh(self) -> None:
        """Copy the weights if they have changed since the last call. It may be interrupted anywhere."""
        state = weights_state(self._weights)
        if state != self._seen:
            self._seen = None  # Not current until all weights are copied.
            self._fixed.refresh()
            self._seen = state

    def __call__(self, encoded: Float[Tensor, "*encoded"]) -> Float[Tensor, "*values"]:
        # No `no_grad` context: the viewer may interrupt inside one, and gradients would stay off.
        encoded = encoded.detach()
        if self._graphs is not None:
            return self._replayed(self._graphs, encoded)
        if self._reads_image or encoded.device.type == "cuda" or encoded.shape[0] <= CPU_ROWS:
            return self._network(encoded)
        return torch.cat([self._fixed(part) for part in encoded.split(CPU_ROWS)])

    def _network(self, encoded: Tensor) -> Tensor:
        return self._fixed(encoded.contiguous(memory_format=torch.channels_last) if self._reads_image else encoded)

    def _replayed(self, graphs: CudaGraphs, encoded: Tensor) -> Tensor:
        """Run graphs of few shapes: powers of two of rays, or ray images in steps."""
        network = self._fixed.network
        if self._reads_image:
            frames = torch.cat([graphs(frame) for frame in to_bucket(encoded, GRID_STEP).split(1)])
            return from_bucket(frames, encoded.shape[-2], encoded.shape[-1], upsampling_factor(network))
        values = []
        for part in encoded.split(chunk_rows(encoded.device)):
            rows = max(_LEAST_ROWS, 1 << (len(part) - 1).bit_length())
            values.append(graphs(pad(part, (0, 0, 0, rows - len(part))))[: len(part)])
        return torch.cat(values)
