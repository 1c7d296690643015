"""A student's graph as OpenVINO's pair of files, .xml and .bin."""

from __future__ import annotations

from pathlib import Path

from r2l_nerfstudio.atomic_output import atomic_files
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.export.comparison import Arrays, check_export
from r2l_nerfstudio.export.graph import GraphSpec
from r2l_nerfstudio.export.onnx_file import metadata, require_onnx, write_onnx
from r2l_nerfstudio.student import Student


def export_openvino(student: Student, spec: GraphSpec, output: Path, overwrite: bool = False) -> float:
    """Write complete OpenVINO files that render what PyTorch renders.

    Args:
        student: on the CPU.
        spec: which graph.
        output: the .xml file; the weights are beside it in a .bin file.
        overwrite: whether they may exist.

    Returns:
        PSNR in dB against PyTorch.

    Raises:
        InputError: packages are missing, the files may not be written, or they render something else; nothing is kept
            then.
    """
    require_onnx()
    try:
        import openvino
    except ImportError as error:
        raise InputError("This export needs OpenVINO, which is not installed: pip install openvino.") from error
    if Path(output).suffix != ".xml":
        raise InputError(f"--output {output}: OpenVINO's files are a .xml and a .bin; give the .xml.")
    with atomic_files(output, overwrite, also=(".bin",)) as file:
        onnx_file = file.with_suffix(".onnx")
        write_onnx(student, spec, onnx_file)
        model = openvino.convert_model(str(onnx_file))
        for key, value in metadata(student, spec).items():
            model.set_rt_info(value, ["r2l", key])
        openvino.save_model(model, str(file), compress_to_fp16=False)  # fp16 networks already are.
        return check_export(student, spec, lambda inputs: run_openvino(file, inputs), f"The OpenVINO file {output}")


def run_openvino(path: Path, inputs: Arrays) -> Arrays:
    """Run the files with OpenVINO on the CPU, in fp32."""
    import openvino

    # Without the hint it would compute in bf16 if the CPU supports that.
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(inputs)
    return {output.any_name: results[output] for output in compiled.outputs}
