"""Small captures and briefly trained teachers for tests."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from r2l_nerfstudio.lpips import without_lpips

if TYPE_CHECKING:
    from nerfstudio.engine.trainer import Trainer, TrainerConfig

_NERFACTO = {
    "pipeline.model.implementation": "torch",
    "pipeline.model.num_levels": 4,
    "pipeline.model.max_res": 64,
    "pipeline.model.log2_hashmap_size": 10,
    "pipeline.model.hidden_dim": 16,
    "pipeline.model.hidden_dim_color": 16,
    "pipeline.model.appearance_embed_dim": 4,
    "pipeline.model.num_proposal_samples_per_ray": (24, 16),
    "pipeline.model.num_nerf_samples_per_ray": 12,
    "pipeline.model.proposal_net_args_list": [
        {"hidden_dim": 16, "log2_hashmap_size": 10, "num_levels": 3, "max_res": 32, "use_linear": False}
    ],
    # Its value at evaluation is not saved, so a trained model and the same one loaded would differ.
    "pipeline.model.use_proposal_weight_anneal": False,
}
_NERF = {"pipeline.model.num_coarse_samples": 8, "pipeline.model.num_importance_samples": 8}
_TENSORF = {
    "pipeline.model.init_resolution": 8,
    "pipeline.model.final_resolution": 16,
    "pipeline.model.upsampling_iters": (2, 4),
    "pipeline.model.num_den_components": 4,
    "pipeline.model.num_color_components": 4,
    "pipeline.model.num_uniform_samples": 16,
    "pipeline.model.num_samples": 8,
}
TINY = {"nerfacto": _NERFACTO, "vanilla-nerf": _NERF, "mipnerf": _NERF, "tensorf": _TENSORF}
"""What makes a method small enough for a test, as dotted names in its configuration."""


def write_capture(folder: Path, views: int = 8, size: int = 24, distance: float = 2.0) -> Path:
    """Write a capture in Nerfstudio's format: views from a ring around a colored ball in a colored room.

    Every 4th view (0, 4, …) is for evaluation, as `train_teacher` reads it.

    Args:
        folder: where to write `transforms.json` and `images/`; created.
        views: number of views.
        size: width and height in pixels.
        distance: radius of the ring in units of the ball's radius.

    Returns:
        `folder`.
    """
    (folder / "images").mkdir(parents=True)
    frames = []
    for index, pose in enumerate(_ring(views, distance)):
        name = f"images/{index:03d}.png"
        _render(pose, size)[0].save(folder / name)
        frames.append({"file_path": name, "transform_matrix": pose.tolist()})
    camera = {"w": size, "h": size, "fl_x": float(size), "fl_y": float(size), "cx": size / 2, "cy": size / 2}
    (folder / "transforms.json").write_text(json.dumps({**camera, "frames": frames}))
    return folder


def write_blender_capture(folder: Path, views: int = 6, size: int = 24) -> Path:
    """Write a capture in the format of NeRF Synthetic: the ball alone, RGBA, seen from distance 4.

    Args:
        folder: where to write `transforms_{train,val,test}.json` and the images; created.
        views: number of training views; the other splits repeat the first.
        size: width and height in pixels.

    Returns:
        `folder`.
    """
    frames = []
    (folder / "train").mkdir(parents=True)
    for index, pose in enumerate(_ring(views, 4.0)):
        color, opacity = _render(pose, size)
        color.putalpha(opacity)
        color.save(folder / f"train/r_{index}.png")
        frames.append({"file_path": f"./train/r_{index}", "transform_matrix": pose.tolist()})
    for split in ("train", "val", "test"):
        meta = {"camera_angle_x": 2 * np.arctan(0.5), "frames": frames if split == "train" else frames[:1]}
        (folder / f"transforms_{split}.json").write_text(json.dumps(meta))
    return folder


def teacher_config(method: str, data: Path, output: Path, iterations: int, **overrides: Any) -> TrainerConfig:
    """The configuration that `train_teacher` trains."""
    from nerfstudio.configs.method_configs import all_methods
    from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
    from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

    config = copy.deepcopy(all_methods[method])
    if (data / "transforms.json").exists():
        dataparser = NerfstudioDataParserConfig(eval_mode="interval", eval_interval=4)
    else:
        dataparser = BlenderDataParserConfig()
    # One process: nerfacto's own data manager starts others.
    config.pipeline.datamanager = VanillaDataManagerConfig(
        data=data, dataparser=dataparser, train_num_rays_per_batch=128, eval_num_rays_per_batch=128
    )
    common = {
        "output_dir": output,
        "experiment_name": "tiny",
        "timestamp": "run",
        "max_num_iterations": iterations,
        "steps_per_eval_batch": 10**9,
        "steps_per_eval_image": 10**9,
        "steps_per_eval_all_images": 10**9,
        "machine.device_type": "cpu",
        "mixed_precision": False,
        "vis": "tensorboard",
        "logging.local_writer.enable": False,
        "logging.profiler": "none",
    }
    for name, value in {**common, **TINY.get(method, {}), **overrides}.items():
        *parents, field = name.split(".")
        holder = config
        for parent in parents:
            holder = getattr(holder, parent)
        if not hasattr(holder, field):
            raise AttributeError(f"a configuration of {method} has no {name}")
        setattr(holder, field, value)
    return config


def train(config: TrainerConfig) -> Trainer:
    """Train in this process as `ns-train` does, and leave a run in the configured folder."""
    from nerfstudio.utils import writer

    torch.manual_seed(0)
    np.random.seed(0)
    config.save_config()
    try:
        with without_lpips():
            trainer = config.setup(local_rank=0, world_size=1)
            trainer.setup()
        trainer.train()
    finally:
        # Nerfstudio's writers are global, and would log the next training into this run too.
        writer.EVENT_WRITERS.clear()
        writer.EVENT_STORAGE.clear()
        writer.GLOBAL_BUFFER.clear()
    return trainer


def train_teacher(method: str, data: Path, output: Path, iterations: int, **overrides: Any) -> Path:
    """Train a tiny model of a stock method.

    Args:
        method: name of a method in `TINY`.
        data: capture in Nerfstudio's (`write_capture`) or Blender's (`write_blender_capture`) format.
        output: where runs go; the run's folder is `output/tiny/METHOD/run`.
        iterations: training iterations of 128 rays.
        **overrides: configuration by dotted name, as in `**{"pipeline.model.background_color": "random"}`.

    Returns:
        The run's config.yml.
    """
    config = teacher_config(method, data, output, iterations, **overrides)
    train(config)
    return config.get_base_dir() / "config.yml"


def _ring(views: int, distance: float) -> list[np.ndarray]:
    """Camera-to-world matrices [4, 4] (x right, y up, z back) around the origin, all looking at it."""
    poses = []
    for azimuth in np.arange(views) * (2 * np.pi / views):
        back = np.array([np.cos(azimuth), np.sin(azimuth), 0.4 + 0.2 * np.cos(3 * azimuth)])
        back /= np.linalg.norm(back)
        right = np.cross([0.0, 0.0, 1.0], back)
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3] = np.stack([right, np.cross(back, right), back, distance * back], axis=1)
        poses.append(pose)
    return poses


def _render(pose: np.ndarray, size: int) -> tuple[Image.Image, Image.Image]:
    """A ball of radius 0.7 at the origin, colored by position, before a room colored by direction; focal = size."""
    x, y = np.meshgrid((np.arange(size) + 0.5) / size - 0.5, 0.5 - (np.arange(size) + 0.5) / size)
    rays = np.stack([x, y, -np.ones_like(x)], axis=-1) @ pose[:3, :3].T
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    origin = pose[:3, 3]
    middle = rays @ origin
    inside = middle**2 - origin @ origin + 0.7**2
    hit = inside > 0
    points = origin + rays * (-middle - np.sqrt(np.maximum(inside, 0)))[..., None]
    color = np.where(hit[..., None], 0.5 + 0.5 * points / 0.7, 0.4 + 0.3 * rays)
    return Image.fromarray((255 * color).astype(np.uint8)), Image.fromarray((255 * hit).astype(np.uint8))
