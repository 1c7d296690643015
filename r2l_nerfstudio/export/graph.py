"""A whole student as one graph: a camera, or rays, in; pictures out. The encoding is in fp32 in any case."""

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
from r2l_nerfstudio.models.light_field import LightFieldModel
from r2l_nerfstudio.models.mobile_r2l import MobileR2LModel
from r2l_nerfstudio.rays.encoding import frequency_encode
from r2l_nerfstudio.rays.pinhole import image_rays
from r2l_nerfstudio.rays.ray_image import MARGIN, ray_image_size
from r2l_nerfstudio.student import Student

GraphInputs = Literal["camera", "rays"]
GraphPrecision = Literal["fp32", "fp16"]

RAYS_AT_ONCE = 1 << 16
"""A whole picture's codes would take gigabytes: beyond this many rays a camera's graph goes through it in parts."""


TURN = (6.28125, 2 * math.pi - 6.28125)
"""2 pi, as eight bits and the rest."""


class EncodedNetwork(nn.Module):
    """From rays to the student's five numbers: rgb, accumulation, depth as a position along the ray; all in (0, 1).

    Args:
        model: copied, its feature volume into plain gathers.
        precision: of the network's weights and arithmetic; encoding, input and output are fp32.
        reduce_angles: bring the encoding's angles near zero first, for machines whose sines are good only there.
    """

    background: Tensor

    def __init__(self, model: LightFieldModel, precision: GraphPrecision, reduce_angles: bool = False) -> None:
        super().__init__()
        self.ray_code = copy.deepcopy(model.ray_code)
        self.volume = None if model.volume is None else GatheredVolume(model.volume, DTYPES[precision])
        self.register_buffer("background", model.background.clone())
        self.volume_points = model.config.volume_points
        self.network = FixedNetwork(model.network, precision)
        self.encode = reduced_frequency_encode if reduce_angles else frequency_encode
        self.factor = model.factor if isinstance(model, MobileR2LModel) else 1
        self.is_image = isinstance(model, MobileR2LModel)

    def forward(
        self, origins: Float[Tensor, "*rays 3"], directions: Float[Tensor, "*rays 3"]
    ) -> Float[Tensor, "*pixels 5"]:
        """Rays of any number for an R2L; for a MobileR2L those of a ray image's cells, [rows, columns, 3].

        Args:
            origins: in the run's frame.
            directions: unit length.

        Returns:
            as many as there are rays, or [rows * factor, columns * factor, 5], the margin's pixels among them.
        """
        code = self.encode(self.ray_code.values(origins, directions), self.ray_code.num_frequencies)
        if self.volume is not None:
            features = self.volume(self.ray_code.points(origins, directions, self.volume_points))
            code = torch.cat([code, features], dim=-1)
        if not self.is_image:
            return self.network(code)
        return self.network(code.permute(2, 0, 1)[None])[0].permute(1, 2, 0)


def reduced_frequency_encode(
    values: Float[Tensor, "*batch dim"], num_frequencies: int
) -> Float[Tensor, "*batch encoded"]:
    """As `frequency_encode`, with sines and cosines of angles within half a turn of zero only.

    A turn is taken off in two parts, the first of so few bits that its multiples are exact (Cody and Waite).
    """
    frequencies = 2.0 ** torch.arange(num_frequencies, device=values.device, dtype=torch.float32)
    phases = (values[..., None, :] * frequencies[:, None]).flatten(-2)
    turns = (phases / (2 * math.pi) + 0.5).floor()
    phases = (phases - turns * TURN[0]) - turns * TURN[1]
    return torch.cat([values, phases.sin(), phases.cos()], dim=-1)


class RayGraph(nn.Module):
    """Rays in, what is seen along them out: for R2L students, which answer any ray by itself.

    Args:
        model: copied.
        precision: of the network.
    """

    inputs = ("origins", "directions")

    def __init__(self, model: LightFieldModel, precision: GraphPrecision) -> None:
        super().__init__()
        self.encoded_network = EncodedNetwork(model, precision)
        self.outputs = output_names(model)

    def forward(self, origins: Float[Tensor, "rays 3"], directions: Float[Tensor, "rays 3"]) -> tuple[Tensor, ...]:
        """`rgb` [rays, 3], and where the student knows them `accumulation` and `depth` [rays, 1].

        Args:
            origins: in the run's frame.
            directions: unit length.
        """
        values = self.encoded_network(origins, directions)
        return split_values(values, origins, directions, self.encoded_network, self.outputs)


