"""Students as graphs and files: the same images as PyTorch's, or no file."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from student_runs import (
    tiny_composited_mobile_r2l,
    tiny_composited_r2l,
    tiny_mobile_r2l,
    tiny_r2l,
    write_run,
)
from versions import needs_graph_export

from r2l_nerfstudio import load_student
from r2l_nerfstudio.engines.protocol import BrokenEngine
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.export import coreml_file, graph, int8, mobile_onnx, onnx_file, openvino_file, tensorrt_plan
from r2l_nerfstudio.export.comparison import check_export, probe_inputs
from r2l_nerfstudio.export.coreml_file import export_coreml
from r2l_nerfstudio.export.gathered_volume import GatheredVolume
from r2l_nerfstudio.export.graph import GraphSpec
from r2l_nerfstudio.export.int8 import export_int8
from r2l_nerfstudio.export.joined_onnx import join_onnx
from r2l_nerfstudio.export.onnx_file import export_onnx, run_onnx
from r2l_nerfstudio.export.openvino_file import export_openvino
from r2l_nerfstudio.export.plain_network import SigmoidGelu, SubpixelConv
from r2l_nerfstudio.export.tensorrt_plan import export_plan, export_torch_tensorrt
from r2l_nerfstudio.psnr import psnr
from r2l_nerfstudio.run_config import load_run_config
from r2l_nerfstudio.scripts import export as script
from r2l_nerfstudio.student import Student
from r2l_nerfstudio.students.ray_features import FeatureVolume

pytestmark = needs_graph_export

CONFIGS = {
    "r2l": tiny_r2l(),
    "plucker": tiny_r2l(ray_encoding="plucker", volume_resolution=0),
    "two-plane": tiny_r2l(ray_encoding="two-plane", volume_resolution=0),
    "mobile-r2l": tiny_mobile_r2l(volume_resolution=5),
    "composited-r2l": tiny_composited_r2l(),
    "composited-mobile": tiny_composited_mobile_r2l(),
}
CAMERA = GraphSpec("camera", "fp32", 27, 18)
RAYS = GraphSpec("rays", "fp32", 27, 18)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from a name in `CONFIGS` to the config.yml of a student. Read only."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = write_run(tmp_path_factory.mktemp("runs") / name, CONFIGS[name])
        return made[name]

    return find


@pytest.fixture(scope="module")
def student(run: Callable[..., Path]) -> Callable[..., Student]:
    """A function from a name in `CONFIGS` to a student."""
    return lambda name: load_student(run(name), device="cpu", engine="torch")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """As `write_onnx`, but each graph is exported once for all tests: that takes most of their time."""
    made: dict[tuple[bytes, GraphSpec], Path] = {}
    folder = tmp_path_factory.mktemp("graphs")
    write_onnx = onnx_file.write_onnx

    def write(student: Student, spec: GraphSpec, path: Path) -> None:
        saved = BytesIO()
        torch.save(student.model.state_dict(), saved)
        key = (saved.getvalue(), spec)
        if key not in made:
            write_onnx(student, spec, folder / f"{len(made)}.onnx")
            made[key] = folder / f"{len(made)}.onnx"
        shutil.copyfile(made[key], path)

    return write


@pytest.fixture
def exported_once(graphs: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """All exports take their graphs from `graphs`."""
    for module in (onnx_file, openvino_file, tensorrt_plan, int8):
        monkeypatch.setattr(module, "write_onnx", graphs)


@pytest.mark.parametrize("resolution", [1, 2, 5])
def test_gathers_equal_the_volumes_reads(resolution: int) -> None:
    torch.manual_seed(0)
    volume = FeatureVolume(resolution, 3)
    volume.extent.fill_(1.3)
    steps = torch.linspace(-1.3, 1.3, resolution)
    points = torch.cat([torch.randn(40, 4, 3), 9 * torch.randn(10, 4, 3), steps[:, None, None].expand(-1, 4, 3)])
    assert volume(points).std() > 0.05
    assert torch.allclose(GatheredVolume(volume)(points), volume(points), atol=2e-6)
    assert torch.allclose(GatheredVolume(volume, torch.float16)(points), volume(points), atol=2e-4)


@pytest.mark.parametrize("spacing", ["sphere", "near-far", "disparity"])
@pytest.mark.parametrize("name", ["r2l", "mobile-r2l", "composited-r2l", "composited-mobile"])
def test_camera_graph_is_what_torch_renders(name: str, spacing: str, tmp_path: Path) -> None:
    student = load_student(write_run(tmp_path / "run", CONFIGS[name], spacing), device="cpu", engine="torch")
    module = CAMERA.build(student)

    def run_module(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = module(*(torch.from_numpy(inputs[key]) for key in module.inputs))
        return dict(zip(module.outputs, (value.detach().numpy() for value in found), strict=True))

    # Composited pictures have edges, where the last digit of a coordinate decides which cell is read.
    assert check_export(student, CAMERA, run_module, "The graph") > (80 if "composited" in name else 120)
    assert probe_inputs(student, CAMERA, 0)[1]["rgb"].std() > 0.01


@pytest.mark.parametrize(("stride", "kernel", "padding"), [(2, 4, 1), (3, 3, 0)])
def test_depth_to_space_is_a_transposed_convolution(stride: int, kernel: int, padding: int) -> None:
    torch.manual_seed(0)
    layer = torch.nn.ConvTranspose2d(5, 3, kernel, stride=stride, padding=padding)
    x = torch.randn(2, 5, 7, 4)
    assert torch.allclose(SubpixelConv(layer)(x), layer(x), atol=1e-5)


def test_one_sigmoid_is_nearly_gelu() -> None:
    x = torch.linspace(-300, 300, 60_001)
    assert (SigmoidGelu()(x) - torch.nn.functional.gelu(x)).abs().max() < 3e-4


def test_large_images_are_rendered_in_parts(student: Callable[..., Student], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = probe_inputs(student("r2l"), CAMERA, 0)
    module = CAMERA.build(student("r2l"))
    whole = module(*map(torch.from_numpy, inputs.values()))[0]
    monkeypatch.setattr(graph, "RAYS_AT_ONCE", 4 * CAMERA.width + 3)
    parts = module(*map(torch.from_numpy, inputs.values()))[0]
    assert torch.allclose(whole, parts, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "inputs", "precision"),
    [
        ("r2l", "camera", "fp32"),
        ("r2l", "rays", "fp16"),
        ("plucker", "rays", "fp32"),
        ("two-plane", "camera", "fp32"),
        ("mobile-r2l", "camera", "fp32"),
        ("mobile-r2l", "camera", "fp16"),
        ("composited-r2l", "rays", "fp32"),
        ("composited-mobile", "camera", "fp16"),
    ],
)
@pytest.mark.usefixtures("exported_once")
def test_onnx_renders_what_torch_renders(
    name: str, inputs: str, precision: str, student: Callable[..., Student], tmp_path: Path
) -> None:
    exported, spec = student(name), GraphSpec(inputs, precision, 27, 18)
    file = tmp_path / "new folder" / "student.onnx"
    psnr = export_onnx(exported, spec, file)
    assert psnr > {"fp32": 80 if "composited" in name else 100, "fp16": 55}[precision]
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    model = onnx.load(str(file))
    weights = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1}
    assert (onnx.TensorProto.FLOAT16 in weights) == (precision == "fp16")
    assert not {"GridSample", "GatherND", "ScatterND", "Loop", "If"} & {node.op_type for node in model.graph.node}
    assert str(Path(torch.__file__).parents[1]).encode() not in file.read_bytes()
    props = {prop.key: prop.value for prop in model.metadata_props}
    encoding = exported.model.ray_encoding
    assert json.loads(props["near"]) == pytest.approx(float(encoding.near))
    assert np.allclose(json.loads(props["axes"]), encoding.axes.numpy())
    assert json.loads(props["background"]) == pytest.approx([1.0, 0.9, 0.8])
    assert props["spacing"] == "sphere" and json.loads(props["samples"]) == encoding.num_points
    if name == "mobile-r2l":
        assert json.loads(props["factor"]) == 4 and json.loads(props["focal"]) == 50.0


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("mobile-r2l", "camera"),
        ("r2l", "camera"),
        ("r2l", "rays"),
        ("composited-mobile", "camera"),
        ("composited-r2l", "rays"),
    ],
)
@pytest.mark.usefixtures("exported_once")
def test_the_three_parts_equal_the_whole(
    name: str, inputs: str, student: Callable[..., Student], tmp_path: Path
) -> None:
    """Each part agrees with PyTorch, and together they render the image."""
    exported, spec = student(name), GraphSpec(inputs, "fp32", 27, 18)
    given, truth = probe_inputs(exported, spec, 1)
    known = dict(given)
    for part in ("encoding", "network", "values"):
        file = tmp_path / f"{part}.onnx"
        assert export_onnx(exported, replace(spec, part=part), file) > (80 if "composited" in name else 100)
        takes = [value.name for value in onnx.load(str(file)).graph.input]
        known |= run_onnx(file, {key: known[key] for key in takes})
    assert all(np.allclose(known[key], value, atol=1e-4) for key, value in truth.items())
    stages = [onnx.load(str(tmp_path / f"{part}.onnx")) for part in ("encoding", "network", "values")]
    onnx.save_model(join_onnx(*stages), str(tmp_path / "joined.onnx"))
    joined = run_onnx(tmp_path / "joined.onnx", given)
    assert list(joined) == list(truth) and np.allclose(joined["rgb"], truth["rgb"], atol=1e-4)


@pytest.mark.parametrize(("name", "precision"), [("mobile-r2l", "fp32"), ("r2l", "fp16")])
def test_the_whole_network_converts_for_phones(
    name: str, precision: str, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    output = tmp_path / "student.onnx"
    size = ("--width", 27, "--height", 18, "--precision", precision)
    call(monkeypatch, "onnx", "--load-config", run(name), "--output", output, "--target", "mobile", *size)
    said = " ".join(capsys.readouterr().out.split())
    assert "NNAPI YES" in said and "Core ML YES" in said and "1 partition" in said
    model = onnx.load(str(output))
    # In Qualcomm's and NNAPI's lists as in Core ML's.
    known = {"Add", "Cast", "Conv", "DepthToSpace", "Gemm", "Mul", "Relu", "Sigmoid", "Slice"}
    assert {node.op_type for node in model.graph.node} <= known
    modes = {attribute.s for node in model.graph.node for attribute in node.attribute if attribute.name == "mode"}
    assert modes <= {b"DCR"}
    sizes = [dim.dim_value for value in model.graph.input for dim in value.type.tensor_type.shape.dim]
    assert min(sizes) > 0 and model.opset_import[0].version == mobile_onnx.OPSET


def test_an_operator_that_phones_do_not_support_is_named(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as caught:
        call(
            monkeypatch, "onnx", "--load-config", run("mobile-r2l"), "--output", tmp_path / "a.onnx",
            "--target", "mobile", "--part", "encoding", "--width", 27, "--height", 18,
        )  # fmt: skip
    assert caught.value.code == 1
    assert re.search(r"operators that NNAPI lacks: .*Cos.*--part encoding", " ".join(capsys.readouterr().out.split()))
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def captured(run: Callable[..., Path], tiny_capture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.yml of a mobile-r2l whose capture is there."""
    folder = tmp_path_factory.mktemp("captured") / "run"
    shutil.copytree(run("mobile-r2l").parent, folder)
    config = load_run_config(folder)
    config.pipeline.datamanager.data = tiny_capture
    config.pipeline.datamanager.dataparser = NerfstudioDataParserConfig(data=tiny_capture, downscale_factor=1)
    (folder / "config.yml").write_text(yaml.dump(config))
    return folder / "config.yml"


