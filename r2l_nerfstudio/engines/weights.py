"""A network's weights for engines: norms folded, in one precision, separate from the weights being trained."""

from __future__ import annotations

import copy
import hashlib

import torch
from jaxtyping import Float
from torch import Tensor, nn

from r2l_nerfstudio.engines.protocol import DTYPES, Precision
from r2l_nerfstudio.students.mobile import ConvBlock, MobileR2L


class FixedNetwork(nn.Module):
    """A copy of a student's network with every BatchNorm folded into its convolution, computing in one precision.

    fp32 in and out, shapes as the network's. Training is not affected.

    Args:
        network: in fp32.
        precision: precision of weights and arithmetic.
    """

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.dtype = DTYPES[precision]
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        for block in _blocks(self.network):
            for name in ("first_norm", "second_norm"):
                block.register_module(name, nn.Identity())
        self.network.to(self.dtype)
        if isinstance(network, MobileR2L):
            self.network.to(memory_format=torch.channels_last)
        self.follow(network)
        self.refresh()

    def follow(self, network: nn.Module) -> None:
        """Set the network whose weights `refresh` copies: one of the same shape."""
        # In tuples, since as an attribute the network would become a submodule.
        self._convolutions: list[tuple[nn.Conv2d, nn.Conv2d, nn.BatchNorm2d]] = []
        for mine, its in zip(_blocks(self.network), _blocks(network), strict=True):
            self._convolutions.append((mine.first, its.first, its.first_norm))
            self._convolutions.append((mine.second, its.second, its.second_norm))
        folded = {id(p) for mine, _, _ in self._convolutions for p in mine.parameters()}
        theirs = dict(network.named_parameters())
        self._others = [(p, theirs[name]) for name, p in self.network.named_parameters() if id(p) not in folded]

    def refresh(self) -> None:
        """Copy the current weights in place. After an interruption it may be called again.

        Weights are detached instead of using `no_grad`, which would stay active if the viewer interrupts inside it.
        """
        for mine, conv, norm in self._convolutions:
            mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
            scale = norm.weight.detach() * torch.rsqrt(variance + norm.eps)
            mine.weight.copy_(conv.weight.detach() * scale[:, None, None, None])
            bias = (conv.get_parameter("bias").detach() - mean) * scale + norm.bias.detach()
            mine.get_parameter("bias").copy_(bias)
        for mine, its in self._others:
            mine.copy_(its.detach())

    def forward(self, encoded: Float[Tensor, "*encoded"]) -> Float[Tensor, "*values"]:
        return self.network(encoded.to(self.dtype)).float()


def _blocks(network: nn.Module) -> list[ConvBlock]:
    return [module for module in network.modules() if isinstance(module, ConvBlock)]


class RowsLast(nn.Module):
    """A convolutional network with channels last: [batch, rows, columns, channels]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, encoded: Float[Tensor, "batch rows columns in_dim"]
    ) -> Float[Tensor, "batch height width out_dim"]:
        return self.network(encoded.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def weights_of(network: nn.Module) -> list[Tensor]:
    """Return all tensors of a network that may change: parameters and buffers, by reference."""
    return [*network.parameters(), *network.buffers()]


def weights_state(weights: list[Tensor]) -> int:
    """Return a number that changes whenever a weight is written in place or its data is replaced."""
    return hash(tuple([(t.data_ptr(), t._version) for t in weights]))


def weights_hash(network: nn.Module) -> str:
    """Return a hash of a network's layers, shapes and numbers, equal for equal networks only, in any process."""
    digest = hashlib.sha256(repr(network).encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
