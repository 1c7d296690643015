"""Trained runs render rays and views; runs that cannot raise errors with the reason."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.models.nerfacto import NerfactoModel, NerfactoModelConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from teachers import TINY, teacher_config, train, write_blender_capture, write_capture
from torch import nn

import r2l_nerfstudio.teacher
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.lpips import without_lpips
from r2l_nerfstudio.run_config import load_run_config
from r2l_nerfstudio.teacher import Teacher


@pytest.fixture(scope="session")
def blender_capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blender_capture(tmp_path_factory.mktemp("captures") / "blender")


@dataclass
class Trained:
    """A teacher beside the model it should equal."""

    model: nn.Module
    teacher: Teacher

    def camera(self, index: int = 1) -> Cameras:
        return self.teacher.dataparser_outputs.cameras[index : index + 1]


@pytest.fixture(scope="module", params=TINY)
def trained(
    request: pytest.FixtureRequest, tiny_capture: Path, blender_capture: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    data = blender_capture if request.param in ("vanilla-nerf", "tensorf") else tiny_capture
    config = teacher_config(request.param, data, tmp_path_factory.mktemp("runs"), iterations=6)
    model = train(config).pipeline.model.eval()
    return Trained(model, Teacher.load(config.get_base_dir()))


@pytest.fixture
def run(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A copy of the tiny nerfacto run, to be damaged."""
    return Path(shutil.copytree(tiny_teacher, tmp_path / "run"))


@pytest.fixture
def edit_checkpoint(run: Path) -> Callable[[Callable[[dict], object]], Path]:
    """A function that changes the checkpoint of `run` with a function of its content, and returns its path."""

    def edit(change: Callable[[dict], object]) -> Path:
        (file,) = (run / "nerfstudio_models").iterdir()
        content = torch.load(file, weights_only=False)
        change(content)
        torch.save(content, file)
        return file

    return edit


def _edit_config(run: Path, old: str, new: str) -> None:
    text = (run / "config.yml").read_text()
    assert old in text
    (run / "config.yml").write_text(text.replace(old, new))


def _error(run: Path, data: Path | None = None) -> str:
    """The one paragraph that loading gives."""
    with pytest.raises(InputError) as caught:
        Teacher.load(run, data=data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _equal(first: Cameras, second: Cameras) -> bool:
    return all(
        torch.equal(getattr(first, name), getattr(second, name))
        for name in ("camera_to_worlds", "fx", "fy", "cx", "cy", "width", "height")
    )


# What each of the methods that run here must do.


def test_view_equals_the_trained_models_render(trained: Trained) -> None:
    view = trained.teacher.view(trained.camera())
    with torch.no_grad():
        expected = trained.model.get_outputs_for_camera(trained.camera())
    suffix = "" if "rgb" in expected else "_fine"
    assert torch.equal(view.rgb, expected[f"rgb{suffix}"])
    assert torch.equal(view.accumulation, expected[f"accumulation{suffix}"])
    assert torch.equal(view.depth, expected[f"depth{suffix}"])
    assert view.rgb.shape == (24, 24, 3) and view.depth.shape == view.accumulation.shape == (24, 24, 1)
    assert not torch.equal(view.rgb, trained.teacher.view(trained.camera(2)).rgb)


def test_cropped_camera_gives_the_crop(trained: Trained) -> None:
    camera = copy.deepcopy(trained.camera())
    whole = trained.teacher.view(camera)
    x, y, width, height = 5, 3, 10, 7
    camera.cx, camera.cy = camera.cx - x, camera.cy - y
    camera.width, camera.height = torch.tensor([[width]]), torch.tensor([[height]])
    crop = trained.teacher.view(camera)
    window = slice(y, y + height), slice(x, x + width)
    for name in ("rgb", "accumulation", "depth"):
        torch.testing.assert_close(getattr(crop, name), getattr(whole, name)[window], rtol=1e-4, atol=1e-5)


def test_rays_equal_the_view(trained: Trained) -> None:
    trained.teacher.model.config.eval_num_rays_per_chunk = 100  # an odd part of 576
    view = trained.teacher.view(trained.camera())
    bundle = trained.camera().generate_rays(camera_indices=0, keep_shape=True)
    rays = trained.teacher.rays(bundle)
    for name in ("rgb", "accumulation", "depth"):
        torch.testing.assert_close(getattr(rays, name), getattr(view, name))
    few = bundle[3, 4:9]
    few.camera_indices = None
    rays = trained.teacher.rays(few)
    assert few.camera_indices is None
    assert rays.rgb.shape == (5, 3) and rays.depth.shape == (5, 1)
    torch.testing.assert_close(rays.rgb, view.rgb[3, 4:9], rtol=1e-4, atol=1e-5)


def test_teacher_is_frozen(trained: Trained) -> None:
    teacher = trained.teacher
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())
    holder = nn.Module()
    holder.teacher = teacher
    assert not holder.state_dict() and not list(holder.modules())[1:]
    assert not teacher.view(trained.camera()).rgb.requires_grad
    assert not [key for key in teacher.model.state_dict() if "lpips" in key]


