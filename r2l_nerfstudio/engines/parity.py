"""Agreement of an engine with its network in fp32."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from r2l_nerfstudio.engines.protocol import Engine
from r2l_nerfstudio.engines.sizes import in_dim, reads_ray_image, upsampling_factor
from r2l_nerfstudio.psnr import psnr

PROBE_ROWS = 1000
PROBE_CELLS = (19, 27)
"""Rows and columns of a random ray image. No engine compiles for a multiple of them, so padding is compared too."""


@torch.no_grad()
def parity(
    engine: Engine, network: nn.Module, device: torch.device, probe: Tensor | None = None, margin: int = 0
) -> float:
    """Return the PSNR in dB of an engine against its network.

    Args:
        engine: engine to compare.
        network: in fp32 and evaluation mode, with the weights that the engine was built from.
        device: device of both.
        probe: ray encodings to compare on, as the engine will read them; evenly distributed numbers of order one by default.
        margin: cells around ray images whose pixels are not drawn, and may be others: engines that add cells to reach a
            size they know change their neighbors.
    """
    encoded = random_encoding(network, device) if probe is None else probe
    values, truth = engine(encoded), network(encoded).float()
    if margin and reads_ray_image(network):
        edge = margin * upsampling_factor(network)
        values, truth = (image[..., edge:-edge, edge:-edge] for image in (values, truth))
    return psnr(values, truth)


def random_encoding(network: nn.Module, device: torch.device) -> Float[Tensor, "*encoded"]:
    """Return numbers in [-1, 1] in the shape of encoded rays, the same at every call."""
    shape = (1, in_dim(network), *PROBE_CELLS) if reads_ray_image(network) else (PROBE_ROWS, in_dim(network))
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).mul(2).sub(1).to(device)
