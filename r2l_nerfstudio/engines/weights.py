"""A network's weights as engines want them: norms folded, in one precision, apart from those that are trained."""

from __future__ import annotations

import copy
import hashlib
import itertools

import torch
from jaxtyping import Float
from torch import Tensor, nn

from r2l_nerfstudio.engines.protocol import DTYPES, Precision
from r2l_nerfstudio.students.mobile import ConvBlock, MobileR2L


class FixedNetwork(nn.Module):
    """A student's network with every BatchNorm folded into its convolution, reckoning in one precision.

    fp32 code in, fp32 values out, shapes as the network's. It is a copy: training goes on undisturbed.

    Args:
        network: in fp32.
        precision: of weights and arithmetic.
    """

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.dtype = DTYPES[precision]
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        for block in self._blocks(self.network):
            block.first_norm = block.second_norm = nn.Identity()
        self.network.to(self.dtype)
        if isinstance(network, MobileR2L):
            self.network.to(memory_format=torch.channels_last)
        self.refresh(network)

    def refresh(self, network: nn.Module) -> None:
        """Take over the weights of a network of the same shape, in place. Interrupted, it may be called again.

        Gradients are kept out by detaching: a context for it stays open when the viewer interrupts inside one.
        """
        folded = set()
        for block, its in zip(self._blocks(self.network), self._blocks(network), strict=True):
            for mine, conv, norm in (
                (block.first, its.first, its.first_norm),
                (block.second, its.second, its.second_norm),
            ):
                scale = norm.weight.detach() * torch.rsqrt(norm.running_var + norm.eps)
                mine.weight.copy_(conv.weight.detach() * scale[:, None, None, None])
                mine.bias.copy_((conv.bias.detach() - norm.running_mean) * scale + norm.bias.detach())
                folded |= {id(mine.weight), id(mine.bias)}
        theirs = dict(network.named_parameters())
        for name, mine in self.network.named_parameters():
            if id(mine) not in folded:
                mine.copy_(theirs[name].detach())

    def forward(self, code: Float[Tensor, "*code"]) -> Float[Tensor, "*values"]:
        return self.network(code.to(self.dtype)).float()

    @staticmethod
    def _blocks(network: nn.Module) -> list[ConvBlock]:
        return [module for module in network.modules() if isinstance(module, ConvBlock)]


class RowsLast(nn.Module):
    """A convolutional network that reads and gives channels last: [batch, rows, columns, channels]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, code: Float[Tensor, "batch rows columns in_dim"]) -> Float[Tensor, "batch height width out_dim"]:
        return self.network(code.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def weights_state(network: nn.Module) -> int:
    """A number that changes whenever a weight is written in place, replaced or moved, by whoever does it."""
    tensors = itertools.chain(network.parameters(), network.buffers())
    return hash(tuple((t.data_ptr(), t._version) for t in tensors))


def weights_hash(network: nn.Module) -> str:
    """Of a network's layers, their shapes and all their numbers: equal for equal networks only, in any process."""
    digest = hashlib.sha256(repr(network).encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