# What loading finds out.


def test_properties_of_a_teacher(tiny_teacher: Path, tiny_capture: Path) -> None:
    teacher = Teacher.load(tiny_teacher)
    assert teacher.config_path == tiny_teacher / "config.yml"
    assert teacher.checkpoint == tiny_teacher / "nerfstudio_models" / "step-000000029.ckpt"
    assert teacher.step == 29
    assert teacher.device == torch.device("cpu")
    assert teacher.dataparser_config.data == tiny_capture
    assert len(teacher.dataparser_outputs.cameras) == 6
    assert teacher.background is None and not teacher.views_only
    assert yaml.dump(teacher.config) == yaml.dump(load_run_config(tiny_teacher))
    assert teacher.config.pipeline.datamanager.dataparser.data == Path()  # ours is a copy


def test_one_camera_at_a_time_unmodified(tiny_teacher: Path) -> None:
    class Editing(nn.Module):
        config = NerfactoModelConfig()

        def get_outputs_for_camera(self, camera: Cameras) -> dict:
            camera.fx *= 0.5
            camera.camera_to_worlds += 1
            return {"rgb": torch.zeros(int(camera.height), int(camera.width), 3)}

        def forward(self, bundle) -> dict:
            bundle.origins += 1
            bundle.metadata["directions_norm"] *= 2
            return {"rgb": bundle.origins.sigmoid()}

    teacher = replace(Teacher.load(tiny_teacher), model=Editing())
    cameras = teacher.dataparser_outputs.cameras
    before = copy.deepcopy(cameras)
    assert teacher.view(cameras[0]).rgb.shape == (24, 24, 3)  # of batch shape ()
    view = teacher.view(cameras[:1])
    assert view.accumulation is None and view.depth is None
    assert _equal(cameras, before)
    with pytest.raises(ValueError, match="one camera at a time, got 2"):
        teacher.view(cameras[:2])
    bundle = cameras.generate_rays(camera_indices=0, keep_shape=True)
    untouched = copy.deepcopy(bundle)
    assert teacher.rays(bundle).rgb.shape == (24, 24, 3)
    assert torch.equal(bundle.origins, untouched.origins)
    assert torch.equal(bundle.metadata["directions_norm"], untouched.metadata["directions_norm"])


def test_pose_corrections_match_training(tiny_teacher: Path) -> None:
    teacher = Teacher.load(tiny_teacher)
    corrections = teacher.pose_corrections()
    assert corrections.shape == (6, 3, 4) and not corrections.requires_grad
    assert (corrections - torch.eye(4)[:3]).abs().max() > 1e-4  # it has learned some
    coordinates = torch.tensor([[0.5, 0.5], [7.5, 3.5], [20.5, 9.5]])
    bundle = teacher.dataparser_outputs.cameras.generate_rays(torch.tensor([[4], [0], [2]]), coordinates)
    of_rays = corrections[bundle.camera_indices[:, 0]]
    origins = bundle.origins + of_rays[:, :, 3]
    directions = (of_rays[:, :, :3] @ bundle.directions[..., None])[..., 0]
    teacher.model.camera_optimizer.apply_to_raybundle(bundle)
    torch.testing.assert_close(bundle.origins, origins)
    torch.testing.assert_close(bundle.directions, directions)


def test_no_pose_corrections_if_none_were_learned(run: Path, edit_checkpoint) -> None:
    _edit_config(run, "mode: SO3xR3", "mode: 'off'")
    edit_checkpoint(lambda content: content["pipeline"].pop("_model.camera_optimizer.pose_adjustment"))
    assert Teacher.load(run).pose_corrections() is None


