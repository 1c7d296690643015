"""TorchInductor, compiled ahead of time: one artifact for all sizes, whose calls trace and compile nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from r2l_nerfstudio.engines import torch_engine
from r2l_nerfstudio.engines.protocol import BuildSpec, EngineName, Precision
from r2l_nerfstudio.engines.sizes import chunk_rows, in_chunks, in_dim, out_dim, reads_ray_image
from r2l_nerfstudio.engines.weights import FixedNetwork, RowsLast

_MOST_CELLS = 4096
"""Largest number of rows or columns of a ray image."""


def version() -> str:
    return f"{torch.__version__}, rows last"


def why_not(device: torch.device, precision: Precision) -> str | None:
    reason = torch_engine.why_not(device, precision)
    if reason is not None:
        return reason
    import torch._inductor

    if not hasattr(torch._inductor, "aoti_compile_and_package"):
        return f"it needs torch 2.6 or newer, and this is {torch.__version__}."
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except Exception as error:
            return f"Triton does not start ({type(error).__name__}: {error}): install the torch build that has it."
    if _compiler() is None:
        return "it needs a C++ compiler: install g++, or name one in the environment variable CXX."
    return None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def build(spec: BuildSpec) -> InductorEngine:
    """Compile, or load from the cache. Compiling a full-sized student takes half a minute. On CUDA: not verified
    yet."""
    file = None if spec.cache is None else spec.cache / f"inductor-{spec.precision}.pt2"
    if file is None:
        with tempfile.TemporaryDirectory() as folder:
            return InductorEngine(spec, _compiled(spec, Path(folder) / "network.pt2"))
    if not file.exists():
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = _compiled(spec, Path(folder) / "network.pt2")
            made.chmod(0o600)
            made.replace(file)
    return InductorEngine(spec, file)


def _compiled(spec: BuildSpec, file: Path) -> Path:
    network, device = spec.network, spec.device
    sizes: dict[int, torch.export.Dim] | None = None
    fixed: nn.Module = FixedNetwork(network, spec.precision)
    if reads_ray_image(network):
        # Encoded rays are in this memory order; transposing them would take as long as a layer.
        fixed = RowsLast(fixed)
        example = torch.zeros(1, 64, 72, in_dim(network), device=device, dtype=torch.float32)
        sizes = {axis: torch.export.Dim(name, min=2, max=_MOST_CELLS) for axis, name in ((1, "rows"), (2, "columns"))}
    else:
        example = torch.zeros(chunk_rows(device), in_dim(network), device=device, dtype=torch.float32)
    with torch.no_grad():
        program = torch.export.export(fixed, (example,), dynamic_shapes=(sizes,))
        made = torch._inductor.aoti_compile_and_package(
            program, package_path=str(file), inductor_configs={"freezing": True}
        )
    return Path(made)


class InductorEngine:
    """A network compiled by TorchInductor.

    Args:
        spec: what was built.
        file: the package; not needed after it has been loaded.
    """

    name: EngineName = "inductor"

    def __init__(self, spec: BuildSpec, file: Path) -> None:
        self.precision: Precision = spec.precision
        self._reads_image = reads_ray_image(spec.network)
        self._out_dim = out_dim(spec.network)
        self._rows = chunk_rows(spec.device)
        self._package = torch._inductor.aoti_load_package(str(file))

    def __call__(self, encoded: Float[Tensor, "*encoded"]) -> Float[Tensor, "*values"]:
        encoded = encoded.detach()
        if self._reads_image:
            frames = [self._package(frame.contiguous()) for frame in encoded.permute(0, 2, 3, 1).split(1)]
            return (torch.cat(frames) if len(frames) > 1 else frames[0]).permute(0, 3, 1, 2)
        return in_chunks(self._run, encoded, self._out_dim, self._rows)

    def _run(self, encoded: Tensor, values: Tensor) -> None:
        values.copy_(self._package(encoded))
