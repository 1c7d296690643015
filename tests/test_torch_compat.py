"""The replacements for functions of newer PyTorch versions behave as these do."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from r2l_nerfstudio.distillation import muon
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.export import onnx_file
from r2l_nerfstudio.torch_compat import load_tensors


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon to compare with")
@pytest.mark.parametrize("shape", [(7, 7), (12, 5), (5, 12)])
@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("is_fast", [True, False])
def test_muon_takes_the_same_steps_as_torchs(
    shape: tuple[int, int], adjust_lr_fn: str, is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "is_bf16_fast", lambda _: is_fast)
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        kind([matrix], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust_lr_fn)
        for kind, matrix in ((muon.Muon, ours), (torch.optim.Muon, theirs))
    ]
    for _ in range(5):
        gradient = torch.randn(shape, generator=generator)
        for matrix, optimizer in zip((ours, theirs), optimizers, strict=True):
            matrix.grad = gradient.clone()
            optimizer.step()
    assert (ours - start).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=2e-3)  # as far as bf16 rounds


def test_a_checkpoint_that_names_code_is_refused_without_the_newest_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader for PyTorch before 2.5, which has no list of allowed names."""
    monkeypatch.delattr(torch.serialization, "safe_globals", raising=False)
    good, bad = tmp_path / "good.ckpt", tmp_path / "bad.ckpt"
    torch.save({"rate": np.float64(0.5), "weight": nn.Parameter(torch.ones(2)), "half": torch.ones(3).half()}, good)
    torch.save({"command": os.system}, bad)
    loaded = load_tensors(good)
    assert loaded["rate"] == 0.5 and torch.equal(loaded["weight"], torch.ones(2)) and loaded["half"].dtype == torch.half
    with pytest.raises(pickle.UnpicklingError, match="system"):
        load_tensors(bad)


def test_an_export_names_the_pytorch_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "has_graph_export", lambda: False)
    with pytest.raises(InputError, match=r"needs torch 2\.6 or newer, and this is torch \d"):
        onnx_file.require_onnx()
