"""TensorRT without a GPU: the selection of a library, its errors, and plans that are really built."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from networks import KINDS, encoded, network
from student_runs import fill, tiny_mobile_r2l, tiny_r2l

from r2l_nerfstudio.engines import tensorrt, torch_tensorrt
from r2l_nerfstudio.engines.onnx_graph import INPUT, OUTPUT, network_onnx
from r2l_nerfstudio.engines.protocol import BrokenEngine, BuildSpec
from r2l_nerfstudio.engines.registry import build_engine
from r2l_nerfstudio.engines.sizes import in_dim
from r2l_nerfstudio.engines.tensorrt import Shapes, build_plan, find_flavour, usual_shapes
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.export.graph import EncodedNetwork
from r2l_nerfstudio.rays.spacing import SceneBounds
from r2l_nerfstudio.students.mobile import MobileR2L
from r2l_nerfstudio.students.resmlp import ResMLP

CUDA = torch.device("cuda")
RTX, PROPER = "tensorrt_rtx", "tensorrt"


def library(name: str, *served: str) -> ModuleType:
    """The attributes of a library that selection reads."""
    module = ModuleType(name)
    module.__version__ = "11.0"
    module.Builder = object
    if served:
        module.ComputeCapability = SimpleNamespace(__members__=dict.fromkeys(served))
    return module


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Makes torch report a GPU of a compute capability; None for no GPU."""

    def report(capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return report


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        ((8, 9), (RTX, PROPER), RTX),
        ((12, 0), (RTX,), RTX),
        ((8, 9), (PROPER,), PROPER),
        ((9, 0), (RTX, PROPER), PROPER),
        ((10, 0), (PROPER,), PROPER),
        (None, (RTX, PROPER), RTX),
    ],
)
def test_the_library_flavor_suits_the_gpu(
    capability: tuple[int, int] | None, installed: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
):
    served = {RTX: ("SM75", "SM86", "SM89", "SM120"), PROPER: ()}
    for name in (RTX, PROPER):
        monkeypatch.setitem(sys.modules, name, library(name, *served[name]) if name in installed else None)
    module, reason = find_flavour(capability)
    assert module.__name__ == expected and reason is None


def test_a_gpu_that_the_installed_flavor_does_not_support(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, RTX, library(RTX, "SM89"))
    monkeypatch.setitem(sys.modules, PROPER, None)
    module, reason = find_flavour((9, 0))
    assert module is None
    assert "does not support compute capability 9.0" in reason and "r2l-nerfstudio[tensorrt]" in reason
    # This one's plans ran on an H100.
    monkeypatch.setattr(sys.modules[RTX], "__version__", "1.4.0.76")
    assert find_flavour((9, 0)) == (sys.modules[RTX], None)
    assert find_flavour((10, 0))[0] is None


def test_a_gpu_that_is_too_old(gpu, monkeypatch: pytest.MonkeyPatch):
    gpu((6, 1))
    assert "6.1 and 7.5 is needed" in tensorrt.why_not(CUDA, "fp16")


class _Failing:
    """Imports end as they do where libraries are missing."""

    def __init__(self, package: str, error: BaseException) -> None:
        self.package, self.error = package, error

    def find_spec(self, name: str, path=None, target=None):
        if name == self.package:
            raise self.error
        return None


FAILURES = [
    ImportError("libnvinfer.so.11: cannot open shared object file"),
    OSError("libcudart.so.13: cannot open shared object file"),
    RuntimeError("CUDA driver version is insufficient"),
    AssertionError(),
    Exception("TensorRT libraries are not found\nlong explanation"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("package", "module", "extra"),
    [
        (PROPER, tensorrt, "r2l-nerfstudio[tensorrt]"),
        (RTX, tensorrt, "r2l-nerfstudio[tensorrt-rtx]"),
        ("torch_tensorrt", torch_tensorrt, "r2l-nerfstudio[torch-tensorrt]"),
    ],
)
def test_every_import_failure_ends_in_one_sentence(
    package: str, module: ModuleType, extra: str, error: Exception, gpu, monkeypatch: pytest.MonkeyPatch
):
    gpu((8, 9))
    for name in (RTX, PROPER, "torch_tensorrt"):
        if name == package:
            monkeypatch.delitem(sys.modules, name, raising=False)
        else:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "meta_path", [_Failing(package, error), *sys.meta_path])
    reason = module.why_not(CUDA, "fp16")
    assert extra in reason and "does not import" in reason
    assert (str(error).splitlines() or [type(error).__name__])[0] in reason and "\n" not in reason


