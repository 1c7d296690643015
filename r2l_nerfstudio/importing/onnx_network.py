"""MobileR2L networks from the `.onnx` files that the published code exports: BatchNorm folded, GELU replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from r2l_nerfstudio.errors import InputError, one_line
from r2l_nerfstudio.importing.published_network import (
    PublishedNetwork,
    check_memory,
    encoding_size,
    mobile_sizes,
    our_columns,
)
from r2l_nerfstudio.students.mobile import MobileR2L

if TYPE_CHECKING:
    import onnx

MOST_BYTES = 2 << 30
NORM_EPSILON = 1e-5
"""PyTorch's BatchNorm epsilon: a variance this much below 1 makes a norm the identity."""
AGREEMENT = 1e-4
"""Largest difference between the file's graph and our network with its weights."""


@dataclass(frozen=True)
class Step:
    """One node of the graph."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]


def read_onnx(path: Path, num_points: int | None = None, num_frequencies: int | None = None) -> PublishedNetwork:
    """Read a MobileR2L network.

    `Relu` and Snap's `GeluSnap` both stand for GELU, with which the weights were trained: the published plain export is a
    ReLU network with a GELU network's weights.

    Args:
        path: the file.
        num_points: sample points per ray; read from the file by default.
        num_frequencies: octaves of the frequency encoding; read from the file by default.

    Raises:
        InputError: if it is damaged, has other operators, or other connections than MobileR2L.
    """
    path = Path(path)
    model = _load(path)
    weights = _weights(path, model)
    steps = _steps(path, model, weights)
    (given,) = [value for value in model.graph.input if value.name not in weights] or [None]
    if given is None or len(model.graph.output) != 1:
        raise _refused(path, "it has not one input and one output")
    result = model.graph.output[0].name
    sizes, state, in_dim = _network(path, steps, weights)
    points, octaves = encoding_size(path, in_dim, {}, num_points, num_frequencies)
    state["head.weight"] = state["head.weight"][:, our_columns(points, octaves)]

    def run(encoded: Tensor) -> Tensor:
        return _run(path, steps, weights, given.name, result, encoded)

    shape = [size.dim_value for size in given.type.tensor_type.shape.dim]
    cells = (shape[2], shape[3]) if len(shape) == 4 and min(shape[2:]) > 0 else None
    network = PublishedNetwork(path, "mobile-r2l", state, run, points, octaves, sizes, cells)
    _check_connections(network, in_dim)
    return network


def _refused(path: Path, why: str) -> InputError:
    return InputError(
        f"The file {path} cannot be imported: {why}. Pass the .onnx of a MobileR2L network as its own code exports it"
        " (not that of its sampler or embedder), or the .tar it was exported from."
    )


def _load(path: Path) -> onnx.ModelProto:
    try:
        import onnx
    except ImportError as error:
        raise InputError(
            "Reading an .onnx file needs the package onnx, which is not installed: pip install onnx (or the extra"
            " 'export' of r2l-nerfstudio)."
        ) from error
    if not path.is_file():
        raise InputError(f"There is no checkpoint at {path}: give a published .tar or .onnx file.")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise _refused(path, f"it has {size} bytes, and no .onnx file has more than {MOST_BYTES}")
    check_memory(path, size)
    try:
        # Data outside the file is not read: it may refer to any file of the machine.
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own
        raise _refused(path, f"it is damaged ({type(error).__name__}: {one_line(error)})") from error


def _array(path: Path, tensor: onnx.TensorProto) -> Tensor:
    from onnx import TensorProto, numpy_helper

    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise _refused(path, f"its weight {tensor.name} is stored in another file")
    try:
        array = np.array(numpy_helper.to_array(tensor))
    except Exception as error:
        raise _refused(path, f"its weight {tensor.name} is damaged ({one_line(error)})") from error
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise _refused(path, f"its weight {tensor.name} has non-finite numbers")
    return torch.from_numpy(array)


def _weights(path: Path, model: onnx.ModelProto) -> dict[str, Tensor]:
    found = {tensor.name: _array(path, tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and len(node.output) == 1:
            values = [attribute.t for attribute in node.attribute if attribute.name == "value"]
            if values:
                found[node.output[0]] = _array(path, values[0])
    return found


def _steps(path: Path, model: onnx.ModelProto, weights: dict[str, Tensor]) -> list[Step]:
    from onnx import helper

    others = sorted({node.op_type for node in model.graph.node} - set(OPERATORS) - {"Constant", "Identity"})
    if others:
        raise _refused(path, f"it has operators that are not MobileR2L's ({', '.join(others[:6])})")
    aliases: dict[str, str] = {}
    steps = []
    for node in model.graph.node:
        if node.op_type == "Constant":
            continue
        inputs = tuple(aliases.get(name, name) for name in node.input)
        if len(node.output) < 1 or not all(inputs):
            raise _refused(path, f"its node {node.name or node.op_type} lacks an input or an output")
        if node.op_type == "Identity":
            aliases[node.output[0]] = inputs[0]
            continue
        try:
            attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        except ValueError as error:
            raise _refused(path, f"its node {node.name or node.op_type} is damaged ({one_line(error)})") from error
        steps.append(Step(node.op_type, inputs, node.output[0], attributes))
    return steps


def _plain_convolution(step: Step, stride: int, padding: int) -> bool:
    wanted = {
        "strides": [stride, stride],
        "pads": [padding] * 4,
        "dilations": [1, 1],
        "group": 1,
        "output_padding": [0, 0],
        "auto_pad": b"NOTSET",
    }
    return all(
        name == "kernel_shape" or (list(value) if isinstance(value, list | tuple) else value) == wanted.get(name)
        for name, value in step.attributes.items()
    )


def _transposed_stride(weight: Tensor) -> int:
    return {4: 2, 3: 3}.get(weight.shape[2], 0)


def _network(
    path: Path, steps: list[Step], weights: dict[str, Tensor]
) -> tuple[dict[str, int], dict[str, Tensor], int]:
    """Return sizes, the state for our network with identity norms, and the length of an encoded ray in the file's order."""
    layers = []
    for step in steps:
        if step.kind not in ("Conv", "ConvTranspose"):
            continue
        weight = weights.get(step.inputs[1]) if len(step.inputs) > 1 else None
        if weight is None or weight.ndim != 4:
            raise _refused(path, f"a {step.kind} has no weights in the file")
        bias = weights.get(step.inputs[2]) if len(step.inputs) > 2 else None
        across = weight.shape[0 if step.kind == "Conv" else 1]
        bias = torch.zeros(across) if bias is None else bias
        if bias.shape != (across,):
            raise _refused(path, f"a {step.kind} of {across} channels has a bias of shape {list(bias.shape)}")
        stride = 1 if step.kind == "Conv" else _transposed_stride(weight)
        square = weight.shape[2:] in ((1, 1),) if step.kind == "Conv" else weight.shape[2:] in ((4, 4), (3, 3))
        if not square or not _plain_convolution(step, stride, 1 if stride == 2 else 0):
            raise _refused(path, f"a {step.kind} with a kernel of {list(weight.shape[2:])} is not MobileR2L's")
        layers.append((step.kind, weight, bias))
    kinds = [kind for kind, _, _ in layers]
    ups = kinds.count("ConvTranspose")
    body = kinds.index("ConvTranspose") - 1 if ups else -1
    wanted = ["Conv"] * (1 + max(body, 0)) + (["ConvTranspose"] + ["Conv"] * 4) * ups + ["Conv"]
    if not ups or body < 0 or body % 2 or kinds != wanted:
        raise _refused(path, f"its {len(kinds)} convolutions do not follow each other as MobileR2L's do")
    _, head, head_bias = layers[0]
    width, in_dim = head.shape[:2]
    state = {"head.weight": head, "head.bias": head_bias}
    rest = iter(layers[1:])

    def take(name: str, shape: tuple[int, ...]) -> None:
        _, weight, bias = next(rest)
        if tuple(weight.shape) != shape:
            raise _refused(path, f"a layer has weights of shape {list(weight.shape)} instead of {list(shape)}")
        state[f"{name}.weight"], state[f"{name}.bias"] = weight, bias

    def take_block(name: str, channels: int) -> None:
        for part in ("first", "second"):
            take(f"{name}.{part}", (channels, channels, 1, 1))
            norm = f"{name}.{part}_norm"
            state[f"{norm}.weight"], state[f"{norm}.bias"] = torch.ones(channels), torch.zeros(channels)
            state[f"{norm}.running_mean"] = torch.zeros(channels)
            state[f"{norm}.running_var"] = torch.full((channels,), 1.0 - NORM_EPSILON)
            state[f"{norm}.num_batches_tracked"] = torch.tensor(0)

    for block in range(body // 2):
        take_block(f"blocks.{block}", width)
    factors, channels = [], [width]
    transposed = [weight for kind, weight, _ in layers if kind == "ConvTranspose"]
    for number, weight in enumerate(transposed):
        channels.append(weight.shape[1])
        factors.append(_transposed_stride(weight))
        take(f"up.{3 * number}", (channels[-2], channels[-1], weight.shape[2], weight.shape[2]))
        for place in (1, 2):
            take_block(f"up.{3 * number + place}", channels[-1])
    take("tail", (3, channels[-1], 1, 1))
    return mobile_sizes(path, width, body // 2, factors, channels[1:]), state, in_dim


def _gelu(step: Step, x: Tensor) -> Tensor:
    # The weights were trained with GELU, whatever the file calls it.
    return F.gelu(x)


def _convolution(step: Step, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias)


def _transposed(step: Step, x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
    stride = _transposed_stride(weight)
    return F.conv_transpose2d(x, weight, *bias, stride=stride, padding=1 if stride == 2 else 0)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "Relu": _gelu,
    "GeluSnap": _gelu,
    "Gelu": _gelu,
    "Sigmoid": lambda step, x: x.sigmoid(),
    "Add": lambda step, a, b: a + b,
    # GELU written out: x / sqrt(2), erf, + 1, * x, * 0.5.
    "Mul": lambda step, a, b: a * b,
    "Div": lambda step, a, b: a / b,
    "Erf": lambda step, x: x.erf(),
}
"""What each node of a MobileR2L's graph computes."""


@torch.no_grad()
def _run(path: Path, steps: list[Step], weights: dict[str, Tensor], given: str, result: str, encoded: Tensor) -> Tensor:
    """Evaluate the graph as the file has it."""
    values = {given: encoded}
    uses: dict[str, int] = {}
    for step in steps:
        for name in step.inputs:
            uses[name] = uses.get(name, 0) + 1
    for step in steps:
        try:
            inputs = [values[name] if name in values else weights[name] for name in step.inputs]
            values[step.output] = OPERATORS[step.kind](step, *inputs)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise _refused(path, f"its {step.kind} cannot be computed ({one_line(error)})") from error
        for name in step.inputs:
            uses[name] -= 1
            if not uses[name] and name != result:
                values.pop(name, None)
    if result not in values:
        raise _refused(path, "its output comes from no node")
    return values[result]


def _check_connections(network: PublishedNetwork, in_dim: int) -> None:
    """Check that the file's graph joins the weights, which are in our order of layers, as our network does: by its
    values."""
    sizes = dict(network.sizes)
    factor = sizes.pop("upsampling_factor")
    ours = MobileR2L(in_dim, 3, factor=factor, **cast(dict[str, Any], sizes))
    ours.load_state_dict(network.state)
    encoded = torch.randn(1, in_dim, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = network.run(encoded)
        mine = ours.eval()(encoded[:, our_columns(network.num_points, network.num_frequencies)])
    if theirs.shape != mine.shape or not float((theirs - mine).abs().max()) <= AGREEMENT:
        raise _refused(network.path, "its layers are not connected as MobileR2L's are")
