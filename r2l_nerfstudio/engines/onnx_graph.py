"""The network as an ONNX graph, for engines that read one."""

from __future__ import annotations

import inspect
import io
import warnings
from typing import Any, cast

import torch
from torch import nn

from r2l_nerfstudio.engines.protocol import Precision
from r2l_nerfstudio.engines.sizes import device_of, in_dim, reads_ray_image
from r2l_nerfstudio.engines.weights import FixedNetwork

INPUT, OUTPUT = "encoded", "values"


def exporter_settings() -> dict[str, Any]:
    """Return settings of `torch.onnx.export` that select the exporter which takes one second instead of ten."""
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        return {"dynamo": False, "opset_version": 20}
    return {"opset_version": 17}  # The only exporter there; its newest opset before torch 2.5.


def network_onnx(network: nn.Module, precision: Precision = "fp32") -> bytes:
    """Return the network as ONNX with norms folded: fp32 `encoded` in, fp32 `values` out, any number of rays or any size.

    Args:
        network: a `ResMLP` or `MobileR2L` in evaluation mode.
        precision: precision of weights and arithmetic; the casts are part of the graph.

    Returns:
        The serialized model.
    """
    device = device_of(network)
    if reads_ray_image(network):
        example = torch.zeros(1, in_dim(network), 5, 6, device=device, dtype=torch.float32)
        axes = {INPUT: {2: "rows", 3: "columns"}, OUTPUT: {2: "height", 3: "width"}}
    else:
        example = torch.zeros(8, in_dim(network), device=device, dtype=torch.float32)
        axes = {INPUT: {0: "rays"}, OUTPUT: {0: "rays"}}
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The warning recommends the exporter that takes ten seconds.
        torch.onnx.export(
            FixedNetwork(network, precision),
            (example,),
            cast(Any, file),  # Annotated as a path; documented to take a stream too.
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes=axes,
            **exporter_settings(),
        )
    return file.getvalue()