def test_a_package_without_its_libraries_counts_as_missing(monkeypatch: pytest.MonkeyPatch):
    stub = ModuleType(PROPER)  # as the registry's own
    monkeypatch.setitem(sys.modules, PROPER, stub)
    monkeypatch.setitem(sys.modules, RTX, None)
    module, reason = find_flavour((9, 0))
    assert module is None and "tensorrt does not import" in reason


@pytest.mark.parametrize("name", ["tensorrt", "torch-tensorrt"])
def test_without_a_gpu_it_is_an_error(name: str):
    with pytest.raises(InputError, match="needs an NVIDIA GPU of compute capability 7.5"):
        build_engine(name, network("r2l"), "fp16")


@pytest.mark.parametrize("module", [tensorrt, torch_tensorrt], ids=["tensorrt", "torch-tensorrt"])
def test_bf16_is_refused_for_its_convolutions(module: ModuleType, gpu):
    gpu((9, 0))
    assert "choose fp16" in module.why_not(CUDA, "bf16")


@pytest.mark.parametrize("kind", KINDS)
def test_usual_shapes_are_static_for_rays_and_dynamic_for_ray_images(kind: str):
    net = network(kind)
    shapes = usual_shapes(net, CUDA)
    assert (shapes.least == shapes.most) == (kind == "r2l")
    assert shapes.least[1] == shapes.usual[1] == shapes.most[1] == in_dim(net)
    assert all(a <= b <= c for a, b, c in zip(shapes.least, shapes.usual, shapes.most, strict=True))


@pytest.fixture(scope="module")
def rtx() -> ModuleType:
    return pytest.importorskip(RTX, reason="pip install 'r2l-nerfstudio[tensorrt-rtx]' to build plans without a GPU")


def wide(kind: str) -> torch.nn.Module:
    """Of the students' own width, so that plans are mostly weights, and of few layers."""
    torch.manual_seed(0)
    if kind == "r2l":
        return ResMLP(1008, 5, width=256, depth=8, zero_init=False).eval()
    return MobileR2L(312, 5, width=256, blocks=3, factor=8, zero_init=False).eval()


PLANS = {
    ("r2l", "static"): Shapes(*[(4096, 1008)] * 3),
    ("r2l", "dynamic"): Shapes((1, 1008), (4096, 1008), (65536, 1008)),
    ("mobile-r2l", "static"): Shapes(*[(1, 312, 102, 102)] * 3),
    ("mobile-r2l", "dynamic"): Shapes((1, 312, 8, 8), (1, 312, 104, 104), (1, 312, 512, 512)),
}


@pytest.mark.parametrize(("kind", "shape"), PLANS, ids=["-".join(key) for key in PLANS])
def test_plans_are_built_in_the_requested_precision(kind: str, shape: str, rtx: ModuleType):
    net = wide(kind)
    numbers = sum(p.numel() for p in net.parameters())
    sizes = {}
    for precision in ("fp16", "fp32"):
        sizes[precision] = len(build_plan(rtx, network_onnx(net, precision), {INPUT: PLANS[kind, shape]}))
    # Strongly typed: the weights are in the plan, in two bytes or in four.
    assert 2 * numbers < sizes["fp16"] < 3.6 * numbers
    assert 4 * numbers < sizes["fp32"]


WHOLE = {
    ("r2l", "static"): Shapes(*[(700, 3)] * 3),
    ("mobile-r2l", "dynamic"): Shapes((3, 3, 3), (27, 19, 3), (512, 512, 3)),
}