class CameraGraph(nn.Module):
    """A camera in, its picture out.

    A MobileR2L student draws at the angular pitch it was trained at: pass intrinsics of that focal length, which is in the
    file's metadata, and resample the picture for any other.

    Args:
        model: copied.
        precision: of the network.
        height: of the picture in pixels.
        width: of the picture in pixels.
    """

    inputs = ("camera_to_world", "intrinsics")
    margin_offset: Tensor

    def __init__(self, model: LightFieldModel, precision: GraphPrecision, height: int, width: int) -> None:
        super().__init__()
        self.encoded_network = EncodedNetwork(model, precision)
        self.outputs = output_names(model)
        self.height = height
        self.width = width
        self.register_buffer("margin_offset", torch.tensor([0.0, 0.0, MARGIN, MARGIN]))

    def forward(self, camera_to_world: Float[Tensor, "3 4"], intrinsics: Float[Tensor, "4"]) -> tuple[Tensor, ...]:
        """`rgb` [height, width, 3], and where the student knows them `accumulation` and `depth` [height, width, 1].

        Args:
            camera_to_world: OpenGL axes, in the run's frame.
            intrinsics: fx, fy, cx, cy in pixels.
        """
        origins, directions = image_rays(camera_to_world, intrinsics, self.height, self.width)
        factor = self.encoded_network.factor
        if self.encoded_network.is_image:
            rows, columns = ray_image_size(self.height, self.width, factor)
            # As `ray_image_intrinsics`, without writing in place: few runtimes scatter.
            cells = image_rays(camera_to_world, intrinsics / factor + self.margin_offset, rows, columns)
            margin = MARGIN * factor
            values = self.encoded_network(*cells)
            values = values[margin : margin + self.height, margin : margin + self.width]
        else:
            rows = max(1, RAYS_AT_ONCE // self.width)
            parts = zip(origins.split(rows), directions.split(rows), strict=True)
            values = torch.cat([self.encoded_network(*part) for part in parts])
        return split_values(values, origins, directions, self.encoded_network, self.outputs)


def output_names(model: LightFieldModel) -> tuple[str, ...]:
    """Of a student's graph, in their order."""
    return ("rgb", *["accumulation"] * model.has_accumulation, *["depth"] * model.has_depth)


def split_values(
    values: Float[Tensor, "*pixels 5"],
    origins: Float[Tensor, "*pixels 3"],
    directions: Float[Tensor, "*pixels 3"],
    encoded_network: EncodedNetwork,
    outputs: tuple[str, ...],
) -> tuple[Tensor, ...]:
    """The network's five numbers per pixel as what was asked for, `depth` as a distance along the pixel's ray.

    Rays that miss a bounded scene see its background.
    """
    ray_code = encoded_network.ray_code
    found = {"rgb": values[..., :3], "accumulation": values[..., 3:4]}
    if ray_code.spacing == "sphere":
        missed = ray_code.misses_scene(origins, directions)
        found["rgb"] = torch.where(missed, encoded_network.background, found["rgb"])
        found["accumulation"] = torch.where(missed, 0.0, found["accumulation"])
    if "depth" in outputs:
        distance = ray_code.to_distance(origins, directions, values[..., 4:5])
        found["depth"] = distance.clamp_min(0.0)
    return tuple(found[name] for name in outputs)


@dataclass(frozen=True)
class GraphSpec:
    """Which graph of a student."""

    inputs: GraphInputs
    """A camera's pose and intrinsics, or the rays' origins and directions."""
    precision: GraphPrecision
    """Of the network; the encoding is in fp32."""
    width: int
    """Of the picture in pixels; a graph of rays takes any number of them, and is only compared on such a picture."""
    height: int

    def build(self, student: Student) -> CameraGraph | RayGraph:
        """The graph as a module, on the student's device.

        Raises:
            InputError: rays are asked of a student that draws pictures only, or the size is none.
        """
        if min(self.width, self.height) < 1:
            raise InputError(f"--width {self.width} --height {self.height}: pass whole numbers of pixels from 1 on.")
        if self.inputs == "camera":
            return CameraGraph(student.model, self.precision, self.height, self.width).eval()
        if isinstance(student.model, MobileR2LModel):
            raise InputError(
                f"--inputs rays: a {student.method_name} student draws whole pictures and answers no single rays; choose"
                " --inputs camera, or export an r2l student."
            )
        return RayGraph(student.model, self.precision).eval()
