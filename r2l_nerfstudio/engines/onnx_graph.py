"""A network as an ONNX graph, for the engines that read one."""

from __future__ import annotations

import io
import warnings

import torch
from torch import nn

from r2l_nerfstudio.engines.parity import in_dim
from r2l_nerfstudio.engines.protocol import Precision
from r2l_nerfstudio.engines.sizes import is_grid
from r2l_nerfstudio.engines.weights import FixedNetwork

INPUT, OUTPUT = "code", "values"


def network_onnx(network: nn.Module, precision: Precision = "fp32") -> bytes:
    """The network alone, norms folded, fp32 `code` in and fp32 `values` out, of any number of rays or any size.

    Args:
        network: a `ResMLP` or `MobileR2L` in evaluation mode.
        precision: of weights and arithmetic; the casts are part of the graph.

    Returns:
        The serialized model.
    """
    device = network.head.weight.device
    if is_grid(network):
        example = torch.zeros(1, in_dim(network), 5, 6, device=device, dtype=torch.float32)
        axes = {INPUT: {2: "rows", 3: "columns"}, OUTPUT: {2: "height", 3: "width"}}
    else:
        example = torch.zeros(8, in_dim(network), device=device, dtype=torch.float32)
        axes = {INPUT: {0: "rays"}, OUTPUT: {0: "rays"}}
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about being the exporter that takes a second, not ten
        torch.onnx.export(
            FixedNetwork(network, precision),
            (example,),
            file,
            dynamo=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes=axes,
            opset_version=20,
        )
    return file.getvalue()
