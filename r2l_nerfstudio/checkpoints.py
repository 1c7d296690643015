"""Checkpoints are read completely and checked, or not at all."""

from __future__ import annotations

import operator
import pickle
import stat
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from r2l_nerfstudio.errors import ZIP_ERRORS, InputError, one_line
from r2l_nerfstudio.renamed_fields import current_name
from r2l_nerfstudio.torch_compat import load_tensors

MOST_STEPS = 10**12
_SPARE_BYTES = 1 << 28
"""Bytes that a model may allocate beyond its weights before its size is doubted."""


@dataclass
class Checkpoint:
    """A checkpoint as `ns-train` writes it, without its optimizers."""

    step: int
    pipeline: dict[str, Any]
    """The pipeline's state dict; every tensor in it is dense, real, on the CPU and no larger than its part of the file."""

    def model_weights(self) -> dict[str, Any]:
        """Return the weights of the pipeline's model, without prefix."""
        weights = {k.removeprefix("_model."): v for k, v in self.pipeline.items() if k.startswith("_model.")}
        return without_module_prefix(weights)


def without_module_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without the prefix `module.` that data-parallel training puts before every key."""
    is_wrapped = all(key.startswith("module.") for key in state)
    return {key.removeprefix("module.") if is_wrapped else key: value for key, value in state.items()}


def read_checkpoint(path: Path, whose: str) -> Checkpoint:
    """Read a checkpoint without running anything in it, and check every byte and value.

    Args:
        path: the file.
        whose: "teacher" or "student", for messages; a student's numbers must all be finite; each of a teacher's tensors
            must have at least one finite number, since some methods tolerate a few others.

    Raises:
        InputError: it is not an ordinary file, is damaged, is not a checkpoint of `ns-train`, or has values that no
            weights can have.
    """
    _check_file(path, whose)
    try:
        loaded = load_tensors(path)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error))
        raise InputError(
            f"The {whose}'s checkpoint {path} was not loaded: it is damaged or holds more than tensors"
            f" ({reason.strip()[:300]}). Use a checkpoint that ns-train wrote, or train the {whose} again."
        ) from error
    except Exception as error:  # A damaged file may raise anything.
        raise _damaged(path, whose, f"{type(error).__name__}: {one_line(error)}") from error
    if not isinstance(loaded, dict) or not isinstance(loaded.get("pipeline"), Mapping):
        raise _damaged(path, whose, f"it holds a {type(loaded).__name__} without a pipeline")
    step = _step(loaded.get("step"), path, whose)
    state = {}
    for key, value in loaded["pipeline"].items():
        if not isinstance(key, str):
            raise _damaged(path, whose, f"a weight is named {key!r}"[:300])
        if isinstance(value, Tensor):
            _check_tensor(key, value, path, whose)
        state[current_name(key) if whose == "student" else key] = value
    checkpoint = Checkpoint(step, without_module_prefix(state))
    if not checkpoint.model_weights():
        raise _damaged(path, whose, "it holds no model")
    return checkpoint


def check_fit(model: nn.Module, weights: Mapping[str, Any], path: Path, whose: str) -> None:
    """Compare the types of a checkpoint's tensors with those of the model that is to load them.

    PyTorch itself would silently round real numbers to integers, drop imaginary parts and accept text as state.

    Raises:
        InputError: a type differs.
    """
    for key, mine in model.state_dict().items():
        theirs = weights.get(key)
        if theirs is None:
            continue
        if isinstance(mine, Tensor) != isinstance(theirs, Tensor):
            raise _unfit(path, whose, f"{key} is a {type(theirs).__name__}")
        if isinstance(mine, Tensor):
            if mine.dtype.is_floating_point != theirs.dtype.is_floating_point:
                raise _unfit(path, whose, f"{key} is of {theirs.dtype}, and {mine.dtype} is expected")
        elif isinstance(mine, dict):
            kinds = {name: type(value) for name, value in mine.items()}
            # Older checkpoints may lack an entry that later versions added.
            if not isinstance(theirs, dict) or any(kinds.get(name) is not type(v) for name, v in theirs.items()):
                raise _unfit(path, whose, f"{key} is {theirs!r}"[:200])


def check_size(build: Callable[[], nn.Module], path: Path, most: int | None = None) -> None:
    """Build a model without allocating memory and check that its weights fit.

    Args:
        build: builds the model; a model that cannot be built without memory is skipped.
        path: the configuration it is built from, for messages.
        most: bytes that its weights may take; free memory by default.

    Raises:
        InputError: its weights would take more.
    """
    needed = weight_bytes(build)
    if needed is None:
        return
    limit = psutil.virtual_memory().available if most is None else most + _SPARE_BYTES
    if needed > limit:
        raise InputError(
            f"The model that {path} describes takes {needed / 1e9:.1f} GB, and "
            + (f"{limit / 1e9:.1f} GB are free here" if most is None else f"its checkpoint holds {most / 1e9:.3f} GB")
            + ": a number in the file is wrong. Restore it from a copy."
        )


def weight_bytes(build: Callable[[], nn.Module]) -> int | None:
    """Return the bytes of a model's parameters and buffers without allocating them; None for a method that needs real
    tensors while it is built.

    Raises:
        InputError: as `build`.
    """
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = build()
        # Not its state dict: modules may copy tensors into theirs, and these have no numbers.
        tensors = [*model.parameters(), *model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.layout == torch.strided)
    except InputError:
        raise
    except Exception:
        return None


def _check_file(path: Path, whose: str) -> None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(
                f"The {whose}'s checkpoint {path} is not an ordinary file: restore the file that ns-train wrote."
            )
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise _damaged(path, whose, "it is compressed, and PyTorch's checkpoints are not")
            if sum(entry.file_size for entry in entries) > status.st_size:
                raise _damaged(path, whose, "its parts are larger than the file")
            broken = archive.testzip()  # PyTorch does not check the checksums that it writes.
    except OSError as error:
        raise _damaged(path, whose, one_line(error)) from error
    except ZIP_ERRORS as error:
        raise _damaged(path, whose, one_line(error)) from error
    if broken is not None:
        raise _damaged(path, whose, f"the checksum of its part {broken} is wrong")


def _step(value: Any, path: Path, whose: str) -> int:
    try:
        step = operator.index(value)
    except TypeError as error:
        raise _damaged(path, whose, f"its step is {value!r}"[:200]) from error
    if isinstance(value, bool) or not 0 <= step <= MOST_STEPS:
        raise _damaged(path, whose, f"its step is {str(value)[:40]}")
    return step


def _check_tensor(key: str, value: Tensor, path: Path, whose: str) -> None:
    kind = value.dtype
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu" or kind.is_complex:
        raise _damaged(path, whose, f"{key} is not an ordinary tensor but {kind}, {value.layout}, on {value.device}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise _damaged(path, whose, f"{key} of shape {list(value.shape)} is larger than its part of the file")
    if not kind.is_floating_point or value.numel() == 0:
        return
    finite = value.isfinite()
    if not bool(finite.any() if whose == "teacher" else finite.all()):
        raise InputError(
            f"The {whose}'s checkpoint {path} cannot be used: {int((~finite).sum())} of {value.numel()} numbers of {key} are"
            f" not finite, so its training had diverged or the file is damaged. Use an earlier checkpoint (delete this one,"
            f" or set load_step in config.yml), or train the {whose} again."
        )


def _damaged(path: Path, whose: str, why: str) -> InputError:
    return InputError(
        f"The {whose}'s checkpoint {path} is truncated, damaged or not a checkpoint of ns-train ({why}). Restore it"
        f" from a copy; or delete it, if an older one is beside it; or train the {whose} again."
    )


def _unfit(path: Path, whose: str, why: str) -> InputError:
    return InputError(
        f"The {whose}'s checkpoint {path} does not fit the model that its config.yml describes ({why}): a run's config.yml"
        " goes with its own checkpoints; restore both from one copy."
    )
