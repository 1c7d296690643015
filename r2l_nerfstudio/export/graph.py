"""Students as graphs: a camera or rays in, images out; or parts of that. The encoding is in fp32 in any case."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from r2l_nerfstudio.engines.protocol import DTYPES
from r2l_nerfstudio.engines.weights import FixedNetwork
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.export.gathered_volume import GatheredVolume
from r2l_nerfstudio.export.plain_network import to_plain_operators
from r2l_nerfstudio.models.composited_encoding import EncodedRays, encode_ray_image, encode_single_rays, finished
from r2l_nerfstudio.models.light_field import LightFieldModel
from r2l_nerfstudio.rays.conventions import RayConventions
from r2l_nerfstudio.rays.encoding import frequency_encode
from r2l_nerfstudio.rays.pinhole import image_rays
from r2l_nerfstudio.rays.ray_image import ray_image_size
from r2l_nerfstudio.rays.spacing import MISSED_FRACTION
from r2l_nerfstudio.student import Student

GraphInputs = Literal["camera", "rays"]
GraphPart = Literal["whole", "encoding", "network", "values"]
GraphPrecision = Literal["fp32", "fp16"]

RAYS_AT_ONCE = 1 << 16
"""Rays per part of an image: the ray encodings of a whole image would take gigabytes."""


COMPOSITED_AT_ONCE = 1 << 14
"""The same for rays along which features are composited."""

TURN = (6.28125, 2 * math.pi - 6.28125)
"""2 pi, as eight bits and the rest."""


class Encoding(nn.Module):
    """What a student's network reads of rays, in fp32.

    Args:
        model: model to copy, its feature volume with plain gathers.
        precision: precision of the stored features.
        reduce_angles: reduce the encoding's angles first, for machines whose sine is accurate only near zero.
        int8_features: store a composited encoding's features in int8.
    """

    def __init__(
        self,
        model: LightFieldModel,
        precision: GraphPrecision,
        reduce_angles: bool = False,
        int8_features: bool = False,
    ) -> None:
        super().__init__()
        kept = torch.int8 if int8_features else DTYPES[precision]
        self.composited = None if model.composited is None else model.composited.for_graph(kept)
        self.factor = model.factor
        self.pixel_samples = getattr(model.config, "pixel_samples", 0)
        self.block = getattr(model, "block", 1)
        self.ray_encoding = copy.deepcopy(model.ray_encoding)
        self.volume = None if model.volume is None else GatheredVolume(model.volume, DTYPES[precision])
        self.volume_points = model.config.volume_points
        self.encode = reduced_frequency_encode if reduce_angles else frequency_encode
        self.reads_ray_image = model.reads_ray_image

    @property
    def rays_at_once(self) -> int:
        """Rays of an image that are processed at once."""
        return RAYS_AT_ONCE if self.composited is None else COMPOSITED_AT_ONCE

    def forward(self, origins: Float[Tensor, "*rays 3"], directions: Float[Tensor, "*rays 3"]) -> EncodedRays:
        """Return the encoding of rays, as the network reads it, and the geometry that is known without the network.

        Args:
            origins: in the run's frame; for a MobileR2L those of a ray image, [rows, columns, 3].
            directions: unit length.

        Returns:
            encoded [*rays, in_dim], for a MobileR2L [1, in_dim, rows, columns]; geometry of a composited encoding
            [*rays, 2], for a MobileR2L [height, width, 2] without the margin, else None.
        """
        if self.composited is not None:
            if not self.reads_ray_image:
                return encode_single_rays(self.composited, origins, directions, encode=self.encode)
            found = encode_ray_image(
                self.composited, self.factor, self.pixel_samples, self.block, origins, directions, encode=self.encode
            )
            return EncodedRays(found.encoded.permute(2, 0, 1)[None], found.geometry)
        encoded = self.encode(self.ray_encoding.values(origins, directions), self.ray_encoding.num_frequencies)
        if self.volume is not None:
            features = self.volume(self.ray_encoding.points(origins, directions, self.volume_points))
            encoded = torch.cat([encoded, features], dim=-1)
        return EncodedRays(encoded.permute(2, 0, 1)[None] if self.reads_ray_image else encoded)


class EncodedNetwork(nn.Module):
    """From rays to the student's five numbers: rgb, accumulation, depth as a position along the ray; all in [0, 1].

    Args:
        model: model to copy.
        precision: precision of the network's weights and arithmetic; encoding, input and output are fp32.
        reduce_angles: as `Encoding`.
    """

    def __init__(self, model: LightFieldModel, precision: GraphPrecision, reduce_angles: bool = False) -> None:
        super().__init__()
        self.encoding = Encoding(model, precision, reduce_angles)
        self.network = FixedNetwork(model.network, precision)
        self.joining = Joining(model)

    def forward(
        self, origins: Float[Tensor, "*rays 3"], directions: Float[Tensor, "*rays 3"]
    ) -> Float[Tensor, "*pixels 5"]:
        """Evaluate any number of rays for R2L; for MobileR2L those of a ray image, [rows, columns, 3].

        Args:
            origins: in the run's frame.
            directions: unit length.

        Returns:
            One value per ray, or those of the ray image's pixels [height, width, 5], without its margin.
        """
        encoded, geometry = self.encoding(origins, directions)
        return self.joining(self.network(encoded), geometry)


class Joining(nn.Module):
    """Combine the network's values and geometry into the five numbers of pixels.

    Args:
        model: model whose settings are copied.
    """

    background: Tensor

    def __init__(self, model: LightFieldModel) -> None:
        super().__init__()
        self.reads_ray_image = model.reads_ray_image
        self.edge = model.margin * model.factor
        self.is_bounded = model.composited is not None and model.composited.is_bounded
        self.register_buffer("background", model.background.clone())

    def forward(self, values: Float[Tensor, "*values"], geometry: Float[Tensor, "*pixels 2"] | None) -> Tensor:
        """Return [*pixels, 5]; for MobileR2L without the margin.

        Args:
            values: values of the network.
            geometry: geometry of a composited encoding.
        """
        if self.reads_ray_image:
            values = values[0].permute(1, 2, 0)
        if self.edge:
            values = values[self.edge : -self.edge, self.edge : -self.edge]
        return values if geometry is None else finished(values, geometry, self.background if self.is_bounded else None)


def reduced_frequency_encode(
    values: Float[Tensor, "*batch dim"], num_frequencies: int
) -> Float[Tensor, "*batch encoded"]:
    """Return `frequency_encode` with sines and cosines of angles within half a turn of zero only.

    A turn is subtracted in two parts, the first with so few bits that its multiples are exact (Cody and Waite).
    """
    frequencies = 2.0 ** torch.arange(num_frequencies, device=values.device, dtype=torch.float32)
    phases = (values[..., None, :] * frequencies[:, None]).flatten(-2)
    turns = (phases / (2 * math.pi) + 0.5).floor()
    phases = (phases - turns * TURN[0]) - turns * TURN[1]
    return torch.cat([values, phases.sin(), phases.cos()], dim=-1)


class Pictures(nn.Module):
    """Convert the network's five numbers into images.

    Args:
        model: model whose settings are copied.
    """

    background: Tensor

    def __init__(self, model: LightFieldModel) -> None:
        super().__init__()
        self.ray_encoding = copy.deepcopy(model.ray_encoding)
        self.register_buffer("background", model.background.clone())
        self.outputs = ("rgb", *["accumulation"] * model.has_accumulation, *["depth"] * model.has_depth)

    def forward(
        self, values: Float[Tensor, "*rays 5"], origins: Float[Tensor, "*rays 3"], directions: Float[Tensor, "*rays 3"]
    ) -> tuple[Tensor, ...]:
        """Return `rgb` [*rays, 3], and if the student has them `accumulation` and `depth` [*rays, 1].

        Rays that miss a bounded scene see its background; `depth` is the distance along the ray.
        """
        found, fraction = {"rgb": values[..., :3], "accumulation": values[..., 3:4]}, values[..., 4:5]
        if self.ray_encoding.spacing == "sphere":
            # Arithmetic instead of a selection, for which Core ML's converter would store the background once per
            # pixel.
            missed = self.ray_encoding.misses_scene(origins, directions).to(values.dtype)
            found["rgb"] = found["rgb"] * (1 - missed) + self.background * missed
            found["accumulation"] = found["accumulation"] * (1 - missed)
            fraction = fraction * (1 - missed) + MISSED_FRACTION * missed
        if "depth" in self.outputs:
            distance = self.ray_encoding.to_distance(origins, directions, fraction)
            found["depth"] = distance.clamp_min(0.0)
        return tuple(found[name] for name in self.outputs)


class PictureFrame(nn.Module):
    """Rays of a camera of one size: those that a student evaluates, and those of the image's pixels.

    Args:
        model: the student.
        height: height of the image in pixels.
        width: width of the image in pixels.
    """

    margin_offset: Tensor

    def __init__(self, model: LightFieldModel, height: int, width: int) -> None:
        super().__init__()
        self.reads_ray_image = model.reads_ray_image
        self.factor = model.factor
        self.rays_per_cell = model.rays_per_cell
        self.margin = model.margin
        self.conventions: RayConventions = model.ray_encoding.conventions
        self.height = height
        self.width = width
        margin = self.margin * self.rays_per_cell
        self.register_buffer("margin_offset", torch.tensor([0.0, 0.0, margin, margin]))

    def pixels(self, camera_to_world: Float[Tensor, "3 4"], intrinsics: Float[Tensor, "4"]) -> tuple[Tensor, Tensor]:
        """Return origins and directions [height, width, 3], as the ray encoding reads them."""
        return self._rays(camera_to_world, intrinsics, self.height, self.width)

    def _rays(self, camera_to_world: Tensor, intrinsics: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        conventions = self.conventions
        return image_rays(camera_to_world, intrinsics, rows, columns, conventions.pixel_offset, conventions.is_planar)

    def evaluated(self, camera_to_world: Float[Tensor, "3 4"], intrinsics: Float[Tensor, "4"]) -> tuple[Tensor, Tensor]:
        """Return origins and directions [rows, columns, 3] of a MobileR2L's ray image with its margin; else of the
        pixels."""
        if not self.reads_ray_image:
            return self.pixels(camera_to_world, intrinsics)
        size = ray_image_size(self.height, self.width, self.factor, self.margin)
        rows, columns = (count * self.rays_per_cell for count in size)
        # As `ray_image_intrinsics`, but not in place: few runtimes scatter.
        scaled = intrinsics / self.factor * self.rays_per_cell + self.margin_offset
        return self._rays(camera_to_world, scaled, rows, columns)

    def crop(self, values: Float[Tensor, "drawn_height drawn_width 5"]) -> Float[Tensor, "height width 5"]:
        """Crop whole cells to the image."""
        return values[: self.height, : self.width]


class RayGraph(nn.Module):
    """Rays in, values along them out: for R2L students, which evaluate rays one by one.

    Args:
        model: model to copy.
        precision: precision of the network.
        reduce_angles: as `Encoding`.
    """

    inputs = ("origins", "directions")

    def __init__(self, model: LightFieldModel, precision: GraphPrecision, reduce_angles: bool = False) -> None:
        super().__init__()
        self.encoded_network = EncodedNetwork(model, precision, reduce_angles)
        self.pictures = Pictures(model)
        self.outputs = self.pictures.outputs

    def forward(self, origins: Float[Tensor, "rays 3"], directions: Float[Tensor, "rays 3"]) -> tuple[Tensor, ...]:
        """Return `rgb` [rays, 3], and if the student has them `accumulation` and `depth` [rays, 1].

        Args:
            origins: in the run's frame.
            directions: unit length.
        """
        return self.pictures(self.encoded_network(origins, directions), origins, directions)


class CameraGraph(nn.Module):
    """A camera in, its image out.

    A MobileR2L student renders at the angular pitch it was trained at: pass intrinsics of that focal length, which is
        in the file's metadata, and resample the image for any other.

    Args:
        model: model to copy.
        precision: precision of the network.
        height: height of the image in pixels.
        width: width of the image in pixels.
        reduce_angles: as `Encoding`.
    """

    inputs = ("camera_to_world", "intrinsics")

    def __init__(
        self, model: LightFieldModel, precision: GraphPrecision, height: int, width: int, reduce_angles: bool = False
    ) -> None:
        super().__init__()
        self.encoded_network = EncodedNetwork(model, precision, reduce_angles)
        self.frame = PictureFrame(model, height, width)
        self.pictures = Pictures(model)
        self.outputs = self.pictures.outputs

    def forward(self, camera_to_world: Float[Tensor, "3 4"], intrinsics: Float[Tensor, "4"]) -> tuple[Tensor, ...]:
        """Return `rgb` [height, width, 3], and if the student has them `accumulation` and `depth` [height, width, 1].

        Args:
            camera_to_world: OpenGL axes, in the run's frame.
            intrinsics: fx, fy, cx, cy in pixels.
        """
        rays = self.frame.pixels(camera_to_world, intrinsics)
        if self.frame.reads_ray_image:
            values = self.encoded_network(*self.frame.evaluated(camera_to_world, intrinsics))
        else:
            rows = max(1, self.encoded_network.encoding.rays_at_once // self.frame.width)
            # Slices instead of a split: Core ML's converter does not support one whose last part is shorter.
            parts = [[tensor[top : top + rows] for tensor in rays] for top in range(0, self.frame.height, rows)]
            values = torch.cat([self.encoded_network(*part) for part in parts])
        return self.pictures(self.frame.crop(values), *rays)


class EncodingGraph(nn.Module):
    """The first part: the input of `NetworkGraph` from rays or, with a frame, from a camera.

    Args:
        model: model to copy.
        precision: precision of a stored feature volume.
        frame: rays of the camera's image; None for a graph of rays.
        reduce_angles: as `Encoding`.
        int8_features: whether features are stored in int8.
    """

    def __init__(
        self,
        model: LightFieldModel,
        precision: GraphPrecision,
        frame: PictureFrame | None,
        reduce_angles: bool = False,
        int8_features: bool = False,
    ) -> None:
        super().__init__()
        self.encoding = Encoding(model, precision, reduce_angles, int8_features)
        self.frame = frame
        self.inputs = RayGraph.inputs if frame is None else CameraGraph.inputs
        self.outputs = encoding_outputs(model)

    def forward(self, first: Float[Tensor, "*first"], second: Float[Tensor, "*second"]) -> tuple[Tensor, ...]:
        """Return `encoded`: [rays, in_dim], or for MobileR2L [1, in_dim, rows, columns] with a margin of one cell on every
        side; for a composited encoding also `geometry`: [rays, 2], or [height, width, 2] of whole cells without the
        margin.

        Args:
            first: origins [rays, 3], or camera_to_world [3, 4].
            second: directions [rays, 3], or intrinsics [4].
        """
        rays = (first, second) if self.frame is None else self.frame.evaluated(first, second)
        encoded, geometry = self.encoding(*rays)
        if not self.encoding.reads_ray_image:
            encoded = encoded.flatten(0, -2)
            geometry = None if geometry is None else geometry.flatten(0, -2)
        return (encoded,) if geometry is None else (encoded, geometry)


class NetworkGraph(nn.Module):
    """The second part: the network only.

    Args:
        model: model to copy.
        precision: precision of the network.
        is_plain: use operators that phone processors support; see `to_plain_operators`.
    """

    inputs = ("encoded",)
    outputs = ("values",)

    def __init__(self, model: LightFieldModel, precision: GraphPrecision, is_plain: bool) -> None:
        super().__init__()
        self.network = FixedNetwork(model.network, precision)
        if is_plain:
            to_plain_operators(self.network)

    def forward(self, encoded: Float[Tensor, "*encoded"]) -> tuple[Float[Tensor, "*values"]]:
        """Return `values`: rgb, and unless the encoding is composited accumulation and depth as a position along the
        ray.

        Args:
            encoded: output of `EncodingGraph`.

        Returns:
            [rays, 5 or 3]; for a MobileR2L [1, 5 or 3, rows * factor, columns * factor], with `factor` pixels of margin.
        """
        return (self.network(encoded),)


class ValuesGraph(nn.Module):
    """The last part, after the network: crop the margin, fill in the background, convert positions to distances.

    Args:
        model: model to copy.
        frame: rays of the camera's image; None for a graph of rays.
    """

    def __init__(self, model: LightFieldModel, frame: PictureFrame | None) -> None:
        super().__init__()
        self.frame = frame
        self.joining = Joining(model)
        self.pictures = Pictures(model)
        self.has_geometry = model.composited is not None
        self.inputs = (
            "values",
            *encoding_outputs(model)[1:],
            *(RayGraph.inputs if frame is None else CameraGraph.inputs),
        )
        self.outputs = self.pictures.outputs

    def forward(
        self, values: Float[Tensor, "*values"], second: Tensor, third: Tensor, fourth: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the outputs of `CameraGraph` or `RayGraph`.

        Args:
            values: output of `NetworkGraph`.
            second: `geometry` of `EncodingGraph` if it has one, else the first input of `EncodingGraph`.
            third: the next input.
            fourth: the next input, if there is `geometry`.
        """
        geometry, first, last = None, second, third
        if self.has_geometry:
            assert fourth is not None
            geometry, first, last = second, third, fourth
        values = self.joining(values, geometry)
        if self.frame is None:
            return self.pictures(values, first, last)
        rays = self.frame.pixels(first, last)
        if self.frame.reads_ray_image:
            values = self.frame.crop(values)
        else:
            values = values.reshape(self.frame.height, self.frame.width, -1)
        return self.pictures(values, *rays)


