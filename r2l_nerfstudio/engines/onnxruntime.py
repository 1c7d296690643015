"""ONNX Runtime on CPUs, in fp32: used where OpenVINO is missing."""

from __future__ import annotations

from importlib import metadata

import torch
from jaxtyping import Float
from torch import Tensor, nn

from r2l_nerfstudio.engines.onnx_graph import INPUT, OUTPUT, network_onnx
from r2l_nerfstudio.engines.protocol import BuildSpec, EngineName, Precision
from r2l_nerfstudio.engines.sizes import (
    chunk_rows,
    in_chunks,
    out_dim,
    reads_ray_image,
)


def version() -> str:
    # Importing the module for its version would take seconds.
    return metadata.version("onnxruntime")


def why_not(device: torch.device, precision: Precision) -> str | None:
    if device.type != "cpu":
        return "it is used on CPUs only; on a GPU choose tensorrt or inductor."
    if precision != "fp32":
        return "on a CPU it supports fp32 only, its fastest precision: choose that."
    try:
        import onnx  # noqa: F401 - torch writes the graph with it
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return f"a package is missing ({error}): pip install 'r2l-nerfstudio[onnxruntime]'."
    except Exception as error:  # A broken installation.
        return f"ONNX Runtime does not start ({type(error).__name__}: {error}): install it again."
    return None


def build(spec: BuildSpec) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(spec.network)


class OnnxRuntimeEngine:
    """A network run by ONNX Runtime's CPU provider.

    Args:
        network: in fp32, evaluation mode, on the CPU.
    """

    name: EngineName = "onnxruntime"
    precision: Precision = "fp32"

    def __init__(self, network: nn.Module) -> None:
        import onnxruntime

        self._reads_image = reads_ray_image(network)
        self._out_dim = out_dim(network)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(network_onnx(network), options, providers=["CPUExecutionProvider"])

    def __call__(self, encoded: Float[Tensor, "*encoded"]) -> Float[Tensor, "*values"]:
        encoded = encoded.detach()
        if self._reads_image:
            return torch.cat([self._values(frame.contiguous()) for frame in encoded.split(1)])
        return in_chunks(self._run, encoded, self._out_dim, chunk_rows(encoded.device))

    def _run(self, encoded: Tensor, values: Tensor) -> None:
        values.copy_(self._values(encoded))

    def _values(self, encoded: Tensor) -> Tensor:
        return torch.from_numpy(self._session.run([OUTPUT], {INPUT: encoded.numpy()})[0])
