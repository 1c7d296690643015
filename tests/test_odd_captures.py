"""Unusual captures are either read correctly or refused in one paragraph with the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.instant_ngp_dataparser import InstantNGPDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.dataparsers.scannet_dataparser import ScanNetDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from PIL import Image
from scene_teacher import SceneTeacher
from scipy.spatial.transform import Rotation
from teachers import _ring

from r2l_nerfstudio.capture import CaptureError, parse_capture
from r2l_nerfstudio.dataparsers import without_points
from r2l_nerfstudio.distillation.photos import Photos
from r2l_nerfstudio.distillation.pose_sampling import PoseSampler, capture_cameras
from r2l_nerfstudio.distillation.survey import Survey
from r2l_nerfstudio.distillation.view_ring import ViewRenderer
from r2l_nerfstudio.engines.parity import psnr
from r2l_nerfstudio.errors import InputError

WHITE = torch.ones(3)
VIEWS = 6


@dataclass
class Lens:
    """Pinhole intrinsics, in pixels."""

    w: int = 24
    h: int = 24
    fl_x: float = 24.0
    fl_y: float = 24.0
    cx: float = 12.0
    cy: float = 12.0


def colors(origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """A ball of radius 0.7 at the origin, colored by position, before a room colored by direction."""
    middle = (directions * origins).sum(-1)
    inside = middle**2 - (origins**2).sum(-1) + 0.7**2
    points = origins + directions * (-middle - np.sqrt(np.maximum(inside, 0)))[..., None]
    return np.where((inside > 0)[..., None], 0.5 + 0.5 * points / 0.7, 0.4 + 0.3 * directions)


def picture(pose: np.ndarray, lens: Lens) -> Image.Image:
    """The photo of a camera-to-world matrix (x right, y up, z back)."""
    x, y = np.meshgrid(np.arange(lens.w) + 0.5, np.arange(lens.h) + 0.5)
    rays = np.stack([(x - lens.cx) / lens.fl_x, -(y - lens.cy) / lens.fl_y, -np.ones_like(x)], -1) @ pose[:3, :3].T
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    return Image.fromarray((255 * colors(pose[:3, 3], rays) + 0.5).astype(np.uint8))


POSES = _ring(VIEWS, 2.0)
Make = Callable[[Path], DataParserConfig]
Save = Callable[[Image.Image, Path], None]


def nerfstudio(
    folder: Path,
    lenses: Lens | list[Lens] | None = None,
    name: str = "images/{:03d}.png",
    save: Save = lambda image, path: image.save(path),
    poses: list[np.ndarray] = POSES,
    written_name: str | None = None,
    **fields: Any,
) -> NerfstudioDataParserConfig:
    """A capture in Nerfstudio's format; several lenses are written beside each frame."""
    each = lenses if isinstance(lenses, list) else [lenses or Lens()] * len(poses)
    frames = []
    for index, (pose, lens) in enumerate(zip(poses, each, strict=True)):
        file = folder / name.format(index)
        file.parent.mkdir(exist_ok=True, parents=True)
        save(picture(pose, lens), file)
        frame = {"file_path": (written_name or name).format(index), "transform_matrix": pose.tolist()}
        frames.append({**frame, **vars(lens)} if isinstance(lenses, list) else frame)
    shared = {} if isinstance(lenses, list) else vars(each[0])
    (folder / "transforms.json").write_text(json.dumps({**shared, **fields, "frames": frames}))
    return NerfstudioDataParserConfig(data=folder, eval_mode="all")


def per_frame_intrinsics(folder: Path) -> DataParserConfig:
    lenses = [Lens(fl_x=20 + i, fl_y=21 + i, cx=11 + 0.3 * i, cy=12.5 - 0.2 * i) for i in range(VIEWS)]
    return nerfstudio(folder, lenses)


