"""Students as graphs and files: the same pictures as torch's, or no file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from r2l_nerfstudio.scripts import export as script
from student_runs import tiny_mobile_r2l, tiny_r2l, write_run

from r2l_nerfstudio import load_student
from r2l_nerfstudio.engines.protocol import BrokenEngine
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.export import graph, onnx_file, openvino_file, tensorrt_plan
from r2l_nerfstudio.export.comparison import check_export, probe_inputs
from r2l_nerfstudio.export.gathered_volume import GatheredVolume
from r2l_nerfstudio.export.graph import GraphSpec
from r2l_nerfstudio.export.onnx_file import export_onnx, run_onnx
from r2l_nerfstudio.export.openvino_file import export_openvino
from r2l_nerfstudio.export.tensorrt_plan import export_plan, export_torch_tensorrt
from r2l_nerfstudio.student import Student
from r2l_nerfstudio.students.ray_features import FeatureVolume

CONFIGS = {
    "r2l": tiny_r2l(),
    "plucker": tiny_r2l(ray_code="plucker", volume_resolution=0),
    "two-plane": tiny_r2l(ray_code="two-plane", volume_resolution=0),
    "mobile-r2l": tiny_mobile_r2l(volume_resolution=5),
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


@pytest.mark.parametrize("resolution", [1, 2, 5])
def test_gathers_read_what_the_volume_reads(resolution: int) -> None:
    torch.manual_seed(0)
    volume = FeatureVolume(resolution, 3)
    volume.extent.fill_(1.3)
    steps = torch.linspace(-1.3, 1.3, resolution)
    points = torch.cat([torch.randn(40, 4, 3), 9 * torch.randn(10, 4, 3), steps[:, None, None].expand(-1, 4, 3)])
    assert volume(points).std() > 0.05
    assert torch.allclose(GatheredVolume(volume)(points), volume(points), atol=2e-6)
    assert torch.allclose(GatheredVolume(volume, torch.float16)(points), volume(points), atol=2e-4)


@pytest.mark.parametrize("spacing", ["sphere", "near-far", "disparity"])
@pytest.mark.parametrize("name", ["r2l", "mobile-r2l"])
def test_camera_graph_is_what_torch_renders(name: str, spacing: str, tmp_path: Path) -> None:
    student = load_student(write_run(tmp_path / "run", CONFIGS[name], spacing), device="cpu", engine="torch")
    module = CAMERA.build(student)

    def run_module(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = module(*(torch.from_numpy(inputs[key]) for key in module.inputs))
        return dict(zip(module.outputs, (value.detach().numpy() for value in found), strict=True))

    assert check_export(student, CAMERA, run_module, "The graph") > 120
    assert probe_inputs(student, CAMERA, 0)[1]["rgb"].std() > 0.01


def test_large_pictures_are_gone_through_in_parts(
    student: Callable[..., Student], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    ],
)
def test_onnx_renders_what_torch_renders(
    name: str, inputs: str, precision: str, student: Callable[..., Student], tmp_path: Path
) -> None:
    exported, spec = student(name), GraphSpec(inputs, precision, 27, 18)
    file = tmp_path / "new folder" / "student.onnx"
    psnr = export_onnx(exported, spec, file)
    assert psnr > {"fp32": 100, "fp16": 55}[precision]
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    model = onnx.load(str(file))
    weights = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1}
    assert (onnx.TensorProto.FLOAT16 in weights) == (precision == "fp16")
    assert not {"GridSample", "GatherND", "ScatterND", "Loop", "If"} & {node.op_type for node in model.graph.node}
    assert str(Path(torch.__file__).parents[1]).encode() not in file.read_bytes()
    props = {prop.key: prop.value for prop in model.metadata_props}
    code = exported.model.ray_code
    assert json.loads(props["near"]) == pytest.approx(float(code.near))
    assert np.allclose(json.loads(props["axes"]), code.axes.numpy())
    assert json.loads(props["background"]) == pytest.approx([1.0, 0.9, 0.8])
    assert props["spacing"] == "sphere" and json.loads(props["samples"]) == code.num_points
    if name == "mobile-r2l":
        assert json.loads(props["factor"]) == 4 and json.loads(props["focal"]) == 50.0


def test_a_graph_of_rays_takes_any_number(student: Callable[..., Student], tmp_path: Path) -> None:
    onnx_file.write_onnx(student("r2l"), RAYS, tmp_path / "rays.onnx")
    inputs, truth = probe_inputs(student("r2l"), RAYS, 2)
    for number in (1, 100):
        found = run_onnx(tmp_path / "rays.onnx", {key: value[:number] for key, value in inputs.items()})
        assert np.allclose(found["rgb"], truth["rgb"][:number], atol=1e-4)


def test_openvino_renders_what_torch_renders(student: Callable[..., Student], tmp_path: Path) -> None:
    assert export_openvino(student("mobile-r2l"), CAMERA, tmp_path / "student.xml") > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student.bin", "student.xml"]
    assert "sphere" in (tmp_path / "student.xml").read_text()


@pytest.mark.parametrize(("kind", "broken"), [("onnx", "not finite"), ("openvino", "noise")])
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
    with pytest.raises(InputError, match="does not render what torch renders.*not kept"):
        write(student("r2l"), RAYS, output, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    assert output.read_text() == "an older one"


def test_what_is_there_is_replaced_only_on_request(student: Callable[..., Student], tmp_path: Path) -> None:
    output = tmp_path / "student.onnx"
    output.write_text("mine")
    with pytest.raises(InputError, match="is there already.*--overwrite"):
        export_onnx(student("r2l"), RAYS, output)
    assert output.read_text() == "mine"
    (tmp_path / f".{output.name}.partial").mkdir()  # as a killed export leaves it
    export_onnx(student("r2l"), RAYS, output, overwrite=True)
    assert list(tmp_path.iterdir()) == [output] and output.stat().st_size > 1000
    with pytest.raises(InputError, match="is a folder"):
        export_onnx(student("r2l"), RAYS, tmp_path, overwrite=True)
    with pytest.raises(InputError, match="cannot be written"):
        export_onnx(student("r2l"), RAYS, output / "below a file.onnx")


def test_tells_what_a_student_cannot_take(student: Callable[..., Student], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="answers no single rays"):
        export_onnx(student("mobile-r2l"), RAYS, tmp_path / "a.onnx")
    with pytest.raises(InputError, match="--width 0"):
        export_onnx(student("r2l"), GraphSpec("camera", "fp32", 0, 4), tmp_path / "a.onnx")
    with pytest.raises(InputError, match="name the .xml"):
        export_openvino(student("r2l"), RAYS, tmp_path / "a.bin")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnxscript", "openvino"])
def test_tells_a_package_that_is_missing(
    missing: str, student: Callable[..., Student], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match="not installed: pip install"):
        export_openvino(student("r2l"), RAYS, tmp_path / "student.xml")


@pytest.mark.parametrize(("name", "inputs"), [("r2l", "rays"), ("mobile-r2l", "camera")])
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


def test_tells_what_needs_a_gpu_or_a_library(
    student: Callable[..., Student], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="TensorRT plan is built for the GPU that is there"):
        export_plan(student("r2l"), RAYS, tmp_path / "student.plan", "tensorrt")
    with pytest.raises(InputError, match="Torch-TensorRT program cannot be built here: it needs an NVIDIA GPU"):
        export_torch_tensorrt(student("r2l"), CAMERA, tmp_path / "student.ep")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(InputError, match="needs the package tensorrt-rtx.*pip install tensorrt-rtx"):
        export_plan(student("r2l"), RAYS, tmp_path / "student.plan", "tensorrt-rtx")
    assert not any(tmp_path.iterdir())


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
    assert caught.value.code == 1 and "is there already" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, "onnx", "--load-config", tmp_path / "nowhere", "--output", tmp_path / "a.onnx")
    assert caught.value.code == 1 and "no trained run" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, "gltf", "--load-config", run("r2l"), "--output", tmp_path / "a.gltf")
    assert caught.value.code == 2
