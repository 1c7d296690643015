"""Training photos as undistorted views of one size and one focal length, for students of ray images."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from r2l_nerfstudio.distillation.photos import SHARE_OF_MEMORY, read_photo
from r2l_nerfstudio.distillation.view_ring import free_memory
from r2l_nerfstudio.errors import InputError


@dataclass
class PhotoViews:
    """Photos as `crops.Views`."""

    pixels: UInt8[Tensor, "views height width 4"]
    """rgb, and 1 where the color is learned."""
    depth: Float[Tensor, "views height width"]
    camera_to_worlds: Float[Tensor, "views 3 4"]
    intrinsics: Float[Tensor, "views 4"]
    has_geometry: bool = False
    crop_views: None = None

    def __len__(self) -> int:
        return len(self.pixels)


def photo_views(
    dataset: InputDataset,
    indices: list[int],
    intrinsics: Float[Tensor, "num_train 4"],
    size: tuple[int, int],
    corrections: Float[Tensor, "num_train 3 4"] | None,
    background: Float[Tensor, "3"],
    device: torch.device | str,
) -> PhotoViews:
    """Resample photos to pinhole views like the teacher's.

    Args:
        dataset: the training views.
        indices: indices of the photos.
        intrinsics: fx, fy, cx, cy in pixels of the views to make, for all training views.
        size: height and width in pixels of the views to make.
        corrections: the teacher's pose corrections for all training views, or None.
        background: color behind photos with an alpha channel.
        device: device of the views.

    Raises:
        InputError: for an image that cannot be read, or a lens that cannot be undistorted.
    """
    chosen = _affordable(indices, size, device)
    pixels = torch.empty(len(chosen), *size, 4, dtype=torch.uint8, device=device)
    shown = []
    for index in chosen:
        view = undistorted_photo(dataset, index, intrinsics[index], size, background)
        if view[..., 3].any():
            pixels[len(shown)] = view.to(device)
            shown.append(index)
    if len(shown) < len(chosen):
        missing = next(index for index in chosen if index not in shown)
        CONSOLE.print(
            f"[yellow]Skipping {len(chosen) - len(shown)} photos that their masks cover entirely, the first being"
            f" {dataset.image_filenames[missing]}.",
            soft_wrap=True,
        )
    poses = dataset.cameras.camera_to_worlds[shown].cpu().float().clone()
    if corrections is not None:
        # Like CameraOptimizer.apply_to_raybundle: shift the origin, rotate the directions, both in the world frame.
        moved = corrections[shown].cpu()
        poses = torch.cat([moved[:, :, :3] @ poses[:, :, :3], poses[:, :, 3:] + moved[:, :, 3:]], dim=-1)
    return PhotoViews(
        pixels=pixels[: len(shown)],
        # Unknown: one number stands for all pixels.
        depth=torch.zeros(1, 1, 1, dtype=torch.float16, device=device).expand(len(shown), *size),
        camera_to_worlds=poses.to(device),
        intrinsics=intrinsics[shown].to(device),
    )


def _affordable(indices: list[int], size: tuple[int, int], device: torch.device | str) -> list[int]:
    """Return as many photos as there is room for, evenly spaced."""
    room = int(SHARE_OF_MEMORY * free_memory(torch.device(device))) // (4 * size[0] * size[1])
    if room >= len(indices):
        return indices
    CONSOLE.print(f"[bold yellow]{device} has room for {max(1, room)} of {len(indices)} photos: learning from these.")
    places = np.linspace(0, len(indices) - 1, max(1, room)).round().astype(int)
    return [indices[place] for place in dict.fromkeys(places.tolist())]


def undistorted_photo(
    dataset: InputDataset, index: int, wanted: Float[Tensor, "4"], size: tuple[int, int], background: Float[Tensor, "3"]
) -> UInt8[Tensor, "height width 4"]:
    """Return one photo as a pinhole view: rgb, and 1 where the color is known. Arguments and errors as
    `photo_views`."""
    photo = read_photo(dataset, index, background)
    known = np.ones(photo.rgb.shape[:2], np.uint8) if photo.mask is None else photo.mask.astype(np.uint8)
    # One array, so that pixels beyond the photo or under a mask are known when colors are averaged. 16 bits, so that
    # shrinking does not round to 8 once more; fp32 would take twice the memory.
    channels = np.dstack([photo.rgb * known[..., None], 255 * known]).astype(np.uint16) * 256
    height, width = channels.shape[:2]
    camera = dataset.cameras[index : index + 1]
    fx, fy, cx, cy = (float(value) for value in (camera.fx, camera.fy, camera.cx, camera.cy))
    # Shrink first, by area: reading a larger photo at few points would alias.
    across, down = (min(1.0, float(w) / f) for w, f in zip(wanted[:2], (fx, fy), strict=True))
    small = (max(1, round(width * across)), max(1, round(height * down)))
    if small != (width, height):
        channels = cv2.resize(channels, small, interpolation=cv2.INTER_AREA)
        across, down = small[0] / width, small[1] / height
        fx, cx, fy, cy = fx * across, cx * across, fy * down, cy * down
    across_map, down_map = _where(camera, (fx, fy, cx, cy), wanted, size, dataset.image_filenames[index])
    channels = channels.astype(np.float32) / 256

    def read(part: np.ndarray, interpolation: int) -> np.ndarray:
        return cv2.remap(
            part, across_map, down_map, interpolation, borderMode=cv2.BORDER_CONSTANT, borderValue=(0,) * 4
        )

    valid = read(channels[..., 3], cv2.INTER_LINEAR)[..., None] > 0.999 * 255
    # Bilinear reading would lose a third of the energy of a photo's fine detail, and the student learns what is lost.
    sharp = read(channels, cv2.INTER_LANCZOS4)
    rgb = sharp[..., :3] / np.maximum(sharp[..., 3:] / 255, 0.5)  # of what is known
    return torch.from_numpy(np.concatenate([np.clip(rgb, 0, 255), valid], axis=-1).round().astype(np.uint8))


def _where(
    camera: Cameras, intrinsics: tuple[float, ...], wanted: Tensor, size: tuple[int, int], path: object
) -> tuple[np.ndarray, np.ndarray]:
    """Return for every pixel of the view where to read it; OpenCV counts from the center of the first pixel."""
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
        f"The photo {path} cannot be undistorted (camera type {CameraType(kind).name}, lens parameters k1-k4 {k1:g}"
        f" {k2:g} {k3:g} {k4:g}, p1 p2 {p1:g} {p2:g}): learn from the teacher only with"
        " --pipeline.datamanager.photo-iterations 0, or distil an r2l student, which supports any lens."
    )