def test_fingerprint_depends_on_weights_and_not_on_location(run: Path, tiny_teacher: Path, edit_checkpoint) -> None:
    original = Teacher.load(tiny_teacher).fingerprint()
    assert Teacher.load(run).fingerprint() == original
    edit_checkpoint(lambda content: content["pipeline"]["_model.field.aabb"].add_(0.5))
    retrained = Teacher.load(run).fingerprint()
    assert retrained != original
    _edit_config(run, "eval_num_rays_per_chunk: ", "eval_num_rays_per_chunk: 1")
    assert Teacher.load(run).fingerprint() not in (original, retrained)


def test_background_of_a_teacher_trained_on_random_colors(
    run: Path, tiny_teacher: Path, blender_capture: Path, tmp_path: Path
) -> None:
    _edit_config(run, "background_color: last_sample", "background_color: random")
    black = Teacher.load(run)
    assert torch.equal(black.background, torch.zeros(3))

    config = teacher_config("nerfacto", blender_capture, tmp_path, 2, **{"pipeline.model.background_color": "random"})
    train(config)
    white = Teacher.load(config.get_base_dir())
    assert torch.equal(white.background, torch.ones(3))  # as the photos are composited
    camera = white.dataparser_outputs.cameras[0]
    painted = white.view(camera)
    unpainted = replace(white, background=None).view(camera)
    torch.testing.assert_close(painted.rgb, (unpainted.rgb + 1 - unpainted.accumulation).clamp(0, 1))
    assert (painted.rgb - unpainted.rgb).abs().max() > 0.01
    rays = white.rays(camera.reshape((1,)).generate_rays(camera_indices=0, keep_shape=True))
    torch.testing.assert_close(rays.rgb, painted.rgb)


# Runs that have moved, and captures that have.


def test_moved_run_with_a_relative_capture(
    tiny_teacher: Path, tiny_capture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_capture, tmp_path / "moved" / "captures" / "ball")
    run = Path(shutil.copytree(tiny_teacher, tmp_path / "moved" / "outputs" / "ball" / "run"))
    config = load_run_config(run)
    config.pipeline.datamanager.data = Path("captures/ball")
    (run / "config.yml").write_text(yaml.dump(config))
    expected = Teacher.load(tiny_teacher).view(Teacher.load(tiny_teacher).dataparser_outputs.cameras[0])

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in (elsewhere, tmp_path / "moved", run):
        monkeypatch.chdir(folder)
        teacher = Teacher.load(Path(os.path.relpath(run)))
        assert teacher.dataparser_config.data.samefile(tmp_path / "moved" / "captures" / "ball")
        assert torch.equal(teacher.view(teacher.dataparser_outputs.cameras[0]).rgb, expected.rgb)


def test_capture_given_by_the_caller(run: Path, tiny_capture: Path, tmp_path: Path) -> None:
    _edit_config(run, tiny_capture.name, "gone")
    assert "--data" in _error(run)
    moved = Path(shutil.copytree(tiny_capture, tmp_path / "moved"))
    teacher = Teacher.load(run, data=moved)
    assert teacher.dataparser_config.data == moved
    assert teacher.dataparser_outputs.image_filenames[0].is_relative_to(moved)


def test_capture_named_only_by_the_dataparser(run: Path, tiny_capture: Path) -> None:
    config = load_run_config(run)
    config.pipeline.datamanager.data = None
    config.pipeline.datamanager.dataparser.data = tiny_capture
    (run / "config.yml").write_text(yaml.dump(config))
    assert Teacher.load(run).dataparser_config.data == tiny_capture


