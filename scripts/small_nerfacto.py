"""A nerfacto small enough to train on two CPU cores in minutes: the teacher of the benchmarks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import torch
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.models.nerfacto import NerfactoModelConfig

from r2l_nerfstudio.scene.capture import RADIUS

OBJECT_RADIUS = 1.02 / RADIUS
"""Radius of a procedural scene's object in the unit of `procedural_dataparser`."""
PROCEDURAL_RANGE = (1 - OBJECT_RADIUS, 1 + OBJECT_RADIUS)
"""Nearest and farthest distance of the object in that unit."""


def procedural_dataparser(capture: Path) -> NerfstudioDataParserConfig:
    """Return how a procedural capture is read: all cameras are on the unit sphere of its frame, the object in the middle
    third.

    Args:
        capture: its folder or `transforms.json`, as `r2l_nerfstudio.scene.write_capture` writes it.
    """
    return NerfstudioDataParserConfig(
        data=capture,
        orientation_method="none",
        center_method="none",
        auto_scale_poses=False,
        scale_factor=1 / RADIUS,
        scene_scale=OBJECT_RADIUS,
    )


def small_nerfacto(
    dataparser: DataParserConfig,
    output_dir: Path,
    iterations: int,
    object_range: tuple[float, float] | None = None,
    camera_res_scale_factor: float = 1.0,
    optimize_cameras: bool = False,
) -> TrainerConfig:
    """Return the configuration of Nerfstudio's nerfacto with smaller grids, fewer samples and its PyTorch
    implementation.

    Args:
        dataparser: the capture; its `data` is set.
        output_dir: folder of all runs.
        iterations: number of iterations, of 1024 rays each.
        object_range: nearest and farthest distance of an object before white, in the dataparser's unit; None for a
            capture with surroundings, which nerfacto contracts.
        camera_res_scale_factor: resolution of the photos, as a share of the original.
        optimize_cameras: correct the training poses, as nerfacto does by default.

    Returns:
        A configuration for `nerfstudio.scripts.train.main`.
    """
    from nerfstudio.configs.method_configs import method_configs

    config = cast(TrainerConfig, copy.deepcopy(method_configs["nerfacto"]))
    config.output_dir = output_dir
    config.max_num_iterations = iterations
    config.steps_per_save = 500
    config.steps_per_eval_batch = config.steps_per_eval_image = config.steps_per_eval_all_images = 0
    config.vis = "tensorboard"
    config.viewer.quit_on_train_completion = True
    if not torch.cuda.is_available():
        config.machine.device_type = "cpu"
        config.mixed_precision = False
    config.pipeline.datamanager = VanillaDataManagerConfig(
        data=dataparser.data,
        dataparser=dataparser,
        train_num_rays_per_batch=1024,
        eval_num_rays_per_batch=1024,
        camera_res_scale_factor=camera_res_scale_factor,
    )
    model = cast(NerfactoModelConfig, config.pipeline.model)
    model.implementation = "torch"
    model.hidden_dim = model.hidden_dim_color = 32
    model.features_per_level = 4
    model.use_appearance_embedding = False
    model.average_init_density = 1.0
    model.camera_optimizer = CameraOptimizerConfig(mode="SO3xR3" if optimize_cameras else "off")
    if object_range is None:
        model.num_levels, model.log2_hashmap_size, model.base_res, model.max_res = 7, 16, 16, 512
        model.num_proposal_samples_per_ray, model.num_nerf_samples_per_ray = (64, 32), 24
        model.num_proposal_iterations = 2
        model.proposal_net_args_list = [
            {"hidden_dim": 16, "log2_hashmap_size": 14, "num_levels": 4, "max_res": resolution, "use_linear": False}
            for resolution in (64, 128)
        ]
    else:
        model.num_levels, model.log2_hashmap_size, model.base_res, model.max_res = 6, 16, 16, 256
        model.num_proposal_samples_per_ray, model.num_nerf_samples_per_ray = (64,), 24
        model.num_proposal_iterations = 1
        model.proposal_net_args_list = [
            {"hidden_dim": 16, "log2_hashmap_size": 14, "num_levels": 4, "max_res": 96, "use_linear": False}
        ]
        model.near_plane, model.far_plane = object_range
        model.proposal_initial_sampler = "uniform"
        model.disable_scene_contraction = True
        model.background_color = "white"
    for group in ("proposal_networks", "fields"):
        config.optimizers[group]["optimizer"].lr = 1e-2
        config.optimizers[group]["scheduler"].lr_final = 5e-4
        config.optimizers[group]["scheduler"].max_steps = iterations
    if optimize_cameras:
        config.optimizers["camera_opt"]["scheduler"].max_steps = iterations
    else:
        config.optimizers.pop("camera_opt", None)
    return config
