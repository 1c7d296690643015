"""How far an engine's values are from the network's own in fp32."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from r2l_nerfstudio.engines.protocol import Engine
from r2l_nerfstudio.engines.sizes import in_dim, reads_ray_image
from r2l_nerfstudio.psnr import psnr

PROBE_ROWS = 1000
PROBE_CELLS = (19, 27)
"""Neither fits what an engine compiles for: padding is probed too."""


@torch.no_grad()
def parity(engine: Engine, network: nn.Module, device: torch.device, probe: Tensor | None = None) -> float:
    """PSNR in dB of an engine against its network.

    Args:
        engine: to be judged.
        network: in fp32 and evaluation mode, with the weights that the engine was built from.
        device: of both.
        probe: codes to compare on, such as the engine will see; by default evenly distributed ones of order one.
    """
    code = random_code(network, device) if probe is None else probe
    return psnr(engine(code), network(code).float())


def random_code(network: nn.Module, device: torch.device) -> Float[Tensor, "*code"]:
    """Numbers in [-1, 1] in the shape of a code, the same ones each time."""
    shape = (1, in_dim(network), *PROBE_CELLS) if reads_ray_image(network) else (PROBE_ROWS, in_dim(network))
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).mul(2).sub(1).to(device)
