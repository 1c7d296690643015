"""Compare an export with PyTorch on probe cameras of the trained student."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float

from r2l_nerfstudio.engines.protocol import PARITY_DB
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.export.graph import GraphSpec
from r2l_nerfstudio.models.probe_cameras import probe_intrinsics, probe_poses
from r2l_nerfstudio.psnr import psnr
from r2l_nerfstudio.student import Student

PLAIN_DB = 60.0
COMPOSITED_DB = 60.0
"""Minimum in fp32, that of 8-bit colors: at the edge of an occupied cell the last digit of a coordinate decides where
sample points lie, and more so at sizes far from those of training."""

Arrays = dict[str, Float[np.ndarray, "..."]]
"""Arrays by the names of a graph's inputs or outputs."""


@torch.no_grad()
def probe_inputs(student: Student, spec: GraphSpec, probe: int) -> tuple[Arrays, Arrays]:
    """Return a graph's inputs for one of the probe cameras, and PyTorch's outputs for them."""
    model = student.model
    pose = probe_poses(model)[probe]
    intrinsics = probe_intrinsics(model, spec.width, spec.height)
    if spec.inputs == "camera":
        inputs = {"camera_to_world": pose.numpy(), "intrinsics": intrinsics.numpy()}
    else:
        rays = model.ray_encoding.image_rays(pose, intrinsics, spec.height, spec.width)
        origins, directions = (np.ascontiguousarray(tensor.reshape(-1, 3).numpy()) for tensor in rays)
        inputs = {"origins": origins, "directions": directions}
    truth: Arrays = {}
    if spec.part in ("whole", "values"):
        rendered = student.render_all(pose.numpy(), intrinsics.numpy(), spec.width, spec.height)
        truth = {name: np.asarray(value) for name, value in rendered.items()}
        if spec.inputs == "rays":
            truth = {name: value.reshape(-1, value.shape[-1]) for name, value in truth.items()}
        if spec.part == "whole":
            return inputs, truth
    encoded, geometry = model.encoding_for_camera(pose, intrinsics, spec.height, spec.width)
    known = {} if geometry is None else {"geometry": geometry.numpy()}
    if spec.part == "encoding":
        return inputs, {"encoded": encoded.numpy()} | known
    values = {"values": model.network(encoded).numpy()}
    return (values | known | inputs, truth) if spec.part == "values" else ({"encoded": encoded.numpy()}, values)


def needed_db(spec: GraphSpec) -> float:
    """Return the minimum PSNR in dB of a graph against PyTorch. Plain operators approximate GELU to five digits."""
    return min(PARITY_DB[spec.precision], PLAIN_DB) if spec.is_plain else PARITY_DB[spec.precision]


def check_export(
    student: Student, spec: GraphSpec, run: Callable[[Arrays], Arrays], what: str, needed: float | None = None
) -> float:
    """Compare an export with PyTorch.

    Args:
        student: student that was exported.
        spec: spec of the graph.
        run: the export, from its inputs to its outputs.
        what: its name, for the message.
        needed: minimum PSNR in dB; by default what the precision allows.

    Returns:
        The worst PSNR in dB over all probe cameras and outputs; depths count in units of the scene's far distance.

    Raises:
        InputError: it is less than the precision allows.
    """
    worst = math.inf
    needed = needed_db(spec) if needed is None else needed
    if student.model.composited is not None:
        needed = min(needed, COMPOSITED_DB)
    for probe in range(len(probe_poses(student.model))):
        inputs, truth = probe_inputs(student, spec, probe)
        found = run(inputs)
        for name, value in truth.items():
            unit = float(student.model.ray_encoding.far) if name == "depth" else 1.0
            pair = (torch.from_numpy(np.array(array, dtype=np.float32)) / unit for array in (found[name], value))
            worst = min(worst, psnr(*pair))
    if not worst >= needed:
        said = "it gives values that are not finite" if worst == -math.inf else f"it agrees to {worst:.0f} dB only"
        raise InputError(
            f"{what} does not render what PyTorch renders: {said} on probe cameras of the student, and {needed:.0f}"
            f" dB are needed in {spec.precision}. It was not kept; try --precision fp32, or another format."
        )
    return worst
