"""The MobileR2L network is the published one."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.students.mobile import ConvBlock, MobileR2L, up_steps


def test_mobile_r2l_has_the_published_size() -> None:
    network = MobileR2L(312, 3, width=256, blocks=29, factor=8)
    assert sum(p.numel() for p in network.parameters()) == 4_305_539  # 4.306 M
    assert sum(t.numel() for t in network.state_dict().values()) * 2 < 8.7e6  # fp16, running statistics included
    assert network.flops_per_cell * 100 * 100 / 1e9 == pytest.approx(101.2, abs=0.1)


@pytest.mark.parametrize("factor", [4, 12])
def test_flops_are_what_torch_counts(factor: int) -> None:
    network = MobileR2L(10, 5, width=8, blocks=2, factor=factor, up_width=6, last_width=4)
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 10, 3, 5))
    assert network.flops_per_cell * 15 == counter.get_total_flops()


@pytest.mark.parametrize(
    ("factor", "steps"), [(2, [2]), (3, [3]), (4, [2, 2]), (6, [2, 3]), (8, [2, 2, 2]), (12, [2, 2, 3])]
)
def test_upsampling_factors(factor: int, steps: list[int]) -> None:
    assert up_steps(factor) == steps
    network = MobileR2L(10, 5, width=8, blocks=1, factor=factor, up_width=6, last_width=4)
    assert network(torch.zeros(2, 10, 3, 4)).shape == (2, 5, 3 * factor, 4 * factor)


@pytest.mark.parametrize("factor", [0, 1, 5, 9, 18, 10])
def test_impossible_upsampling_factor_is_an_error_that_names_the_flag(factor: int) -> None:
    with pytest.raises(InputError, match="--pipeline.model.upsampling-factor"):
        MobileR2L(10, factor=factor)


def test_forward_is_head_blocks_long_skip_up_tail() -> None:
    network = MobileR2L(7, 3, width=8, blocks=2, factor=4, up_width=6, last_width=4, zero_init=False).eval()
    encoded = torch.randn(1, 7, 3, 3)
    hidden = first = torch.nn.functional.gelu(network.head(encoded))
    for block in network.blocks:
        inner = torch.nn.functional.gelu(block.first_norm(block.first(hidden)))
        hidden = hidden + block.second_norm(block.second(inner))
    torch.testing.assert_close(network(encoded), network.tail(network.up(first + hidden)).sigmoid())


@pytest.mark.parametrize("joined", [0, 5])
@pytest.mark.parametrize("factor", [2, 3, 4, 6, 8, 12])
def test_pixels_without_those_of_the_margin_are_the_same(factor: int, joined: int) -> None:
    torch.manual_seed(0)
    sizes = {"width": 8, "blocks": 1, "factor": factor, "up_width": 6, "last_width": 4, "joined": joined}
    network = MobileR2L(5 + joined * factor**2, 3, **sizes).eval()
    encoded = torch.randn(2, network.in_dim, 4, 5)
    whole = network(encoded)[..., factor:-factor, factor:-factor]
    torch.testing.assert_close(network(encoded, margin=1), whole)


@pytest.mark.parametrize("join_blocks", [0, 2])
def test_with_silent_cells_a_pixel_depends_on_its_own_numbers_only(join_blocks: int) -> None:
    torch.manual_seed(0)
    network = MobileR2L(
        5 + 3 * 16, 4, width=8, blocks=1, factor=4, joined=3, join_width=8, join_blocks=join_blocks
    ).eval()
    network.silence_cells()
    encoded = torch.randn(2, network.in_dim, 3, 2)
    pixels = torch.nn.functional.pixel_shuffle(encoded[:, 5:], 4).permute(0, 2, 3, 1)
    for block in network.join_blocks:
        assert torch.equal(block(encoded[:, :8]), encoded[:, :8])  # the identity, which learns nevertheless
        torch.nn.init.normal_(block.second.weight)
    expected = network.forward_pixels(pixels.reshape(-1, 3)).view(2, 12, 8, 4)
    torch.testing.assert_close(network(encoded), expected.permute(0, 3, 1, 2))
    with torch.no_grad():
        network.join.weight[:, 0] = 1.0
    assert not torch.allclose(network(encoded), expected.permute(0, 3, 1, 2))


def test_zero_init_starts_as_the_identity() -> None:
    block = ConvBlock(8, zero_init=True)
    hidden = torch.randn(2, 8, 3, 3)
    assert torch.equal(block(hidden), hidden)


@pytest.mark.parametrize("factor", [4, 8, 12])
def test_a_pixel_depends_only_on_its_cell_and_the_cells_around_it(factor: int) -> None:
    torch.manual_seed(0)
    network = MobileR2L(5, 3, width=8, blocks=1, factor=factor, up_width=6, last_width=4, zero_init=False).eval()
    encoded = torch.randn(1, 5, 5, 5)
    far = encoded.clone()
    far[..., :, 0] += 1
    far[..., 4, :] += 1
    own = slice(2 * factor, 3 * factor)
    assert torch.equal(network(encoded)[..., own, own], network(far)[..., own, own])
    near = encoded.clone()
    near[..., 1, 1] += 1
    assert not torch.equal(network(encoded)[..., own, own], network(near)[..., own, own])
