"""The base of all students behind Nerfstudio's Model interface: rays in, color, accumulation and depth out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
import tyro
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.model_components import renderers
from nerfstudio.models.base_model import Model, ModelConfig
from nerfstudio.utils import colormaps
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException
from torch import Tensor
from torch.nn import Parameter

from r2l_nerfstudio.engines.switch import EngineOption, EngineSwitch
from r2l_nerfstudio.errors import InputError, exit_on_input_error
from r2l_nerfstudio.models.camera_rays import CameraRays, crop_interval
from r2l_nerfstudio.models.composited_encoding import (
    CompositedEncoding,
    CompositedSettings,
    EncodedRays,
    finished,
)
from r2l_nerfstudio.models.cpu_ray_encoding import CpuRayEncoding
from r2l_nerfstudio.models.metrics import image_metrics
from r2l_nerfstudio.models.probe_cameras import probe_encoding
from r2l_nerfstudio.ranges import FloatRange, IntRange
from r2l_nerfstudio.rays.conventions import OURS, RayConventions
from r2l_nerfstudio.rays.ray_encoding import RayEncoding, RayEncodingKind
from r2l_nerfstudio.rays.ray_image import StudentRays
from r2l_nerfstudio.rays.spacing import MISSED_FRACTION, SceneBounds, SpacingKind
from r2l_nerfstudio.renamed_fields import RenamedFields, current_name
from r2l_nerfstudio.students.ray_features import FeatureVolume
from r2l_nerfstudio.viewer.engine_menu import EngineMenu
from r2l_nerfstudio.viewer.panel import FrameTime, ViewerPanel
from r2l_nerfstudio.viewer.render_thread import current_render_thread
from r2l_nerfstudio.viewer.teacher_split import TeacherSplit


@dataclass
class LightFieldModelConfig(RenamedFields, ModelConfig):
    """Settings that all students share."""

    RENAMED: ClassVar[dict[str, str]] = {"ray_code": "ray_encoding"}

    _target: type = field(default_factory=lambda: LightFieldModel)
    enable_collider: tyro.conf.Suppress[bool] = False
    """The students' ray encoding has near and far."""
    collider_params: tyro.conf.Suppress[dict[str, float] | None] = None
    loss_coefficients: tyro.conf.Suppress[dict[str, float]] = field(default_factory=dict)
    prompt: tyro.conf.Suppress[str | None] = None
    width: Annotated[int, IntRange(1, 8192)] = 256
    """Features of the hidden layers."""
    zero_init: bool = True
    """Start every residual block as the identity."""
    ray_encoding: Annotated[RayEncodingKind, tyro.conf.arg(aliases=["--pipeline.model.ray-code"])] = "points"
    """Ray encoding: points along the ray, Plücker coordinates, intersections with two planes, or composited: features
    gathered along the ray where the scene is."""
    num_points: Annotated[int, IntRange(1, 4096)] = 16
    """Points per ray."""
    num_frequencies: Annotated[int, IntRange(0, 64)] = 10
    """Octaves of the frequency encoding."""
    jitter_points: bool = True
    """Draw the points at random inside their segments while training."""
    spacing: Literal["auto", "sphere", "near-far", "disparity"] = "auto"
    """Spacing of the points; auto: inside the scene's sphere for a bounded capture, else by disparity."""
    feature_channels: Annotated[int, IntRange(1, 256)] = 4
    """composited: features per grid point."""
    num_samples: Annotated[int, IntRange(1, 4096)] = 24
    """composited: sample points per ray."""
    num_probes: Annotated[int, IntRange(1, 4096)] = 64
    """composited: bins per ray in which the scene is searched."""
    occupancy_cells: Annotated[int, IntRange(1, 1024)] = 64
    """composited: the occupancy grid has about this many cells cubed."""
    max_grid_points: Annotated[int, IntRange(1, 10**8)] = 200_000
    """composited: grid points with features, at most; the volume is as fine as a pixel of the teacher views, or as this
    allows."""
    point_octaves: Annotated[int, IntRange(0, 64)] = 4
    """composited: octaves of the encoding of the expected point."""
    direction_octaves: Annotated[int, IntRange(0, 64)] = 3
    """composited: octaves of the encoding of the direction."""
    volume_resolution: Annotated[int, IntRange(0, 1024)] = 0
    """Grid points along each side of a learned feature volume, read at the ray's points; 0 for none, as in the
    paper."""
    volume_channels: Annotated[int, IntRange(1, 256)] = 4
    """Features per grid point of that volume."""
    volume_points: Annotated[int, IntRange(1, 4096)] = 16
    """Points per ray at which that volume is read."""
    published_rays: bool = False
    """Encode rays as the published code does: world units without contraction, planar directions, its pixel corners or
    centers, its near and far, and for MobileR2L normalized device coordinates in forward-facing captures."""
    color_only: bool = False
    """Three outputs, as published, instead of five: no accumulation and no depth."""
    accumulation_weight: Annotated[float, FloatRange(0, 1e6)] = 0.1
    """Weight of the accumulation loss."""
    depth_weight: Annotated[float, FloatRange(0, 1e6)] = 0.1
    """Weight of the depth loss, on positions in [0, 1] along the ray."""
    engine: EngineOption = "auto"
    """Engine that runs the network of a trained student; auto: the fastest one that agrees with PyTorch on this
    machine."""

    def fit_to(self, width: int, height: int) -> None:  # noqa: B027
        """Set what depends on the size in pixels of the training views, before a model is built."""

    @property
    def forced_spacing(self) -> Literal["sphere", "near-far", "disparity"] | None:
        """The configured spacing; None to choose by the capture.

        Raises:
            InputError: for an unknown one.
        """
        if self.spacing not in ("auto", *get_args(SpacingKind)):
            raise InputError(
                f"Unknown spacing {self.spacing!r}: choose --pipeline.model.spacing from auto,"
                f" {', '.join(get_args(SpacingKind))}."
            )
        return None if self.spacing == "auto" else self.spacing


