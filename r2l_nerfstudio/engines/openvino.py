"""OpenVINO on CPUs: the fastest engine there, with the least variation."""

from __future__ import annotations

import threading
import warnings
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from r2l_nerfstudio.engines.protocol import BuildSpec, EngineName, Precision
from r2l_nerfstudio.engines.sizes import (
    chunk_rows,
    in_chunks,
    in_dim,
    out_dim,
    reads_ray_image,
    upsampling_factor,
)
from r2l_nerfstudio.engines.weights import FixedNetwork, RowsLast

if TYPE_CHECKING:
    import openvino as ov

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_ABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}


def version() -> str:
    # Importing the module for its version would take seconds.
    return metadata.version("openvino")


def why_not(device: torch.device, precision: Precision) -> str | None:
    if device.type != "cpu":
        return "it is used on CPUs only; on a GPU choose tensorrt or inductor."
    try:
        abilities = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except ImportError as error:
        return f"OpenVINO cannot be imported ({error}): pip install 'r2l-nerfstudio[openvino]'."
    except Exception as error:  # A broken installation.
        return f"OpenVINO does not start ({type(error).__name__}: {error}): install it again."
    if _ABILITIES[precision] not in abilities:
        return f"OpenVINO has no {precision} arithmetic on this CPU: choose fp32."
    return None


@lru_cache(maxsize=1)
def _core() -> ov.Core:
    import openvino as ov

    return ov.Core()


def build(spec: BuildSpec) -> OpenVinoEngine:
    return OpenVinoEngine(spec.network, spec.precision)


class OpenVinoEngine:
    """A network compiled by OpenVINO: a ResMLP for one number of rays, a MobileR2L for any size.

    Args:
        network: in fp32, evaluation mode, on the CPU.
        precision: precision of the arithmetic; OpenVINO receives the weights in fp32.
    """

    name: EngineName = "openvino"

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        self.precision: Precision = precision
        self._reads_image = reads_ray_image(network)
        self._out_dim = out_dim(network)
        self._factor = upsampling_factor(network)
        self._rows = chunk_rows(torch.device("cpu"))
        fixed = FixedNetwork(network, "fp32")
        if self._reads_image:
            example, shape = torch.zeros(1, 5, 6, in_dim(network), dtype=torch.float32), [1, -1, -1, in_dim(network)]
            fixed = RowsLast(fixed)
        else:
            example = torch.zeros(8, in_dim(network), dtype=torch.float32)
            shape = [self._rows, in_dim(network)]
        model = _converted(fixed, example)
        model.reshape(shape)
        self._compiled = _core().compile_model(
            model,
            "CPU",
            {
                # Without it OpenVINO silently uses bf16 wherever that is faster.
                "INFERENCE_PRECISION_HINT": _HINTS[precision],
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                # Otherwise it caches something for every image size. oneDNN's own cache remains, limited to 1024 primitives.
                "CPU_RUNTIME_CACHE_CAPACITY": "0",
            },
        )
        # One per render thread: a request owns the memory of its inputs and outputs.
        self._local = threading.local()

    def __call__(self, encoded: Float[Tensor, "*encoded"]) -> Float[Tensor, "*values"]:
        encoded = encoded.detach()
        if not self._reads_image:
            return in_chunks(self._run, encoded, self._out_dim, self._rows)
        frames = []
        for rays in encoded.permute(0, 2, 3, 1).split(1):
            _, rows, columns, _ = rays.shape
            frames.append(encoded.new_empty(1, rows * self._factor, columns * self._factor, self._out_dim))
            self._run(rays.contiguous(), frames[-1])
        values = torch.cat(frames) if len(frames) > 1 else frames[0]
        return values.permute(0, 3, 1, 2)

    def _run(self, encoded: Tensor, values: Tensor) -> None:
        """Run on the tensors' own memory, without copies."""
        import openvino as ov

        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self._compiled.create_infer_request()
        request.set_input_tensor(ov.Tensor(encoded.numpy(), shared_memory=True))
        request.set_output_tensor(ov.Tensor(values.numpy(), shared_memory=True))
        request.infer()


def _converted(module: nn.Module, example: Tensor) -> ov.Model:
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    # `openvino.convert_model` reports each use to its vendor.
    frontend = FrontEndManager().load_by_framework("pytorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `torch.jit`, which OpenVINO reads, is deprecated.
        decoder = TorchScriptPythonDecoder(module, example_input=(example,))
    return frontend.convert(frontend.load(decoder))
