"""Networks in operators that phone processors support: their runtimes have neither GELU nor transposed convolutions."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

GATE = (1.6003134195342565, 0.06940211705496628)
"""x * sigmoid(x * (a + b x^2)) is GELU to 2.7e-4 (a minimax fit on [0, 9]; with the usual tanh: 4.7e-4)."""


class SigmoidGelu(nn.Module):
    """GELU, approximated with one sigmoid."""

    def forward(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        a, b = GATE
        return x * torch.sigmoid(x * (a + b * (x * x)))


class SubpixelConv(nn.Module):
    """A transposed convolution of stride 2 (kernel 4, padding 1) or 3 (kernel 3), as a convolution and pixels from channels.

    Results and multiplications are equal. An output pixel of stride 2 reads two inputs along each side: the convolution
    computes the blocks between input pixels, one row and column more than there are, and half a block is cropped at
    each edge.

    Args:
        layer: layer to replace.
    """

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        super().__init__()
        stride, channels = layer.stride[0], layer.out_channels
        taps = layer.kernel_size[0] // stride
        self.stride, self.edge = stride, int(layer.padding[0])
        made = nn.Conv2d(layer.in_channels, channels * stride**2, taps, padding=taps - 1)
        made.to(layer.weight)
        # [in, out, tap, row, tap, column]: the first tap belongs to the nearer input, which is the later one.
        weight = layer.weight.detach().unflatten(3, (taps, stride)).unflatten(2, (taps, stride)).flip(2, 4)
        weight = weight.permute(1, 3, 5, 0, 2, 4).reshape(channels * stride**2, layer.in_channels, taps, taps)
        made.weight.data.copy_(weight)
        bias = layer.get_parameter("bias").detach()
        made.get_parameter("bias").data.copy_(bias.repeat_interleave(stride**2))
        self.conv = made.requires_grad_(False)

    def forward(self, x: Float[Tensor, "batch in_dim rows columns"]) -> Float[Tensor, "batch out_dim height width"]:
        pixels = pixel_shuffle(self.conv(x), self.stride)
        if not self.edge:
            return pixels
        return pixels[..., self.edge : -self.edge, self.edge : -self.edge]


def to_plain_operators(network: nn.Module) -> None:
    """Replace GELU and transposed convolutions, in place.

    Args:
        network: a copy of either student's network that is not being trained.
    """
    for name, child in network.named_children():
        if isinstance(child, nn.ConvTranspose2d):
            network.register_module(name, SubpixelConv(child))
        elif isinstance(child, nn.GELU):
            network.register_module(name, SigmoidGelu())
        else:
            to_plain_operators(child)