def portrait_and_landscape(folder: Path) -> DataParserConfig:
    tall, wide = Lens(w=18, h=30, cx=9, cy=15), Lens(w=30, h=18, cx=15, cy=9)
    return nerfstudio(folder, [tall, wide] * (VIEWS // 2))


def turned_on_its_side(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=100)


def rotated_by_exif(folder: Path) -> DataParserConfig:
    return nerfstudio(folder, Lens(w=18, h=30, cx=9, cy=15), "images/{}.jpg", turned_on_its_side)


def with_an_exif_orientation_that_its_cameras_ignore(folder: Path) -> DataParserConfig:
    def save(image: Image.Image, path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, exif=exif, quality=100, subsampling=0)

    return nerfstudio(folder, Lens(w=18, h=30, cx=9, cy=15), "images/{}.jpg", save)


def of_16_bits_and_gray(folder: Path) -> DataParserConfig:
    def save(image: Image.Image, path: Path) -> None:
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)

    return nerfstudio(folder, save=save)


def of_16_bits_a_channel(folder: Path) -> DataParserConfig:
    def save(image: Image.Image, path: Path) -> None:
        import cv2

        cv2.imwrite(str(path), np.asarray(image)[..., ::-1].astype(np.uint16) * 257)

    return nerfstudio(folder, save=save)


def of_exr(folder: Path) -> DataParserConfig:
    return nerfstudio(
        folder,
        name="images/{}.exr",
        save=lambda image, path: path.write_bytes(b"\x76\x2f\x31\x01" + bytes(500)) and None,
    )


def of_cmyk(folder: Path) -> DataParserConfig:
    return nerfstudio(folder, name="images/{}.jpg", save=lambda image, path: image.convert("CMYK").save(path))


def of_a_palette(folder: Path) -> DataParserConfig:
    return nerfstudio(folder, save=lambda image, path: image.convert("P").save(path))


def with_windows_line_ends(folder: Path) -> DataParserConfig:
    config = nerfstudio(folder)
    text = json.dumps(json.loads((folder / "transforms.json").read_text()), indent=1)
    (folder / "transforms.json").write_bytes(text.replace("\n", "\r\n").encode())
    return config


def with_windows_paths(folder: Path) -> DataParserConfig:
    return nerfstudio(folder, written_name="images\\{:03d}.png")


def scaled(scale: float) -> Make:
    def make(folder: Path) -> DataParserConfig:
        config = nerfstudio(folder)
        meta = json.loads((folder / "transforms.json").read_text())
        for frame in meta["frames"]:
            for row in frame["transform_matrix"][:3]:
                row[3] *= scale
        (folder / "transforms.json").write_text(json.dumps(meta))
        return config

    return make


def of_one_camera(folder: Path) -> DataParserConfig:
    return nerfstudio(folder, poses=POSES[:1])


def of_cameras_in_one_place(folder: Path) -> DataParserConfig:
    turned = []
    for pose in POSES:
        pose = pose.copy()
        pose[:3, 3] = [2.0, 0.0, 0.0]
        turned.append(pose)
    return nerfstudio(folder, poses=turned)


def of_two_cameras_in_one_place_of_many(folder: Path) -> DataParserConfig:
    return nerfstudio(folder, poses=[*POSES, POSES[0]])


def of_polycam(folder: Path) -> DataParserConfig:
    """As `ns-process-data polycam` converts it."""
    from nerfstudio.process_data.polycam_utils import polycam_to_json

    (folder / "cameras").mkdir(parents=True)
    (folder / "images").mkdir()
    files = []
    for index, pose in enumerate(POSES):
        lens = Lens(fl_x=24 + 0.1 * index)
        files.append(folder / f"images/frame_{index + 1:05d}.png")
        picture(pose, lens).save(files[-1])
        # Polycam's world has y up.
        rows = {f"t_{to}{column}": pose[row, column] for to, row in ((2, 0), (0, 1), (1, 2)) for column in range(4)}
        sizes = {"fx": lens.fl_x, "fy": lens.fl_y, "cx": lens.cx, "cy": lens.cy, "width": lens.w, "height": lens.h}
        (folder / f"cameras/{files[-1].stem}.json").write_text(json.dumps({**rows, **sizes}))
    polycam_to_json(files, [], None, folder / "cameras", folder)
    return NerfstudioDataParserConfig(data=folder, eval_mode="all")


def of_record3d(folder: Path) -> DataParserConfig:
    """As `ns-process-data record3d` converts it."""
    from nerfstudio.process_data.record3d_utils import record3d_to_json

    (folder / "images").mkdir(parents=True)
    names = []
    for index, pose in enumerate(POSES):
        names.append(Path(f"images/frame_{index + 1:05d}.png"))
        picture(pose, Lens()).save(folder / names[-1])
    poses = [[*Rotation.from_matrix(pose[:3, :3]).as_quat(), *pose[:3, 3]] for pose in POSES]
    intrinsics = np.array([[24.0, 0, 12], [0, 24, 12], [0, 0, 1]]).T.flatten().tolist()
    (folder / "metadata.json").write_text(json.dumps({"poses": poses, "K": intrinsics, "w": 24, "h": 24}))
    record3d_to_json(names, folder / "metadata.json", folder, np.arange(VIEWS))
    return NerfstudioDataParserConfig(data=folder, eval_mode="all")


def of_scannet(folder: Path) -> DataParserConfig:
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir(parents=True)
    for index, pose in enumerate(POSES):
        picture(pose, Lens()).save(folder / f"color/{index}.jpg", quality=100, subsampling=0)
        Image.new("I;16", (24, 24), 1000).save(folder / f"depth/{index}.png")
        np.savetxt(folder / f"pose/{index}.txt", pose @ np.diag([1, -1, -1, 1]))
    np.savetxt(folder / "intrinsic/intrinsic_color.txt", [[24, 0, 12, 0], [0, 24, 12, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    # Without a .ply, as many are: a splat's points are for its own training.
    return ScanNetDataParserConfig(data=folder, train_split_fraction=1.0)


def of_instant_ngp(folder: Path) -> DataParserConfig:
    fields = {"camera_angle_x": 2 * np.arctan(0.5), "aabb_scale": 4, "k1": 0.0, "k2": 0.0, "p1": 0.0, "p2": 0.0}
    nerfstudio(folder, written_name="images/{:03d}", **fields)
    return InstantNGPDataParserConfig(data=folder, eval_mode="all")


def of_colmap(folder: Path, **options: Any) -> DataParserConfig:
    (folder / "images").mkdir(parents=True)
    (folder / "sparse/0").mkdir(parents=True)
    lines = []
    for index, pose in enumerate(POSES):
        picture(pose, Lens()).save(folder / f"images/{index}.png")
        to_camera = np.linalg.inv(pose @ np.diag([1, -1, -1, 1]))
        x, y, z, w = Rotation.from_matrix(to_camera[:3, :3]).as_quat()
        numbers = " ".join(map(repr, map(float, [w, x, y, z, *to_camera[:3, 3]])))
        lines += [f"{index + 1} {numbers} 1 {index}.png", "0.5 0.5 -1"]
    (folder / "sparse/0/cameras.txt").write_text("1 PINHOLE 24 24 24 24 12 12\n")
    (folder / "sparse/0/images.txt").write_text("\n".join(lines) + "\n")
    (folder / "sparse/0/points3D.txt").write_text("")
    return ColmapDataParserConfig(data=folder, colmap_path=Path("sparse/0"), eval_mode="all", **options)


def of_colmap_without(factor: int) -> Make:
    return lambda folder: of_colmap(folder, downscale_factor=factor)


def of_nerfstudio_without_images_4(folder: Path) -> DataParserConfig:
    config = nerfstudio(folder)
    config.downscale_factor = 4
    return config


GOOD: dict[str, tuple[Make, float]] = {
    "per-frame intrinsics": (per_frame_intrinsics, 45),
    "portrait and landscape": (portrait_and_landscape, 45),
    "EXIF orientation that the cameras ignore": (with_an_exif_orientation_that_its_cameras_ignore, 30),
    "16 bits a channel": (of_16_bits_a_channel, 45),
    "Windows line ends": (with_windows_line_ends, 45),
    "two cameras in one place": (of_two_cameras_in_one_place_of_many, 45),
    "Polycam": (of_polycam, 45),
    "Record3D": (of_record3d, 45),
    "ScanNet": (of_scannet, 30),
    "instant-ngp": (of_instant_ngp, 45),
    "COLMAP": (of_colmap, 45),
}
"""And the least PSNR in dB of photos against the scene along their rays; JPEG has less."""
TINY_OR_HUGE = {"scale 1e-3": scaled(1e-3), "scale 1e4": scaled(1e4)}
BAD: dict[str, tuple[Make, str]] = {
    "rotated by EXIF": (rotated_by_exif, r"0.jpg has 30x18 pixels, and its camera 18x30: .*on its side.*-auto-orient"),
    "16 bits, gray": (of_16_bits_and_gray, r"000.png is an image of an unusual kind \(mode I;16\).*8-bit RGB"),
    "EXR": (of_exr, r"cannot identify image file .*0.exr'.*such as EXR; convert the photos to 8-bit"),
    "CMYK": (of_cmyk, r"0.jpg is an image of an unusual kind \(CMYK\).*8-bit RGB"),
    "palette": (of_a_palette, r"000.png is an image of an unusual kind \(a palette\).*8-bit RGB"),
    "Windows paths": (with_windows_paths, r"000.png' \(its paths were written on Windows: replace \\ by /"),
    "one camera": (of_one_camera, r"cameras? .*in one place"),
    "cameras in one place": (of_cameras_in_one_place, r"all in one place"),
    "COLMAP without images_2": (of_colmap_without(2), r"1/2 of their size are missing: .*images_2 does not exist"),
    "COLMAP without images_4": (of_colmap_without(4), r"1/4 of their size are missing: .*images_4 does not exist"),
    "COLMAP without images_8": (of_colmap_without(8), r"1/8 of their size are missing: .*images_8 does not exist"),
    "no images_4": (of_nerfstudio_without_images_4, r"images_4/000.png"),
}


def read(config: DataParserConfig) -> tuple[InputDataset, Photos]:
    """The photos of a capture as a student learns from them."""
    outputs = parse_capture(without_points(config))
    dataset = InputDataset(outputs)
    return dataset, Photos(dataset, list(range(len(dataset))), None, WHITE, "cpu")


@pytest.mark.parametrize("kind", GOOD)
def test_unusual_captures_are_read_correctly(kind: str, tmp_path: Path) -> None:
    make, least = GOOD[kind]
    dataset, photos = read(make(tmp_path / "capture"))
    assert len(photos) == len(dataset) >= VIEWS
    rays = photos.rays(torch.arange(len(photos.pixels)))
    # Where the capture's cameras are in its own world, from all of them; the frame is the dataparser's choice.
    order = [int(Path(file).stem.rpartition("_")[2]) for file in dataset.image_filenames]
    order = [index - min(order) for index in order]
    truth = torch.from_numpy(np.stack([*POSES, POSES[0]]))[order, :3].float()
    mine = dataset.cameras.camera_to_worlds
    turn = truth[0, :, :3] @ mine[0, :, :3].T
    here, there = mine[:, :, 3], truth[:, :, 3]
    scale = (there - there.mean(0)).norm() / (here - here.mean(0)).norm()
    origins = scale * (rays.origins - here.mean(0)) @ turn.T + there.mean(0)
    seen = colors(origins.numpy(), (rays.directions @ turn.T).numpy())
    assert psnr(rays.rgb, torch.from_numpy(seen).float()) > least


@pytest.mark.parametrize(
    "kind", ["per-frame intrinsics", "portrait and landscape", "two cameras in one place", *TINY_OR_HUGE]
)
def test_teacher_views_can_be_rendered_around_it(kind: str, tmp_path: Path) -> None:
    make = TINY_OR_HUGE[kind] if kind in TINY_OR_HUGE else GOOD[kind][0]
    dataset, _ = read(make(tmp_path / "capture"))
    teacher = SceneTeacher()
    survey = Survey.take(teacher, dataset.cameras)
    sampler = PoseSampler(capture_cameras(dataset.cameras))
    height, width = sampler.cameras.height, sampler.cameras.width
    view = ViewRenderer(teacher, sampler, survey, height, width, 0).render(0)
    assert (view.pixels[..., 4] == 1).all() and view.camera_to_world.isfinite().all()
    bounds = survey.bounds(sampler.cameras)
    assert np.isfinite([*bounds.center, bounds.radius, bounds.near, bounds.far]).all()


@pytest.mark.parametrize("kind", BAD)
def test_unusable_captures_are_refused_in_one_paragraph(kind: str, tmp_path: Path) -> None:
    make, said = BAD[kind]
    with pytest.raises((CaptureError, InputError), match=said) as caught:
        read(make(tmp_path / "capture"))
    assert "\n" not in str(caught.value)