def test_missing_capture(run: Path, tmp_path: Path) -> None:
    message = _error(run, data=tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message and "--data" in message


def test_missing_images(run: Path, tiny_capture: Path, tmp_path: Path) -> None:
    capture = Path(shutil.copytree(tiny_capture, tmp_path / "capture"))
    for name in ("002.png", "005.png"):
        (capture / "images" / name).unlink()
    message = _error(run, data=capture)
    assert "lacks 2 of its 6 training images" in message
    assert str(capture / "images" / "002.png") in message and "--data" in message


def test_damaged_capture(run: Path, tiny_capture: Path, tmp_path: Path) -> None:
    capture = Path(shutil.copytree(tiny_capture, tmp_path / "capture"))
    (capture / "transforms.json").write_text((capture / "transforms.json").read_text()[:200])
    message = _error(run, data=capture)
    assert str(capture) in message and "--data" in message


def test_capture_in_another_frame(run: Path, tmp_path: Path) -> None:
    other = write_capture(tmp_path / "other", distance=2.1)
    message = _error(run, data=other)
    assert "different frames" in message and str(other) in message and "--data" in message


def test_capture_with_another_number_of_images(run: Path, tmp_path: Path) -> None:
    other = write_capture(tmp_path / "other", views=16)
    (run / "dataparser_transforms.json").unlink()  # or it would be the frame that differs
    message = _error(run, data=other)
    assert "was trained on 6 images" in message and f"{other} has 12" in message and "--data" in message


@pytest.mark.parametrize("content", ["", "{}", '{"transform": 3, "scale": "a"}', '{"transform": [[1, 2]], "scale": 1}'])
def test_damaged_frame_file(content: str, run: Path) -> None:
    (run / "dataparser_transforms.json").write_text(content)
    assert str(run) in _error(run)


# Checkpoints, good and bad.


def test_numpy_scalars_are_allowed(run: Path, edit_checkpoint) -> None:
    def add(content: dict) -> None:
        scalars = [np.float64(0.5), np.float32(0.25), np.int64(3)]
        content["schedulers"] = {"fields": {"_last_lr": scalars}}

    file = edit_checkpoint(add)
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(file, weights_only=True)
    assert Teacher.load(run).step == 29


def test_prefixes_of_data_parallel_runs_and_lpips_weights(run: Path, tiny_teacher: Path, edit_checkpoint) -> None:
    expected = Teacher.load(tiny_teacher).model.state_dict()

    def check() -> None:
        state = Teacher.load(run).model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)

    def as_saved_with_lpips(content: dict) -> None:
        content["pipeline"]["_model.lpips.net.lin0.model.1.weight"] = torch.rand(1, 64, 1, 1)

    def as_wrapped_model(content: dict) -> None:
        content["pipeline"] = {k.replace("_model.", "_model.module."): v for k, v in content["pipeline"].items()}

    def as_wrapped_pipeline(content: dict) -> None:
        content["pipeline"] = {f"module.{k}": v for k, v in content["pipeline"].items()}

    for change in (as_saved_with_lpips, as_wrapped_model, as_wrapped_pipeline):
        edit_checkpoint(change)
        check()


def test_missing_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "nerfstudio_models")
    assert str(run / "nerfstudio_models") in _error(run)


@pytest.mark.parametrize("kept", [0, 10, 0.3, 0.99])
def test_truncated_checkpoint(kept: float, run: Path) -> None:
    (file,) = (run / "nerfstudio_models").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    message = _error(run)
    assert str(file) in message and "truncated" in message


@pytest.mark.parametrize("content", [{"weights": 1}, {"pipeline": {}, "step": 1}, [1, 2], {"pipeline": 3, "step": 1}])
def test_other_files_in_place_of_a_checkpoint(content: object, run: Path) -> None:
    (file,) = (run / "nerfstudio_models").iterdir()
    torch.save(content, file)
    assert str(file) in _error(run)


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_checkpoint_that_would_run_code(run: Path, tmp_path: Path) -> None:
    (file,) = (run / "nerfstudio_models").iterdir()
    torch.save({"pipeline": {}, "step": 1, "evil": _Evil(tmp_path / "mark")}, file)
    message = _error(run)
    assert str(file) in message and "system" in message and "more than tensors" in message
    assert not (tmp_path / "mark").exists()


def test_checkpoint_of_another_model(run: Path) -> None:
    _edit_config(run, "hidden_dim_color: 16", "hidden_dim_color: 24")
    message = _error(run)
    assert "step-000000029.ckpt" in message and "does not fit" in message and "size mismatch" in message


def test_checkpoint_that_lacks_weights(run: Path, edit_checkpoint) -> None:
    # Nerfstudio's own loader would leave these random without a word.
    file = edit_checkpoint(lambda content: content["pipeline"].pop("_model.field.mlp_head.layers.0.weight"))
    message = _error(run)
    assert str(file) in message and "field.mlp_head.layers.0.weight" in message


def test_checkpoint_trained_with_tiny_cuda_nn(run: Path, edit_checkpoint) -> None:
    def flatten(content: dict) -> None:
        pipeline = content["pipeline"]
        for key in [key for key in pipeline if key.startswith("_model.field.mlp_head.layers")]:
            del pipeline[key]
        pipeline["_model.field.mlp_head.tcnn_encoding.params"] = torch.zeros(10)

    edit_checkpoint(flatten)
    message = _error(run)
    assert "tiny-cuda-nn" in message and "--pipeline.model.implementation torch" in message


