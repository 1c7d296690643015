"""Torch-TensorRT: a network exported and compiled by `torch_tensorrt.dynamo`. Only chosen by name, since it pins
PyTorch's version.

NOT VERIFIED: it cannot be imported without a GPU and NVIDIA's package index. Every refusal was run.
"""

from __future__ import annotations

from importlib import import_module

import torch
from jaxtyping import Float
from torch import Tensor

from r2l_nerfstudio.engines.protocol import DTYPES, BuildSpec, EngineName, Precision
from r2l_nerfstudio.engines.sizes import (
    GRID_STEP,
    chunk_rows,
    from_bucket,
    in_chunks,
    out_dim,
    reads_ray_image,
    to_bucket,
    upsampling_factor,
)
from r2l_nerfstudio.engines.tensorrt import usual_shapes
from r2l_nerfstudio.engines.weights import FixedNetwork
from r2l_nerfstudio.errors import first_line


def version() -> str:
    return import_module("torch_tensorrt").__version__


def why_not(device: torch.device, precision: Precision) -> str | None:
    # Checked first: without a GPU the import ends in any of four exceptions, some of them after seconds.
    if device.type != "cuda" or not torch.cuda.is_available():
        return "it needs an NVIDIA GPU of compute capability 7.5 or newer, and this machine has none."
    if precision == "bf16":
        return "TensorRT has no transposed convolution in bf16, and fp16 is closer to fp32: choose fp16."
    try:
        import_module("torch_tensorrt")
    except Exception as error:
        return (
            f"torch_tensorrt does not import ({first_line(error)}): pip install"
            " 'r2l-nerfstudio[torch-tensorrt]', in the version of your torch, or choose tensorrt."
        )
    return None


def build(spec: BuildSpec) -> TorchTensorRtEngine:
    """Compile for one chunk of rays, or for ray images of any size in steps. NOT VERIFIED."""
    torch_tensorrt = import_module("torch_tensorrt")
    network, device = spec.network, spec.device
    shapes = usual_shapes(network, device)
    fixed = FixedNetwork(network, spec.precision).network
    example = torch.zeros(shapes.usual, device=device, dtype=DTYPES[spec.precision])
    sizes: dict[int, torch.export.Dim] | None = None
    if reads_ray_image(network):
        sizes = {
            axis: GRID_STEP * torch.export.Dim(name, min=1, max=shapes.most[axis] // GRID_STEP)
            for axis, name in ((2, "rows"), (3, "columns"))
        }
    with torch.no_grad():
        program = torch.export.export(fixed, (example,), dynamic_shapes=(sizes,))
        inputs = [
            torch_tensorrt.Input(
                min_shape=shapes.least, opt_shape=shapes.usual, max_shape=shapes.most, dtype=example.dtype
            )
        ]
        compiled = torch_tensorrt.dynamo.compile(program, arg_inputs=inputs)
    return TorchTensorRtEngine(spec, compiled)


class TorchTensorRtEngine:
    """A compiled program on a GPU. NOT VERIFIED.

    Args:
        spec: what was built.
        compiled: takes and returns the precision's type.
    """

    name: EngineName = "torch-tensorrt"

    def __init__(self, spec: BuildSpec, compiled: torch.nn.Module) -> None:
        self.precision: Precision = spec.precision
        self._dtype = DTYPES[spec.precision]
        self._compiled = compiled
        self._reads_image = reads_ray_image(spec.network)
        self._factor = upsampling_factor(spec.network)
        self._out_dim = out_dim(spec.network)
        self._rows = chunk_rows(spec.device)

    def __call__(self, encoded: Float[Tensor, "*encoded"]) -> Float[Tensor, "*values"]:
        encoded = encoded.detach()
        if not self._reads_image:
            return in_chunks(self._run, encoded, self._out_dim, self._rows)
        padded = to_bucket(encoded, GRID_STEP).to(self._dtype).contiguous()
        values = torch.cat([self._compiled(frame) for frame in padded.split(1)]).float()
        return from_bucket(values, encoded.shape[-2], encoded.shape[-1], self._factor)

    def _run(self, encoded: Tensor, values: Tensor) -> None:
        values.copy_(self._compiled(encoded.to(self._dtype)))
