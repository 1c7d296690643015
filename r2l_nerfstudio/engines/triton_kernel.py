"""R2L's residual MLP in one launch: a Triton kernel that keeps a tile of rays in registers through all hidden layers.

After the fully-fused MLP of tiny-cuda-nn (Müller et al. 2021, sec. 4), for a residual network and in Triton. A program takes
a tile of rays; their activations never leave the chip between the first and the last layer, and each hidden layer's
weights are read once per tile, from the L2 cache after the first tile.

Run on an H100 for a width of 128; for others by Triton's interpreter on a CPU only (`TRITON_INTERPRET=1`), NOT VERIFIED on a
GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

TILE = 64
"""Rays of a program: their activations and the products of a layer have to fit into its registers."""
INNER = 64
"""Columns of the ray encoding that the first layer takes at a time."""
OUTPUTS = 16
"""Columns of the last layer, filled up with zeros: the least that a matrix unit multiplies."""


@triton.jit
def _residual_mlp(
    encoded,
    head_weight,
    head_bias,
    hidden_weights,
    hidden_biases,
    tail_weight,
    tail_bias,
    values,
    rays,
    in_dim,
    out_dim,
    blocks,
    WIDTH: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    INNER: tl.constexpr,  # noqa: N803
    OUTPUTS: tl.constexpr,  # noqa: N803
):
    dtype = head_weight.dtype.element_ty
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_ray = rows < rays
    features = tl.arange(0, WIDTH)

    # The first layer, over the encoding's columns in steps.
    total = tl.zeros((TILE, WIDTH), dtype=tl.float32)
    for start in range(0, in_dim, INNER):
        inner = start + tl.arange(0, INNER)
        part = tl.load(
            encoded + rows[:, None] * in_dim + inner[None, :],
            mask=is_ray[:, None] & (inner[None, :] < in_dim),
            other=0.0,
        )
        weight = tl.load(
            head_weight + inner[:, None] * WIDTH + features[None, :], mask=inner[:, None] < in_dim, other=0.0
        )
        total = tl.dot(part.to(dtype), weight, acc=total)
    first = tl.maximum(total + tl.load(head_bias + features).to(tl.float32)[None, :], 0.0).to(dtype)

    # All residual blocks; sums in fp32, as they are added up over dozens of blocks.
    square = tl.arange(0, WIDTH)[:, None] * WIDTH + features[None, :]
    hidden = first.to(tl.float32)
    for block in range(blocks):
        weight = tl.load(hidden_weights + (2 * block) * WIDTH * WIDTH + square)
        bias = tl.load(hidden_biases + (2 * block) * WIDTH + features).to(tl.float32)
        inside = tl.maximum(tl.dot(hidden.to(dtype), weight) + bias[None, :], 0.0)
        weight = tl.load(hidden_weights + (2 * block + 1) * WIDTH * WIDTH + square)
        bias = tl.load(hidden_biases + (2 * block + 1) * WIDTH + features).to(tl.float32)
        hidden += tl.dot(inside.to(dtype), weight) + bias[None, :]
    hidden += first.to(tl.float32)

    # The last layer and its sigmoid.
    columns = tl.arange(0, OUTPUTS)
    weight = tl.load(tail_weight + features[:, None] * OUTPUTS + columns[None, :])
    out = tl.dot(hidden.to(dtype), weight) + tl.load(tail_bias + columns).to(tl.float32)[None, :]
    tl.store(
        values + rows[:, None] * out_dim + columns[None, :],
        1.0 / (1.0 + tl.exp(-out)),
        mask=is_ray[:, None] & (columns[None, :] < out_dim),
    )


def residual_mlp(
    encoded: Float[Tensor, "rays in_dim"],
    head: tuple[Float[Tensor, "in_dim width"], Float[Tensor, "width"]],
    hidden: tuple[Float[Tensor, "layers width width"], Float[Tensor, "layers width"]],
    tail: tuple[Float[Tensor, "width outputs"], Float[Tensor, "outputs"]],
    out_dim: int,
) -> Float[Tensor, "rays out_dim"]:
    """Evaluate a `ResMLP` in one kernel.

    Args:
        encoded: encoded rays, fp32, contiguous.
        head: weight, transposed, and bias of the first layer, in the precision of the arithmetic; products are summed in
            fp32.
        hidden: weights of all layers between the first and the last.
        tail: of the last layer, filled up to `OUTPUTS` columns.
        out_dim: outputs per ray.

    Returns:
        fp32.
    """
    rays, in_dim = encoded.shape
    layers, width, _ = hidden[0].shape
    values = torch.empty(rays, out_dim, device=encoded.device, dtype=torch.float32)
    if rays:
        grid = (triton.cdiv(rays, TILE),)
        _residual_mlp[grid](
            encoded, *head, *hidden, *tail, values, rays, in_dim, out_dim, layers // 2,
            WIDTH=width, TILE=TILE, INNER=INNER, OUTPUTS=OUTPUTS, num_warps=4 if width <= 128 else 8, num_stages=2,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return values
