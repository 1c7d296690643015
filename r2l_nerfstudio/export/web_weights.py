"""A student's weights as the web page's own renderer reads them: one safetensors file, in fp16 or int8."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.models.light_field import LightFieldModel
from r2l_nerfstudio.rays.occupancy import packed
from r2l_nerfstudio.students.mobile import ConvBlock, MobileR2L, PixelBlock
from r2l_nerfstudio.students.resmlp import ResidualBlock, ResMLP

WebPrecision = Literal["fp16", "int8"]

LEVELS = 127
"""Steps of an int8 weight on each side of zero."""
FEATURE_LEVELS = 255
"""Steps of an 8-bit feature, from its channel's smallest value to its largest."""


def require_safetensors() -> None:
    """Fail early.

    Raises:
        InputError: the package is missing.
    """
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"The web page needs the package safetensors ({error}): pip install 'r2l-nerfstudio[export]'."
        ) from error


class WebWeights:
    """A copy of what a student learned, BatchNorm folded, rounded as the page's file stores it.

    Args:
        model: the student's, on the CPU.
        precision: of the network's matrices and of the features.
    """

    def __init__(self, model: LightFieldModel, precision: WebPrecision) -> None:
        self.precision = precision
        self.network = folded(model.network)
        for layer in self.network.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
                layer.weight.data = _rounded_weight(layer.weight.data, axis, precision)
                if layer.bias is not None:
                    layer.bias.data = layer.bias.data.float()
        self._model = model
        self.features = _features(model)
        """Rows [points, values] of the sparse volume, density last, or the dense one [z, y, x, channels]."""
        if self.features is not None:
            self.features = _rounded_features(self.features, precision)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within it, the student renders with these weights."""
        model = self._model
        parameter = _feature_parameter(model)
        if parameter is None or self.features is None:
            with model.network_run_by(self._run):
                yield
            return
        former = parameter.data
        parameter.data = _as_stored(self.features, model)
        try:
            with model.network_run_by(self._run):
                yield
        finally:
            parameter.data = former

    def _run(self, encoded: Tensor) -> Tensor:
        # A method: a module that is set as an attribute of a module becomes a part of it.
        return self.network(encoded)

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds.

        Matrices are [inputs, outputs]; those of a transposed convolution [phases, inputs of all taps, outputs], one for each
        pixel that a pixel becomes. int8 tensors have a `.scale`, 8-bit features a `.offset` besides.
        """
        found: dict[str, Tensor] = {}
        for name, layer in _layers(self.network):
            weight = _matrix(layer)
            if self.precision == "int8":
                found |= _int8(name, weight)
            else:
                found[f"{name}.weight"] = weight.half()
            assert layer.bias is not None
            found[f"{name}.bias"] = layer.bias.data
        if self.features is not None:
            if self.precision == "int8":
                found |= _uint8("features", self.features)
            else:
                found["features"] = self.features.half()
        if self._model.composited is not None:
            found["occupancy"] = packed(self._model.composited.occupancy.cells)
        return {name: tensor.detach().contiguous() for name, tensor in found.items()}

    def write(self, path: Path) -> None:
        """Write the file."""
        from safetensors.torch import save_file

        save_file(self.tensors(), str(path))

    def describe(self) -> dict[str, Any]:
        """The network's shape, as the page reads it."""
        network = self.network
        if isinstance(network, ResMLP):
            kind, ups, join, join_blocks = "r2l", [], 0, 0
        else:
            assert isinstance(network, MobileR2L)
            kind = "mobile-r2l"
            ups = [{"channels": up.out_channels, "step": up.stride[0]} for up in _ups(network)]
            join = network.join.out_channels if network.joined else 0
            join_blocks = len(network.join_blocks) if network.joined else 0
        return {
            "kind": kind,
            "width": _width(network),
            "blocks": len(network.blocks),
            "ups": ups,
            "join": join,
            "joinBlocks": join_blocks,
        }


def folded(network: nn.Module) -> ResMLP | MobileR2L:
    """A copy in evaluation mode without BatchNorm: each is part of the convolution before it."""
    made = copy.deepcopy(network).float().eval().requires_grad_(False)
    for block in made.modules():
        if isinstance(block, ConvBlock):
            for conv, name in ((block.first, "first_norm"), (block.second, "second_norm")):
                norm = getattr(block, name)
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                )
                setattr(block, name, nn.Identity())
    assert isinstance(made, ResMLP | MobileR2L)
    return made


def _width(network: ResMLP | MobileR2L) -> int:
    return network.head.out_features if isinstance(network, ResMLP) else network.head.out_channels


def _ups(network: MobileR2L) -> list[nn.ConvTranspose2d]:
    return [layer for layer in network.up if isinstance(layer, nn.ConvTranspose2d)]


Layer = nn.Linear | nn.Conv2d | nn.ConvTranspose2d


def _layers(network: ResMLP | MobileR2L) -> Iterator[tuple[str, Layer]]:
    """Layers by the names of the page."""
    yield "head", network.head
    for number, block in enumerate(network.blocks):
        assert isinstance(block, ResidualBlock | ConvBlock)
        yield f"blocks.{number}.first", block.first
        yield f"blocks.{number}.second", block.second
    if isinstance(network, MobileR2L):
        up, block = -1, 0
        for layer in network.up:
            if isinstance(layer, nn.ConvTranspose2d):
                up, block = up + 1, 0
                yield f"ups.{up}", layer
            else:
                assert isinstance(layer, ConvBlock)
                yield f"ups.{up}.{block}.first", layer.first
                yield f"ups.{up}.{block}.second", layer.second
                block += 1
        if network.joined:
            yield "join", network.join
            for number, block in enumerate(network.join_blocks):
                assert isinstance(block, PixelBlock)
                yield f"joins.{number}.first", block.first
                yield f"joins.{number}.second", block.second
    yield "tail", network.tail


