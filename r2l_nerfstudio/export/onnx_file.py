"""A student's graph as one ONNX file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from r2l_nerfstudio.atomic_output import atomic_files
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.export import mobile_onnx
from r2l_nerfstudio.export.comparison import Arrays, check_export, probe_inputs
from r2l_nerfstudio.export.graph import GraphSpec
from r2l_nerfstudio.student import Student
from r2l_nerfstudio.torch_compat import has_graph_export

if TYPE_CHECKING:
    import onnx

OPSET = 20


def export_onnx(student: Student, spec: GraphSpec, output: Path, overwrite: bool = False) -> float:
    """Write a complete ONNX file that renders what PyTorch renders.

    Args:
        student: on the CPU.
        spec: which graph.
        output: the file.
        overwrite: whether it may exist.

    Returns:
        PSNR in dB against PyTorch.

    Raises:
        InputError: packages are missing, the file may not be written, it is for phones and has operators that they
            lack, or it renders something else; nothing is kept then.
    """
    require_onnx()
    with atomic_files(output, overwrite) as file:
        write_onnx(student, spec, file)
        if spec.is_plain:
            mobile_onnx.mobile_verdict(file)
        return check_export(student, spec, lambda inputs: run_onnx(file, inputs), f"The ONNX file {output}")


def write_onnx(student: Student, spec: GraphSpec, path: Path) -> None:
    """Write the graph with its weights and `metadata`; `export_onnx` also compares it with PyTorch.

    Raises:
        InputError: the student does not support these inputs.
    """
    import onnx

    graph = spec.build(student)
    inputs, _ = probe_inputs(student, spec, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The exporter warns about its own internals.
        program = torch.onnx.export(
            graph,
            tuple(torch.from_numpy(value) for value in inputs.values()),
            dynamo=True,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=dynamic_shapes(student, spec, graph.inputs),
            opset_version=mobile_onnx.OPSET if spec.is_plain else OPSET,
            external_data=False,
            verbose=False,
        )
    model = exported_model(program)
    forget_source(model)
    if spec.is_plain:
        mobile_onnx.order_depth_first(model)
    onnx.helper.set_model_props(model, metadata(student, spec))
    onnx.checker.check_model(model)
    onnx.save_model(model, str(path))


def exported_model(program: torch.onnx.ONNXProgram | None) -> onnx.ModelProto:
    """Return the ONNX model of an exported program.

    Raises:
        RuntimeError: the exporter returned none.
    """
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return program.model_proto


def dynamic_shapes(student: Student, spec: GraphSpec, inputs: tuple[str, ...]) -> tuple[dict[int, Any], ...] | None:
    """Return the sizes that a graph leaves open, by axis of each input: the number of rays, or of a network's cells."""
    if spec.is_static:
        return None
    if spec.part == "network" and student.model.reads_ray_image:
        return ({axis: torch.export.Dim(name, min=3) for axis, name in ((2, "rows"), (3, "columns"))},)
    if spec.part != "network" and spec.inputs == "camera":
        return None
    return ({0: torch.export.Dim("rays", min=1)},) * len(inputs)


def forget_source(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes on the Python code behind each node, which include paths of this machine."""
    graph = model.graph
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def metadata(student: Student, spec: GraphSpec) -> dict[str, str]:
    """Return what another program needs: text, and numbers or lists of numbers in JSON; lengths in the run's unit."""
    model, encoding = student.model, student.model.ray_encoding
    found: dict[str, Any] = {
        "method": student.method_name,
        "precision": spec.precision,
        "part": spec.part,
        "frame": "the run's, to which its dataparser_transforms.json leads; OpenGL camera axes",
        "ray_encoding": model.config.ray_encoding,
        "spacing": encoding.spacing,
        "samples": encoding.num_points,
        "frequencies": encoding.num_frequencies,
        "near": float(encoding.near),
        "far": float(encoding.far),
        "center": encoding.center.tolist(),
        "scale": float(encoding.radius),
        "axes": encoding.axes.tolist(),
        "directions": "planar" if encoding.conventions.is_planar else "unit",
        "pixel_offset": encoding.conventions.pixel_offset,
        "is_contracted": encoding.is_contracted,
        "encoding_frame": None if encoding.conventions.frame is None else encoding.frame.tolist(),
        "ndc": None if encoding.conventions.ndc is None else list(encoding.conventions.ndc),
        "background": model.background.tolist(),
        "factor": 1,
    }
    if model.reads_ray_image:
        focal = model.native_focal(1.0)
        found |= {"factor": model.factor, "margin": model.margin, "focal": focal, "pitch": 1.0 / focal}
    if spec.inputs == "camera" or spec.is_static:
        found |= {"width": spec.width, "height": spec.height}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}


def run_onnx(path: Path, inputs: Arrays) -> Arrays:
    """Run an ONNX file with ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {name: np.asarray(value) for name, value in zip(names, session.run(names, inputs), strict=True)}


def require_onnx() -> None:
    """Check for the packages that write, check and run ONNX.

    Raises:
        InputError: one is missing, or PyTorch is too old.
    """
    if not has_graph_export():
        raise InputError(
            f"An export needs torch 2.6 or newer, and this is torch {torch.__version__}. Run r2l-export in an"
            " environment with a newer one; it needs the run's folder only."
        )
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"An export needs the package {error.name}, which is not installed: pip install onnx onnxscript"
            " onnxruntime (or the extra 'export' of r2l-nerfstudio)."
        ) from error