def test_model_that_cannot_be_built(run: Path) -> None:
    _edit_config(run, "hidden_dim_color: 16", "hidden_dim_color: -3")
    message = _error(run)
    assert "cannot be built" in message and str(run / "config.yml") in message


def test_run_without_a_capture(run: Path) -> None:
    config = load_run_config(run)
    del config.pipeline.datamanager.dataparser
    (run / "config.yml").write_text(yaml.dump(config))
    assert "not trained on a capture" in _error(run)


def test_teacher_without_color(tiny_teacher: Path) -> None:
    class Colorless(nn.Module):
        config = NerfactoModelConfig()

        def get_outputs_for_camera(self, camera: Cameras) -> dict:
            return {"depth": torch.ones(2, 2, 1), "normals": torch.ones(2, 2, 3)}

        def forward(self, bundle) -> dict:
            return self.get_outputs_for_camera(bundle)

    teacher = replace(Teacher.load(tiny_teacher), model=Colorless())
    camera = teacher.dataparser_outputs.cameras[:1]
    for ask in (lambda: teacher.view(camera), lambda: teacher.rays(camera.generate_rays(0))):
        with pytest.raises(InputError, match="no color output: its outputs are depth, normals"):
            ask()


# A method whose pipeline hands its model more than Nerfstudio's does.


@dataclass
class GuidedModelConfig(NerfactoModelConfig):
    _target: type = field(default_factory=lambda: GuidedModel)


class GuidedModel(NerfactoModel):
    def populate_modules(self) -> None:
        super().populate_modules()
        self.guide = nn.Parameter(self.kwargs["guide"].clone())


@dataclass
class GuidedPipelineConfig(VanillaPipelineConfig):
    _target: type = field(default_factory=lambda: GuidedPipeline)


class GuidedPipeline(VanillaPipeline):
    def __init__(self, config: GuidedPipelineConfig, device: str, **kwargs) -> None:
        model = config.model.setup

        def setup(**model_kwargs) -> GuidedModel:
            return model(**model_kwargs, guide=torch.zeros(3))

        config.model.setup = setup
        super().__init__(config, device, **kwargs)
        del config.model.setup