def _matrix(layer: Layer) -> Float[Tensor, "*phases inputs outputs"]:
    if isinstance(layer, nn.Linear):
        return layer.weight.T
    if isinstance(layer, nn.Conv2d):
        return layer.weight[:, :, 0, 0].T
    if layer.stride[0] == 3:
        # Every pixel becomes three by three, which share nothing.
        return layer.weight.permute(2, 3, 0, 1).flatten(0, 1)
    # Kernel 4, stride 2, padding 1: a phase has two taps along each axis, the pixel itself and the neighbor on its side.
    taps = ((1, 3), (2, 0))
    phases = [
        torch.cat([layer.weight[:, :, ky, kx] for ky in taps[down] for kx in taps[across]])
        for down in (0, 1)
        for across in (0, 1)
    ]
    return torch.stack(phases)


def _rounded_weight(weight: Tensor, axis: int, precision: WebPrecision) -> Tensor:
    if precision == "fp16":
        return weight.half().float()
    others = [a for a in range(weight.ndim) if a != axis]
    scale = weight.abs().amax(others, keepdim=True).clamp_min(1e-12) / LEVELS
    return (weight / scale).round() * scale


def _int8(name: str, weight: Float[Tensor, "*phases inputs outputs"]) -> dict[str, Tensor]:
    scale = weight.abs().flatten(0, -2).amax(0).clamp_min(1e-12) / LEVELS
    return {f"{name}.weight": (weight / scale).round().to(torch.int8), f"{name}.weight.scale": scale}


def _uint8(name: str, values: Float[Tensor, "*points channels"]) -> dict[str, Tensor]:
    low, scale = _range(values)
    return {
        name: ((values - low) / scale).round().to(torch.uint8),
        f"{name}.scale": scale,
        f"{name}.offset": low,
    }


def _range(values: Float[Tensor, "*points channels"]) -> tuple[Float[Tensor, "channels"], Float[Tensor, "channels"]]:
    flat = values.flatten(0, -2)
    low = flat.amin(0)
    return low, (flat.amax(0) - low).clamp_min(1e-12) / FEATURE_LEVELS


def _rounded_features(values: Float[Tensor, "*points channels"], precision: WebPrecision) -> Tensor:
    if precision == "fp16":
        return values.half().float()
    low, scale = _range(values)
    return ((values - low) / scale).round() * scale + low


def _feature_parameter(model: LightFieldModel) -> nn.Parameter | None:
    if model.composited is not None:
        return model.composited.volume.rows
    return None if model.volume is None else model.volume.grid


def _features(model: LightFieldModel) -> Float[Tensor, "*points channels"] | None:
    parameter = _feature_parameter(model)
    if parameter is None:
        return None
    if model.composited is not None:
        rows = parameter.data[: model.composited.volume.num_grid_points + 1].float()
        return torch.cat([rows[:, 1:], rows[:, :1]], dim=1)
    return parameter.data[0].permute(1, 2, 3, 0).float()


def _as_stored(features: Tensor, model: LightFieldModel) -> Tensor:
    """Inverse of `_features`."""
    if model.composited is not None:
        return torch.cat([features[:, -1:], features[:, :-1]], dim=1).contiguous()
    return features.permute(3, 0, 1, 2)[None].contiguous()


def encoding_description(model: LightFieldModel) -> dict[str, Any]:
    """How the student encodes rays, as the page reads it."""
    encoding = model.ray_encoding
    found: dict[str, Any] = {
        "spacing": encoding.spacing,
        "center": encoding.center.tolist(),
        "radius": float(encoding.radius),
        "near": float(encoding.near),
        "far": float(encoding.far),
    }
    if model.composited is not None:
        encoding = model.composited
        scene, settings = encoding.occupancy.scene, encoding.settings
        return found | {
            "kind": "composited",
            "warp": scene.warp,
            "low": scene.low.tolist(),
            "extent": scene.extent.tolist(),
            "origin": scene.origin.tolist(),
            "axes": scene.axes.tolist(),
            "occupancy": list(encoding.occupancy.resolution),
            "cells": list(encoding.volume.cells),
            "channels": settings.channels,
            "samples": settings.samples,
            "block": getattr(model, "block", 1),
            "pixelSamples": getattr(model.config, "pixel_samples", settings.samples),
            "probes": settings.probes,
            "pointOctaves": settings.point_octaves,
            "directionOctaves": settings.direction_octaves,
        }
    conventions = encoding.conventions
    volume = None
    if model.volume is not None:
        volume = {
            "resolution": model.volume.grid.shape[-1],
            "channels": model.volume.grid.shape[1],
            "points": model.config.volume_points,
            "extent": float(model.volume.extent),
        }
    return found | {
        "kind": encoding.kind,
        "axes": encoding.axes.tolist(),
        "contracted": encoding.is_contracted,
        "frame": None if conventions.frame is None else encoding.frame.tolist(),
        "rotation": None if conventions.frame is None else encoding.frame_rotation.tolist(),
        "ndc": None if conventions.ndc is None else list(conventions.ndc),
        "points": encoding.num_points,
        "octaves": encoding.num_frequencies,
        "volume": volume,
    }