@pytest.mark.parametrize("flags", [("--target", "mobile"), ()])
def test_int8_is_used_if_it_costs_little(
    flags: tuple[str, ...],
    captured: Path,
    exported_once: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    output, size = tmp_path / "student.onnx", ("--width", 27, "--height", 18)
    call(monkeypatch, "onnx", "--load-config", captured, "--output", output, "--precision", "int8", *flags, *size)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"int8 \(all layers.*\): [\d.]+ dB on 1 held-out training photos, the student itself", said)
    lost = float(re.search(r"(-?[\d.]+) dB lost", said)[1])
    assert lost <= int8.MOST_LOSS
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    model = onnx.load(str(output))
    assert "DequantizeLinear" in {node.op_type for node in model.graph.node}
    weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4]
    assert weights and {tensor.data_type for tensor in weights} == {onnx.TensorProto.INT8}
    assert {prop.key: prop.value for prop in model.metadata_props}["precision"] == "int8"
    student = load_student(captured, device="cpu", engine="torch")
    part = "network" if flags else "whole"
    given, truth = probe_inputs(student, GraphSpec("camera", "fp32", 27, 18, part), 0)
    found = run_onnx(output, given)
    assert all(psnr(torch.from_numpy(found[key]), torch.from_numpy(truth[key])) > 25 for key in truth if key != "depth")


