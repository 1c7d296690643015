"""The R2L network is the published one."""

import subprocess
import sys

import pytest
import torch

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.students.resmlp import ResMLP


def test_r2l_has_the_published_size() -> None:
    network = ResMLP(1008, 3, width=256, depth=88)
    assert sum(p.numel() for p in network.parameters()) == 5_917_187  # 5.917 M
    assert sum(isinstance(m, torch.nn.Linear) for m in network.modules()) == 88
    assert network.flops_per_ray / 1e6 == pytest.approx(11.79, abs=0.005)


def test_forward_is_head_blocks_long_skip_tail() -> None:
    network = ResMLP(7, 5, width=8, depth=6, zero_init=False)
    encoded = torch.randn(3, 7)
    hidden = first = network.head(encoded).relu()
    for block in network.blocks:
        hidden = hidden + block.second(block.first(hidden).relu())
    torch.testing.assert_close(network(encoded), network.tail(first + hidden).sigmoid())


def test_zero_init_starts_as_the_identity() -> None:
    network = ResMLP(7, 5, width=8, depth=30, zero_init=True)
    hidden = torch.randn(3, 8)
    assert torch.equal(network.blocks(hidden), hidden)


@pytest.mark.parametrize("depth", [3, 2, 87])
def test_impossible_depth_is_an_error_that_names_the_flag(depth) -> None:
    with pytest.raises(InputError, match="--pipeline.model.depth"):
        ResMLP(7, depth=depth)


def test_students_and_rays_do_without_nerfstudio() -> None:
    encoded = (
        "import sys; import r2l_nerfstudio.students.resmlp, r2l_nerfstudio.rays.ray_encoding;"
        "sys.exit(any(name.split('.')[0] == 'nerfstudio' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", encoded], check=False).returncode == 0