# The other two, a ray image of one size and any number of rays, `test_export` builds, with feature volumes. Nearly all the
# time goes into torch's exporter, which takes it by the operator: so few layers, and no volume.
@pytest.mark.parametrize(("kind", "shape"), WHOLE, ids=["-".join(key) for key in WHOLE])
def test_plans_of_whole_students_are_built_encoding_and_all(kind: str, shape: str, rtx: ModuleType):
    config = tiny_r2l(depth=4, volume_resolution=0) if kind == "r2l" else tiny_mobile_r2l(blocks=1, upsampling_factor=2)
    model = config.setup(scene_box=None, num_train_data=1, metadata={}, device="cpu", grad_scaler=None).eval()
    bounds = SceneBounds("sphere" if kind == "r2l" else "disparity", (0.1, -0.1, 0.05), 0.8, 1.0, 3.0)
    model.set_scene(bounds, torch.eye(3), torch.ones(3), has_accumulation=True, has_depth=True, focal=50.0)
    fill(model)
    shapes = WHOLE[kind, shape]
    rays = torch.nn.functional.normalize(torch.randn(2, *shapes.usual), dim=-1).unbind(0)
    open_axes = {axis: torch.export.Dim(f"side{axis}", min=3) for axis in range(len(shapes.usual) - 1)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            EncodedNetwork(model, "fp16").eval(),
            rays,
            dynamo=True,
            input_names=["origins", "directions"],
            dynamic_shapes=None if shape == "static" else (open_axes, open_axes),
            opset_version=20,
            verbose=False,
        )
    graph = program.model_proto.SerializeToString()
    plan = build_plan(rtx, graph, dict.fromkeys(["origins", "directions"], shapes))
    assert len(plan) > 2 * sum(p.numel() for p in model.network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_has_fp32_inputs_and_outputs_of_any_size(kind: str, rtx: ModuleType):
    net = network(kind)
    log = tensorrt._Log(rtx)
    builder = rtx.Builder(log.logger)
    definition = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert rtx.OnnxParser(definition, log.logger).parse(network_onnx(net, "fp16")), log.said
    assert (definition.num_inputs, definition.num_outputs) == (1, 1)
    read, gives = definition.get_input(0), definition.get_output(0)
    assert (read.name, gives.name) == (INPUT, OUTPUT)
    assert read.dtype == gives.dtype == rtx.DataType.FLOAT
    assert tuple(read.shape) == ((-1, 40) if kind == "r2l" else (1, 24, -1, -1))
    inner = {definition.get_layer(i).get_output(0).dtype for i in range(definition.num_layers)}
    assert rtx.DataType.HALF in inner


def test_a_graph_that_cannot_be_read_is_an_error_with_the_reason(rtx: ModuleType):
    with pytest.raises(BrokenEngine, match="cannot read the graph"):
        build_plan(rtx, network_onnx(network("r2l"))[:500], {})


def test_invalid_shapes_are_an_error(rtx: ModuleType):
    graph = network_onnx(network("r2l"))
    with pytest.raises(BrokenEngine, match="tensorrt_rtx (built nothing|refuses)"):
        build_plan(rtx, graph, {INPUT: Shapes((1, 7), (8, 7), (9, 7))})


def test_a_rejected_plan_is_an_error_and_is_removed_from_the_cache(
    rtx: ModuleType, gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Without a GPU no plan is taken: the way of a cached plan that does not fit, as far as it can be gone here.
    gpu((8, 9))
    monkeypatch.setitem(sys.modules, PROPER, None)
    monkeypatch.setattr(tensorrt, "usual_shapes", lambda net, device: PLANS["r2l", "static"])
    cached = tmp_path / "tensorrt_rtx-fp16.plan"
    cached.write_bytes(b"of another version")
    order = BuildSpec(wide("r2l"), "fp16", torch.device("cpu"), tmp_path)
    with pytest.raises(BrokenEngine, match="rejects the plan"):
        tensorrt.build(order)
    assert cached.stat().st_size > 1000 and [*tmp_path.iterdir()] == [cached]


@pytest.mark.parametrize("kind", KINDS)
def test_torch_tensorrt_converts_the_whole_network(kind: str, capfd: pytest.CaptureFixture):
    try:
        torch_trt = importlib.import_module("torch_tensorrt")
    except Exception as error:  # four kinds, depending on what is missing
        pytest.skip(f"torch_tensorrt does not import here ({type(error).__name__}): it needs TensorRT's own libraries")
    net = network(kind)
    example = encoded(kind, 8, 8)
    with torch.no_grad():
        program = torch.export.export(net, (example,))
        torch_trt.dynamo.compile(program, [example], dryrun=True, min_block_size=1)
    assert "100.00%" in "".join(capfd.readouterr()), "a part of it would stay with torch"
