"""The graph that the web page runs: an origin and directions in, pixels of the screen out."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from r2l_nerfstudio.export.graph import EncodedNetwork, GraphPrecision
from r2l_nerfstudio.export.onnx_file import OPSET, exported_model, forget_source
from r2l_nerfstudio.export.plain_network import to_plain_operators
from r2l_nerfstudio.student import Student

if TYPE_CHECKING:
    import onnx

SMALL = 1024
"""Numbers; a weight of no more is kept as it is."""


class WebGraph(nn.Module):
    """Pixels as a canvas takes them: four bytes each, red, green, blue, 255.

    Args:
        student: copied.
        precision: of the network's arithmetic.
    """

    def __init__(self, student: Student, precision: GraphPrecision) -> None:
        super().__init__()
        # GPUs are at liberty to compute sines of large angles badly, and some do.
        self.encoded_network = EncodedNetwork(student.model, precision, reduce_angles=True)
        if precision == "fp32":
            # What WebAssembly runs: its GELU and transposed convolutions are slow, a sixth of a frame more.
            to_plain_operators(self.encoded_network.network)

        model = student.model
        self.factor = model.factor
        """Pixels along each side of a cell."""
        self.rays_per_cell = model.rays_per_cell
        """Rays along each side of a cell."""
        self.reads_ray_image = model.reads_ray_image
        """Whether the student reads ray images."""
        self.margin = model.margin
        """Cells around the image."""

    def forward(
        self, origin: Float[Tensor, "3"], directions: Float[Tensor, "rows columns 3"]
    ) -> Int[Tensor, "height width"]:
        """Return an image without its margin.

        Args:
            origin: of all rays, in the run's frame.
            directions: as the ray encoding reads them, rows from the top.

        Returns:
            int32, its bytes red, green, blue and 255 where the lowest byte comes first; [rows, columns], or for a MobileR2L
            `factor` times as many as there are cells inside the margin.
        """
        rgb = self.encoded_network(origin.expand_as(directions), directions)[..., :3]
        steps = (rgb.clamp(0.0, 1.0) * 255.0 + 0.5).floor()
        # Below 2^24 every whole number is an fp32; the fourth byte, 255, makes the integer that much less than zero.
        packed = steps[..., 0] + 256.0 * steps[..., 1] + 65536.0 * steps[..., 2]
        return packed.to(torch.int32) - 2**24


def write_web_graph(student: Student, precision: GraphPrecision, path: Path) -> None:
    """Write the graph as ONNX. Weights are always stored in half precision; for fp32 they are widened on loading."""
    import onnx

    graph = WebGraph(student, precision).eval()
    cells = (torch.export.Dim("rows", min=3), torch.export.Dim("columns", min=3))
    rows, columns = (dim if graph.rays_per_cell == 1 else graph.rays_per_cell * dim for dim in cells)
    example = torch.nn.functional.normalize(torch.randn(6 * graph.rays_per_cell, 5 * graph.rays_per_cell, 3), dim=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            (torch.zeros(3), example),
            dynamo=True,
            input_names=["origin", "directions"],
            output_names=["pixels"],
            dynamic_shapes={"origin": None, "directions": {0: rows, 1: columns}},
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    model = exported_model(program)
    forget_source(model)
    keep_in_half(model)
    onnx.checker.check_model(model)
    onnx.save_model(model, str(path))


def keep_in_half(model: onnx.ModelProto) -> None:
    """Keep large fp32 weights as fp16, and widen them where they are used: runtimes do that once, on loading."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or math.prod(tensor.dims) <= SMALL:
            continue
        half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{tensor.name}_half")
        casts.append(helper.make_node("Cast", [half.name], [tensor.name], to=TensorProto.FLOAT))
        tensor.CopyFrom(half)
    for number, node in enumerate(casts):
        model.graph.node.insert(number, node)
