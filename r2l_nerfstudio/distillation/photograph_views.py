"""The training photographs as undistorted views of one size and one focal length: what a student of whole images learns."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.datasets.base_dataset import InputDataset
from torch import Tensor

from r2l_nerfstudio.distillation.photographs import read_photograph
from r2l_nerfstudio.errors import InputError


@dataclass
class PhotographViews:
    """Photographs as `crops.Views`."""

    pixels: UInt8[Tensor, "views height width 5"]
    depth: Float[Tensor, "views height width"]
    camera_to_worlds: Float[Tensor, "views 3 4"]
    intrinsics: Float[Tensor, "views 4"]
    has_geometry: bool = False

    def __len__(self) -> int:
        return len(self.pixels)


def photograph_views(
    dataset: InputDataset,
    indices: list[int],
    intrinsics: Float[Tensor, "num_train 4"],
    size: tuple[int, int],
    corrections: Float[Tensor, "num_train 3 4"] | None,
    background: Float[Tensor, "3"],
    device: torch.device | str,
) -> PhotographViews:
    """Resample photographs to pinhole views, as the teacher's views are.

    Args:
        dataset: the training views.
        indices: which of them.
        intrinsics: fx, fy, cx, cy in pixels of the views to make, for all training views.
        size: height and width in pixels of the views to make.
        corrections: the teacher's pose corrections for all training views, or None.
        background: colour behind photographs that have an alpha channel.
        device: where the views live.

    Raises:
        InputError: for an image that cannot be read, or a lens that cannot be undistorted.
    """
    made = [_undistorted(dataset, index, intrinsics[index], size, background) for index in indices]
    poses = dataset.cameras.camera_to_worlds[indices].cpu().float().clone()
    if corrections is not None:
        # As CameraOptimizer.apply_to_raybundle: shift the origin, rotate the directions, both in the world frame.
        chosen = corrections[indices].cpu()
        poses = torch.cat([chosen[:, :, :3] @ poses[:, :, :3], poses[:, :, 3:] + chosen[:, :, 3:]], dim=-1)
    pixels = torch.stack(made).to(device)
    return PhotographViews(
        pixels=pixels,
        depth=torch.zeros(pixels.shape[:3], dtype=torch.float16, device=device),
        camera_to_worlds=poses.to(device),
        intrinsics=intrinsics[indices].to(device),
    )


def _undistorted(
    dataset: InputDataset, index: int, wanted: Tensor, size: tuple[int, int], background: Tensor
) -> UInt8[Tensor, "height width 5"]:
    data = read_photograph(dataset, index, "float32")
    image = data["image"]
    if image.shape[-1] == 4:
        image = image[..., :3] * image[..., 3:] + background.cpu() * (1 - image[..., 3:])
    known = data["mask"].float() if "mask" in data else torch.ones_like(image[..., :1])
    # One array, so that colours never come from beyond the picture or from under a mask without being known to.
    channels = torch.cat([image * known, known], dim=-1).numpy()
    height, width = channels.shape[:2]
    camera = dataset.cameras[index : index + 1]
    fx, fy, cx, cy = (float(value) for value in (camera.fx, camera.fy, camera.cx, camera.cy))
    # Shrink first, by areas: reading a larger picture at few points would alias.
    across, down = (min(1.0, float(w) / f) for w, f in zip(wanted[:2], (fx, fy), strict=True))
    small = (max(1, round(width * across)), max(1, round(height * down)))
    if small != (width, height):
        channels = cv2.resize(channels, small, interpolation=cv2.INTER_AREA)
        across, down = small[0] / width, small[1] / height
        fx, cx, fy, cy = fx * across, cx * across, fy * down, cy * down
    across_map, down_map = _where(camera, (fx, fy, cx, cy), wanted, size, dataset.image_filenames[index])
    read = cv2.remap(
        channels, across_map, down_map, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=(0, 0, 0, 0)
    )
    valid = read[..., 3:4] > 0.999
    color = np.clip(read[..., :3], 0, 1) * 255
    # Image type of a teacher view: rgb, accumulation (unknown), validity.
    filler = np.full_like(read[..., :1], 255)
    return torch.from_numpy(np.concatenate([color, filler, valid], axis=-1).round().astype(np.uint8))


def _where(
    camera: Cameras, intrinsics: tuple[float, ...], wanted: Tensor, size: tuple[int, int], path: object
) -> tuple[np.ndarray, np.ndarray]:
    """For every pixel of the view to make, where to read it; OpenCV counts from the centre of the first pixel."""
    matrix, target = (
        np.array([[fx, 0, cx - 0.5], [0, fy, cy - 0.5], [0, 0, 1]])
        for fx, fy, cx, cy in (intrinsics, wanted.double().tolist())
    )
    lens = camera.distortion_params
    k1, k2, k3, k4, p1, p2 = (0.0,) * 6 if lens is None else lens.flatten().double().tolist()
    kind = int(camera.camera_type)
    shape = size[::-1]
    if kind == CameraType.PERSPECTIVE.value and k4 == 0:
        lens_array = np.array([k1, k2, p1, p2, k3])
        return cv2.initUndistortRectifyMap(matrix, lens_array, np.eye(3), target, shape, cv2.CV_32FC1)
    if kind == CameraType.FISHEYE.value and p1 == 0 and p2 == 0:
        lens_array = np.array([k1, k2, k3, k4])
        return cv2.fisheye.initUndistortRectifyMap(matrix, lens_array, np.eye(3), target, shape, cv2.CV_32FC1)
    raise InputError(
        f"The photograph {path} cannot be undistorted (camera type {CameraType(kind).name}, lens parameters"
        f" k1-k4 {k1:g} {k2:g} {k3:g} {k4:g}, p1 p2 {p1:g} {p2:g}): learn from the teacher alone with"
        " --pipeline.datamanager.real-iterations 0, or distil an r2l student, which takes any lens."
    )
