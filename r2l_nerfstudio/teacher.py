"""Teachers: frozen trained Nerfstudio models, loaded from their runs, which render rays or whole views.

Only the model is loaded, without data manager, images, optimizers or LPIPS network. Everything here is in the teacher's
frame: the capture's world after the run's dataparser has rotated, centered and scaled it.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.camera_optimizers import CameraOptimizer
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.model_components.renderers import background_color_override_context
from torch import Tensor
from torch.nn import ParameterDict

from r2l_nerfstudio.capture import CaptureError, parse_capture
from r2l_nerfstudio.checkpoints import check_fit, check_size, read_checkpoint
from r2l_nerfstudio.dataparsers import dataparser_at
from r2l_nerfstudio.errors import InputError, one_line
from r2l_nerfstudio.lpips import AbsentLpips, without_lpips
from r2l_nerfstudio.run_config import capture_path, checkpoint_path, load_run_config, resolve_run

if TYPE_CHECKING:
    from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
    from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs
    from nerfstudio.engine.trainer import TrainerConfig
    from nerfstudio.models.base_model import Model
    from nerfstudio.models.splatfacto import SplatfactoModel

CPU_RAYS_PER_CHUNK = 1024
OVERSHOOT = 0.5
"""How far a color may exceed [0, 1] before it is clamped: spherical harmonics overshoot a little."""

# Weights with one row per training image, by the end of their name.
_PER_IMAGE_WEIGHTS = ("camera_optimizer.pose_adjustment", "embedding_appearance.embedding.weight")


@dataclass
class TeacherOutputs:
    """Outputs of a teacher along rays or at the pixels of a view; float32, on the teacher's device."""

    rgb: Float[Tensor, "*batch 3"]
    """Color in [0, 1], composited on the teacher's `background`."""
    accumulation: Float[Tensor, "*batch 1"] | None
    """Opacity in [0, 1]; None if the method has none."""
    depth: Float[Tensor, "*batch 1"] | None
    """Distance from the ray's origin along its unit direction, in units of the teacher's frame; None if the method has
    none. The method decides which depth it is (median or expected)."""


