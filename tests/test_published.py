"""The published conventions: images of the published code, exports, and frames of reference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from published_captures import around, blender_capture, llff_capture, mirrored
from student_runs import fill, tiny_mobile_r2l, tiny_r2l

from r2l_nerfstudio import load_student
from r2l_nerfstudio.distillation.hard_rays import HardRayPool
from r2l_nerfstudio.distillation.optimization import PublishedSchedulerConfig
from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras
from r2l_nerfstudio.distillation.published_scene import scene_of_capture
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.export.comparison import check_export
from r2l_nerfstudio.export.graph import GraphSpec
from r2l_nerfstudio.export.onnx_file import export_onnx
from r2l_nerfstudio.export.openvino_file import export_openvino
from r2l_nerfstudio.export.web_folder import page_rays, to_rgb
from r2l_nerfstudio.export.web_graph import WebGraph
from r2l_nerfstudio.importing.capture_frame import read_frame
from r2l_nerfstudio.psnr import psnr
from r2l_nerfstudio.rays.conventions import OURS, RayConventions, ndc_rays
from r2l_nerfstudio.rays.published import (
    Similarity,
    blender_residual,
    fit_similarity,
    from_dataparser,
    llff_frame,
    published_scene,
)
from r2l_nerfstudio.rays.ray_encoding import RayEncoding
from r2l_nerfstudio.rays.spacing import SceneBounds
from r2l_nerfstudio.scripts.import_checkpoint import ImportCheckpoint
from r2l_nerfstudio.student import Student

PICTURES = {
    "r2l_blender": "r2l_w32_d8",
    "r2l_forward": "r2l_w32_d8",
    "mobile_blender": "mobile_blender_w32_b3",
    "mobile_forward_ndc": "mobile_forward_ndc_w32_b3",
}


@pytest.fixture(scope="module")
def imported(
    capture_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Student, dict[str, np.ndarray], torch.Tensor]]:
    """A function from the name of a published picture to the imported student, the picture, and its pose in the run."""
    made = {}

    def find(name: str) -> tuple[Student, dict[str, np.ndarray], torch.Tensor]:
        if name not in made:
            files = capture_data("published_small")
            picture = dict(np.load(files / f"{name}.npz"))
            place = tmp_path_factory.mktemp(name)
            height, width = picture["rgb"].shape[:2]
            factor = int(picture.get("factor", 1))
            focal = float(picture["focal"]) if "focal" in picture else factor * float(picture["cell_focal"])
            picture["intrinsics"] = np.array([focal, focal, width / 2, height / 2], dtype=np.float32)
            capture = place / "capture"
            if "forward" in name:
                far = float(picture["far"]) if "r2l" in name else 9.0
                llff_capture(capture, picture["camera_to_world"], height, width, focal, (4 / 3, far))
            else:
                blender_capture(capture, picture["camera_to_world"], height, width, focal)
            cells = (int(picture["cell_rows"]), int(picture["cell_columns"])) if factor > 1 else None
            command = ImportCheckpoint(
                files / f"{PICTURES[name]}.tar", capture, output_dir=place / "outputs", cells=cells
            )
            command.main()
            (config,) = (place / "outputs").rglob("config.yml")
            student = load_student(config, device="cpu", engine="torch")
            made[name] = (student, picture, read_frame(capture).cameras.camera_to_worlds[0])
        return made[name]

    return find


@pytest.mark.parametrize("name", PICTURES)
def test_imported_students_render_the_published_images(name: str, imported) -> None:
    student, picture, pose = imported(name)
    height, width = picture["rgb"].shape[:2]
    found = student.render(pose.numpy(), picture["intrinsics"], width, height)
    assert picture["rgb"].std() > 0.03
    assert np.abs(found - picture["rgb"]).max() < 1e-4


@pytest.mark.parametrize("name", PICTURES)
def test_sample_points_equal_the_published_ones(name: str, imported) -> None:
    student, picture, pose = imported(name)
    encoding = student.model.ray_encoding
    rows, columns, count = picture["points"].shape[:3]
    factor = int(picture.get("factor", 1))
    rays = encoding.image_rays(pose, torch.from_numpy(picture["intrinsics"]) / factor, rows, columns)
    assert (encoding.points(*rays, count) - torch.from_numpy(picture["points"])).abs().max() < 5e-6


@pytest.mark.parametrize("name", PICTURES)
def test_training_uses_the_same_rays(name: str, imported) -> None:
    """Outside of inference the encoding goes another way: autograd on, no doubled sines."""
    student, picture, pose = imported(name)
    model = student.model
    factor = int(picture.get("factor", 1))
    rows, columns = picture["points"].shape[:2]
    rays = model.ray_encoding.image_rays(pose, torch.from_numpy(picture["intrinsics"]) / factor, rows, columns)
    with torch.enable_grad():
        encoded = model.encode(*rays)
        if factor > 1:
            values = model.network(encoded.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
        else:
            values = model.network(encoded)
    assert np.abs(values.detach().numpy() - picture["rgb"]).max() < 1e-4


def published_student(kind: str, ndc: bool = False) -> Student:
    """A student of the published conventions with random weights, in a frame that is turned, scaled and moved."""
    config = tiny_mobile_r2l() if kind == "mobile-r2l" else tiny_r2l(volume_resolution=0)
    config.published_rays = config.color_only = True
    if kind == "mobile-r2l":
        config.margin = 0
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    similarity = Similarity(turn * torch.linalg.det(turn), 1.7, torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64))
    scene = published_scene(similarity, kind == "mobile-r2l", not ndc, (0.0, 0.0), (1.9, 2.4) if ndc else None)
    model = config.setup(scene_box=None, num_train_data=1, metadata={}, device="cpu", grad_scaler=None)
    # Probe cameras look along the frame's -z.
    axes = similarity.rotation.T.float()
    bounds = SceneBounds("near-far", (0.1, -0.1, 0.05), 0.4, scene.near, scene.far)
    model.set_scene(bounds, axes, torch.ones(3), True, True, 50.0, scene.conventions)
    fill(model)
    return Student(model.eval().requires_grad_(False), f"{kind}-paper")


KINDS = [("r2l", False), ("mobile-r2l", False), ("mobile-r2l", True)]


@pytest.mark.parametrize(("kind", "ndc"), KINDS)
def test_graphs_of_published_students_equal_torch(kind: str, ndc: bool) -> None:
    student = published_student(kind, ndc)
    assert student.outputs == ("rgb",)
    spec = GraphSpec("camera", "fp32", 28, 20)
    module = spec.build(student)

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = module(*(torch.from_numpy(inputs[key]) for key in module.inputs))
        return dict(zip(module.outputs, (value.detach().numpy() for value in found), strict=True))

    assert check_export(student, spec, run, "The graph") > 90


@pytest.mark.parametrize(("kind", "ndc"), [("r2l", False), ("mobile-r2l", True)])
def test_onnx_and_openvino_of_published_students(kind: str, ndc: bool, tmp_path: Path) -> None:
    student = published_student(kind, ndc)
    spec = GraphSpec("camera", "fp32", 28, 20)
    assert export_onnx(student, spec, tmp_path / "student.onnx", False) > 80
    import onnx

    said = {entry.key: entry.value for entry in onnx.load(str(tmp_path / "student.onnx")).metadata_props}
    assert said["directions"] == "planar" and said["is_contracted"] == "false"
    assert said["pixel_offset"] == ("0.5" if kind == "mobile-r2l" else "0.0")
    assert (said["ndc"] != "null") == ndc
    assert export_openvino(student, spec, tmp_path / "student.xml", False) > 60


def test_the_ray_graph_of_a_published_r2l() -> None:
    student = published_student("r2l")
    pose, intrinsics = torch.eye(3, 4), torch.tensor([30.0, 30.0, 14.0, 10.0])
    rays = student.model.ray_encoding.image_rays(pose, intrinsics, 20, 28)
    (found,) = GraphSpec("rays", "fp32", 28, 20).build(student)(*(tensor.reshape(-1, 3) for tensor in rays))
    assert (found.view(20, 28, 3) - student.render(pose, intrinsics, 28, 20)).abs().max() < 1e-4


@pytest.mark.parametrize(("kind", "ndc"), KINDS)
def test_the_web_graph_of_published_students(kind: str, ndc: bool) -> None:
    student = published_student(kind, ndc)
    graph = WebGraph(student, "fp32").eval()
    pose = torch.cat([student.model.ray_encoding.axes, student.model.ray_encoding.center[:, None]], dim=-1)
    picture = {"width": 24, "height": 16, "focal": 50.0}
    pixels = graph(*page_rays(graph, pose, picture)).numpy()
    rgb = torch.from_numpy(to_rgb(pixels)).float() / 255
    truth = student.render(pose, torch.tensor([50.0, 50.0, 12.0, 8.0]), 24, 16)
    assert psnr(rgb, truth) > 50


def test_wide_lenses_of_a_published_r2l_are_rendered_from_pinholes() -> None:
    from nerfstudio.cameras.cameras import Cameras, CameraType

    student = published_student("r2l")
    pose = torch.eye(3, 4)
    fisheye = Cameras(pose[None], 20.0, 20.0, 10.0, 10.0, 20, 20, camera_type=CameraType.FISHEYE)
    rgb = student.model.get_outputs_for_camera(fisheye)["rgb"]
    pinhole = Cameras(pose[None], 20.0, 20.0, 10.0, 10.0, 20, 20)
    flat = student.model.get_outputs_for_camera(pinhole)["rgb"]
    # Around its middle a fisheye is a pinhole.
    assert rgb.isfinite().all() and (rgb - flat)[8:12, 8:12].abs().max() < 0.05


def test_single_rays_have_infinite_depth() -> None:
    from nerfstudio.cameras.rays import RayBundle

    for kind in ("r2l", "mobile-r2l"):
        student = published_student(kind)
        directions = torch.nn.functional.normalize(torch.randn(5, 3), dim=-1)
        norms = torch.full((5, 1), 1.2)
        bundle = RayBundle(torch.zeros(5, 3), directions, torch.ones(5, 1), metadata={"directions_norm": norms})
        with torch.no_grad():
            outputs = student.model(bundle)
        assert outputs["rgb"].shape == (5, 3) and outputs["depth"].isinf().all()
        if kind == "r2l":  # planar directions: those of Nerfstudio's bundles times their length
            with torch.no_grad():
                planar = student.model(RayBundle(torch.zeros(5, 3), 1.2 * directions, torch.ones(5, 1)))
            assert torch.allclose(planar["rgb"], outputs["rgb"], atol=1e-5)


def test_ndc_of_known_points() -> None:
    """A point p lies at (-a x/z, -b y/z, 1 + 2/z); positions 0 and 1 are z = -1 and infinity."""
    origins = torch.tensor([[0.3, -0.2, 0.4], [0.0, 0.1, -0.2]])
    directions = torch.tensor([[0.2, 0.1, -1.0], [-0.3, 0.2, -2.0]])
    scale = torch.tensor([1.5, 2.0])
    start, step = ndc_rays(origins, directions, scale)
    for distance in (2.0, 5.0):
        point = origins + distance * directions
        x, y, z = point.unbind(-1)
        wanted = torch.stack([-1.5 * x / z, -2.0 * y / z, 1 + 2 / z], dim=-1)
        position = (wanted[:, 2:] - start[:, 2:]) / step[:, 2:]
        assert torch.allclose(start + position * step, wanted, atol=1e-5)
    assert torch.allclose(start[:, 2], torch.tensor(-1.0)) and torch.allclose((start + step)[:, 2], torch.tensor(1.0))
    backwards = ndc_rays(origins, -directions, scale)
    assert all(values.isfinite().all() for values in backwards)


def test_conventions_are_in_the_checkpoint() -> None:
    student = published_student("mobile-r2l", ndc=True)
    other = RayEncoding("points", 4, 4)
    other.load_state_dict(student.model.ray_encoding.state_dict())
    assert other.conventions == student.model.ray_encoding.conventions
    rays = student.model.ray_encoding.image_rays(torch.eye(3, 4), torch.tensor([9.0, 9.0, 4.0, 4.0]), 8, 8)
    assert torch.equal(other(*rays), student.model.ray_encoding(*rays))


def test_a_checkpoint_without_conventions_uses_ours() -> None:
    encoding = RayEncoding("points", 4, 3)
    state = encoding.state_dict()
    state["_extra_state"] = {"spacing": "disparity"}
    assert set(state) == {"center", "radius", "near", "far", "axes", "_extra_state"}
    encoding.load_state_dict(state, strict=True)
    assert encoding.conventions == OURS and encoding.is_contracted and encoding.spacing == "disparity"


def test_conventions_that_do_not_fit_the_encoding() -> None:
    for encoding, spacing in ((RayEncoding("plucker"), "near-far"), (RayEncoding("points"), "sphere")):
        encoding.spacing = spacing
        with pytest.raises(InputError, match="published-rays"):
            encoding.set_conventions(RayConventions(is_planar=True))


# Frames.


def random_similarity(seed: int) -> Similarity:
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    return Similarity(turn * torch.linalg.det(turn), 0.37, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))


def test_a_similarity_is_found_again() -> None:
    poses, wanted = around(6).double(), random_similarity(2)
    found, residual, degrees = fit_similarity(poses, wanted.poses(poses))
    assert residual < 1e-12 and degrees < 1e-5
    assert torch.allclose(torch.tensor(found.rows), torch.tensor(wanted.rows), atol=1e-9)
    back = found.then(found.inverse())
    assert torch.allclose(torch.tensor(back.rows), torch.eye(3, 4), atol=1e-9)


def test_a_similarity_of_cameras_on_one_line() -> None:
    poses = around(1).double().expand(4, 3, 4).clone()
    poses[:, 0, 3] += torch.arange(4.0)
    wanted = random_similarity(4)
    found, residual, degrees = fit_similarity(poses, wanted.poses(poses))
    assert residual < 1e-9 and degrees < 1e-4
    assert torch.allclose(torch.tensor(found.rows), torch.tensor(wanted.rows), atol=1e-6)


def test_cameras_of_another_scene_leave_a_residual() -> None:
    poses = around(6).double()
    _, residual, degrees = fit_similarity(poses, poses[[3, 1, 4, 0, 5, 2]])
    assert residual > 0.3 and degrees > 20


def test_blender_geometry() -> None:
    assert blender_residual(around(9)) < 1e-4
    half = around(9).clone()
    half[:, :, 3] *= 0.5
    assert blender_residual(half) == pytest.approx(0.5, abs=1e-3)


def test_a_dataparsers_frame_is_undone() -> None:
    poses, moved = around(5).double(), random_similarity(5)
    transform = torch.cat([moved.rotation, moved.translation[:, None]], dim=-1)
    scaled = Similarity(moved.rotation, 0.3, 0.3 * moved.translation)
    back = from_dataparser(transform.float(), 0.3)
    assert torch.allclose(back.poses(scaled.poses(poses)), poses, atol=1e-5)


def test_the_frame_of_a_forward_facing_capture() -> None:
    pose = np.concatenate([np.eye(3), [[0.2], [-0.1], [0.05]]], axis=1)
    poses = torch.from_numpy(mirrored(pose))
    raw = random_similarity(7).poses(poses)
    back = llff_frame(raw, 0.37 * 4 / 3)
    assert torch.allclose(back.poses(raw), poses, atol=1e-9)
    # With an origin of its own only the positions move.
    centered = llff_frame(raw, 0.37 * 4 / 3, raw[0, :, 3])
    assert torch.allclose(centered.poses(raw)[0, :, 3], torch.zeros(3, dtype=torch.float64), atol=1e-9)


@dataclasses.dataclass
class Outputs:
    """What `scene_of_capture` reads of a dataparser's outputs."""

    dataparser_transform: torch.Tensor
    dataparser_scale: float


