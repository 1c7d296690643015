"""The fused kernel of the R2L network in Triton's interpreter on a CPU, which needs a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from networks import network

from r2l_nerfstudio.engines import triton_engine
from r2l_nerfstudio.engines.protocol import PARITY_DB, BrokenEngine, BuildSpec
from r2l_nerfstudio.engines.registry import build_engine
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.students.resmlp import ResMLP

CASES = [(128, "fp16", 6), (256, "fp16", 6), (64, "fp16", 10)]
PROGRAM = """
import json, sys
sys.path.insert(0, "tests")
import torch
from networks import network
from r2l_nerfstudio.engines.parity import psnr
from r2l_nerfstudio.engines.protocol import BuildSpec
from r2l_nerfstudio.engines.triton_engine import build, why_not
from r2l_nerfstudio.students.resmlp import ResMLP

found = []
for width, precision, depth in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    net = ResMLP(37, 5, width=width, depth=depth, zero_init=False).eval().requires_grad_(False)
    torch.nn.init.normal_(net.tail.weight, std=0.3)
    code = torch.rand(100, 37) * 2 - 1  # fills neither a tile nor a step
    assert why_not(torch.device("cpu"), precision) is None
    engine = build(BuildSpec(net, precision, torch.device("cpu")))
    values = engine(code)
    assert values.shape == (100, 5) and values.dtype == torch.float32 and net(code).std() > 0.05
    assert engine(code[:0]).shape == (0, 5)
    assert torch.equal(engine(code[:1]), values[:1])
    found.append(psnr(values, net(code)))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> list[float]:
    """PSNR in dB of every case against PyTorch in fp32."""
    pytest.importorskip("triton", reason="PyTorch for CUDA on Linux brings Triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{w}-{p}-{d} layers" for w, p, d in CASES])
def test_values_equal_pytorchs(case: int, found: list[float]) -> None:
    assert found[case] >= PARITY_DB[CASES[case][1]]


def test_refusals() -> None:
    device = torch.device("cpu")
    with pytest.raises(InputError, match="needs an NVIDIA GPU"):
        build_engine("triton", network("r2l"), "fp16", device)
    with pytest.raises(BrokenEngine, match="for r2l students"):
        triton_engine.build(BuildSpec(network("mobile-r2l"), "fp16", device))
    with pytest.raises(BrokenEngine, match="not 32"):
        triton_engine.build(BuildSpec(ResMLP(8, 3, width=32, depth=4), "fp16", device))
    for precision in ("fp32", "bf16"):
        assert "multiplies in fp16" in str(triton_engine.why_not(torch.device("cuda"), precision))
