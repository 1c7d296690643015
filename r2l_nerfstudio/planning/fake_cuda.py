"""CUDA tensors without a GPU: shapes, types and devices are checked, nothing is computed.

`torch._subclasses.FakeTensorMode` is what `torch.compile` traces with. Here it runs whole programs: modules move to the
device, autocast is on, and backward passes run, in Python, since PyTorch's own engine looks for a CUDA context.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def fake_cuda(total_bytes: int = 80 << 30) -> Iterator[FakeTensorMode]:
    """Run what is inside on fake tensors, with a CUDA device that exists in name only.

    Tensors made inside, on any device, have no values: `Tensor.item` and its like raise. Tensors made before may be read.
    Nothing outside this thread may use PyTorch meanwhile: functions of `torch.cuda` are replaced.

    Args:
        total_bytes: memory that `torch.cuda.mem_get_info` reports, all of it free.
    """
    mode = _NoDevice(allow_non_fake_inputs=True)
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None, cuda_stream=0)
    replaced: dict[str, Any] = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.is_initialized": lambda: False,
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda.is_current_stream_capturing": lambda: False,
        "torch.cuda.get_device_capability": lambda *_: (8, 6),
        "torch.cuda.mem_get_info": lambda *_: (total_bytes, total_bytes),
        "torch.cuda.memory_allocated": lambda *_: 0,
        "torch.cuda.max_memory_allocated": lambda *_: 0,
        "torch.cuda.reset_peak_memory_stats": lambda *_: None,
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.synchronize": lambda *_: None,
        "torch.cuda.Stream": lambda *_, **__: stream,
        "torch.cuda.current_stream": lambda *_: stream,
        "torch.cuda.stream": lambda _: ExitStack(),
        "torch.autograd.backward": _backward,
        "torch.autograd.grad": _grad,
        "torch.nn.Module._apply": _apply,
        "torch._subclasses.fake_tensor.FakeTensor.__deepcopy__": _copied,
    }
    if hasattr(fake_tensor, "init_gpu_context"):  # Before PyTorch 2.12, it believes `is_available`.
        replaced["torch._subclasses.fake_tensor.init_gpu_context"] = lambda _: None
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch(name, value))
        yield stack.enter_context(mode)


class _NoDevice(FakeTensorMode):
    """That starts no device, although `torch.cuda.is_available` says there is one."""

    @property
    def avoid_device_init(self) -> bool:
        return True


def _apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """As `nn.Module._apply`, which cannot put one fake tensor in another's place: parameters become new objects."""
    for child in module.children():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            moved = function(parameter)
            if moved is not parameter:
                module._parameters[name] = nn.Parameter(moved.detach(), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """`copy.deepcopy` of a fake tensor, whose own way ends the process."""
    made = tensor.detach().clone()
    made = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    memo[id(tensor)] = made
    return made


def _backward(
    tensors: Tensor | Sequence[Tensor],
    grad_tensors: Tensor | Sequence[Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    if create_graph or inputs is not None:
        # A training step asks for neither; counting would be wrong without a word.
        raise ValueError("backward on fake CUDA tensors takes neither create_graph nor inputs")
    _run(_listed(tensors), _listed(grad_tensors), None)


def _grad(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | Sequence[Tensor | None] | None = None,
    **settings: Any,
) -> tuple[Tensor | None, ...]:
    wanted = [(*_edge(tensor),) for tensor in _listed(inputs)]
    found = _run(_listed(outputs), _listed(grad_outputs), wanted)
    return tuple(found.get(key) for key in wanted)


def _listed(tensors: Any) -> list[Any]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors or [])


def _edge(tensor: Tensor) -> tuple[Any, int]:
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    # The node that accumulates a leaf's gradient is reached through a view of it.
    return tensor.view_as(tensor).grad_fn.next_functions[0][0], 0  # pyright: ignore[reportOptionalMemberAccess]


@torch.no_grad()
def _run(
    roots: list[Tensor], gradients: list[Tensor | None], wanted: list[tuple[Any, int]] | None
) -> dict[tuple[Any, int], Tensor]:
    """Run a graph backward: into the leaves' `grad`, or, where gradients at some edges are wanted, to them."""
    pending: dict[Any, dict[int, Tensor]] = {}
    found: dict[tuple[Any, int], Tensor] = {}
    edges = [_edge(root) for root in roots]
    for number, (root, (node, index)) in enumerate(zip(roots, edges, strict=True)):
        given = gradients[number] if number < len(gradients) else None
        _add(pending, node, index, torch.ones_like(root) if given is None else given)
    waits = _dependencies([node for node, _ in edges])
    # The newest node first, as PyTorch's engine has it.
    ready: list[tuple[int, int, Any]] = []
    order = 0

    def push(node: Any) -> None:
        nonlocal order
        order += 1
        heapq.heappush(ready, (-_number(node), order, node))

    for node in dict.fromkeys(node for node, _ in edges):
        if not waits.get(node):
            push(node)
    del roots, edges
    while ready:
        _, _, node = heapq.heappop(ready)
        given = pending.pop(node, {})
        for index, gradient in given.items():
            if wanted is not None and (node, index) in wanted:
                found[node, index] = gradient
        inputs = [_checked(node, index, given.get(index)) for index in range(max(given, default=-1) + 1)]
        del given
        passed = _call(node, inputs, wanted is None)
        del inputs
        for (following, index), gradient in zip(node.next_functions, passed, strict=False):
            if following is None:
                continue
            if gradient is not None:
                _add(pending, following, index, gradient)
            waits[following] -= 1
            if waits[following] == 0:
                push(following)
        del passed, node
    return found


def _dependencies(roots: list[Any]) -> dict[Any, int]:
    waits: dict[Any, int] = {}
    seen, stack = set(roots), list(roots)
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None:
                waits[following] = waits.get(following, 0) + 1
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
    return waits


def _number(node: Any) -> int:
    # Gradients are accumulated as soon as they are there.
    return 1 << 62 if hasattr(node, "variable") else node._sequence_nr()


def _add(pending: dict[Any, dict[int, Tensor]], node: Any, index: int, gradient: Tensor) -> None:
    here = pending.setdefault(node, {})
    here[index] = here[index] + gradient if index in here else gradient


def _checked(node: Any, index: int, gradient: Tensor | None) -> Tensor | None:
    """A gradient of the shape, type and device that the node's output had, as PyTorch's engine makes it."""
    if gradient is None or hasattr(node, "variable"):
        return gradient
    metadata = getattr(node, "_input_metadata", ())
    if index >= len(metadata):
        return gradient
    wanted = metadata[index]
    if gradient.device != wanted.device:
        raise RuntimeError(f"{node.name()}: a gradient on {gradient.device} for an output on {wanted.device}")
    if gradient.shape != wanted.shape:
        gradient = gradient.sum_to_size(wanted.shape)
    return gradient if gradient.dtype == wanted.dtype else gradient.to(wanted.dtype)


def _call(node: Any, inputs: list[Tensor | None], accumulates: bool) -> tuple[Tensor | None, ...]:
    variable = getattr(node, "variable", None)
    if variable is not None:
        if accumulates and inputs and inputs[0] is not None:
            _accumulate(variable, inputs[0])
        return ()
    if all(gradient is None for gradient in inputs):
        return (None,) * len(node.next_functions)
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        # A function in Python gets a gradient for every output.
        filled = [
            torch.zeros(wanted.shape, dtype=wanted.dtype, device=wanted.device) if gradient is None else gradient
            for gradient, wanted in zip_longest(inputs, getattr(node, "_input_metadata"))  # noqa: B009 - in no stub
        ]
        passed = node.apply(*filled)
    else:
        passed = node(*inputs)
    return passed if isinstance(passed, tuple) else (passed,)


def _accumulate(variable: Tensor, gradient: Tensor) -> None:
    if gradient.shape != variable.shape:
        gradient = gradient.sum_to_size(variable.shape)
    if gradient.device != variable.device:
        raise RuntimeError(
            f"a gradient on {gradient.device} for a parameter {tuple(variable.shape)} on {variable.device}"
        )
    gradient = gradient.to(variable.dtype)
    variable.grad = gradient.detach() if variable.grad is None else variable.grad + gradient