def test_training_conventions_by_kind_of_capture() -> None:
    lens = torch.tensor([[50.0, 50.0, 20.0, 15.0]])
    bounds = SceneBounds("near-far", (0.0, 0.0, 0.0), 1.0, 0.9, 4.4)
    identity = Outputs(torch.eye(3, 4), 1.0)
    inward = CaptureCameras(around(9), lens.expand(9, 4), 40, 30)
    scene = scene_of_capture(inward, identity, bounds, reads_ray_image=False)
    assert (scene.near, scene.far) == (2.0, 6.0) and scene.conventions.pixel_offset == 0.0
    assert torch.allclose(torch.tensor(scene.conventions.frame), torch.eye(3, 4), atol=1e-6)
    # The same capture as a dataparser scales it: back to its own coordinates.
    small = around(9).clone()
    small[:, :, 3] *= 0.25
    scene = scene_of_capture(
        CaptureCameras(small, lens.expand(9, 4), 40, 30), Outputs(torch.eye(3, 4), 0.25), bounds, True
    )
    assert scene.conventions.scale == pytest.approx(4.0) and scene.conventions.ndc is None
    # Another capture around an object: its cameras are put at Blender's distance.
    scene = scene_of_capture(CaptureCameras(small, lens.expand(9, 4), 40, 30), identity, bounds, True)
    assert scene.conventions.scale == pytest.approx(4.0, rel=1e-3)
    ahead = torch.from_numpy(mirrored(np.concatenate([np.eye(3), [[0.2], [-0.1], [0.0]]], axis=1))).float()
    forward = CaptureCameras(ahead, lens.expand(5, 4), 40, 30)
    scene = scene_of_capture(forward, identity, bounds, reads_ray_image=True)
    assert (scene.near, scene.far) == (0.0, 1.0) and scene.conventions.ndc == pytest.approx((2.5, 10 / 3))
    assert scene.conventions.scale == pytest.approx(4 / 3)
    scene = scene_of_capture(forward, identity, bounds, reads_ray_image=False)
    assert (scene.near, scene.far) == pytest.approx((0.9 * 4 / 3, 4 * 4 / 3)) and scene.conventions.ndc is None