def test_method_that_needs_its_whole_pipeline(
    run: Path, tiny_teacher: Path, edit_checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    _edit_config(run, "nerfstudio.models.nerfacto.Nerfacto", f"{__name__}.Guided")
    _edit_config(run, "nerfstudio.pipelines.base_pipeline.Vanilla", f"{__name__}.Guided")
    edit_checkpoint(lambda content: content["pipeline"].update({"_model.guide": torch.arange(3.0)}))
    monkeypatch.setenv("NERFSTUDIO_METHOD_CONFIGS", f"guided={__name__}:method")
    teacher = Teacher.load(run)
    assert torch.equal(teacher.model.guide, torch.arange(3.0)) and not teacher.model.guide.requires_grad
    camera = teacher.dataparser_outputs.cameras[0]
    assert torch.equal(teacher.view(camera).rgb, Teacher.load(tiny_teacher).view(camera).rgb)


# Methods that need CUDA: everything but their kernels.

_CUDA_METHODS = {
    "instant-ngp": {"log2_hashmap_size": 8, "grid_resolution": 4, "grid_levels": 1},
    "splatfacto": {"num_random": 20, "sh_degree": 1},
}


def _cuda_run(method: str, data: Path, output: Path, splats: int = 30) -> Path:
    """A run as training leaves it, but with an untrained model."""
    overrides = {f"pipeline.model.{name}": value for name, value in _CUDA_METHODS[method].items()}
    config = teacher_config(method, data, output, 100, **overrides)
    config.save_config()
    run = config.get_base_dir()
    if method == "splatfacto":
        config.pipeline.model.num_random = splats  # training changes their number
    with without_lpips():
        model = config.pipeline.model.setup(
            scene_box=SceneBox(aabb=torch.tensor([[-1.0, -1, -1], [1, 1, 1]])), num_train_data=6, metadata={}
        )
    (run / "nerfstudio_models").mkdir()
    state = {f"_model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"step": 99, "pipeline": state}, run / "nerfstudio_models" / "step-000000099.ckpt")
    return run


@pytest.mark.parametrize("method", _CUDA_METHODS)
def test_cuda_methods_load_strictly_and_ask_for_cuda(method: str, tiny_capture: Path, tmp_path: Path) -> None:
    run = _cuda_run(method, tiny_capture, tmp_path)
    message = _error(run)
    assert "CUDA" in message and method in message and str(run) in message
    (file,) = (run / "nerfstudio_models").iterdir()
    content = torch.load(file)
    content["pipeline"].popitem()
    torch.save(content, file)
    assert "does not fit" in _error(run)


@pytest.fixture
def splat(tiny_capture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    """A real splatfacto whose rasterization kernel sees a plane at depth 2, a quarter opaque and red."""
    import nerfstudio.models.splatfacto as splatfacto

    def rasterize(*, width: int, height: int, **kwargs) -> tuple:
        image = torch.tensor([0.25, 0.0, 0.0, 2.0]).expand(1, height, width, 4)
        return image, torch.full((1, height, width, 1), 0.25), {}

    monkeypatch.setattr(splatfacto, "rasterization", rasterize)
    monkeypatch.setattr(splatfacto, "get_viewmat", lambda pose: pose)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(r2l_nerfstudio.teacher, "_needs_cuda", lambda model: False)
    return Teacher.load(_cuda_run("splatfacto", tiny_capture, tmp_path))


def test_splat_has_the_size_of_its_checkpoint(splat: Teacher) -> None:
    assert splat.views_only
    assert splat.model.num_points == 30
    assert not any(parameter.requires_grad for parameter in splat.model.parameters())


def test_splat_depth_is_distance_along_the_ray(splat: Teacher) -> None:
    camera = copy.deepcopy(splat.dataparser_outputs.cameras[2:3])
    camera.cx, camera.fy = camera.cx - 3, camera.fy * 1.5
    view = splat.view(camera)
    rays = camera.generate_rays(camera_indices=0, keep_shape=True)
    forward = -camera.camera_to_worlds[0, :, 2]
    torch.testing.assert_close(view.depth, 2 / (rays.directions @ forward)[..., None])
    assert view.depth.shape == view.accumulation.shape == (24, 24, 1) and view.rgb.shape == (24, 24, 3)


def test_splat_trained_on_random_colors_is_not_rendered_on_gray(splat: Teacher) -> None:
    camera = splat.dataparser_outputs.cameras[0]
    assert torch.equal(splat.background, torch.zeros(3))
    torch.testing.assert_close(splat.view(camera).rgb[3, 4], torch.tensor([0.25, 0.0, 0.0]))
    white = replace(splat, background=torch.ones(3))
    torch.testing.assert_close(white.view(camera).rgb[3, 4], torch.tensor([1.0, 0.75, 0.75]))


def test_splat_with_a_background_of_its_own(splat: Teacher) -> None:
    run = splat.config_path.parent
    _edit_config(run, "background_color: random", "background_color: white")
    assert Teacher.load(run).background is None


def test_splat_refuses_rays_and_distorted_cameras(splat: Teacher) -> None:
    camera = copy.deepcopy(splat.dataparser_outputs.cameras[:1])
    with pytest.raises(InputError, match="whole views"):
        splat.rays(camera.generate_rays(camera_indices=0))
    camera.distortion_params = torch.tensor([[0.1, 0, 0, 0, 0, 0]])
    with pytest.raises(ValueError, match="undistorted"):
        splat.view(camera)


def test_splat_from_before_its_parameters_were_grouped(splat: Teacher) -> None:
    expected = splat.model.means
    content = torch.load(splat.checkpoint)
    content["pipeline"] = {key.replace("gauss_params.", ""): value for key, value in content["pipeline"].items()}
    torch.save(content, splat.checkpoint)
    assert torch.equal(Teacher.load(splat.config_path).model.means, expected)


# Real captures.


@pytest.mark.parametrize(("name", "images"), [("fox_540", 43), ("fern_504", 17)])
def test_frames_of_real_captures_are_reproducible(
    name: str, images: int, capture_data: Callable[[str], Path], tmp_path: Path
) -> None:
    data = capture_data(name)
    config = teacher_config("nerfacto", data, tmp_path, 1, **{"pipeline.datamanager.camera_res_scale_factor": 0.05})
    config.pipeline.datamanager.dataparser.eval_interval = 8
    train(config)
    teacher = Teacher.load(config.get_base_dir())
    assert len(teacher.dataparser_outputs.cameras) == images
    saved = json.loads((config.get_base_dir() / "dataparser_transforms.json").read_text())
    assert saved["scale"] == pytest.approx(teacher.dataparser_outputs.dataparser_scale)
