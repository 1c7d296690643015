"""Networks in published checkpoints: kind, size, and weights under our names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from r2l_nerfstudio.checkpoints import without_module_prefix
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.importing.pickle_reader import Checkpoint, TensorRef, plain

PublishedKind = Literal["r2l", "mobile-r2l"]
PlainNetwork = Callable[[Tensor], Tensor]
"""A network from ray encodings in the published order to colors in (0, 1)."""

MOST_FREQUENCIES = 16
"""Maximum octaves; more exceed the precision of float32 and indicate that the number of points was misread."""
MEMORY_FACTOR = 4
"""Memory of an import, as a multiple of the file's weights."""


@dataclass
class PublishedNetwork:
    """A published network, checked.

    Encodings in the published order hold, for each coordinate of each point, L sines, L cosines and the coordinate itself.
    """

    path: Path
    kind: PublishedKind
    state: dict[str, Tensor]
    """State of our network class for `kind`, whose inputs are in our order."""
    run: PlainNetwork
    """The file's own weights in plain PyTorch: [rays, in_dim] to [rays, 3], or [1, in_dim, rows, columns] to [1, 3,
    height, width]."""
    num_points: int
    num_frequencies: int
    sizes: dict[str, int]
    """Settings of our model configuration: width, and depth or blocks, factor, up_width, last_width."""
    cells: tuple[int, int] | None = None
    """Rows and columns of the ray image, if the file has them."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Plain values of the training's command line, if the file has them."""


def read_tar(path: Path, num_points: int | None = None, num_frequencies: int | None = None) -> PublishedNetwork:
    """Read a `.tar` that the published R2L or MobileR2L saved, without running anything in it.

    Args:
        path: the file.
        num_points: sample points per ray; read from the file by default.
        num_frequencies: octaves of the frequency encoding; read from the file by default.

    Raises:
        InputError: if it is damaged, of neither kind, or not a network that can run.
    """
    with Checkpoint(path) as checkpoint:
        content = plain(checkpoint.content)
        found = without_module_prefix(plain(content.get("network_fn_state_dict")) or {})
        if not found:
            held = ", ".join(sorted(content)[:6]) or "nothing"
            raise _refused(path, f"it has no network_fn_state_dict (but {held})")
        _check_memory(path, found)
        weights = {
            name: _number(path, name, checkpoint.tensor(value, name))
            for name, value in found.items()
            if isinstance(value, TensorRef)
        }
        if len(weights) < len(found):
            strange = next(name for name, value in found.items() if not isinstance(value, TensorRef))
            raise _refused(path, f"its {strange} is not a tensor")
        arguments = _arguments(content)
    if any(".conv_block." in name for name in weights):
        return _mobile(path, weights, arguments, num_points, num_frequencies)
    if "head.0.weight" in weights and any(re.match(r"body\.\d+\.body\.", name) for name in weights):
        return _r2l(path, weights, arguments, num_points, num_frequencies)
    raise _refused(path, f"its weights ({', '.join(list(weights)[:4])}, …) are neither R2L's nor MobileR2L's")


def _refused(path: Path, why: str) -> InputError:
    return InputError(
        f"The checkpoint {path} cannot be imported: {why}. Pass a .tar that snap-research's R2L or MobileR2L saved, or the"
        " .onnx of a MobileR2L's network."
    )


def _check_memory(path: Path, found: dict[str, Any]) -> None:
    size = sum(ref.numel * 4 for ref in found.values() if isinstance(ref, TensorRef))
    check_memory(path, size)


def check_memory(path: Path, size: int) -> None:
    """Refuse a network whose weights do not fit into memory.

    Args:
        path: for the message.
        size: bytes of its weights.

    Raises:
        InputError: if there is too little memory.
    """
    available = psutil.virtual_memory().available
    if size * MEMORY_FACTOR > available:
        raise InputError(
            f"The network of {path} does not fit into memory: its weights take {size / 1e9:.1f} GB, an import"
            f" {MEMORY_FACTOR} times that, and {available / 1e9:.1f} GB are free. Import it on a machine with more."
        )


