"""A student's graph as a plan of TensorRT or TensorRT-RTX, or as a program of Torch-TensorRT.

Building plans with TensorRT-RTX was run on a machine without a GPU. What needs one is NOT VERIFIED: building with TensorRT,
running a plan to compare it, everything of Torch-TensorRT beyond its refusals.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch

from r2l_nerfstudio.atomic_output import atomic_files
from r2l_nerfstudio.engines import torch_tensorrt as torch_tensorrt_engine
from r2l_nerfstudio.engines.protocol import BrokenEngine
from r2l_nerfstudio.engines.tensorrt import Shapes, build_plan
from r2l_nerfstudio.errors import InputError, first_line
from r2l_nerfstudio.export.comparison import Arrays, check_export, probe_inputs
from r2l_nerfstudio.export.graph import RAYS_AT_ONCE, GraphSpec
from r2l_nerfstudio.export.onnx_file import metadata, require_onnx, write_onnx
from r2l_nerfstudio.student import Student

Flavour = Literal["tensorrt", "tensorrt-rtx"]


def export_plan(
    student: Student, spec: GraphSpec, output: Path, flavour: Flavour, overwrite: bool = False
) -> float | None:
    """Write a plan, and beside it the metadata of ONNX files in JSON.

    Args:
        student: on the CPU.
        spec: which graph; one of rays takes up to 65536 of them.
        output: the file.
        flavour: TensorRT-RTX builds without a GPU, for any that it supports; TensorRT builds for the GPU of this
            machine.
        overwrite: whether the files may exist.

    Returns:
        PSNR in dB against PyTorch; None if there is no GPU to run a plan on.

    Raises:
        InputError: the library or its GPU is missing, it rejects the graph, the files may not be written, or the plan
            renders something else; nothing is kept then.
    """
    require_onnx()
    has_gpu = torch.cuda.is_available()
    if flavour == "tensorrt" and not has_gpu:
        raise InputError(
            "A TensorRT plan is built for the GPU of the machine, and this machine has none: run this where the plan"
            " will run, or export for TensorRT-RTX (r2l-export tensorrt-rtx), which builds without one, or ONNX."
        )
    trt = import_flavour(flavour)
    with atomic_files(output, overwrite, also=(".json",)) as file:
        graph_file = file.with_suffix(".onnx")
        write_onnx(student, spec, graph_file)
        rays = Shapes((1, 3), (RAYS_AT_ONCE, 3), (RAYS_AT_ONCE, 3))
        shapes = {"origins": rays, "directions": rays} if spec.inputs == "rays" else {}
        try:
            plan = build_plan(trt, graph_file.read_bytes(), shapes)
        except BrokenEngine as error:
            raise InputError(f"No plan could be built: {error}. Export ONNX instead (r2l-export onnx).") from error
        file.write_bytes(plan)
        about = {**metadata(student, spec), "library": f"{trt.__name__} {trt.__version__}"}
        file.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
        if not has_gpu:
            return None
        return check_export(student, spec, lambda inputs: run_plan(trt, file, inputs), f"The plan {output}")


def import_flavour(flavour: Flavour) -> ModuleType:
    """Return the library.

    Raises:
        InputError: it is not installed, or incomplete.
    """
    try:
        trt = import_module(flavour.replace("-", "_"))
        trt.Builder  # noqa: B018 - the registry's package without libraries imports, and is empty
    except Exception as error:  # ImportError, OSError or RuntimeError, depending on what is missing.
        raise InputError(
            f"This export needs the package {flavour}, which does not import ({first_line(error)}):"
            f" pip install {flavour} (the extra '{flavour}' of r2l-nerfstudio)."
        ) from error
    return trt


def run_plan(trt: ModuleType, path: Path, inputs: Arrays) -> Arrays:
    """Run a plan on the GPU. NOT VERIFIED.

    Raises:
        BrokenEngine: the library rejects the plan.
    """
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
    context = None if engine is None else engine.create_execution_context()
    if engine is None or context is None:
        raise BrokenEngine(f"{trt.__name__} rejects the plan that it built")
    held = {name: torch.from_numpy(np.ascontiguousarray(value)).cuda() for name, value in inputs.items()}
    for name, value in held.items():
        context.set_input_shape(name, tuple(value.shape))
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
    held |= {name: torch.empty(tuple(context.get_tensor_shape(name)), device="cuda") for name in outputs}
    for name, value in held.items():
        context.set_tensor_address(name, value.data_ptr())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    if not context.execute_async_v3(stream.cuda_stream):
        raise BrokenEngine("the plan did not start")
    stream.synchronize()
    return {name: held[name].cpu().numpy() for name in outputs}


def export_torch_tensorrt(student: Student, spec: GraphSpec, output: Path, overwrite: bool = False) -> float:
    """Write a program that `torch.export.load` reads if torch_tensorrt is imported. NOT VERIFIED beyond its refusals.

    Returns:
        PSNR in dB against PyTorch.

    Raises:
        InputError: as `export_plan`; the graph takes a camera only.
    """
    reason = torch_tensorrt_engine.why_not(torch.device("cuda"), spec.precision)
    if reason is not None:
        raise InputError(f"A Torch-TensorRT program cannot be built here: {reason}")
    if spec.inputs != "camera":
        raise InputError("--inputs rays: a Torch-TensorRT program is built for one size; leave the flag out.")
    torch_tensorrt = import_module("torch_tensorrt")

    graph = spec.build(student).cuda()
    inputs, _ = probe_inputs(student, spec, 0)
    examples = tuple(torch.from_numpy(value).cuda() for value in inputs.values())
    with atomic_files(output, overwrite) as file, torch.no_grad():
        compiled = torch_tensorrt.dynamo.compile(torch.export.export(graph, examples), list(examples))
        torch_tensorrt.save(compiled, str(file), inputs=list(examples))
        program = torch.export.load(str(file)).module()

        def run(arrays: Arrays) -> Arrays:
            found = program(*(torch.from_numpy(array).cuda() for array in arrays.values()))
            return dict(zip(graph.outputs, (value.cpu().numpy() for value in found), strict=True))

        return check_export(student, spec, run, f"The program {output}")
