"""The MobileR2L network: a residual body on a low-resolution ray image, then upsampling."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, pixel_shuffle

from r2l_nerfstudio.errors import InputError


class ConvBlock(nn.Module):
    """1x1 convolution, BatchNorm, GELU, 1x1 convolution, BatchNorm, plus the input (MobileR2L, fig. 3).

    Args:
        width: channels in and out.
        zero_init: start as the identity, so that depth costs nothing at the first steps.
    """

    def __init__(self, width: int, zero_init: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 1)
        self.first_norm = nn.BatchNorm2d(width)
        self.activation = nn.GELU()
        self.second = nn.Conv2d(width, width, 1)
        self.second_norm = nn.BatchNorm2d(width)
        if zero_init:
            nn.init.zeros_(self.second_norm.weight)

    def forward(self, x: Float[Tensor, "batch width height width_px"]) -> Float[Tensor, "batch width height width_px"]:
        hidden = self.activation(self.first_norm(self.first(x)))
        return x + self.second_norm(self.second(hidden))


class PixelBlock(nn.Module):
    """1x1 convolution, ReLU, 1x1 convolution, plus the input: R2L's residual block (R2L, fig. 3), for every pixel.

    It starts as the identity.

    Args:
        width: channels in and out.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 1)
        self.second = nn.Conv2d(width, width, 1)
        self.activation = nn.ReLU()
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.get_parameter("bias"))

    def forward(self, x: Float[Tensor, "batch width height width_px"]) -> Float[Tensor, "batch width height width_px"]:
        return x + self.second(self.activation(self.first(x)))


