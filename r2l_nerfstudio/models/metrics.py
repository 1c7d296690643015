"""Image metrics as they are usually computed: PSNR, SSIM, and LPIPS if its weights can be loaded.

Every figure is of one image, clamped to [0, 1]; a set of images gets the mean of its images' figures (not the PSNR of the
mean error). torchmetrics is imported late: it takes seconds, and every `ns-*` command imports this module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, cast

import torch
from jaxtyping import Float
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from r2l_nerfstudio.psnr import psnr as unclamped_psnr

LpipsNetwork = Literal["alex", "vgg"]

SSIM_WINDOW = 11
"""Side in pixels of SSIM's Gaussian window."""
SSIM_SIGMA = 1.5
"""Its standard deviation in pixels; with K1 = 0.01, K2 = 0.03 the settings of Wang et al. 2004."""


LEAST_DETAIL = 1e-6
"""Energy below which an image has no detail to compare with: differences of a quarter of a level in 256."""


@lru_cache(maxsize=2)
def _lpips(network: LpipsNetwork = "alex") -> torch.nn.Module | None:
    """Return the LPIPS network, downloaded on first use; None, with one log line, if it cannot be loaded."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        return LearnedPerceptualImagePatchSimilarity(net_type=network, normalize=True)
    except Exception as error:  # No network or no disk: many exceptions.
        CONSOLE.print(f"[yellow]Skipping LPIPS ({network}): its weights could not be loaded ({type(error).__name__}).")
        return None


def psnr(image: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]) -> float:
    """Return the PSNR in dB of an image, clamped to [0, 1], against one in [0, 1]."""
    return unclamped_psnr(image.float().clamp(0, 1), truth.float())


def ssim(image: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]) -> float:
    """Return the SSIM of an image, clamped to [0, 1], against one in [0, 1]: mean over channels and pixels.

    A Gaussian window of 11x11 pixels with a standard deviation of 1.5; beyond its border the image is reflected.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = structural_similarity_index_measure(
        *_batches(image, truth), data_range=1.0, gaussian_kernel=True, sigma=SSIM_SIGMA, kernel_size=SSIM_WINDOW
    )
    return float(cast(Tensor, found))  # It returns a tuple only with other options.


def lpips(
    image: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"], network: LpipsNetwork = "alex"
) -> float | None:
    """Return the LPIPS (Zhang et al. 2018, version 0.1) of an image, clamped to [0, 1], against one in [0, 1].

    Args:
        image: image to measure.
        truth: reference image.
        network: network whose features are compared. Figures of different networks are not comparable.

    Returns:
        The distance; None if the network's weights cannot be loaded.
    """
    measure = _lpips(network)
    if measure is None:
        return None
    prediction, target = _batches(image, truth)
    return float(measure.to(prediction.device)(prediction, target))


def gmsd(image: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]) -> float:
    """Gradient magnitude similarity deviation (Xue et al. 2014) of an image, clamped to [0, 1], against one in [0, 1].

    Edges decide it: 0 is equal, and a blurred image has about 0.1.
    """
    import piq

    return float(piq.gmsd(*_batches(image, truth), data_range=1.0))


def detail_energy(image: Float[Tensor, "height width 3"]) -> float:
    """Energy of an image's fine detail: mean square of its difference from itself, blurred by a Gaussian of one pixel.

    The ratio of two images' energies tells which of them is blurrier; noise counts as detail.
    """
    from torchvision.transforms.functional import gaussian_blur

    image = image.permute(2, 0, 1)[None].float().clamp(0, 1)
    return float((image - gaussian_blur(image, [7, 7], [1.0, 1.0])).square().mean())


def detail_share(image: Float[Tensor, "height width 3"], truth: Float[Tensor, "height width 3"]) -> float | None:
    """Return an image's `detail_energy` as a share of another's, or None if that is too smooth to have any."""
    whole = detail_energy(truth)
    return None if whole < LEAST_DETAIL else detail_energy(image) / whole


def image_metrics(
    rgb: Float[Tensor, "height width 3"],
    truth: Float[Tensor, "height width 3"],
    networks: tuple[LpipsNetwork, ...] = ("alex",),
) -> dict[str, float]:
    """Return metrics of an image in [0, 1].

    Args:
        rgb: image to measure.
        truth: reference image.
        networks: networks whose LPIPS is included.

    Returns:
        `psnr` (dB), `ssim` and, if its weights can be loaded, `lpips` (of AlexNet, as Nerfstudio reports it) and
        `lpips_vgg`.
    """
    metrics = {"psnr": psnr(rgb, truth), "ssim": ssim(rgb, truth)}
    for network in networks:
        found = lpips(rgb, truth, network)
        if found is not None:
            metrics["lpips" if network == "alex" else f"lpips_{network}"] = found
    return metrics


def mean_metrics(images: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return means over images of `image_metrics`, in order of first appearance.

    Raises:
        ValueError: if there is no image, or one lacks a figure that another has.
    """
    images = list(images)
    if not images or any(set(figures) != set(images[0]) for figures in images):
        raise ValueError("a mean needs at least one image, and the same figures of each")
    return {name: math.fsum(figures[name] for figures in images) / len(images) for name in images[0]}


def _batches(
    image: Tensor, truth: Tensor
) -> tuple[Float[Tensor, "1 3 height width"], Float[Tensor, "1 3 height width"]]:
    """Return them in torchmetrics' layout."""
    return image.permute(2, 0, 1)[None].float().clamp(0, 1), truth.permute(2, 0, 1)[None].float()
