"""`ns-train` for machines without a network: stock models are built without LPIPS, which they would download."""

from __future__ import annotations

from nerfstudio.scripts.train import entrypoint

from r2l_nerfstudio.lpips import without_lpips

if __name__ == "__main__":
    with without_lpips():
        entrypoint()
