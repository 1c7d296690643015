"""Composited rays on a GPU in parts: values and gradients equal those of all rays at once."""

from __future__ import annotations

import pytest
import torch
from test_composited import KINDS, encoding, rays

from r2l_nerfstudio.models import composited_encoding
from r2l_nerfstudio.models.composited_encoding import CompositedEncoding
from r2l_nerfstudio.rays.constants import constant


@pytest.mark.parametrize(("spacing", "warp"), KINDS)
@pytest.mark.parametrize("group", [1, 4])
def test_rays_in_parts_equal_all_rays_at_once(
    spacing: str, warp: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: CompositedEncoding = encoding(spacing, warp)
    origins, directions = (tensor[:600] for tensor in rays())
    span = made.span(origins[::group, None], directions.view(-1, group, 3))
    found = []
    for at_once in (1 << 17, 128):  # 600 rays: all of them, and five parts of which the last is smaller
        monkeypatch.setattr(composited_encoding, "RAYS_AT_ONCE", at_once)
        made.volume.rows.grad = None
        values, is_empty = made.in_torch(span, False, 12)
        torch.cat(values, dim=-1).square().sum().backward()
        found.append(([*values, is_empty], made.volume.rows.grad))
    for whole, parts in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(whole, parts)
    assert found[0][1] is not None and found[0][1].abs().sum() > 0
    torch.testing.assert_close(found[0][1], found[1][1])
    with torch.no_grad():  # a frame
        values, _ = made.in_torch(span, False, 12)
    torch.testing.assert_close(torch.cat(values, dim=-1), torch.cat(found[0][0][:-1], dim=-1))


def test_jitter_is_the_same_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample points are placed once: a step along the gradients changes the loss as they predict."""
    made = encoding("sphere", "ball")
    origins, directions = (tensor[:300] for tensor in rays())
    span = made.span(origins[:, None], directions[:, None])
    gradients = []
    for at_once in (1 << 17, 64):
        monkeypatch.setattr(composited_encoding, "RAYS_AT_ONCE", at_once)
        torch.manual_seed(3)
        made.volume.rows.grad = None
        values, _ = made.in_torch(span, True, 12)
        loss = torch.cat(values, dim=-1).square().sum()
        loss.backward()
        with torch.no_grad():
            kept = made.volume.rows.clone()
            made.volume.rows.add_(made.volume.rows.grad, alpha=-1e-4)
            torch.manual_seed(3)
            after = torch.cat(made.in_torch(span, True, 12)[0], dim=-1).square().sum()
            expected = 1e-4 * made.volume.rows.grad.square().sum()
            made.volume.rows.copy_(kept)
        gradients.append(((loss - after) / expected).item())
    assert gradients == pytest.approx([1.0, 1.0], abs=0.1)


def test_constants_have_the_type_of_their_operand() -> None:
    like = torch.zeros(2, dtype=torch.float64)
    assert torch.equal(constant(like, [1, 2.5]), torch.tensor([1.0, 2.5], dtype=torch.float64))
