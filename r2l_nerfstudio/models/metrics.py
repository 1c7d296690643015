"""Image metrics of a student: PSNR and SSIM always, LPIPS where its weights can be had.

torchmetrics is imported late: it takes seconds, and every `ns-*` command imports this module.
"""

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


def psnr(image: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]) -> float:
    """PSNR in dB of an image, clamped to [0, 1], against one in [0, 1]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(*_batches(image, truth), data_range=1.0))


def ssim(image: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]) -> float:
    """SSIM of an image, clamped to [0, 1], against one in [0, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(structural_similarity_index_measure(*_batches(image, truth), data_range=1.0))


def image_metrics(rgb: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]) -> dict[str, float]:
    """PSNR (dB), SSIM and, if it can be had, LPIPS of an image in [0, 1]."""
    metrics = {"psnr": psnr(rgb, truth), "ssim": ssim(rgb, truth)}
    network = _lpips()
    if network is not None:
        prediction, target = _batches(rgb, truth)
        metrics["lpips"] = float(network.to(prediction.device)(prediction, target))
    return metrics


def _batches(
    image: Tensor, truth: Tensor
) -> tuple[Float[Tensor, "1 3 height width"], Float[Tensor, "1 3 height width"]]:
    """As torchmetrics takes them."""
    return image.permute(2, 0, 1)[None].float().clamp(0, 1), truth.permute(2, 0, 1)[None].float()
