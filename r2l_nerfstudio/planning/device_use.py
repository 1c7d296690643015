"""What a program takes of a device: bytes at its peak, arithmetic, traffic and kernels, by PyTorch's dispatcher."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROUNDING = 512
"""Bytes to a multiple of which PyTorch's CUDA allocator rounds every tensor."""


class DeviceUse(TorchDispatchMode):
    """Count while active what operators do to CUDA tensors, fake ones included.

    Tensors count from the first operator that reads or makes them until their storage is freed. What kernels allocate for
    themselves (workspaces of matrix products and convolutions) does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        """Now held."""
        self.peak_bytes = 0
        self.traffic_bytes = 0
        """Read and written, every operator on its own."""
        self.kernels = 0
        """Operators that touch memory; each is one kernel or few."""
        self.flops = 0
        """Floating-point operations of matrix products and convolutions, a multiply-add counted as two."""
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}

    def restart(self) -> None:
        """Count peak, traffic, kernels and arithmetic from here on; what is held stays held."""
        self.peak_bytes, self.traffic_bytes, self.kernels, self.flops = self.bytes, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=found)
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.device.type == "cuda"]
        made = [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.device.type == "cuda"]
        before = {self._hold(t) for t in read}
        after = {self._hold(t) for t in made}
        if func._schema.is_mutable or after - before:
            self.kernels += 1
            self.traffic_bytes += sum(t.numel() * t.element_size() for t in (*read, *made))
        return found

    def _hold(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        if key not in self._references:
            self._references[key] = weakref.ref(storage, lambda _, key=key: self._free(key))
            self._sizes[key] = 0
        if size != self._sizes[key]:  # new, or resized
            self.bytes += size - self._sizes[key]
            self._sizes[key] = size
            self.peak_bytes = max(self.peak_bytes, self.bytes)
        return key

    def _free(self, key: int) -> None:
        self._references.pop(key, None)
        self.bytes -= self._sizes.pop(key, 0)