# The recipe.


def test_published_hard_rays_start_when_the_pool_is_full() -> None:
    pool = HardRayPool(2, 2, 1, "cpu", is_published=True)
    pool.add(torch.arange(6.0)[:, None], torch.arange(6.0))
    assert pool.available == 0 and len(pool) == 2
    pool.add(torch.arange(10.0, 16.0)[:, None], torch.arange(6.0))
    assert pool.available == 2 and len(pool) == 4
    drawn = set(pool.draw(2)[:, 0].tolist())
    assert len(drawn) == 2 and drawn < {4.0, 5.0, 14.0, 15.0}
    pool.add(torch.tensor([[20.0], [21.0], [22.0]]), torch.tensor([0.1, 3.0, 2.0]))
    # The worst replace those that were drawn, nothing else.
    assert set(pool._records[:, 0].tolist()) == ({4.0, 5.0, 14.0, 15.0} - drawn) | {21.0, 22.0}


def test_the_published_learning_rate_by_kind_of_capture() -> None:
    for is_forward, steps in ((True, 250_000), (False, 500_000)):
        schedule = PublishedSchedulerConfig()
        schedule.settle(is_forward)
        assert schedule.decay_steps == steps
        assert schedule.share(steps, 0.5) == pytest.approx(0.1)
    fixed = PublishedSchedulerConfig(decay_steps=7)
    fixed.settle(True)
    assert fixed.decay_steps == 7
    assert math.isclose(PublishedSchedulerConfig().share(500_000, 0.5), 0.1)


def test_the_paper_methods_are_the_published_recipe() -> None:
    from nerfstudio.configs.method_configs import all_methods

    r2l, mobile = (all_methods[f"{kind}-paper"].pipeline for kind in ("r2l", "mobile-r2l"))
    for pipeline in (r2l, mobile):
        model = pipeline.model
        assert model.published_rays and model.color_only and model.spacing == "near-far" and not model.zero_init
    assert (r2l.model.num_points, r2l.model.num_frequencies) == (16, 10)
    assert (mobile.model.num_points, mobile.model.num_frequencies) == (8, 6)
    rays = r2l.datamanager
    num_hard = int(rays.hard_fraction * rays.train_num_rays_per_batch)
    assert (num_hard, num_hard * rays.hard_pool_batches) == (16_384, 1_638_400) and rays.published_hard_rays
    assert mobile.datamanager.whole_images == 10 and mobile.model.margin == 0 and mobile.sync_batch_norm
    for kind in ("r2l", "mobile-r2l", "r2l-lite", "mobile-r2l-lite"):
        model = all_methods[kind].pipeline.model
        assert not (model.published_rays or model.color_only)