@dataclass(eq=False, repr=False)
class Teacher:
    """A trained model that renders and never changes. It is not a module, so a module that holds it does not register
    it."""

    config: TrainerConfig
    """The run's configuration, as saved."""
    config_path: Path
    """The run's config.yml."""
    checkpoint: Path
    """The checkpoint that was loaded."""
    step: int
    """Training step of the checkpoint."""
    device: torch.device
    """Device of the model and its outputs."""
    model: Model
    """The model: evaluation mode, no gradients."""
    dataparser_config: DataParserConfig
    """The run's dataparser with the capture's current, absolute path. A student that uses it shares the frame."""
    dataparser_outputs: DataparserOutputs
    """The capture's training split: image files and cameras in the teacher's frame, before any
    `camera_res_scale_factor` of the run's data manager."""
    background: Float[Tensor, "3"] | None
    """The color composited behind the scene, or None if the model has its own background (fixed color or last
    sample)."""
    time: float | None = None
    """The instant at which a time-dependent model is frozen, in its capture's time; None for a model without time."""

    @classmethod
    def load(
        cls,
        path: Path,
        device: torch.device | str = "cpu",
        data: Path | None = None,
        time: float | None = None,
    ) -> Teacher:
        """Load a run's checkpoint: the one that its configuration names (`load_step`), else the newest.

        Args:
            path: the run's config.yml or folder, which may have moved.
            device: device of the model.
            data: the capture's location, if it has moved since training. A relative path in the run is searched in the
                current folder, then in each folder above the run.
            time: the instant to freeze a time-dependent model at, in [0, 1] for Nerfstudio's captures.

        Raises:
            InputError: run, configuration, checkpoint or capture are missing, damaged or do not match, the method is
                not installed, it renders only with CUDA and `device` is not CUDA, or it depends on time and `time` is
                missing.
        """
        device = torch.device(device)
        config_path = resolve_run(path)
        config = load_run_config(config_path)
        checkpoint = checkpoint_path(config, config_path)
        dataparser_config, dataparser_outputs = _read_capture(config, config_path, data)
        _check_frame(config_path, dataparser_config.data, dataparser_outputs)
        loaded = read_checkpoint(checkpoint, "teacher")
        weights, step = loaded.model_weights(), loaded.step
        _check_image_count(weights, checkpoint, dataparser_config.data, len(dataparser_outputs.image_filenames))
        model = _build_model(config, config_path, dataparser_config, dataparser_outputs, device)
        _load_weights(model, weights, step, checkpoint)
        model.to(device).eval().requires_grad_(False)
        if device.type == "cpu":
            chunk = model.config.eval_num_rays_per_chunk
            # A chunk sized for a GPU exceeds every cache of a CPU: nerfacto takes 1.6 times as long with 32768.
            model.config.eval_num_rays_per_chunk = min(chunk, CPU_RAYS_PER_CHUNK)
        if device.type != "cuda" and _needs_cuda(model):
            raise InputError(
                f"The teacher {config_path} is a '{config.method_name}', which renders with CUDA kernels only, and the "
                f"device is {device}: run this on a machine with an NVIDIA GPU and --machine.device-type cuda, or "
                "distil a method that runs without one, such as nerfacto."
            )
        _check_time(model, dataparser_outputs.cameras, time, config_path, config.method_name)
        background = None
        if _paints_random(model):
            alpha_color = dataparser_outputs.alpha_color
            background = (torch.zeros(3) if alpha_color is None else alpha_color.float()).to(device)
        return cls(
            config=config,
            config_path=config_path,
            checkpoint=checkpoint,
            step=step,
            device=device,
            model=model,
            dataparser_config=dataparser_config,
            dataparser_outputs=dataparser_outputs,
            background=background,
            time=time,
        )

    @property
    def views_only(self) -> bool:
        """Whether the teacher is a splat: it renders views but not rays, and only undistorted cameras."""
        return hasattr(self.model, "set_background")

    @torch.no_grad()
    def rays(self, ray_bundle: RayBundle) -> TeacherOutputs:
        """Render rays, in chunks of the run's `eval_num_rays_per_chunk`.

        Args:
            ray_bundle: rays of any batch shape in the teacher's frame, with unit directions, as `Cameras.generate_rays`
                gives them. It is not changed. Near and far are the model's own.

        Returns:
            Outputs of the bundle's batch shape. The appearance is the average one, whatever the camera indices.

        Raises:
            InputError: the teacher is a splat, or has no color output.
        """
        if self.views_only:
            raise InputError(
                f"The teacher {self.config_path} is a '{self.config.method_name}', which renders whole views and no"
                " single rays: render views."
            )
        rays = ray_bundle.flatten()
        if rays.camera_indices is None:
            # Some fields require an index, which they do not use at evaluation.
            rays.camera_indices = torch.zeros_like(rays.origins[:, :1], dtype=torch.long)
        if self.time is not None:
            rays.times = torch.full_like(rays.origins[:, :1], self.time)
        chunk_size = self.model.config.eval_num_rays_per_chunk
        chunks = []
        with self._background():
            for start in range(0, len(rays), chunk_size):
                # Indexing with a tensor copies, so the model may edit its bundle.
                indices = torch.arange(start, min(start + chunk_size, len(rays)), device=rays.origins.device)
                chunks.append(self._outputs(self.model(rays[indices].to(self.device)), (len(indices),)))
        joined = {}
        for field in fields(TeacherOutputs):
            parts = [getattr(chunk, field.name) for chunk in chunks]
            joined[field.name] = None if parts[0] is None else torch.cat(parts).reshape(*ray_bundle.shape, -1)
        return TeacherOutputs(**joined)

    @torch.no_grad()
    def view(self, camera: Cameras) -> TeacherOutputs:
        """Render one camera.

        A crop of a view is the view of a cropped camera (cx and cy shifted, width and height smaller).

        Args:
            camera: one camera in the teacher's frame, batch shape () or (1,). It is not changed.

        Returns:
            Outputs of batch shape (height, width).

        Raises:
            InputError: the teacher has no color output.
            ValueError: more than one camera; for a splat, one with lens distortion or a projection other than
                perspective, which it would ignore.
        """
        if camera.size != 1:
            raise ValueError(f"a teacher renders one camera at a time, got {camera.size}")
        # A copy, since some models edit their camera in place.
        camera = copy.deepcopy(camera).reshape((1,)).to(self.device)
        if self.time is not None:
            camera.times = torch.full((1, 1), self.time, device=self.device)
        ray_lengths = _splat_ray_lengths(camera) if self.views_only else None
        shape = (int(camera.height[0]), int(camera.width[0]))
        with self._background():
            outputs = self._outputs(self.model.get_outputs_for_camera(camera), shape)
        if ray_lengths is not None and outputs.depth is not None:
            outputs.depth = outputs.depth * ray_lengths
        return outputs

    @torch.no_grad()
    def pose_corrections(self) -> Float[Tensor, "num_train 3 4"] | None:
        """Return the pose corrections learned with the model, one for each training camera, in the teacher's frame.

        They are applied as `CameraOptimizer.apply_to_raybundle` does: the rotation turns a ray's direction, the
        translation is added to its origin. None if the run learned none.
        """
        optimizer = getattr(self.model, "camera_optimizer", None)
        if not isinstance(optimizer, CameraOptimizer) or optimizer.config.mode == "off":
            return None
        return optimizer(torch.arange(optimizer.num_cameras, device=self.device))

    def fingerprint(self) -> str:
        """Return a hash of the run's configuration and weights, which does not change when the run is moved, and
        changes with training."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self.config_path.read_bytes())
        if self.time is not None:
            digest.update(f"time {self.time}".encode())
        weights = hashlib.sha256()
        with self.checkpoint.open("rb") as file:
            while chunk := file.read(1 << 20):
                weights.update(chunk)
        digest.update(weights.digest())
        return digest.hexdigest()

    @contextmanager
    def _background(self) -> Iterator[None]:
        if self.background is None:
            yield
        elif self.views_only:
            cast("SplatfactoModel", self.model).set_background(self.background)
            yield
        else:
            with background_color_override_context(self.background):
                yield

    def _outputs(self, outputs: Mapping[str, Tensor], shape: tuple[int, ...]) -> TeacherOutputs:
        rgb = _first(outputs, "rgb", "rgb_fine")
        if rgb is None:
            raise InputError(
                f"The teacher {self.config_path} ('{self.config.method_name}') has no color output: its outputs are"
                f" {', '.join(outputs) or 'none'}, without rgb and rgb_fine. Choose a teacher that renders color."
            )
        rgb = self._shaped("color", rgb, shape, 3)
        low, high = (float(value) for value in rgb.nan_to_num(0.5, 0.5, 0.5).aminmax()) if rgb.numel() else (0.0, 1.0)
        if low < -OVERSHOOT or high > 1 + OVERSHOOT:
            raise InputError(
                f"The teacher {self.config_path} ('{self.config.method_name}') renders colors between {low:.3g} and"
                f" {high:.3g}, and a student learns colors between 0 and 1: choose another teacher."
            )
        accumulation = _first(outputs, "accumulation", "accumulation_fine")
        depth = _first(outputs, "depth", "depth_fine")
        return TeacherOutputs(
            rgb=rgb.clamp(0.0, 1.0),
            accumulation=None if accumulation is None else self._shaped("accumulation", accumulation, shape, 1),
            depth=None if depth is None else self._shaped("depth", depth, shape, 1),
        )

    def _shaped(self, name: str, value: Tensor, shape: tuple[int, ...], channels: int) -> Tensor:
        """Return an output in the shape (*shape channels).

        Raises:
            InputError: it has another number of pixels or channels.
        """
        if channels == 1 and tuple(value.shape) == shape:
            value = value[..., None]
        if value.ndim == 0 or value.shape[-1] != channels or value.numel() != math.prod(shape) * channels:
            raise InputError(
                f"The teacher {self.config_path} ('{self.config.method_name}') returns {name} of shape"
                f" {list(value.shape)}, and {[*shape, channels]} is needed: its method does not render like"
                " Nerfstudio's models. Choose another teacher."
            )
        return value.reshape(*shape, channels)


def _first(outputs: Mapping[str, Tensor], *keys: str) -> Tensor | None:
    found = next((outputs[key] for key in keys if outputs.get(key) is not None), None)
    return None if found is None else found.float()


def _read_capture(
    config: TrainerConfig, config_path: Path, data: Path | None
) -> tuple[DataParserConfig, DataparserOutputs]:
    data = capture_path(config, config_path) if data is None else Path(data)
    dataparser_config = dataparser_at(config, data)
    remedy = "Give the location of the teacher's capture with --data."
    try:
        outputs = parse_capture(dataparser_config)
    except CaptureError as error:
        raise InputError(
            f"The capture {data} of the teacher {config_path} cannot be read ({one_line(error)}). {remedy}"
        ) from error
    missing = [file for file in outputs.image_filenames if not Path(file).is_file()]
    if missing or not outputs.image_filenames:
        what = (
            f"lacks {len(missing)} of its {len(outputs.image_filenames)} training images, {missing[0]} being the first"
            if missing
            else "has no training images"
        )
        raise InputError(f"The capture {data} of the teacher {config_path} {what}. Restore them, or: {remedy}")
    return dataparser_config, outputs


def _check_frame(config_path: Path, data: Path, outputs: DataparserOutputs) -> None:
    """Compare with the frame that training saved; runs of other trainers may have saved nothing."""
    file = config_path.parent / "dataparser_transforms.json"
    if not file.is_file():
        return
    try:
        saved = json.loads(file.read_text("utf8"))
        transform, scale = np.array(saved["transform"], dtype=float).reshape(3, 4), float(saved["scale"])
        if not (np.isfinite(transform).all() and math.isfinite(scale)):
            raise ValueError("its numbers are not finite")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise InputError(
            f"The teacher's file {file} is damaged ({one_line(error)}): restore it, or delete it if you are sure that "
            f"{data} is the capture it was trained on."
        ) from error
    close = functools.partial(np.allclose, rtol=1e-4, atol=1e-4)
    if not close(outputs.dataparser_transform, transform) or not close(outputs.dataparser_scale, scale):
        raise InputError(
            f"The capture {data} and the teacher {config_path} are in different frames: the dataparser gives scale "
            f"{outputs.dataparser_scale:.6g} and a transform that differ from scale {scale:.6g} and the transform in "
            f"{file}. Pass with --data the capture as it was when the teacher was trained, or train the teacher again."
        )


def _check_image_count(weights: Mapping[str, Tensor], checkpoint: Path, data: Path, num_images: int) -> None:
    for key, value in weights.items():
        if key.endswith(_PER_IMAGE_WEIGHTS) and len(value) != num_images:
            raise InputError(
                f"The teacher's checkpoint {checkpoint} was trained on {len(value)} images, but the training split of "
                f"the capture {data} has {num_images}. Pass with --data the capture that the teacher was trained on."
            )


def _build_model(
    config: TrainerConfig,
    config_path: Path,
    dataparser_config: DataParserConfig,
    outputs: DataparserOutputs,
    device: torch.device,
) -> Model:
    from nerfstudio.pipelines.base_pipeline import VanillaPipeline
    from nerfstudio.pipelines.dynamic_batch import DynamicBatchPipeline

    def build() -> Model:
        with without_lpips():
            # Copies, since models edit their configuration and metadata.
            return copy.deepcopy(config.pipeline.model).setup(
                scene_box=copy.deepcopy(outputs.scene_box),
                num_train_data=len(outputs.image_filenames),
                metadata=copy.deepcopy(outputs.metadata),
                device=str(device),
                grad_scaler=None,
                seed_points=None,
            )

    if device.type == "cpu":  # A GPU's libraries report themselves what is too large.
        check_size(build, config_path)
    try:
        return build()
    except Exception as error:  # A method's constructor may raise anything.
        if config.pipeline._target in (VanillaPipeline, DynamicBatchPipeline):
            raise InputError(_not_built(config, config_path, error)) from error
    # The method's pipeline passes more to its model: build all of it and keep the model.
    pipeline_config = copy.deepcopy(config.pipeline)
    datamanager = cast("VanillaDataManagerConfig", pipeline_config.datamanager)
    datamanager.dataparser = copy.deepcopy(dataparser_config)
    datamanager.data = dataparser_config.data
    try:
        with without_lpips():
            return pipeline_config.setup(device=str(device), test_mode="inference").model
    except Exception as error:
        raise InputError(_not_built(config, config_path, error)) from error


def _not_built(config: TrainerConfig, config_path: Path, error: Exception) -> str:
    return (
        f"The model of the teacher {config_path} cannot be built ({type(error).__name__}: {one_line(error)}). It was "
        f"probably trained with another version of Nerfstudio or of '{config.method_name}': install that version, or "
        "train the teacher again."
    )


def _load_weights(model: Model, weights: dict[str, Tensor], step: int, checkpoint: Path) -> None:
    check_fit(model, weights, checkpoint, "teacher")
    absent = tuple({"lpips."} | {f"{name}." for name, part in model.named_modules() if isinstance(part, AbsentLpips)})
    weights = {key: value for key, value in weights.items() if not key.startswith(absent)}
    gauss_params = getattr(model, "gauss_params", None)
    if "means" in weights and isinstance(gauss_params, ParameterDict):
        # Older splats kept these one level higher.
        weights = {f"gauss_params.{key}" if key in gauss_params else key: value for key, value in weights.items()}
    try:
        model.update_to_step(step)  # Before loading: grids that grow in training take their size from it.
        model.load_state_dict(weights, strict=True)
    except (RuntimeError, KeyError) as error:
        why = "another version of the method or of Nerfstudio, or the config.yml of another run"
        # tiny-cuda-nn keeps each network in one flat tensor of this name.
        flat_in_weights = any(key.endswith(".params") for key in weights)
        flat_in_model = any(key.endswith(".params") for key in model.state_dict())
        if flat_in_weights and not flat_in_model:
            why = (
                "it was trained with tiny-cuda-nn, which is not installed here. Install tiny-cuda-nn, or train the "
                "teacher with --pipeline.model.implementation torch"
            )
        elif flat_in_model and not flat_in_weights:
            why = "training had no tiny-cuda-nn, which is installed here: set `implementation: torch` in config.yml"
        raise InputError(
            f"The teacher's checkpoint {checkpoint} does not fit the model that its config.yml describes. Probable"
            f" cause: {why}. First differences: {one_line(error)}"
        ) from error


def _needs_cuda(model: Model) -> bool:
    from nerfacc import OccGridEstimator
    from nerfstudio.models.splatfacto import SplatfactoModel

    return isinstance(model, SplatfactoModel) or any(isinstance(part, OccGridEstimator) for part in model.modules())


def _check_time(model: Model, cameras: Cameras, time: float | None, config_path: Path, method_name: str | None) -> None:
    """Refuse a model that depends on time without a time, and a time for a model that does not."""
    is_dependent = _depends_on_time(model, cameras)
    if is_dependent and time is None:
        raise InputError(
            f"The teacher {config_path} is a '{method_name}', whose scene changes over time, and a student shows one"
            " instant: choose it with --teacher-time, a number from 0 to 1."
        )
    if time is not None and not is_dependent:
        raise InputError(
            f"The teacher {config_path} is a '{method_name}', whose scene does not change over time: leave"
            " --teacher-time out."
        )


@torch.no_grad()
def _depends_on_time(model: Model, cameras: Cameras) -> bool:
    """Return whether a model's views depend on the camera's time, by its parts, or else by comparing two small
    views."""
    if getattr(model, "temporal_distortion", None) is not None:
        return True
    if cameras.times is None:
        return False
    size = 16
    views = []
    for time in (0.0, 1.0):
        pose = cameras.camera_to_worlds[:1].to(model.device)
        camera = Cameras(
            pose, fx=size, fy=size, cx=size / 2, cy=size / 2, width=size, height=size, times=torch.tensor([[time]])
        ).to(model.device)
        try:
            views.append(_first(model.get_outputs_for_camera(camera), "rgb", "rgb_fine"))
        except Exception:  # It fails again, with a message, when its first view is rendered.
            return False
    first, last = views
    return first is not None and last is not None and not torch.allclose(first, last, atol=1e-6, equal_nan=True)


def _paints_random(model: Model) -> bool:
    """Return whether training composited on random colors, which become black, or the viewer's gray, at evaluation."""
    renderer = getattr(model, "renderer_rgb", None)
    color = getattr(renderer, "background_color", None)
    if color is None:
        color = getattr(model.config, "background_color", None)
    return isinstance(color, str) and color == "random"


def _splat_ray_lengths(camera: Cameras) -> Float[Tensor, "height width 1"]:
    """Return the length of each pixel's ray per unit of depth along the camera's axis, which is what splats report."""
    distorted = camera.distortion_params is not None and bool((camera.distortion_params != 0).any())
    if distorted or camera.camera_type.item() != CameraType.PERSPECTIVE.value:
        raise ValueError("a splat renders undistorted perspective cameras only: clear the camera's distortion_params")
    y, x = camera.get_image_coords().to(camera.device).unbind(-1)
    x = (x - camera.cx.squeeze()) / camera.fx.squeeze()
    y = (y - camera.cy.squeeze()) / camera.fy.squeeze()
    return (x**2 + y**2 + 1).sqrt()[..., None]
