"""How far an engine's values are from the network's own in fp32."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from r2l_nerfstudio.engines.protocol import Engine
from r2l_nerfstudio.students.mobile import MobileR2L

PROBE_ROWS = 1000
PROBE_CELLS = (19, 27)
"""Neither fits what an engine compiles for: padding is probed too."""


def psnr(values: Float[Tensor, "*any"], truth: Float[Tensor, "*any"]) -> float:
    """PSNR in dB for a peak of 1; minus infinity where a value is not finite, infinity for equal ones."""
    if values.shape != truth.shape or not bool(values.isfinite().all()):
        return -math.inf
    error = float((values.double() - truth.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


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
    shape = (1, in_dim(network), *PROBE_CELLS) if isinstance(network, MobileR2L) else (PROBE_ROWS, in_dim(network))
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(device)


def in_dim(network: nn.Module) -> int:
    """Length of the code that a student's network reads."""
    return network.in_dim
