"""Small files in the format of the published code, with modules and arguments pickled as its trainers pickle them."""

from __future__ import annotations

import argparse
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def _published_classes() -> Iterator[dict[str, type]]:
    """Modules of the published code's names, for as long as something is pickled."""
    classes = {}
    for module, name in (("model.nerf_raybased", "NeRF_v3_2"), ("model.R2L", "R2L"), ("easydict", "EasyDict")):
        made = types.ModuleType(module)
        base = dict if name == "EasyDict" else nn.Module
        classes[name] = type(name, (base,), {"__module__": module})
        setattr(made, name, classes[name])
        sys.modules[module] = made
    sys.modules["model"] = types.ModuleType("model")
    try:
        yield classes
    finally:
        for module in ("model", "model.nerf_raybased", "model.R2L", "easydict"):
            del sys.modules[module]


def numbers(*shape: int, generator: torch.Generator) -> Tensor:
    """Random weights of a layer's usual size."""
    return torch.randn(shape, generator=generator) / max(1, shape[1] if len(shape) > 1 else 4) ** 0.5


def r2l_weights(width: int = 8, blocks: int = 2, points: int = 4, octaves: int = 3) -> dict[str, Tensor]:
    """Of a published R2L."""
    generator = torch.Generator().manual_seed(0)
    in_dim = 3 * points * (2 * octaves + 1)
    shapes = {"head.0": (width, in_dim)}
    for block in range(blocks):
        shapes |= {f"body.{block}.body.0": (width, width), f"body.{block}.body.2": (width, width)}
    shapes["tail.0"] = (3, width)
    found = OrderedDict()
    for name, shape in shapes.items():
        found[f"{name}.weight"] = numbers(*shape, generator=generator)
        found[f"{name}.bias"] = numbers(shape[0], generator=generator)
    return found


def mobile_weights(
    width: int = 8, blocks: int = 1, points: int = 4, octaves: int = 3, kernels: tuple[int, ...] = (4, 4)
) -> dict[str, Tensor]:
    """Of a published MobileR2L, with BatchNorms that do something."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = OrderedDict()

    def layer(name: str, *shape: int, out: int) -> None:
        found[f"{name}.weight"] = numbers(*shape, generator=generator)
        found[f"{name}.bias"] = numbers(out, generator=generator)

    def block(name: str, channels: int) -> None:
        for place in (0, 3):
            layer(f"{name}.conv_block.{place}", channels, channels, 1, 1, out=channels)
            norm = f"{name}.conv_block.{place + 1}"
            found[f"{norm}.weight"] = 1 + 0.1 * numbers(channels, generator=generator)
            found[f"{norm}.bias"] = numbers(channels, generator=generator)
            found[f"{norm}.running_mean"] = numbers(channels, generator=generator)
            found[f"{norm}.running_var"] = 0.5 + torch.rand(channels, generator=generator)
            found[f"{norm}.num_batches_tracked"] = torch.tensor(10)

    in_dim = 3 * points * (2 * octaves + 1)
    layer("head.0", width, in_dim, 1, 1, out=width)
    for number in range(blocks):
        block(f"body.{number}", width)
    channels = width
    for number, kernel in enumerate(kernels):
        after = 4 if number == len(kernels) - 1 else 6
        layer(f"tail.{3 * number}", channels, after, kernel, kernel, out=after)
        channels = after
        block(f"tail.{3 * number + 1}", channels)
        block(f"tail.{3 * number + 2}", channels)
    layer(f"tail.{3 * len(kernels)}", 3, channels, 1, 1, out=3)
    return found


def write_tar(path: Path, weights: dict[str, Tensor], arguments: dict[str, Any] | None = None, **content: Any) -> Path:
    """As the published trainers save: state dictionary, optimizer, and the pickled module with its arguments.

    Args:
        path: the file.
        weights: of the network.
        arguments: plain values of the command line.
        **content: replaces or adds entries of the saved dictionary; None leaves one out.
    """
    is_mobile = any(".conv_block." in name for name in weights)
    with _published_classes() as classes:
        module = classes["R2L" if is_mobile else "NeRF_v3_2"]()
        module.args = classes["EasyDict"](arguments or {}) if is_mobile else argparse.Namespace(**(arguments or {}))
        whole = {
            "global_step": 1,
            "best_psnr": 30.0,
            "network_fn_state_dict": weights,
            "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 5e-4}]},
            "network_fn": module,
            **content,
        }
        torch.save({name: value for name, value in whole.items() if value is not None}, path)
    return path


def write_onnx(
    path: Path, weights: dict[str, Tensor], activation: str = "Relu", rows: int = 5, columns: int = 6
) -> Path:
    """The network of a published MobileR2L as its code exports it: BatchNorm folded, GELU written as `activation`."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, initializers = [], []

    def constant(name: str, tensor: Tensor) -> str:
        initializers.append(numpy_helper.from_array(tensor.contiguous().numpy(), name))
        return name

    def node(kind: str, inputs: list[str], **attributes: Any) -> str:
        output = f"value_{len(nodes)}"
        domain = "snap" if kind == "GeluSnap" else ""
        nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **attributes))
        return output

    def conv(x: str, name: str, norm: str | None = None) -> str:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if norm:
            scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + 1e-5).sqrt()
            weight = weight * scale[:, None, None, None]
            bias = (bias - weights[f"{norm}.running_mean"]) * scale + weights[f"{norm}.bias"]
        inputs = [x, constant(f"{name}.w", weight), constant(f"{name}.b", bias)]
        return node("Conv", inputs, kernel_shape=[1, 1], strides=[1, 1], pads=[0] * 4, dilations=[1, 1], group=1)

    def block(x: str, name: str) -> str:
        hidden = node(activation, [conv(x, f"{name}.conv_block.0", f"{name}.conv_block.1")])
        return node("Add", [x, conv(hidden, f"{name}.conv_block.3", f"{name}.conv_block.4")])

    first = hidden = node(activation, [conv("input", "head.0")])
    body = len({name.split(".")[1] for name in weights if name.startswith("body.")})
    for number in range(body):
        hidden = block(hidden, f"body.{number}")
    hidden = node("Add", [first, hidden])
    layers = len({name.split(".")[1] for name in weights if name.startswith("tail.")})
    factor = 1
    for layer in range(0, layers - 1, 3):
        weight = weights[f"tail.{layer}.weight"]
        stride = {4: 2, 3: 3}[weight.shape[2]]
        factor *= stride
        inputs = [hidden, constant(f"up{layer}.w", weight), constant(f"up{layer}.b", weights[f"tail.{layer}.bias"])]
        pads = [1 if stride == 2 else 0] * 4
        kernel = list(weight.shape[2:])
        hidden = node("ConvTranspose", inputs, kernel_shape=kernel, strides=[stride] * 2, pads=pads, group=1)
        hidden = block(block(hidden, f"tail.{layer + 1}"), f"tail.{layer + 2}")
    node("Sigmoid", [conv(hidden, f"tail.{layers - 1}")])
    nodes[-1].output[0] = "output"
    in_dim = weights["head.0.weight"].shape[1]
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch_size", in_dim, rows, columns])
    result = helper.make_tensor_value_info(
        "output", TensorProto.FLOAT, ["batch_size", 3, rows * factor, columns * factor]
    )
    graph = helper.make_graph(nodes, "network", [given], [result], initializers)
    opsets = [helper.make_opsetid("", 11), helper.make_opsetid("snap", 1)]
    onnx.save_model(helper.make_model(graph, opset_imports=opsets), str(path))
    return path
