"""A student's graph as a Core ML package (.mlpackage), for iOS 16 or macOS 13 and newer.

Conversion and structure were run on Linux. What needs a Mac is NOT VERIFIED: prediction, and the comparison with
PyTorch that follows conversion there.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import platform
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from r2l_nerfstudio.atomic_output import atomic_folder
from r2l_nerfstudio.errors import InputError, one_line
from r2l_nerfstudio.export.comparison import Arrays, check_export, probe_inputs
from r2l_nerfstudio.export.graph import RAYS_AT_ONCE, GraphSpec, StudentGraph
from r2l_nerfstudio.export.onnx_file import metadata
from r2l_nerfstudio.student import Student

MANIFEST = "Manifest.json"
IOS_16 = 7
"""Version of the specification of packages for iOS 16."""
NETWORK_OPERATORS = {"conv", "conv_transpose", "linear", "gelu"}
EXACT_OPERATORS = {"sin", "cos", "sqrt", "floor"}
"""Operators of the encoding; in half precision they would turn coordinates into noise."""
SMALL_WEIGHTS = 200_000
"""Bytes that a package may have beyond its parameters: the program, the manifest, masks of its constants."""


def export_coreml(student: Student, spec: GraphSpec, output: Path, overwrite: bool = False) -> float | None:
    """Write a package and check its structure, on a Mac also its values.

    Args:
        student: on the CPU.
        spec: which graph, of static shapes; its network is in the spec's precision, all else in fp32.
        output: the .mlpackage, a folder.
        overwrite: whether a package may exist.

    Returns:
        PSNR in dB against PyTorch; None except on a Mac, the only platform that runs Core ML.

    Raises:
        InputError: the package coremltools is missing or cannot convert the graph, the output may not be written, or
            its structure is wrong; nothing is kept then.
    """
    coremltools = import_coremltools()
    if Path(output).suffix != ".mlpackage":
        raise InputError(f"{output}: the name of a Core ML package must end in .mlpackage.")
    with atomic_folder(output, overwrite, MANIFEST, "Core ML package") as folder:
        graph = spec.build(student)
        inputs, outputs = probe_inputs(student, spec, 0)
        try:
            with _quiet():
                model = _convert(coremltools, graph, inputs)
        except Exception as error:  # Of any type, for example for an unknown operator.
            raise InputError(
                f"coremltools {coremltools.__version__} cannot convert this graph ({one_line(error)});"
                " try --part network, or r2l-export onnx --target mobile, which ONNX Runtime runs on Apple's processors."
            ) from error
        model.user_defined_metadata.update(metadata(student, spec))
        model.save(str(folder))
        check_structure(coremltools, folder, spec, inputs, outputs, graph)
        if platform.system() != "Darwin":
            return None
        what = f"The package {output}"
        return check_export(student, spec, lambda given: run_coreml(coremltools, folder, given), what)


def import_coremltools() -> Any:
    """Return the library.

    Raises:
        InputError: it is not installed.
    """
    try:
        with _quiet():
            import coremltools
    except ImportError as error:
        raise InputError(
            "This export needs the package coremltools, which is not installed: pip install coremltools (the extra"
            " 'coreml' of r2l-nerfstudio; Linux and macOS)."
        ) from error
    return coremltools


def _convert(coremltools: Any, graph: StudentGraph, inputs: Arrays) -> Any:
    examples = tuple(torch.from_numpy(value) for value in inputs.values())
    with torch.no_grad(), _LogicalOperators():
        traced = torch.jit.trace(graph, examples, check_trace=False)
    return coremltools.convert(
        traced,
        convert_to="mlprogram",
        inputs=[coremltools.TensorType(name=name, shape=value.shape) for name, value in inputs.items()],
        outputs=[coremltools.TensorType(name=name) for name in graph.outputs],
        # Only the graph's own casts: those of the network, not the encoding before it.
        compute_precision=coremltools.precision.FLOAT32,
        minimum_deployment_target=coremltools.target.iOS16,
        skip_model_load=True,
    )


class _LogicalOperators(TorchFunctionMode):
    """`|` and `&` of truth values under the names that coremltools supports."""

    names: dict[Callable[..., Any], Callable[..., Any]] = {
        Tensor.__or__: torch.logical_or,
        Tensor.__and__: torch.logical_and,
    }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.names.get(func, func)(*args, **(kwargs or {}))


def check_structure(
    coremltools: Any, package: Path, spec: GraphSpec, inputs: Arrays, outputs: Arrays, graph: StudentGraph
) -> None:
    """Reload a package and check its structure.

    Args:
        coremltools: the library.
        package: the folder.
        spec: the requested graph.
        inputs: examples, by name.
        outputs: outputs for them.
        graph: graph that was converted.

    Raises:
        InputError: the structure is wrong.
    """
    found = coremltools.utils.load_spec(str(package))
    wrong = []
    if found.specificationVersion != IOS_16:
        wrong.append(f"it is of specification version {found.specificationVersion}, and iOS 16 reads {IOS_16}")
    for kind, wanted, described in (
        ("input", inputs, found.description.input),
        ("output", outputs, found.description.output),
    ):
        shapes = {feature.name: tuple(feature.type.multiArrayType.shape) for feature in described}
        if shapes != {name: value.shape for name, value in wanted.items()}:
            wrong.append(f"its {kind}s are {shapes}")
    function = found.mlProgram.functions["main"]
    (block,) = function.block_specializations.values()
    types = coremltools.proto.MIL_pb2
    expected = {"fp16": types.FLOAT16, "fp32": types.FLOAT32}[spec.precision]
    for operation in block.operations:
        for output in operation.outputs:
            dtype = output.type.tensorType.dataType
            if operation.type in NETWORK_OPERATORS and dtype != expected:
                wrong.append(f"its {operation.type} is not in {spec.precision}")
            if operation.type in EXACT_OPERATORS and dtype != types.FLOAT32:
                wrong.append(f"its {operation.type} is not in fp32")
    size = package_bytes(package)
    parameters = sum(parameter.nbytes for parameter in (*graph.parameters(), *graph.buffers()))
    # An image that is processed in parts may have a copy of the constants for each part.
    parts = 1 if spec.part != "whole" else math.ceil(spec.width * spec.height / RAYS_AT_ONCE)
    if size > 1.1 * parameters * parts + SMALL_WEIGHTS:
        wrong.append(f"it has {size} bytes, and its parameters {parameters}")
    if wrong:
        raise InputError(
            f"The Core ML package has the wrong structure: {'; '.join(dict.fromkeys(wrong))}. It was not kept; try"
            f" another version of coremltools than {coremltools.__version__}."
        )


def package_bytes(package: Path) -> int:
    """Return the bytes of all files in it."""
    return sum(file.stat().st_size for file in package.rglob("*") if file.is_file())


def run_coreml(coremltools: Any, package: Path, inputs: Arrays) -> Arrays:
    """Run a package on inputs. NOT VERIFIED: it runs on a Mac only."""
    return coremltools.models.MLModel(str(package)).predict(dict(inputs))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars and warnings about versions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
