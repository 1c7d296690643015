"""The R2L network: a deep residual MLP, one evaluation per pixel."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from r2l_nerfstudio.errors import InputError


class ResidualBlock(nn.Module):
    """Linear, ReLU, Linear, plus the input; nothing after the sum (R2L, fig. 3).

    Args:
        width: features in and out.
        zero_init: start as the identity, so that depth costs nothing at the first steps.
    """

    def __init__(self, width: int, zero_init: bool) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.activation = nn.ReLU()
        if zero_init:
            nn.init.zeros_(self.second.weight)
            nn.init.zeros_(self.second.bias)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return x + self.second(self.activation(self.first(x)))


class ResMLP(nn.Module):
    """R2L's network: Linear+ReLU, residual blocks under one long skip, Linear+Sigmoid.

    With in_dim 1008, width 256, depth 88, out_dim 3 this is the published network: 5.917 M parameters, 11.79 MFLOP/ray.

    Args:
        in_dim: length of the encoded ray.
        out_dim: outputs per ray, each in (0, 1).
        width: features of the hidden layers.
        depth: number of linear layers in all, an even number of at least 4.
        zero_init: start every residual block as the identity.

    Raises:
        InputError: for a depth that is odd or below 4.
    """

    def __init__(
        self, in_dim: int, out_dim: int = 3, width: int = 256, depth: int = 88, zero_init: bool = True
    ) -> None:
        super().__init__()
        if depth < 4 or depth % 2:
            raise InputError(
                f"--pipeline.model.depth must be an even number of at least 4 (got {depth}): the residual network has"
                " one layer at each end and two in every block between."
            )
        self.in_dim = in_dim
        self.head = nn.Linear(in_dim, width)
        self.activation = nn.ReLU()
        self.blocks = nn.Sequential(*[ResidualBlock(width, zero_init) for _ in range((depth - 2) // 2)])
        self.tail = nn.Linear(width, out_dim)

    def forward(self, encoded: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out_dim"]:
        hidden = self.activation(self.head(encoded))
        hidden = hidden + self.blocks(hidden)
        return self.tail(hidden).sigmoid()

    @property
    def flops_per_ray(self) -> int:
        """Floating-point operations of one evaluation, a multiply-add counted as two, without biases."""
        return sum(2 * layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))
