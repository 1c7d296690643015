"""A rehearsal of code for a GPU on fake CUDA tensors: wrong devices raise, and every wait for the GPU is written down."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import r2l_nerfstudio
from r2l_nerfstudio.planning import fake_cuda as product
from r2l_nerfstudio.planning.fake_cuda import fake_cuda

PACKAGE = Path(r2l_nerfstudio.__file__).parent
aten = torch.ops.aten


@dataclass(frozen=True)
class Wait:
    """A place where the host waits for the GPU, or the GPU for the host."""

    operator: str
    where: str
    """File and function of the package."""
    line: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.where}: {self.operator} in `{self.line}`"


class Rehearsal(TorchDispatchMode):
    """Answers what fake tensors cannot (a value, the number of nonzeros) and writes down who waits for the GPU.

    Half of a mask is true, and every boolean that is read.

    Args:
        number: the value of every fraction that is read.
        integer: of every integer.
    """

    def __init__(self, number: float = 0.5, integer: int = 1) -> None:
        super().__init__()
        self.number = number
        self.integer = integer
        self.answers: dict[str, float] = {}
        """The value of fractions that are read in some functions (file and name)."""
        self.waits: list[Wait] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self._check_generator(func, args, kwargs)
        packet = func.overloadpacket
        _check_lists(packet, args)
        if packet in (aten._local_scalar_dense, aten.item):
            return self._scalar(func, args[0])
        if packet is aten.nonzero:
            return self._nonzero(args[0])
        if packet is aten.masked_select:
            (row,) = self._nonzero(args[1].reshape(-1)).unbind(-1)
            return args[0].reshape(-1)[row]
        if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            args = self._indexed(packet, args)
        if packet in (aten.equal, aten.allclose):
            self._note(packet, args[0])
            return True
        if packet in (aten.bincount, aten._unique2, aten.unique_consecutive, aten.repeat_interleave):
            first = next(a for a in args if isinstance(a, Tensor))
            self._note(packet, first)
            if packet is aten._unique2:
                return first.reshape(-1)[:1], first.new_zeros(first.shape), first.new_ones(1)
            if packet is aten.bincount:
                length = kwargs.get("minlength") or (args[2] if len(args) > 2 else 1)
                return first.new_zeros(length, dtype=torch.long)
        found = func(*args, **kwargs)
        if packet in (aten._to_copy, aten.copy_, aten.copy) and not kwargs.get("non_blocking", False):
            source = args[min(int(packet in (aten.copy_, aten.copy)), len(args) - 1)]
            if isinstance(source, Tensor) and isinstance(found, Tensor):
                kinds = source.device.type, found.device.type
                is_scalar = source.device.type == "cpu" and source.ndim == 0 and packet in (aten.copy_, aten.copy)
                if "cuda" in kinds and kinds[0] != kinds[1] and not is_scalar:
                    self._wait("copy to the host" if kinds[0] == "cuda" else "copy from the host")
        return found

    def _check_generator(self, func: Any, args: tuple, kwargs: dict) -> None:
        generator, device = kwargs.get("generator"), kwargs.get("device")
        if device is None:
            device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
        device = torch.device(device)
        if generator is not None and generator.device.type != device.type:
            raise RuntimeError(f"{func}: expected a '{device.type}' generator but found '{generator.device.type}'")

    def _scalar(self, func: Any, tensor: Tensor) -> Any:
        self._note("item", tensor)
        if tensor.device.type == "cpu":  # numbers of the program itself are known
            try:
                return func(tensor)
            except Exception:  # of several classes, by version of PyTorch
                pass
        if tensor.dtype == torch.bool:
            return True
        if not tensor.is_floating_point():
            return self.integer
        return self.answers.get(_caller()[0], self.number)

    def _nonzero(self, mask: Tensor) -> Tensor:
        self._note("nonzero", mask)
        found = max(1, mask.numel() // 2) if mask.numel() else 0
        return torch.zeros(found, mask.ndim, dtype=torch.long, device=mask.device)

    def _indexed(self, packet: Any, args: tuple) -> tuple:
        tensor, indices, *rest = args
        made: list[Tensor | None] = []
        masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
        is_filled = packet is not aten.index and len(masks) == 1 and rest[0].numel() == 1
        if is_filled and rest[0].device.type == "cpu":  # PyTorch fills by the mask then
            return args
        for index in indices:
            if index is None:
                made.append(None)
                continue
            if index.device.type == "cuda" and tensor.device.type == "cpu":
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            if index.device.type == "cpu" and tensor.device.type == "cuda":
                self._wait("index from the host")
            made += self._nonzero(index).unbind(-1) if index in masks_of(masks) else [index]
        return tensor, made, *rest

    def _note(self, operator: Any, tensor: Tensor) -> None:
        if tensor.device.type == "cuda":
            self._wait(str(operator).removeprefix("aten."))

    def _wait(self, operator: str) -> None:
        self.waits.append(Wait(operator, *_caller()))

    def synchronize(self, *_: Any) -> None:
        """In place of `torch.cuda.synchronize`, and of a stream's."""
        self._wait("synchronize")


def _check_lists(packet: Any, args: tuple) -> None:
    """Operators on lists of tensors, whose devices fake tensors do not compare."""
    name = str(packet).removeprefix("aten.")
    if not name.startswith("_foreach_") or name.startswith("_foreach_copy"):
        return
    for tensors in zip(*(arg for arg in args if isinstance(arg, (list, tuple))), strict=False):
        devices = {tensor.device for tensor in tensors if isinstance(tensor, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{packet}: expected all tensors to be on the same device, found {devices}")


class masks_of(list):  # noqa: N801
    """Membership by identity: tensors compare element by element."""

    def __contains__(self, item: object) -> bool:
        return any(item is mine for mine in self)


def _caller() -> tuple[str, str]:
    """File and function of the package's own code that is running, and the line."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file == product.__file__:
            return "backward", ""
        if Path(file).is_relative_to(PACKAGE):
            line = linecache.getline(file, frame.f_lineno).strip()
            return f"{Path(file).relative_to(PACKAGE)}:{frame.f_code.co_name}", line
        frame = frame.f_back
    return "outside", ""


@contextmanager
def rehearsed(number: float = 0.5, integer: int = 1, total_bytes: int = 80 << 30) -> Iterator[Rehearsal]:
    """Fake CUDA, with answers for what has no values. Arguments as of `Rehearsal` and `fake_cuda`."""
    with ExitStack() as stack:
        stack.enter_context(fake_cuda(total_bytes))
        made = Rehearsal(number, integer)
        stream = SimpleNamespace(wait_stream=lambda _: None, synchronize=made.synchronize, cuda_stream=0)
        stack.enter_context(mock.patch("torch.cuda.synchronize", made.synchronize))
        stack.enter_context(mock.patch("torch.cuda.current_stream", lambda *_: stream))
        yield stack.enter_context(made)


def on_host(function: Callable) -> Callable:
    """A function of host tensors only, run with real ones."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run