def _number(path: Path, name: str, tensor: Tensor) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return tensor.long()
    if not tensor.is_floating_point():
        raise _refused(path, f"its {name} has {tensor.dtype}, not floating-point numbers")
    tensor = tensor.float()
    if not bool(tensor.isfinite().all()):
        raise _refused(path, f"its {name} has non-finite numbers")
    return tensor


def _arguments(content: dict[str, Any]) -> dict[str, Any]:
    """Return the plain values of the argument object in the pickled module."""
    given = plain(plain(content.get("network_fn")).get("args"))
    found = {name: value for name, value in given.items() if isinstance(value, str | int | float | bool | tuple)}
    trial = plain(given.get("trial"))
    return found | {f"trial.{name}": value for name, value in trial.items() if isinstance(value, str | int | float)}


EXPECTED = {
    "act": ("relu",),
    "linear_tail": (False,),
    "use_residual": (True,),
    "layerwise_netwidths": ("",),
    "activation_fn": ("gelu",),
    "use_sr_module": (True,),
    "trial.body_arch": ("resmlp",),
    "trial.inact": ("relu",),
    "trial.outact": ("none",),
    "trial.res_scale": (1, 1.0),
    "trial.n_learnable": (2,),
}
"""Arguments that change what the network computes, and the values that both papers use."""


def _check_arguments(path: Path, arguments: dict[str, Any]) -> None:
    for name, values in EXPECTED.items():
        if name in arguments and arguments[name] not in values:
            raise _refused(path, f"it was trained with {name} {arguments[name]!r} instead of {values[0]!r}")


