"""Run folders of untrained students, as `ns-train` writes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import yaml

from r2l_nerfstudio.models.light_field import LightFieldModel, LightFieldModelConfig
from r2l_nerfstudio.models.mobile_r2l import MobileR2LModelConfig
from r2l_nerfstudio.models.r2l import R2LModelConfig
from r2l_nerfstudio.rays.spacing import SceneBounds

STEP = 7


def tiny_r2l(**overrides: Any) -> R2LModelConfig:
    """With a feature volume."""
    return R2LModelConfig(
        **{"width": 16, "depth": 6, "num_points": 4, "num_frequencies": 4, "volume_resolution": 5, **overrides}
    )


def tiny_mobile_r2l(**overrides: Any) -> MobileR2LModelConfig:
    """4 pixels per cell."""
    sizes = {
        "width": 16,
        "blocks": 2,
        "up_width": 8,
        "last_width": 8,
        "upsampling_factor": 4,
        "num_points": 4,
        "num_frequencies": 4,
    }
    return MobileR2LModelConfig(**{**sizes, **overrides})


COMPOSITED = {"ray_encoding": "composited", "num_samples": 6, "num_probes": 16, "occupancy_cells": 8}


def tiny_composited_r2l(**overrides: Any) -> R2LModelConfig:
    """With features composited along rays."""
    return tiny_r2l(**{"volume_resolution": 0, **COMPOSITED, **overrides})


def tiny_composited_mobile_r2l(**overrides: Any) -> MobileR2LModelConfig:
    """Likewise, 4 pixels per cell."""
    return tiny_mobile_r2l(**{**COMPOSITED, "pixel_samples": 4, "join_width": 8, "join_blocks": 1, **overrides})


def write_run(
    folder: Path,
    model_config: LightFieldModelConfig,
    spacing: str = "sphere",
    has_accumulation: bool = True,
    has_depth: bool = True,
    focal: float = 50.0,
) -> Path:
    """Write a run of a student with random weights that does not paint everything gray.

    Args:
        folder: of the run, to be made.
        model_config: of the student.
        spacing: of the points along its rays.
        has_accumulation: whether its teacher had one.
        has_depth: likewise.
        focal: in pixels, of the views that a MobileR2L would have learned from.

    Returns:
        its config.yml.
    """
    from nerfstudio.configs.method_configs import all_methods

    is_mobile = isinstance(model_config, MobileR2LModelConfig)
    config = copy.deepcopy(all_methods["r2l-lite"])
    config.method_name = "mobile-r2l" if is_mobile else "r2l-lite"
    config.pipeline.model = model_config
    config.pipeline.datamanager.data = folder / "a capture that is gone"
    (folder / config.relative_model_dir).mkdir(parents=True)
    (folder / "config.yml").write_text(yaml.dump(config))
    model = model_config.setup(scene_box=None, num_train_data=1, metadata={}, device="cpu", grad_scaler=None)
    bounds = SceneBounds(spacing, center=(0.1, -0.1, 0.05), radius=0.8, near=1.0, far=3.0)
    axes = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3))).Q
    axes = axes * torch.linalg.det(axes)
    model.set_scene(bounds, axes, torch.tensor([1.0, 0.9, 0.8]), has_accumulation, has_depth, focal)
    if model.composited is not None:
        fill_occupancy(model)
    fill(model)
    state = {f"_model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"step": STEP, "pipeline": state}, folder / config.relative_model_dir / f"step-{STEP:09d}.ckpt")
    return folder / "config.yml"


@torch.no_grad()
def fill_occupancy(model: LightFieldModel) -> None:
    """A shell around the scene's center, with features that make it mostly opaque."""
    encoding = model.composited
    assert encoding is not None
    scene = encoding.occupancy.scene
    generator = torch.Generator().manual_seed(4)
    points = torch.nn.functional.normalize(torch.randn(3000, 3, generator=generator), dim=-1) * 0.7
    warp = "ball" if encoding.ray_encoding.spacing == "sphere" else "contracted"
    scene.fit(warp, points, torch.zeros(3), torch.eye(3))
    encoding.occupancy.clear(scene.resolution(scene.cell_of(model.config.occupancy_cells)))
    encoding.occupancy.mark((encoding.occupancy.counts(points) > 0).to(torch.uint8), dilation=0)
    encoding.lay_out(scene.resolution(scene.cell_of(2 * model.config.occupancy_cells)))
    rows = encoding.volume.rows
    rows[1:].normal_(0.0, 1.0, generator=generator)
    rows[1:, 0] += 2.0


@torch.no_grad()
def fill(model: LightFieldModel) -> None:
    """Weights and running statistics such that every layer counts."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.network.named_parameters():
        scale = 0.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2
        parameter.normal_(0.0, 3 * scale if name.startswith("tail") else scale, generator=generator)
    for part in model.network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.weight.add_(1.0)
            part.running_mean.normal_(0.0, 0.1, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
