"""Image metrics of a student: PSNR and SSIM always, LPIPS where its weights can be had."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor


@lru_cache(maxsize=1)
def _lpips() -> torch.nn.Module | None:
    """The LPIPS network, fetched at the first use; None, with one line that says so, where it cannot be had."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        return LearnedPerceptualImagePatchSimilarity(normalize=True)
    except Exception as error:  # no network, no disk: whatever keeps the weights away
        CONSOLE.print(f"[yellow]LPIPS is left out: its weights cannot be had ({type(error).__name__}).")
        return None


def image_metrics(rgb: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]) -> dict[str, float]:
    """PSNR (dB), SSIM and, if it can be had, LPIPS of an image in [0, 1]."""
    # Imported late: it takes seconds, and every `ns-*` command imports this module.
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    prediction = rgb.permute(2, 0, 1)[None].float().clamp(0, 1)
    target = truth.permute(2, 0, 1)[None].float()
    metrics = {
        "psnr": float(peak_signal_noise_ratio(prediction, target, data_range=1.0)),
        "ssim": float(structural_similarity_index_measure(prediction, target, data_range=1.0)),
    }
    network = _lpips()
    if network is not None:
        metrics["lpips"] = float(network.to(prediction.device)(prediction, target))
    return metrics
