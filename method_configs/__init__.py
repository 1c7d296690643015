"""One file per method that `ns-train` lists.

Nerfstudio loads this for every `ns-*` command: import only what is light.
"""

from .mobile_r2l import mobile_r2l, mobile_r2l_lite, mobile_r2l_paper
from .r2l import r2l, r2l_lite, r2l_paper

__all__ = ["mobile_r2l", "mobile_r2l_lite", "mobile_r2l_paper", "r2l", "r2l_lite", "r2l_paper"]