@pytest.mark.usefixtures("exported_once")
def test_features_of_composited_students_are_stored_in_int8(student: Callable[..., Student], tmp_path: Path) -> None:
    exported, spec = student("composited-r2l"), replace(RAYS, part="encoding")
    files = {kind: tmp_path / f"{kind}.onnx" for kind in ("fp16", "int8")}
    onnx_file.write_onnx(exported, replace(spec, precision="fp16"), files["fp16"])
    onnx_file.write_onnx(exported, replace(spec, precision="fp16", int8_features=True), files["int8"])
    shape = list(exported.model.composited.volume.rows.shape)
    kinds = {
        kind: {tensor.data_type for tensor in onnx.load(str(file)).graph.initializer if list(tensor.dims) == shape}
        for kind, file in files.items()
    }
    assert kinds == {"fp16": {onnx.TensorProto.FLOAT16}, "int8": {onnx.TensorProto.INT8}}
    given, truth = probe_inputs(exported, spec, 0)
    found = run_onnx(files["int8"], given)
    apart = np.abs(found["encoded"] - truth["encoded"])
    assert 0 < apart.mean() < 0.02, "int8 is near fp32, and not the same"


def test_int8_that_costs_too_much_is_refused(
    captured: Path,
    run: Callable[..., Path],
    exported_once: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, of_rays = (load_student(path, device="cpu", engine="torch") for path in (captured, run("r2l")))
    output = tmp_path / "student.onnx"
    # Without photos the student's own pictures judge.
    monkeypatch.setattr(int8, "held_out", lambda *_: [])
    monkeypatch.setattr(int8, "NEEDED_DB", 99.0)
    with pytest.raises(InputError, match="all layers but the first and the last.*own images.*not kept.*fp16"):
        export_int8(student, CAMERA, output, captured)
    with pytest.raises(InputError, match="--width 300 --height 300: .*at most 65536 pixels"):
        export_int8(of_rays, replace(CAMERA, width=300, height=300), output, captured)
    with pytest.raises(InputError, match="--part values has no network"):
        export_int8(student, replace(CAMERA, part="values"), output, captured)
    monkeypatch.setattr(int8, "NEEDED_DB", 20.0)
    with pytest.raises(InputError, match="does not render what PyTorch renders"):
        monkeypatch.setattr(int8, "SANE_DB", 99.0)
        export_int8(student, CAMERA, output, captured)
    with pytest.raises(InputError, match="capture .* cannot be read"):
        export_int8(student, CAMERA, output, captured, data=tmp_path / "gone")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("mobile-r2l", ()),
        ("mobile-r2l", ("--part", "network", "--precision", "fp32")),
        ("r2l", ("--inputs", "rays")),
        ("r2l", ()),
        ("composited-mobile", ()),
        ("composited-r2l", ("--inputs", "rays")),
    ],
)
def test_core_ml_packages_match_the_request(
    name: str,
    arguments: tuple[str, ...],
    run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    coremltools = pytest.importorskip("coremltools", reason="pip install coremltools (Linux and macOS)")
    output = tmp_path / "student.mlpackage"
    # An r2l's picture in two parts.
    monkeypatch.setattr(graph, "RAYS_AT_ONCE", 10 * CAMERA.width)
    monkeypatch.setattr(coreml_file, "RAYS_AT_ONCE", 10 * CAMERA.width)
    monkeypatch.setattr(coreml_file.platform, "system", lambda: "Linux")
    call(monkeypatch, "coreml", output, "--load-config", run(name), "--width", 27, "--height", 18, *arguments)
    assert "not compared with PyTorch: Core ML runs on a Mac only" in " ".join(capsys.readouterr().out.split())
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    found = coremltools.utils.load_spec(str(output))
    assert found.description.metadata.userDefined["factor"] == ("4" if "mobile" in name else "1")
    names = [feature.name for feature in found.description.input]
    assert names == {"network": ["encoded"], "rays": ["origins", "directions"]}.get(
        arguments[1] if arguments else "", ["camera_to_world", "intrinsics"]
    )
    (block,) = found.mlProgram.functions["main"].block_specializations.values()
    constants = [operation.outputs[0] for operation in block.operations if operation.type == "const"]
    sizes = [[axis.constant.size for axis in constant.type.tensorType.dimensions] for constant in constants]
    assert [18, 27, 3] not in sizes and [18, 27, 1] not in sizes  # nothing is written down for every pixel
    with pytest.raises(SystemExit):
        call(monkeypatch, "coreml", output, "--load-config", run(name))
    assert "holds a Core ML package" in " ".join(capsys.readouterr().out.split())


def test_core_ml_errors(student: Callable[..., Student], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coremltools = pytest.importorskip("coremltools", reason="pip install coremltools (Linux and macOS)")
    spec = replace(CAMERA, precision="fp16", part="network", is_static=True)
    output = tmp_path / "student.mlpackage"
    with pytest.raises(InputError, match="must end in .mlpackage"):
        export_coreml(student("mobile-r2l"), spec, tmp_path / "student.mlmodel")
    (tmp_path / "mine.mlpackage").mkdir()
    (tmp_path / "mine.mlpackage" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="not empty and is not a Core ML package"):
        export_coreml(student("mobile-r2l"), spec, tmp_path / "mine.mlpackage", overwrite=True)
    # As on a Mac, where a package gives something else than torch.
    monkeypatch.setattr(coreml_file.platform, "system", lambda: "Darwin")
    _, truth = probe_inputs(student("mobile-r2l"), spec, 0)
    monkeypatch.setattr(coreml_file, "run_coreml", lambda *_: {key: value + 0.1 for key, value in truth.items()})
    with pytest.raises(InputError, match="does not render what PyTorch renders"):
        export_coreml(student("mobile-r2l"), spec, output)
    # An fp32 network, although fp16 was requested.
    really_build = GraphSpec.build
    monkeypatch.setattr(
        GraphSpec, "build", lambda spec, student: really_build(replace(spec, precision="fp32"), student)
    )
    with pytest.raises(InputError, match="has the wrong structure: its conv is not in fp16"):
        export_coreml(student("mobile-r2l"), spec, output)
    # An operator of ours that this coremltools does not know.
    registry = pytest.importorskip("coremltools.converters.mil.frontend.torch.torch_op_registry")
    monkeypatch.delitem(registry._TORCH_OPS_REGISTRY.name_to_func_mapping, "gelu")
    with pytest.raises(InputError, match=f"coremltools {coremltools.__version__} cannot convert.*gelu"):
        export_coreml(student("mobile-r2l"), spec, output)
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(InputError, match="needs the package coremltools.*pip install coremltools"):
        export_coreml(student("mobile-r2l"), spec, output)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.mlpackage"]


@pytest.mark.usefixtures("exported_once")
def test_a_graph_of_rays_takes_any_number(student: Callable[..., Student], tmp_path: Path) -> None:
    onnx_file.write_onnx(student("r2l"), RAYS, tmp_path / "rays.onnx")
    inputs, truth = probe_inputs(student("r2l"), RAYS, 2)
    for number in (1, 100):
        found = run_onnx(tmp_path / "rays.onnx", {key: value[:number] for key, value in inputs.items()})
        assert np.allclose(found["rgb"], truth["rgb"][:number], atol=1e-4)


@pytest.mark.usefixtures("exported_once")
def test_openvino_renders_what_torch_renders(student: Callable[..., Student], tmp_path: Path) -> None:
    assert export_openvino(student("mobile-r2l"), CAMERA, tmp_path / "student.xml") > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student.bin", "student.xml"]
    assert "sphere" in (tmp_path / "student.xml").read_text()


@pytest.mark.parametrize(("kind", "broken"), [("onnx", "not finite"), ("openvino", "noise")])
@pytest.mark.usefixtures("exported_once")
def test_an_export_that_differs_is_not_kept(
    kind: str, broken: str, student: Callable[..., Student], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name, write = {
        "onnx": (onnx_file, "run_onnx", export_onnx),
        "openvino": (openvino_file, "run_openvino", export_openvino),
    }[kind]
    really_run = getattr(module, name)

    def run_badly(file: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = really_run(file, inputs)
        rgb = found["rgb"] + 0.01 if broken == "noise" else np.full_like(found["rgb"], np.nan)
        return {**found, "rgb": rgb}

    monkeypatch.setattr(module, name, run_badly)
    output = tmp_path / ("student.onnx" if kind == "onnx" else "student.xml")
    output.write_text("an older one")
    with pytest.raises(InputError, match="does not render what PyTorch renders.*not kept"):
        write(student("r2l"), RAYS, output, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    assert output.read_text() == "an older one"


@pytest.mark.usefixtures("exported_once")
def test_existing_output_is_replaced_only_on_request(student: Callable[..., Student], tmp_path: Path) -> None:
    output = tmp_path / "student.onnx"
    output.write_text("mine")
    with pytest.raises(InputError, match="already exists.*--overwrite"):
        export_onnx(student("r2l"), RAYS, output)
    assert output.read_text() == "mine"
    (tmp_path / f".{output.name}.partial").mkdir()  # as a killed export leaves it
    export_onnx(student("r2l"), RAYS, output, overwrite=True)
    assert list(tmp_path.iterdir()) == [output] and output.stat().st_size > 1000
    with pytest.raises(InputError, match="is a folder"):
        export_onnx(student("r2l"), RAYS, tmp_path, overwrite=True)
    with pytest.raises(InputError, match="cannot be written"):
        export_onnx(student("r2l"), RAYS, output / "below a file.onnx")


def test_unsupported_options_are_an_error(student: Callable[..., Student], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no single rays"):
        export_onnx(student("mobile-r2l"), RAYS, tmp_path / "a.onnx")
    with pytest.raises(InputError, match="--width and --height must be positive integers .got 0 and 4"):
        export_onnx(student("r2l"), GraphSpec("camera", "fp32", 0, 4), tmp_path / "a.onnx")
    with pytest.raises(InputError, match="give the .xml"):
        export_openvino(student("r2l"), RAYS, tmp_path / "a.bin")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnxscript", "openvino"])
def test_a_missing_package_is_named(
    missing: str, student: Callable[..., Student], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match="not installed: pip install"):
        export_openvino(student("r2l"), RAYS, tmp_path / "student.xml")


@pytest.mark.parametrize(
    ("name", "inputs"),
    [("r2l", "rays"), ("mobile-r2l", "camera"), ("composited-r2l", "rays"), ("composited-mobile", "camera")],
)
@pytest.mark.usefixtures("exported_once")
def test_tensorrt_rtx_plans_are_built_without_a_gpu(
    name: str, inputs: str, student: Callable[..., Student], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx (Linux on x86-64)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    psnr = export_plan(student(name), GraphSpec(inputs, "fp16", 27, 18), tmp_path / "student.plan", "tensorrt-rtx")
    assert psnr is None  # nothing here runs it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student.json", "student.plan"]
    assert (tmp_path / "student.plan").stat().st_size > 1000
    about = json.loads((tmp_path / "student.json").read_text())
    assert about["precision"] == "fp16" and about["library"].startswith("tensorrt_rtx")


def test_formats_that_need_a_gpu_or_a_library(
    student: Callable[..., Student], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="TensorRT plan is built for the GPU of the machine"):
        export_plan(student("r2l"), RAYS, tmp_path / "student.plan", "tensorrt")
    with pytest.raises(InputError, match="Torch-TensorRT program cannot be built here: it needs an NVIDIA GPU"):
        export_torch_tensorrt(student("r2l"), CAMERA, tmp_path / "student.ep")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(InputError, match="needs the package tensorrt-rtx.*pip install tensorrt-rtx"):
        export_plan(student("r2l"), RAYS, tmp_path / "student.plan", "tensorrt-rtx")
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("exported_once")
def test_a_graph_that_a_library_refuses_leaves_nothing(
    student: Callable[..., Student], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise BrokenEngine("it cannot read the graph")

    monkeypatch.setattr(tensorrt_plan, "import_flavour", lambda _: sys)
    monkeypatch.setattr(tensorrt_plan, "build_plan", refuse)
    with pytest.raises(InputError, match="No plan could be built: it cannot read the graph"):
        export_plan(student("mobile-r2l"), CAMERA, tmp_path / "student.plan", "tensorrt-rtx")
    assert not any(tmp_path.iterdir())


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """As a user calls `r2l-export`."""
    monkeypatch.setattr(sys, "argv", ["r2l-export", *map(str, arguments)])
    script.main()


DEFAULT_SIZES = [
    ("r2l", [], (400, "whole", "fp32")),
    ("r2l", ["--part", "encoding"], (256, "encoding", "fp32")),
    ("r2l", ["--target", "mobile"], (256, "network", "fp32")),
    ("r2l", ["--precision", "int8"], (256, "whole", "fp32")),
    ("mobile-r2l", [], (400, "whole", "fp32")),
    ("mobile-r2l", ["--target", "mobile"], (400, "network", "fp32")),
]


@pytest.mark.parametrize(("name", "flags", "wanted"), DEFAULT_SIZES)
def test_defaults_of_onnx_are_the_documented_ones(
    name: str, flags: list[str], wanted: tuple[int, str, str], run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A size that a graph cannot take, as 400 once was for parts, would raise in `frame`."""
    asked: list[GraphSpec] = []

    def record(student: Student, spec: GraphSpec, *_: object) -> int8.Int8Report | float:
        asked.append(spec)
        if spec.part != "whole" or "int8" in flags:
            replace(spec, part="encoding").frame(student)
        return int8.Int8Report("all layers", 1, None, 50.0, 50.0) if "int8" in flags else 100.0

    monkeypatch.setattr(onnx_file, "export_onnx", record)
    monkeypatch.setattr(int8, "export_int8", record)
    monkeypatch.setattr(mobile_onnx, "mobile_verdict", lambda path: "")
    monkeypatch.setattr(script, "report", lambda *arguments: None)
    call(monkeypatch, "onnx", "--load-config", run(name), "--output", "student.onnx", *flags)
    (spec,) = asked
    assert (spec.width, spec.height) == (wanted[0],) * 2 and (spec.part, spec.precision) == wanted[1:]
    assert spec.inputs == "camera"


@pytest.mark.parametrize("name", ["coreml", "openvino", "tensorrt", "tensorrt-rtx", "torch-tensorrt"])
@pytest.mark.parametrize("student", ["r2l", "mobile-r2l"])
def test_other_formats_default_to_the_whole_student_at_the_same_size(
    name: str, student: str, run: Callable[..., Path]
) -> None:
    _, spec = script.COMMANDS[name](load_config=run(student), output=Path("student")).load()
    assert (spec.width, spec.height, spec.part, spec.inputs) == (400, 400, "whole", "camera")
    assert spec.precision == ("fp16" if name == "coreml" else "fp32")


def test_command_line(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "student.onnx"
    call(monkeypatch, "onnx", "--load-config", run("mobile-r2l"), "--output", output, "--width", 30, "--height", 20)
    assert f"Written: {output}" in capsys.readouterr().out.replace("\n", "")
    (rgb, accumulation, depth) = onnx.load(str(output)).graph.output
    assert [dim.dim_value for dim in rgb.type.tensor_type.shape.dim] == [20, 30, 3]
    assert (accumulation.name, depth.name) == ("accumulation", "depth")
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, "onnx", "--load-config", run("mobile-r2l"), "--output", output)
    assert caught.value.code == 1 and "already exists" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, "onnx", "--load-config", tmp_path / "nowhere", "--output", tmp_path / "a.onnx")
    assert caught.value.code == 1 and "no trained run" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, "gltf", "--load-config", run("r2l"), "--output", tmp_path / "a.gltf")
    assert caught.value.code == 2
