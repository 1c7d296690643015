"""TensorRT and TensorRT-RTX through the native API that both share: ONNX, plan, data pointers of tensors.

Building plans, choosing between the two and every refusal were run on a machine without a GPU; plans of R2L students ran
on an H100 with TensorRT-RTX. NOT VERIFIED: ray images, and TensorRT itself.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from r2l_nerfstudio.disk import write_atomically
from r2l_nerfstudio.engines.onnx_graph import INPUT, OUTPUT, network_onnx
from r2l_nerfstudio.engines.protocol import BrokenEngine, BuildSpec, EngineName, Precision
from r2l_nerfstudio.engines.sizes import (
    GRID_STEP,
    chunk_rows,
    from_bucket,
    in_chunks,
    in_dim,
    out_dim,
    reads_ray_image,
    to_bucket,
    upsampling_factor,
)
from r2l_nerfstudio.errors import first_line

_MOST_CELLS = 512
_LEAST_CAPABILITY = (7, 5)


@dataclass(frozen=True)
class Shapes:
    """Smallest, usual and largest shape of an input; equal shapes give a static plan."""

    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]


def usual_shapes(network: nn.Module, device: torch.device) -> Shapes:
    """Return one chunk of rays for a ResMLP, or ray images of up to 512x512 cells for a MobileR2L."""
    if reads_ray_image(network):
        sides = (GRID_STEP, 104, _MOST_CELLS)
        return Shapes(*((1, in_dim(network), side, side) for side in sides))
    return Shapes(*[(chunk_rows(device), in_dim(network))] * 3)


def version() -> str:
    flavour, _ = find_flavour(None)
    return f"{flavour.__name__}-{flavour.__version__}" if flavour else ""


def why_not(device: torch.device, precision: Precision) -> str | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return "it needs an NVIDIA GPU of compute capability 7.5 or newer, and this machine has none."
    if precision == "bf16":
        return "it has no transposed convolution in bf16, and fp16 is closer to fp32: choose fp16."
    try:
        import onnx  # noqa: F401 - torch writes the graph with it
    except Exception as error:
        return f"a package is missing ({error}): pip install 'r2l-nerfstudio[tensorrt-rtx]'."
    return find_flavour(torch.cuda.get_device_capability(device))[1]


def find_flavour(capability: tuple[int, int] | None) -> tuple[ModuleType | None, str | None]:
    """Return TensorRT-RTX if it supports the GPU, else TensorRT: RTX needs no other package index and plans in a
    second.

    Args:
        capability: compute capability of the GPU; None if the plan is built for another machine.

    Returns:
        The module or None, and why there is none and what to do.
    """
    if capability is not None and capability < _LEAST_CAPABILITY:
        return None, (
            f"the GPU has compute capability {capability[0]}.{capability[1]} and 7.5 is needed: choose inductor."
        )
    reasons = []
    for name, extra in (("tensorrt_rtx", "tensorrt-rtx"), ("tensorrt", "tensorrt")):
        try:
            module = import_module(name)
            module.Builder  # noqa: B018 - the registry's package without libraries imports, and is empty
        except Exception as error:  # ImportError, OSError or RuntimeError, depending on what is missing.
            reasons.append(f"{name} does not import ({first_line(error)}); pip install 'r2l-nerfstudio[{extra}]'")
            continue
        if capability is not None and not _serves(module, capability):
            reasons.append(
                f"{name} {module.__version__} does not support compute capability {capability[0]}.{capability[1]}"
            )
            continue
        return module, None
    return None, "; ".join(reasons) + "; or choose inductor."


def _serves(module: ModuleType, capability: tuple[int, int]) -> bool:
    # TensorRT-RTX lists them; TensorRT has no list, and supports all from 7.5 on.
    listed = getattr(getattr(module, "ComputeCapability", None), "__members__", None)
    if module.__name__ != "tensorrt_rtx" or listed is None or f"SM{capability[0]}{capability[1]}" in listed:
        return True
    # Not listed, but its plans ran on an H100; 1.7 refuses them.
    return capability == (9, 0) and module.__version__.startswith("1.4.")


def build_plan(trt: ModuleType, graph: bytes, shapes: dict[str, Shapes]) -> bytes:
    """Return a serialized engine of an ONNX model. TensorRT-RTX needs no GPU for this.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        graph: the model, in the types it is to run in.
        shapes: shapes of each input that has an axis of open size.

    Raises:
        BrokenEngine: if the graph cannot be read or planned, with the library's reasons.
    """
    log = _Log(trt)
    builder = trt.Builder(log.logger)
    # Absent in versions that only have strong typing.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    definition = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(definition, log.logger)
    if not parser.parse(graph):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise BrokenEngine(f"{trt.__name__} cannot read the graph: {errors}")
    config = builder.create_builder_config()
    if shapes:
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape.least, shape.usual, shape.most)
        if config.add_optimization_profile(profile) < 0:
            raise BrokenEngine(f"{trt.__name__} refuses the shapes {shapes}")
    plan = builder.build_serialized_network(definition, config)
    if plan is None:
        raise BrokenEngine(f"{trt.__name__} built nothing: {'; '.join(log.said) or 'no reason given'}")
    return bytes(plan)


class _Log:
    """Collect the errors that TensorRT would print."""

    def __init__(self, trt: ModuleType) -> None:
        said = self.said = []

        class Logger(trt.ILogger):
            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    said.append(message)

        self.logger = Logger()


def build(spec: BuildSpec) -> TensorRtEngine:
    """Return an engine that runs a plan, from the cache if it holds one for this library and GPU.

    Raises:
        BrokenEngine: if there is no library for the GPU, or it returns nothing.
    """
    trt, reason = find_flavour(torch.cuda.get_device_capability(spec.device))
    if trt is None:
        raise BrokenEngine(reason)
    file = None if spec.cache is None else spec.cache / f"{trt.__name__}-{spec.precision}.plan"
    if file is not None and file.exists():
        try:
            return TensorRtEngine(trt, file.read_bytes(), spec)
        except BrokenEngine:
            file.unlink()
    graph = network_onnx(spec.network, spec.precision)
    plan = build_plan(trt, graph, {INPUT: usual_shapes(spec.network, spec.device)})
    if file is not None:
        write_atomically(file, plan, is_private=True)
    return TensorRtEngine(trt, plan, spec)


class TensorRtEngine:
    """A plan on a GPU. NOT VERIFIED for ray images.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        plan: as `build_plan` makes it.
        spec: what it was built from.

    Raises:
        BrokenEngine: if the library rejects the plan.
    """

    name: EngineName = "tensorrt"

    def __init__(self, trt: ModuleType, plan: bytes, spec: BuildSpec) -> None:
        self.precision: Precision = spec.precision
        self._reads_image = reads_ray_image(spec.network)
        self._factor = upsampling_factor(spec.network)
        self._out_dim = out_dim(spec.network)
        self._rows = chunk_rows(spec.device)
        self._device = spec.device
        log = _Log(trt)
        self._runtime = trt.Runtime(log.logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BrokenEngine(f"{trt.__name__} rejects the plan: {'; '.join(log.said) or 'no reason given'}")
        # A context and a stream per render thread.
        self._local = threading.local()

    def __call__(self, encoded: Float[Tensor, "*encoded"]) -> Float[Tensor, "*values"]:
        encoded = encoded.detach()
        if not self._reads_image:
            return in_chunks(self._run, encoded, self._out_dim, self._rows)
        _, _, rows, columns = encoded.shape
        padded = to_bucket(encoded, GRID_STEP).contiguous()
        if max(padded.shape[-2:]) > _MOST_CELLS:
            raise BrokenEngine(f"{columns}x{rows} cells are more than the {_MOST_CELLS}x{_MOST_CELLS} planned for")
        batch, _, more_rows, more_columns = padded.shape
        values = encoded.new_empty(batch, self._out_dim, more_rows * self._factor, more_columns * self._factor)
        for frame, out in zip(padded.split(1), values.split(1), strict=True):
            self._run(frame, out)
        return from_bucket(values, rows, columns, self._factor)

    def _run(self, encoded: Tensor, values: Tensor) -> None:
        state = getattr(self._local, "state", None)
        if state is None:
            context = self._engine.create_execution_context()
            if context is None:
                raise BrokenEngine("no execution context: the GPU's memory may be full")
            state = self._local.state = (context, torch.cuda.Stream(self._device))
        context, stream = state
        current = torch.cuda.current_stream(self._device)
        if not context.set_input_shape(INPUT, tuple(encoded.shape)):
            raise BrokenEngine(f"the plan rejects an input of {tuple(encoded.shape)}")
        context.set_tensor_address(INPUT, encoded.data_ptr())
        context.set_tensor_address(OUTPUT, values.data_ptr())
        stream.wait_stream(current)
        started = context.execute_async_v3(stream.cuda_stream)
        # If this thread is interrupted, their memory must not be reused before the plan has run.
        encoded.record_stream(stream)
        values.record_stream(stream)
        current.wait_stream(stream)
        if not started:
            raise BrokenEngine("the plan did not start")
