"""Conditions on the installed PyTorch version, for tests."""

from __future__ import annotations

import pytest
import torch
import torch._inductor

from r2l_nerfstudio.torch_compat import has_graph_export


def _has_half_on_cpu() -> bool:
    try:
        torch.nn.functional.linear(torch.ones(2, 2).half(), torch.ones(2, 2).half())
        torch.nn.functional.conv2d(torch.ones(1, 1, 2, 2).half(), torch.ones(1, 1, 1, 1).half())
    except RuntimeError:
        return False
    return True


needs_half_on_cpu = pytest.mark.skipif(not _has_half_on_cpu(), reason="this PyTorch has no fp16 arithmetic on CPUs")
needs_graph_export = pytest.mark.skipif(not has_graph_export(), reason="exports need torch 2.6 or newer")
needs_ahead_of_time_compiler = pytest.mark.skipif(
    not hasattr(torch._inductor, "aoti_compile_and_package"), reason="TorchInductor writes packages from torch 2.6 on"
)