def encoding_outputs(model: LightFieldModel) -> tuple[str, ...]:
    """Return the names of an encoding's outputs."""
    return ("encoded",) if model.composited is None else ("encoded", "geometry")


StudentGraph = CameraGraph | RayGraph | EncodingGraph | NetworkGraph | ValuesGraph


@dataclass(frozen=True)
class GraphSpec:
    """Which graph of a student to build."""

    inputs: GraphInputs
    """A camera's pose and intrinsics, or the rays' origins and directions; without the encoding, the network's input."""
    precision: GraphPrecision
    """Precision of the network; the encoding is in fp32."""
    width: int
    """Size of the image in pixels; a graph of rays takes any number of them, and is only compared on such an image."""
    height: int
    part: GraphPart = "whole"
    """The whole graph, or one part: encoding, network, or values."""
    is_static: bool = False
    """Fix all shapes: a graph of rays takes width * height of them."""
    is_plain: bool = False
    """Build the network from operators that phone processors support."""
    reduce_angles: bool = False
    """Reduce the encoding's angles first, for machines whose sine is accurate only near zero."""
    int8_features: bool = False
    """Store a composited encoding's features in int8; for the encoding part."""

    def frame(self, student: Student) -> PictureFrame | None:
        """Return the rays of the camera's image; None for a graph of rays.

        Raises:
            InputError: a part of a graph is requested whose ray encodings would take gigabytes.
        """
        if self.inputs == "rays":
            return None
        if not student.model.reads_ray_image and self.width * self.height > RAYS_AT_ONCE:
            raise InputError(
                f"--width {self.width} --height {self.height}: the encodings of so many rays of a {student.method_name}"
                f" student take gigabytes; choose at most {RAYS_AT_ONCE} pixels, or --inputs rays and process them in"
                " parts."
            )
        return PictureFrame(student.model, self.height, self.width)

    def build(self, student: Student) -> StudentGraph:
        """Build the graph as a module, on the student's device.

        Raises:
            InputError: rays are requested of a student that renders images only, or the size is invalid.
        """
        if min(self.width, self.height) < 1:
            raise InputError(f"--width and --height must be positive integers (got {self.width} and {self.height}).")
        if self.inputs == "rays" and student.model.reads_ray_image:
            raise InputError(
                f"--inputs rays: a {student.method_name} student renders whole images and no single rays; choose"
                " --inputs camera, or export an r2l student."
            )
        if self.part == "network":
            return NetworkGraph(student.model, self.precision, self.is_plain).eval()
        if self.part == "encoding":
            return EncodingGraph(
                student.model, self.precision, self.frame(student), self.reduce_angles, self.int8_features
            ).eval()
        if self.part == "values":
            return ValuesGraph(student.model, self.frame(student)).eval()
        if self.inputs == "camera":
            return CameraGraph(student.model, self.precision, self.height, self.width, self.reduce_angles).eval()
        return RayGraph(student.model, self.precision, self.reduce_angles).eval()