class MobileR2L(nn.Module):
    """MobileR2L's network: every cell of a ray image becomes `factor` x `factor` pixels.

    With in_dim 312, width 256, blocks 29, factor 8, out_dim 3 this is the published network: 4.306 M parameters, 101
        GFLOP for 100x100 cells (800x800 pixels). A pixel depends only on its own cell and the eight around it.

    Args:
        in_dim: channels of the encoded ray image.
        out_dim: outputs per pixel, each in (0, 1).
        width: channels of the body.
        blocks: residual blocks of the body.
        factor: upsampling factor, pixels per cell along each side: a power of two from 2 on, or three times one (a last
            step of 3).
        up_width: channels of all upsampling steps but the last.
        last_width: channels of its last step.
        zero_init: start every residual block as the identity.
        joined: numbers per pixel that join the last upsampling step, `factor`² times as many channels of the input
            after the cell's own; 0 is the published network.
        join_width: channels of the layer that joins them.
        join_blocks: residual blocks after it.

    Raises:
        InputError: for a factor that is not a product of steps of 2 and a last one of 2 or 3.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 3,
        width: int = 256,
        blocks: int = 29,
        factor: int = 8,
        up_width: int = 64,
        last_width: int = 16,
        zero_init: bool = True,
        joined: int = 0,
        join_width: int = 32,
        join_blocks: int = 0,
    ) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.factor = factor
        self.joined = joined
        self.head = nn.Conv2d(in_dim - joined * factor**2, width, 1)
        self.activation = nn.GELU()
        self.blocks = nn.Sequential(*[ConvBlock(width, zero_init) for _ in range(blocks)])
        up: list[nn.Module] = []
        steps = up_steps(factor)
        for number, step in enumerate(steps, start=1):
            channels = last_width if number == len(steps) else up_width
            kernel, padding = (4, 1) if step == 2 else (3, 0)
            up.append(nn.ConvTranspose2d(width, channels, kernel, stride=step, padding=padding))
            up += [ConvBlock(channels, zero_init) for _ in range(2)]
            width = channels
        self.up = nn.Sequential(*up)
        if joined:
            self.join = nn.Conv2d(width + joined, join_width, 1)
            self.join_blocks = nn.Sequential(*[PixelBlock(join_width) for _ in range(join_blocks)])
            width = join_width
        self.tail = nn.Conv2d(width, out_dim, 1)

    def forward(
        self, encoded: Float[Tensor, "batch in_dim rows columns"], margin: int = 0
    ) -> Float[Tensor, "batch out_dim height width"]:
        """Return `factor` times as many rows and columns of pixels as the ray image has cells inside its margin.

        Args:
            encoded: encoded ray image.
            margin: cells on every side that get no pixels, 0 or 1. Of what lies there only the neighbors that pixels
                depend on are computed: a crop of few cells has more margin than inside.
        """
        pixels = None
        if self.joined:
            encoded, pixels = encoded.split((self.head.in_channels, self.joined * self.factor**2), dim=1)
        hidden = self.activation(self.head(encoded))
        hidden = hidden + self.blocks(hidden)
        around, steps = margin, up_steps(self.factor)
        for layer in self.up:
            hidden = layer(hidden)
            if around and isinstance(layer, nn.ConvTranspose2d):
                # The next step of 2 reads one neighbor on every side, one of 3 none.
                wanted = int(steps[1:2] == [2])
                hidden = _inside(hidden, around * steps.pop(0) - wanted)
                around = wanted
        if pixels is not None:
            pixels = _inside(pixels, margin)
            hidden = torch.cat([hidden, pixel_shuffle(pixels, self.factor).to(hidden.dtype)], dim=1)
            hidden = self.join_blocks(self.activation(self.join(hidden)))
        return self.tail(hidden).sigmoid()

    @torch.no_grad()
    def silence_cells(self) -> None:
        """Make pixels depend on their own numbers only, as in `forward_pixels`, until training says otherwise; only with
        `joined`."""
        self.join.weight[:, : -self.joined] = 0

    def forward_pixels(self, joined: Float[Tensor, "pixels joined"]) -> Float[Tensor, "pixels out_dim"]:
        """Return what the network makes of the numbers of single pixels alone, whatever their cells show: the layers
        that join them, and the last one.

        Args:
            joined: features and accumulation of each pixel, as they follow a cell's own channels in `forward`.
        """
        # Matrix products: a CPU takes twice as long for convolutions of so few channels.
        weight = self.join.weight[:, -self.joined :, 0, 0]
        hidden = self.activation(linear(joined, weight, self.join.bias))
        for block in self.join_blocks:
            assert isinstance(block, PixelBlock)
            hidden = hidden + _dense(block.second, block.activation(_dense(block.first, hidden)))
        return _dense(self.tail, hidden).sigmoid()

    @property
    def flops_per_cell(self) -> int:
        """Floating-point operations per cell of the ray image, a multiply-add counted as two, without biases and
        norms."""
        flops, scale = 0, 1
        for layer in self.modules():
            if isinstance(layer, nn.ConvTranspose2d):
                flops += 2 * layer.weight.numel() * scale**2
                scale *= layer.stride[0]
            elif isinstance(layer, nn.Conv2d):
                flops += 2 * layer.weight.numel() * scale**2
        return flops


def _dense(layer: nn.Conv2d, x: Float[Tensor, "pixels in_dim"]) -> Float[Tensor, "pixels out_dim"]:
    """Apply a 1x1 convolution to single pixels."""
    return linear(x, layer.weight[:, :, 0, 0], layer.bias)


def _inside(
    image: Float[Tensor, "batch channels height width"], border: int
) -> Float[Tensor, "batch channels inner_height inner_width"]:
    """Return an image without its border."""
    return image[..., border:-border, border:-border] if border else image


def up_steps(factor: int) -> list[int]:
    """Return the upsampling steps of 2, and a last one of 2 or 3, whose product is the factor.

    Raises:
        InputError: if there are none.
    """
    steps = [3] if factor % 3 == 0 else []
    rest = factor // 3 if steps else factor
    if factor < 2 or rest & (rest - 1):
        raise InputError(
            f"--pipeline.model.upsampling-factor must be one of 2, 3, 4, 6, 8, 12, 16 (got {factor}): upsampling has"
            " steps of 2, and a last one of 2 or 3."
        )
    return [2] * (rest.bit_length() - 1) + steps
