"""ONNX graphs for phones: operators that their processors support, checked with ONNX Runtime's mobile usability
checker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from r2l_nerfstudio.errors import InputError

if TYPE_CHECKING:
    import onnx
    from onnxruntime.tools.mobile_helpers import usability_checker

OPSET = 18
"""Older than the desktop's opset: ONNX Runtime Mobile has supported it for years."""


def mobile_verdict(path: Path) -> str:
    """Return one line of ONNX Runtime's mobile usability checker on a graph that Android's NNAPI supports completely.

    Args:
        path: the ONNX file.

    Raises:
        InputError: it has an operator that NNAPI lacks, or a shape that is not fixed.
    """
    from onnxruntime.tools.mobile_helpers import usability_checker
    from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo

    model = ModelProtoWithShapeInfo(path).model_with_shape_info
    nnapi = usability_checker.check_nnapi_partitions(model, True)
    if nnapi.num_supported_nodes < nnapi.num_nodes:
        if nnapi.unsupported_ops:
            lacks = ", ".join(sorted(operator.removeprefix("ai.onnx:") for operator in nnapi.unsupported_ops))
            what = f"has operators that NNAPI lacks: {lacks}"
        else:
            what = f"has shapes that are not fixed at {nnapi.nodes_unsupported_due_to_dynamic_input} operators"
        raise InputError(
            f"--target mobile: this graph {what}. Only the network runs on a phone's processors: leave out --part;"
            " what comes before and after it runs on the phone's CPU (--target desktop --part encoding)."
        )
    core_ml = usability_checker.check_coreml_partitions(model, True, "coreml_supported_mlprogram_ops.md")
    said = [f"{name} {_judged(info)}" for name, info in (("NNAPI", nnapi), ("Core ML", core_ml))]
    return f"ONNX Runtime's mobile usability checker: {'; '.join(said)}."


def _judged(info: usability_checker.PartitioningInfo) -> str:
    lacks = ", ".join(sorted(operator.removeprefix("ai.onnx:") for operator in info.unsupported_ops))
    parts = f"{info.num_supported_nodes} of {info.num_nodes} operators, {info.num_partitions} partition"
    return f"{info.suitability().name} ({parts}{'s' * (info.num_partitions != 1)}{', not ' * bool(lacks)}{lacks})"


def order_depth_first(model: onnx.ModelProto) -> None:
    """Make every DepthToSpace take its channels depth first, the order that phones support, by sorting the filters
    before it.

    Args:
        model: each of its DepthToSpace operators follows a convolution of its own.
    """
    from onnx import numpy_helper

    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "DepthToSpace":
            continue
        attributes = {attribute.name: attribute for attribute in node.attribute}
        block = attributes["blocksize"].i ** 2
        attributes["mode"].s = b"DCR"
        for name in makers[node.input[0]].input[1:]:
            values = numpy_helper.to_array(weights[name])
            channels = np.arange(len(values)).reshape(-1, block).T.flatten()
            weights[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[channels]), name))
