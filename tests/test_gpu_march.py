"""The kernels that read and composite a volume on a GPU, in Triton's interpreter on a CPU, which needs a process of its
own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from r2l_nerfstudio.students import gpu_march

CASES = [(3, 1, 1, False), (4, 12, 2, False), (7, 5, 16, False), (4, 6, 2, True)]
"""Features, samples, rays of a group, and whether some samples are as dense as counts at most."""
PROGRAM = """
import json, sys
import torch
from r2l_nerfstudio.students.gpu_march import march, works
from r2l_nerfstudio.students.sparse_volume import composite, read_rows

assert works(torch.device("cpu"))
found = []
for channels, samples, group, is_dense in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    rays = 80  # fills no whole number of programs
    rows = (6 * torch.rand(50, 1 + channels) - 2).requires_grad_()
    with torch.no_grad():
        rows[1:40:3, 0] = 30.0 if is_dense else 0.0
    index = (torch.rand(4, 5, 6) * 50).int()
    points = torch.rand(rays, samples, 3)
    points[0], points[1] = 1.0, 0.0
    lengths, fractions = 3 * torch.rand(rays // group, samples), torch.rand(rays // group, samples)
    is_empty = torch.rand(rays // group) < 0.2
    weights = torch.randn(rays, channels + 5)
    own = march(rows, index, points, lengths, fractions, is_empty)
    (gradient,) = torch.autograd.grad((own * weights).sum(), rows)
    each = [tensor.repeat_interleave(group, 0) for tensor in (lengths, fractions)]
    truth = composite(read_rows(rows, index, points), *each, points, is_empty.repeat_interleave(group))
    truth = torch.cat(truth, dim=-1)
    (wanted,) = torch.autograd.grad((truth * weights).sum(), rows)
    assert truth.abs().max() > 0.5 and wanted.abs().max() > 0.5 and wanted[0].abs().max() > 0
    differences = own - truth, (gradient - wanted)[1:], gradient[0]
    found.append([float(difference.abs().max()) for difference in differences])
assert march(rows, index, points[:0], lengths[:0], fractions[:0], is_empty[:0]).shape == (0, channels + 5)
print(json.dumps(found))
"""


def test_values_and_gradients_equal_pytorchs() -> None:
    pytest.importorskip("triton", reason="PyTorch for CUDA on Linux brings Triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for (*_, is_dense), (value, gradient, of_empty_space) in zip(CASES, json.loads(done.stdout), strict=True):
        # PyTorch's own sums lose digits where samples are dense.
        assert value < (1e-2 if is_dense else 1e-5) and gradient < (1e-2 if is_dense else 1e-3)
        assert of_empty_space == 0.0


def test_a_device_without_them_is_told_from_one_that_has_them() -> None:
    assert not gpu_march.works(torch.device("cpu"))
