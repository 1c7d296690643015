"""Published figures that the tables quote, with their sources and caveats."""

from __future__ import annotations

from dataclasses import dataclass

NERF = "Mildenhall et al., ECCV 2020, table 1"
SNERG = "Hedman et al., ICCV 2021"
MOBILE_NERF = "Chen et al., CVPR 2023"
R2L = "Wang et al., ECCV 2022"
MOBILE_R2L = "Cao et al., CVPR 2023"


@dataclass(frozen=True)
class Quality:
    """Means over the eight scenes of each set; None where a figure is not quoted."""

    method: str
    source: str
    synthetic: tuple[float | None, float | None, float | None]
    """PSNR in dB, SSIM, LPIPS on NeRF-Synthetic at 800x800."""
    llff: tuple[float | None, float | None, float | None]
    """The same on LLFF at 1008x756."""


QUALITY = (
    Quality("NeRF", NERF, (31.01, 0.947, 0.081), (26.50, 0.811, 0.250)),
    Quality("NeRF-PyTorch", f"as quoted by {MOBILE_R2L}", (30.92, None, None), (26.26, None, None)),
    Quality("SNeRG", f"{SNERG}; as quoted by {MOBILE_R2L}", (30.38, None, None), (25.63, 0.818, 0.183)),
    Quality("MobileNeRF", MOBILE_NERF, (30.90, 0.947, None), (25.91, 0.825, 0.183)),
    Quality("MobileR2L", MOBILE_R2L, (31.34, None, None), (26.15, None, None)),
    Quality("MobileR2L's teacher", MOBILE_R2L, (33.09, None, None), (26.85, None, None)),
)

STORAGE = (
    ("MobileNeRF", MOBILE_R2L, 125.8, 201.5),
    ("SNeRG", MOBILE_R2L, 86.8, 337.3),
    ("MobileR2L", MOBILE_R2L, 8.3, 8.3),
)
"""Method, source, megabytes on disk of a NeRF-Synthetic and of an LLFF scene."""

LATENCY = (
    ("MobileNeRF", MOBILE_R2L, "iPhone 13", 17.54, 27.15),
    ("MobileR2L", MOBILE_R2L, "iPhone 13", 26.21, 18.04),
    ("MobileNeRF", MOBILE_R2L, "iPhone 14", 16.67, 20.98),
    ("MobileR2L", MOBILE_R2L, "iPhone 14", 22.65, 16.48),
)
"""Method, source, device, milliseconds per frame at 800x800 (NeRF-Synthetic) and 1008x756 (LLFF)."""

TRADE_OFF = (
    ("NeRF", R2L, 303.8, 30.47, 2.4),
    ("R2L", R2L, 11.79, 31.87, 23.7),
)
"""Method, source, MFLOP per ray, PSNR in dB on NeRF-Synthetic at 400x400, megabytes. R2L has 1/26 of NeRF's FLOP and
+1.40 dB."""


@dataclass(frozen=True)
class PageSize:
    """What a scene of another representation weighs, without its viewer, and its quality."""

    method: str
    source: str
    scenes: str
    megabytes: float
    psnr: float
    """In dB; mean over the scenes."""


SURVEY = "3dgs-compression-survey"
PAGE_SIZES = (
    PageSize("HAC++, low rate", SURVEY, "NeRF-Synthetic 800x800", 0.79, 32.77),
    PageSize("Self-organizing Gaussians", SURVEY, "NeRF-Synthetic 800x800", 4.1, 33.23),
    PageSize("gsplat PNG, 1.0 M splats", SURVEY, "mip-NeRF 360", 16.0, 27.3),
    PageSize("gsplat PNG, 0.36 M splats", SURVEY, "mip-NeRF 360", 6.9, 26.6),
    PageSize("MobileNeRF", MOBILE_R2L, "NeRF-Synthetic 800x800", 125.8, 30.90),
    PageSize("SNeRG", MOBILE_R2L, "NeRF-Synthetic 800x800", 86.8, 30.38),
    PageSize("MobileR2L", MOBILE_R2L, "NeRF-Synthetic 800x800", 8.3, 31.34),
)

FOOTNOTES = (
    "SSIM and LPIPS of R2L and MobileR2L are not quoted: their code reads height as channels, which gives an SSIM of about"
    " .99 for anything, and rescales images before LPIPS. NeRF-PyTorch's and the teacher's come from that code too.",
    "R2L's PSNR is at 400x400, all others' on NeRF-Synthetic at 800x800; LLFF is at 1008x756.",
    "R2L and MobileR2L choose their best checkpoint on the test images. Ours never sees them before the last figure.",
    "The 8.3 MB of MobileR2L are 28 blocks, BatchNorm folded, in half precision; its code trains 29 blocks (8.6 MB).",
    "LPIPS is VGG's in NeRF's, SNeRG's and MobileNeRF's papers; ours is given for VGG and AlexNet where the weights can be"
    " loaded.",
)
