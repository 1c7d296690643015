"""Add numbers of your own to what R2L's network reads of a ray, as a new method of Nerfstudio.

    export PYTHONPATH=examples NERFSTUDIO_METHOD_CONFIGS=r2l-harmonics=custom_ray_encoding:method
    ns-train r2l-harmonics --teacher outputs/…/nerfacto/…
    ns-viewer --load-config outputs/…/r2l-harmonics/…/config.yml

Here they are spherical harmonics of the ray's direction, beside the encoded points. Viewer, `ns-render`, `ns-eval`, engines
and `load_student` work as for other students; `r2l-export` writes only the package's own ray encodings.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from nerfstudio.field_components.encodings import SHEncoding
from nerfstudio.plugins.types import MethodSpecification
from torch import Tensor

from r2l_nerfstudio.method_configs import r2l
from r2l_nerfstudio.models.composited_encoding import EncodedRays
from r2l_nerfstudio.models.r2l import R2LModel, R2LModelConfig
from r2l_nerfstudio.students.resmlp import ResMLP


@dataclass
class HarmonicsModelConfig(R2LModelConfig):
    """R2L with spherical harmonics of the direction."""

    _target: type = field(default_factory=lambda: HarmonicsModel)
    harmonic_levels: int = 4
    """Degrees of spherical harmonics, squared as many numbers per ray."""


class HarmonicsModel(R2LModel):
    """R2L whose network also reads spherical harmonics of the ray's direction."""

    config: HarmonicsModelConfig

    def build_network(self, in_dim: int) -> ResMLP:
        """Make room for the additional numbers in the first layer."""
        self.harmonics = SHEncoding(levels=self.config.harmonic_levels, implementation="torch")
        return super().build_network(in_dim + self.harmonics.get_out_dim())

    def encode_rays(
        self, origins: Float[Tensor, "*batch 3"], directions: Float[Tensor, "*batch 3"], jitter: bool = False
    ) -> EncodedRays:
        """Return what the network reads: the encoded points, then the harmonics."""
        encoded, geometry = super().encode_rays(origins, directions, jitter)
        return EncodedRays(torch.cat([encoded, self.harmonics(directions)], dim=-1), geometry)


config = copy.deepcopy(r2l.config)
config.method_name = "r2l-harmonics"
config.pipeline.model = HarmonicsModelConfig(ray_encoding="points", depth=64)
method = MethodSpecification(config=config, description="R2L with spherical harmonics of the ray's direction.")