def encoding_size(
    path: Path,
    in_dim: int,
    arguments: dict[str, Any],
    num_points: int | None = None,
    num_frequencies: int | None = None,
) -> tuple[int, int]:
    """Return points per ray K and octaves L of a network that reads 3 K (2 L + 1) numbers per ray.

    K is the largest power of two that divides in_dim / 3, as in all published networks, unless given or in the arguments.

    Raises:
        InputError: if in_dim is not of this form.
    """
    per_ray = in_dim // 3
    points = num_points or arguments.get("n_sample_per_ray")
    octaves = num_frequencies or arguments.get("multires")
    if not (type(points) is int and points > 0):
        points = per_ray // (2 * octaves + 1) if type(octaves) is int and octaves > 0 else per_ray & -per_ray
    if not (type(octaves) is int and octaves > 0):
        octaves = (per_ray // max(1, points) - 1) // 2
    if 3 * points * (2 * octaves + 1) != in_dim or not 1 <= octaves <= MOST_FREQUENCIES:
        raise _refused(
            path,
            f"its first layer reads {in_dim} numbers, which are not {points} points with {octaves} octaves; give"
            " other --num-points and --num-frequencies",
        )
    return points, octaves


def our_columns(num_points: int, num_frequencies: int) -> Tensor:
    """Return for each number of our ray encoding its position in the published order."""
    values = torch.arange(3 * num_points)
    octaves = torch.arange(num_frequencies)[:, None]
    first = values * (2 * num_frequencies + 1)
    parts = [first + 2 * num_frequencies, (first + octaves).flatten(), (first + num_frequencies + octaves).flatten()]
    return torch.cat(parts)


class _Weights:
    """The weights of a file, taken one by one."""

    def __init__(self, path: Path, weights: dict[str, Tensor]) -> None:
        self.path = path
        self.left = dict(weights)

    def take(self, name: str, *shape: int | None) -> Tensor:
        """Return a tensor of a shape, in which None stands for any size."""
        tensor = self.left.pop(name, None)
        if tensor is None:
            raise _refused(self.path, f"it lacks {name}")
        fits = tensor.ndim == len(shape) and all(w in (None, s) for w, s in zip(shape, tensor.shape, strict=True))
        if not fits or 0 in tensor.shape:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise _refused(self.path, f"its {name} has the shape {list(tensor.shape)} instead of [{wanted}]")
        return tensor

    def count(self, pattern: str) -> int:
        """Return how many consecutive numbers from 0 on occur in names of this pattern."""
        numbers = {int(match[1]) for name in self.left if (match := re.match(pattern, name))}
        if numbers != set(range(len(numbers))):
            raise _refused(self.path, f"of its layers {pattern} some numbers are missing")
        return len(numbers)

    def finish(self) -> None:
        if self.left:
            raise _refused(self.path, f"it has weights of unknown layers: {', '.join(list(self.left)[:4])}")


def _r2l(
    path: Path,
    weights: dict[str, Tensor],
    arguments: dict[str, Any],
    num_points: int | None,
    num_frequencies: int | None,
) -> PublishedNetwork:
    _check_arguments(path, arguments)
    left = _Weights(path, weights)
    head = left.take("head.0.weight", None, None)
    width, in_dim = head.shape
    state = {"head.weight": head, "head.bias": left.take("head.0.bias", width)}
    blocks = left.count(r"body\.(\d+)\.")
    for block in range(blocks):
        for place, name in ((0, "first"), (2, "second")):
            state[f"blocks.{block}.{name}.weight"] = left.take(f"body.{block}.body.{place}.weight", width, width)
            state[f"blocks.{block}.{name}.bias"] = left.take(f"body.{block}.body.{place}.bias", width)
    state["tail.weight"] = left.take("tail.0.weight", 3, width)
    state["tail.bias"] = left.take("tail.0.bias", 3)
    left.finish()
    points, octaves = encoding_size(path, in_dim, arguments, num_points, num_frequencies)
    state["head.weight"] = head[:, our_columns(points, octaves)]

    def run(encoded: Float[Tensor, "rays in_dim"]) -> Float[Tensor, "rays 3"]:
        first = hidden = F.linear(encoded, weights["head.0.weight"], weights["head.0.bias"]).relu()
        for block in range(blocks):
            of = f"body.{block}.body"
            inner = F.linear(hidden, weights[f"{of}.0.weight"], weights[f"{of}.0.bias"]).relu()
            hidden = hidden + F.linear(inner, weights[f"{of}.2.weight"], weights[f"{of}.2.bias"])
        return F.linear(first + hidden, weights["tail.0.weight"], weights["tail.0.bias"]).sigmoid()

    sizes = {"width": width, "depth": 2 * blocks + 2}
    return PublishedNetwork(path, "r2l", state, run, points, octaves, sizes, None, arguments)


def _mobile(
    path: Path,
    weights: dict[str, Tensor],
    arguments: dict[str, Any],
    num_points: int | None,
    num_frequencies: int | None,
) -> PublishedNetwork:
    _check_arguments(path, arguments)
    left = _Weights(path, weights)
    head = left.take("head.0.weight", None, None, 1, 1)
    width, in_dim = head.shape[:2]
    state = {"head.weight": head, "head.bias": left.take("head.0.bias", width)}

    def take_block(theirs: str, ours: str, channels: int) -> None:
        for place, name in ((0, "first"), (3, "second")):
            source = f"{theirs}.conv_block.{place}"
            state[f"{ours}.{name}.weight"] = left.take(f"{source}.weight", channels, channels, 1, 1)
            state[f"{ours}.{name}.bias"] = left.take(f"{source}.bias", channels)
            source = f"{theirs}.conv_block.{place + 1}"
            for part in ("weight", "bias", "running_mean", "running_var"):
                state[f"{ours}.{name}_norm.{part}"] = left.take(f"{source}.{part}", channels)
            count = f"{source}.num_batches_tracked"
            state[f"{ours}.{name}_norm.num_batches_tracked"] = (
                left.take(count) if count in left.left else torch.tensor(0)
            )
            if bool((state[f"{ours}.{name}_norm.running_var"] < 0).any()):
                raise _refused(path, f"its {source}.running_var has negative variances")

    blocks = left.count(r"body\.(\d+)\.")
    for block in range(blocks):
        take_block(f"body.{block}", f"blocks.{block}", width)
    layers = left.count(r"tail\.(\d+)\.")
    if layers < 4 or layers % 3 != 1:
        raise _refused(path, f"its upsampling has {layers} layers instead of three per step and a last one")
    steps, channels = [], [width]
    for first in range(0, layers - 1, 3):
        weight = left.take(f"tail.{first}.weight", channels[-1], None, None, None)
        kernel = weight.shape[2]
        if weight.shape[2:] not in ((4, 4), (3, 3)):
            raise _refused(path, f"its tail.{first}.weight has a kernel of {list(weight.shape[2:])}, not 4x4 or 3x3")
        steps.append({4: 2, 3: 3}[kernel])
        channels.append(weight.shape[1])
        state[f"up.{first}.weight"] = weight
        state[f"up.{first}.bias"] = left.take(f"tail.{first}.bias", channels[-1])
        for number in (first + 1, first + 2):
            take_block(f"tail.{number}", f"up.{number}", channels[-1])
    state["tail.weight"] = left.take(f"tail.{layers - 1}.weight", 3, channels[-1], 1, 1)
    state["tail.bias"] = left.take(f"tail.{layers - 1}.bias", 3)
    left.finish()
    sizes = mobile_sizes(path, width, blocks, steps, channels[1:])
    points, octaves = encoding_size(path, in_dim, arguments, num_points, num_frequencies)
    state["head.weight"] = head[:, our_columns(points, octaves)]

    def run_block(x: Tensor, of: str) -> Tensor:
        hidden = x
        for place in (0, 3):
            conv, norm = f"{of}.conv_block.{place}", f"{of}.conv_block.{place + 1}"
            hidden = F.conv2d(hidden, weights[f"{conv}.weight"], weights[f"{conv}.bias"])
            hidden = F.batch_norm(
                hidden,
                weights[f"{norm}.running_mean"],
                weights[f"{norm}.running_var"],
                weights[f"{norm}.weight"],
                weights[f"{norm}.bias"],
            )
            if place == 0:
                hidden = F.gelu(hidden)
        return x + hidden

    def run(encoded: Float[Tensor, "1 in_dim rows columns"]) -> Float[Tensor, "1 3 height width"]:
        first = hidden = F.gelu(F.conv2d(encoded, weights["head.0.weight"], weights["head.0.bias"]))
        for block in range(blocks):
            hidden = run_block(hidden, f"body.{block}")
        hidden = first + hidden
        for number, step in enumerate(steps):
            layer = f"tail.{3 * number}"
            hidden = F.conv_transpose2d(
                hidden, weights[f"{layer}.weight"], weights[f"{layer}.bias"], stride=step, padding=1 if step == 2 else 0
            )
            for block in (3 * number + 1, 3 * number + 2):
                hidden = run_block(hidden, f"tail.{block}")
        layer = f"tail.{layers - 1}"
        return F.conv2d(hidden, weights[f"{layer}.weight"], weights[f"{layer}.bias"]).sigmoid()

    return PublishedNetwork(path, "mobile-r2l", state, run, points, octaves, sizes, cells_of(arguments), arguments)


def mobile_sizes(path: Path, width: int, blocks: int, steps: list[int], channels: list[int]) -> dict[str, int]:
    """Return the settings of our MobileR2L configuration.

    Args:
        path: for messages.
        width: channels of the body.
        blocks: residual blocks of the body.
        steps: upsampling of each step, 2 or 3.
        channels: channels of each step.

    Raises:
        InputError: if our network class does not support them.
    """
    factor = 1
    for step in steps:
        factor *= step
    if 3 in steps[:-1] or len(set(channels[:-1])) > 1:
        raise _refused(
            path,
            f"its upsampling of x{' x'.join(map(str, steps))} with {', '.join(map(str, channels))} channels is not"
            " MobileR2L's: steps of 2, a last one of 2 or 3, and one number of channels for all but the last",
        )
    up_width = channels[0] if len(channels) > 1 else 64
    return {
        "width": width,
        "blocks": blocks,
        "upsampling_factor": factor,
        "up_width": up_width,
        "last_width": channels[-1],
    }


def cells_of(arguments: dict[str, Any]) -> tuple[int, int] | None:
    """Return rows and columns of the ray image from the training's arguments."""
    rows, columns = arguments.get("input_height"), arguments.get("input_width")
    return (rows, columns) if type(rows) is int and type(columns) is int and min(rows, columns) > 0 else None