class LightFieldModel(Model):
    """A student: a network from encoded rays to color, accumulation and depth.

    The ray encoding, its bounds, the background and the teacher's outputs are in the checkpoint.
    """

    config: LightFieldModelConfig
    reads_ray_image: ClassVar[bool] = False
    """Whether the network reads a ray image, as MobileR2L does, rather than single rays."""
    focal: Tensor | None
    """Focal length in pixels of the views it was trained on; None if rendering does not depend on it."""
    factor: int = 1
    """Upsampling factor: pixels along each side of a cell; 1 for a network that reads single rays."""
    margin: int = 0
    """Cells around an image that are evaluated and dropped."""
    crop_margin: int = 0
    """Cells around a crop that are evaluated and dropped in training."""
    network: torch.nn.Module
    """From encoded rays to numbers in (0, 1): rgb, and unless composited or of color only, accumulation and depth as a
    position along the ray."""
    background: Tensor
    _runner: Callable[[Tensor], Tensor] | None = None
    """Runs the network in place of `engines`; see `network_run_by`."""

    def populate_modules(self) -> None:
        """Build ray encoding and network; no metric network, which would be in every checkpoint."""
        super().populate_modules()
        c = self.config
        is_composited = c.ray_encoding == "composited"
        # Composited students only need its bounds.
        self.ray_encoding = RayEncoding("points" if is_composited else c.ray_encoding, c.num_points, c.num_frequencies)
        self.composited: CompositedEncoding | None = None
        self.volume: FeatureVolume | None = None
        if is_composited:
            settings = CompositedSettings(
                c.feature_channels, c.num_samples, c.num_probes, c.point_octaves, c.direction_octaves
            )
            self.composited = CompositedEncoding(self.ray_encoding, settings)
            in_dim = self.composited.dim
        else:
            in_dim = self.ray_encoding.dim
            if c.volume_resolution > 0:
                self.volume = FeatureVolume(c.volume_resolution, c.volume_channels)
                in_dim += c.volume_channels * c.volume_points
        self.cpu_ray_encoding = CpuRayEncoding(self.ray_encoding, self.volume, self.config.volume_points)
        self.network = self.build_network(in_dim)
        self.register_buffer("background", torch.ones(3))
        has_focal = self.reads_ray_image or is_composited
        self.register_buffer("focal", torch.ones(()) if has_focal else None)
        self.has_accumulation = True
        self.has_depth = True
        self.frame_time = FrameTime()
        self.teacher_split = TeacherSplit()
        self.engines = EngineSwitch(
            lambda: self.network,
            self.config.engine,
            probe=lambda: probe_encoding(self),
            interrupts=(IOChangeException,),
            say=lambda line: CONSOLE.print(line, markup=False, highlight=False),
            margin=self.margin,
        )
        # Nerfstudio's viewer finds these among the attributes of modules.
        self.engine_menu = EngineMenu(self.engines)
        self.engine_dropdown = self.engine_menu.dropdown
        self.viewer_panel = ViewerPanel(self.frame_time)
        self.split_checkbox = self.teacher_split.checkbox

    @property
    def rays(self) -> StudentRays:
        """The rays that it reads, for a data manager."""
        return StudentRays(self.factor, self.rays_per_cell, self.margin, self.ray_encoding.conventions)

    @property
    def rays_per_cell(self) -> int:
        """Rays along each side of a cell that `encode` reads: the middle one, or one for each pixel."""
        return 1 if self.composited is None else self.factor

    @property
    def out_dim(self) -> int:
        """Numbers per pixel that the network predicts: the geometry of a composited encoding needs no network."""
        return 5 if self.composited is None and not self.config.color_only else 3

    @abstractmethod
    def build_network(self, in_dim: int) -> torch.nn.Module:
        """Build the network, for encoded rays of this length."""

    @abstractmethod
    def render_pinhole(
        self, pose: Float[Tensor, "3 4"], intrinsics: Float[Tensor, "4"], height: int, width: int
    ) -> Float[Tensor, "height width 5"]:
        """Return the network's five numbers for every pixel of an undistorted perspective camera.

        Args:
            pose: camera to world, OpenGL axes, in the teacher's frame.
            intrinsics: fx, fy, cx, cy in pixels.
            height: in pixels.
            width: in pixels.
        """

    @abstractmethod
    def render_values(self, camera: CameraRays) -> Float[Tensor, "height width 5"]:
        """Return the network's five numbers for every pixel of a camera of any kind.

        Raises:
            InputError: for a kind that this student cannot render.
        """

    @abstractmethod
    def native_focal(self, focal: float) -> float:
        """Return the focal length in pixels, nearest to `focal`, of images that need no resampling."""

    @abstractmethod
    def encoding_for_camera(
        self, pose: Float[Tensor, "3 4"], intrinsics: Float[Tensor, "4"], height: int, width: int
    ) -> EncodedRays:
        """Return what the network reads for one undistorted perspective camera, in the network's own layout.

        Args:
            pose: camera to world, OpenGL axes, in the teacher's frame.
            intrinsics: fx, fy, cx, cy in pixels.
            height: in pixels.
            width: in pixels.

        Returns:
            encoded (rays, encoded), or of a ray image (1, encoded, rows, columns) with its margin; geometry (rays, 2),
            or (height, width, 2) of whole cells without the margin, None where the network predicts it.
        """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # For Nerfstudio's loader, and for a student that is a teacher.
        for name in [name for name in state_dict if current_name(name) != name]:
            state_dict[current_name(name)] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def get_extra_state(self) -> dict[str, Any]:
        return {"has_accumulation": self.has_accumulation, "has_depth": self.has_depth}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.has_accumulation = state["has_accumulation"]
        self.has_depth = state["has_depth"]

    def set_scene(
        self,
        bounds: SceneBounds,
        axes: Float[Tensor, "3 3"],
        background: Float[Tensor, "3"],
        has_accumulation: bool,
        has_depth: bool,
        focal: float,
        conventions: RayConventions = OURS,
    ) -> None:
        """Set what a student stores of its scene.

        Args:
            bounds: where the scene lies.
            axes: columns: the capture's mean right, up and backward directions.
            background: the background color.
            has_accumulation: whether the teacher has accumulation.
            has_depth: whether the teacher has depth.
            focal: focal length in pixels of the views to learn from.
            conventions: how the ray encoding reads rays.
        """
        self.ray_encoding.set_bounds(bounds, axes)
        self.ray_encoding.set_conventions(conventions)
        if self.volume is not None:
            # A bounded scene's points end a little beyond radius 1, contracted space ends at 2.
            extent = 1.05 if bounds.kind == "sphere" else 2.0
            if conventions.frame is not None:
                extent = 1.0 if conventions.ndc else conventions.scale * bounds.radius
            self.volume.extent.fill_(extent)
        self.background.copy_(background)
        if self.focal is not None:
            self.focal.fill_(focal)
        # Outputs with zero loss weight are unsupervised, so they are not exposed.
        self.has_accumulation = has_accumulation and self.config.accumulation_weight > 0 and not self.config.color_only
        self.has_depth = has_depth and self.config.depth_weight > 0 and not self.config.color_only

    def describe_scene(self) -> str:
        """Return one line on the bounds in use."""
        encoding = self.ray_encoding
        if encoding.conventions.frame is not None:
            ndc = "normalized device coordinates" if encoding.conventions.ndc else "world units, planar depth"
            return f"published ray conventions, {ndc}, near {float(encoding.near):g}, far {float(encoding.far):g}"
        center = ", ".join(f"{value:.2f}" for value in encoding.center.tolist())
        return (
            f"{encoding.spacing} spacing, radius {float(encoding.radius):.2f} around ({center}),"
            f" seen between {float(encoding.near):.2f} and {float(encoding.far):.2f}"
        )

    def begin_with_single_rays(self) -> None:  # noqa: B027
        """Prepare a new student for a training that begins with single rays instead of crops."""

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        """Return `hidden`: the matrices between hidden layers; `ends`: the network's others; `volume`: features in
        space."""
        hidden = [p for p in self.network.get_submodule("blocks").parameters() if p.ndim >= 2]
        chosen = {id(p) for p in hidden}
        groups = {"hidden": hidden, "ends": [p for p in self.network.parameters() if id(p) not in chosen]}
        if self.composited is not None:
            groups["volume"] = [self.composited.volume.rows]
        elif self.volume is not None:
            groups["volume"] = list(self.volume.parameters())
        return groups

    def encode(
        self, origins: Float[Tensor, "*batch 3"], directions: Float[Tensor, "*batch 3"], jitter: bool = False
    ) -> Float[Tensor, "*batch encoded"]:
        """Return what the network reads of rays. Always fp32.

        Args:
            origins: in the teacher's frame.
            directions: unit length, or planar if the ray encoding's conventions are.
            jitter: draw the points at random inside their segments, per ray (training).
        """
        return self.encode_rays(origins, directions, jitter).encoded

    def encode_rays(
        self, origins: Float[Tensor, "*batch 3"], directions: Float[Tensor, "*batch 3"], jitter: bool = False
    ) -> EncodedRays:
        """Return `encode`, with the geometry that is known without the network."""
        if self.composited is not None:
            return self.encode_composited(self.composited, origins, directions, jitter)
        if origins.device.type == "cpu" and not (jitter or torch.is_grad_enabled()):
            return EncodedRays(self.cpu_ray_encoding(origins.float(), directions.float()))
        encoded = self.ray_encoding(origins, directions, jitter)
        if self.volume is None:
            return EncodedRays(encoded)
        points = self.ray_encoding.points(origins, directions, self.config.volume_points, jitter)
        features = self.volume(points.flatten(0, -3))
        return EncodedRays(torch.cat([encoded, features.view(*encoded.shape[:-1], -1)], dim=-1))

    @abstractmethod
    def encode_composited(
        self,
        encoding: CompositedEncoding,
        origins: Float[Tensor, "*batch 3"],
        directions: Float[Tensor, "*batch 3"],
        jitter: bool,
    ) -> EncodedRays:
        """Return `encode_rays` for rays whose features are composited."""

    def finish(
        self, values: Float[Tensor, "*pixels out"], geometry: Float[Tensor, "*pixels 2"] | None
    ) -> Float[Tensor, "*pixels 5"]:
        """Return the five numbers of pixels: rgb, accumulation, depth as a position along the ray.

        Around a bounded scene the network's colors are weighted by accumulation: empty pixels are exactly the
            background.

        Args:
            values: of the network.
            geometry: of `encode_rays`.
        """
        if geometry is None:
            return values
        assert self.composited is not None
        return finished(values, geometry, self.background if self.composited.is_bounded else None)

    def bundle_rays(self, ray_bundle: RayBundle) -> tuple[Float[Tensor, "*batch 3"], Float[Tensor, "*batch 3"]]:
        """Return origins and directions of a bundle as the ray encoding reads them.

        Nerfstudio's own bundles hold unit directions and the length of the planar ones as metadata; those of our data
        managers hold directions by the encoding's conventions.
        """
        directions = ray_bundle.directions
        if self.ray_encoding.conventions.is_planar and "directions_norm" in ray_bundle.metadata:
            directions = directions * ray_bundle.metadata["directions_norm"]
        return ray_bundle.origins, directions

    def unknown_depth(self, like: Float[Tensor, "*batch 1"]) -> Float[Tensor, "*batch 1"]:
        """Return the depth of a student without depth: infinite, so that nothing appears to hide a camera."""
        return torch.full_like(like, torch.inf)

    def run_network(self, encoded: Float[Tensor, "*in"]) -> Float[Tensor, "*out"]:
        """Run the network on encoded rays, for rendering; fp32 in and out."""
        if self._runner is not None:
            return self._runner(encoded)
        with self.frame_time.network():
            return self.engines(encoded, is_exact=current_render_thread() is None)

    @contextmanager
    def network_run_by(self, runner: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within it, render with another runner of the network than the engines: a quantized one, or one that is
        measured.

        Args:
            runner: from encoded rays to values, both fp32, shapes as the network's.
        """
        former = self._runner
        # Not by `setattr`: a module would become a part of this one, and never be found.
        self.__dict__["_runner"] = runner
        try:
            yield
        finally:
            self.__dict__["_runner"] = former

    @torch.no_grad()
    def render_camera(self, camera: Cameras, obb_box: OrientedBox | None = None) -> dict[str, Tensor]:
        """Render one camera of any kind.

        Args:
            camera: one camera, with or without a batch dimension.
            obb_box: show only what lies in this box, the background elsewhere.

        Returns:
            `rgb` (height width 3) and, where the teacher has them, `accumulation` and `depth` (height width 1). If the
            teacher has depth but no accumulation, `accumulation` is 1: Nerfstudio's tools show no depth without one.

        Raises:
            InputError: for a camera that this student cannot render, or an engine chosen by name that fails.
        """
        frame = CameraRays(camera, self.device)
        with self.frame_time.measure(frame.height, frame.width):
            outputs = self.to_outputs(self.render_values(frame), frame)
            return outputs if obb_box is None else self._crop(outputs, *frame.rays, obb_box)

    def get_outputs_for_camera(self, camera: Cameras, obb_box: OrientedBox | None = None) -> dict[str, Tensor]:
        """Render for Nerfstudio's viewer and commands: `render_camera`, with the teacher beside it if that is switched on.

        Raises:
            SystemExit: in place of an `InputError`, whose message is printed.
        """
        with exit_on_input_error():
            outputs = self.render_camera(camera, obb_box)
        outputs["rgb"] = self.teacher_split.apply(outputs["rgb"], camera.reshape((1,)))
        return outputs

    def to_outputs(self, values: Float[Tensor, "height width 5"], camera: CameraRays) -> dict[str, Tensor]:
        """Return Nerfstudio's outputs from the network's numbers for all pixels of a camera.

        Rays that miss a bounded scene's sphere show the background: the student was not trained on them, but there is
        nothing.
        """
        # For a student of color only, the others are empty.
        rgb, accumulation, fraction = values[..., :3], values[..., 3:4], values[..., 4:5]
        crossing = None
        if self.ray_encoding.spacing == "sphere":
            origins, directions = camera.rays
            # All rays of a pinhole have one origin: what depends only on it is computed once.
            crossing = self.ray_encoding.crossing(origins[:1, :1] if camera.is_pinhole else origins, directions)
            assert crossing is not None
            rgb = torch.where(crossing.is_missed, self.background, rgb)
            accumulation = accumulation.masked_fill(crossing.is_missed, 0.0)
            fraction = fraction.masked_fill(crossing.is_missed, MISSED_FRACTION)
        outputs = {"rgb": rgb}
        if self.has_accumulation:
            outputs["accumulation"] = accumulation
        if self.has_depth:
            outputs["depth"] = self.ray_encoding.distance(fraction, crossing).clamp_min(0.0)
            outputs.setdefault("accumulation", torch.ones_like(outputs["depth"]))
        return outputs

    def _crop(
        self, outputs: dict[str, Tensor], origins: Tensor, directions: Tensor, box: OrientedBox
    ) -> dict[str, Tensor]:
        enter, leave = crop_interval(origins, directions, box)
        outside = leave <= enter
        if self.has_depth:
            outside = outside | (outputs["depth"] < enter) | (outputs["depth"] > leave)
        override = renderers.BACKGROUND_COLOR_OVERRIDE
        color = self.background if override is None else override.to(self.background)
        cropped = dict(outputs)
        cropped["rgb"] = torch.where(outside, color, outputs["rgb"])
        if "accumulation" in outputs:
            cropped["accumulation"] = outputs["accumulation"].masked_fill(outside, 0.0)
        return cropped

    def get_rgba_image(self, outputs: dict[str, Tensor], output_name: str = "rgb") -> Float[Tensor, "height width 4"]:
        """Return color without its background, and opacity, in [0, 1]: what `ns-render --rendered-output-names rgba`
        saves."""
        rgb = outputs[output_name]
        opacity = outputs.get("accumulation", torch.ones_like(rgb[..., :1]))
        # At almost zero opacity, color is almost all rounding: it is kept in range, and not visible.
        color = (rgb - self.background * (1 - opacity)) / opacity.clamp_min(1e-3)
        return torch.cat([color.clamp(0, 1), opacity], dim=-1)

    def get_metrics_dict(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the training PSNR in dB."""
        truth = batch["image"].to(self.device)
        error = (outputs["rgb"] - self.blend(truth)).square().mean()
        return {"psnr": -10 * torch.log10(error.detach().clamp_min(1e-12))}

    def get_loss_dict(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor], metrics_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return mean squared errors of color and, where known, accumulation and encoded depth."""
        truth = self.blend(batch["image"].to(self.device))
        weight = batch.get("weight", torch.ones_like(truth[..., :1])).to(self.device)
        losses = {"rgb_loss": _weighted_mean((outputs["rgb"] - truth).square().mean(-1, keepdim=True), weight)}
        if "geometry_weight" not in batch:  # Nerfstudio's evaluation batches: photos only
            return losses
        known = batch["geometry_weight"]
        if self.has_accumulation:
            error = (outputs["accumulation"] - batch["accumulation"]).square()
            losses["accumulation_loss"] = self.config.accumulation_weight * _weighted_mean(error, known)
        if self.has_depth:
            seen = known * batch["accumulation"] * (batch["depth"] > 0)
            # Compared as positions in [0, 1]: a meter far away counts less than one close by.
            target = self.ray_encoding.to_fraction(batch["origins"], batch["directions"], batch["depth"])
            error = (outputs["depth_fraction"] - target).square()
            losses["depth_loss"] = self.config.depth_weight * _weighted_mean(error, seen)
        return losses

    def blend(self, image: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch 3"]:
        """Blend a photo with the background, if it has an alpha channel."""
        if image.shape[-1] == 3:
            return image
        return image[..., :3] * image[..., 3:] + self.background * (1 - image[..., 3:])

    def get_image_metrics_and_images(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Return PSNR, SSIM (and LPIPS if its weights can be loaded), and images: photo beside render, accumulation and
        depth in color."""
        truth = self.blend(batch["image"].to(self.device))
        metrics = image_metrics(outputs["rgb"], truth)
        images = {"img": torch.cat([truth, outputs["rgb"]], dim=1)}
        if "accumulation" in outputs:
            images["accumulation"] = colormaps.apply_colormap(outputs["accumulation"])
        if self.has_depth:
            images["depth"] = colormaps.apply_depth_colormap(outputs["depth"], outputs.get("accumulation"))
        return metrics, images


def _weighted_mean(errors: Float[Tensor, "*batch 1"], weight: Float[Tensor, "*batch 1"]) -> Float[Tensor, ""]:
    """Return the mean over what counts; 0 where nothing does."""
    return (errors * weight).sum() / weight.sum().clamp_min(1.0)
