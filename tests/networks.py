"""Small networks of both students' kinds, with weights as after training: nonzero, normalization included."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from r2l_nerfstudio.students.mobile import MobileR2L
from r2l_nerfstudio.students.resmlp import ResMLP

KINDS = ("r2l", "mobile-r2l")


def network(kind: str, seed: int = 0) -> nn.Module:
    """A student's network in evaluation mode; its values spread over (0, 1)."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(like: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(like.shape, generator=generator)

    if kind == "r2l":
        made: nn.Module = ResMLP(40, 5, width=32, depth=8, zero_init=False)
    else:
        made = MobileR2L(24, 5, width=16, blocks=2, factor=4, up_width=12, last_width=8, zero_init=False)
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(0.5 + numbers(module.weight, 0.2).abs())
                module.bias.copy_(numbers(module.bias, 0.2))
                module.running_mean.copy_(numbers(module.running_mean, 0.2))
                module.running_var.copy_(0.5 + numbers(module.running_var, 0.2).abs())
            elif isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                fan = module.weight[0].numel() if not isinstance(module, nn.ConvTranspose2d) else module.weight.shape[0]
                module.weight.copy_(numbers(module.weight, fan**-0.5))
                module.bias.copy_(numbers(module.bias, 0.1))
    return made.eval()


def encoded(kind: str, *sizes: int, seed: int = 1) -> Tensor:
    """Encoded rays for it: of `sizes[0]` rays, or of a ray image of sizes[0] rows and sizes[1] columns."""
    shape = (sizes[0], 40) if kind == "r2l" else (1, 24, *sizes)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
