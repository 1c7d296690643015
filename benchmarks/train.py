"""Speed of a training step, beside bare matrix products and the published training loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from benchmarks.figures import RESULTS, results_stem, write_figures
from benchmarks.recipes import configured
from benchmarks.render import fastest, products
from r2l_nerfstudio.distillation.pipeline import DistillationPipeline
from r2l_nerfstudio.engines.cache import device_name
from r2l_nerfstudio.engines.protocol import DTYPES, Precision
from r2l_nerfstudio.engines.torch_engine import is_bf16_fast

ON_CPU = {"r2l": 8192, "r2l-lite": 4096, "mobile-r2l": 1 << 18, "mobile-r2l-lite": 8192}
"""Pixels per iteration on a CPU; a GPU uses the method's own."""
PAPER = {"r2l": "r2l-paper", "mobile-r2l": "mobile-r2l-paper"}
RAYS_PER_FILE = 4096
POOL_BATCHES = 20
FRESH_SHARE = 5 / 6


@dataclass
class Train:
    """Time a training step of each method and its parts, beside bare matrix products with the shapes and precision of its
    network's forward and backward pass, and a re-creation of the published loop with the same network."""

    teacher: Path
    """Any trained run, which renders the views."""
    data: Path | None = None
    """The teacher's capture, if it has moved."""
    methods: tuple[str, ...] = tuple(ON_CPU)
    """Methods to measure."""
    rays: int | None = None
    """Pixels per iteration; by default the method's own on a GPU, fewer on a CPU."""
    seconds: float = 20.0
    """Seconds of measuring per method; the fastest call of all rounds is reported."""
    results_dir: Path = RESULTS
    """Folder for the figures."""
    cache_dir: Path | None = None
    """Folder for teacher views."""

    def main(self) -> None:
        """Measure, and write `train_DEVICE.{json,md}`."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = device_name(device)
        figures: dict[str, Any] = {"device": name, "torch": torch.__version__, "students": []}
        stem = results_stem(self.results_dir, "train", name)
        for method in self.methods:
            figures["students"].append(self._student(method, device))
            write_figures(stem, figures, as_markdown(figures))
        CONSOLE.print(as_markdown(figures), markup=False, highlight=False, soft_wrap=True)
        CONSOLE.print(f"Written: {stem}.json, .md")

    def _student(self, method: str, device: torch.device) -> dict[str, Any]:
        CONSOLE.print(f"{method} …")
        changes: dict[str, Any] = {
            "pipeline.datamanager.num_views": 8,
            "pipeline.datamanager.cache_dir": self.cache_dir,
        }
        rays = self.rays or (ON_CPU[method] if device.type == "cpu" else None)
        if rays is not None:
            changes["pipeline.datamanager.train_num_rays_per_batch"] = rays
        step = Step(self._pipeline(method, changes))
        pipeline = step.pipeline
        bundle = pipeline.datamanager.next_batch(0).ray_bundle
        encoded = pipeline.model.encode(bundle.origins, bundle.directions)
        shapes = products(pipeline.model.network, encoded.flatten(0, -2).detach())
        precision: Precision = "bf16" if pipeline.config.bf16 and is_bf16_fast(device) else "fp32"
        learns_encoding = pipeline.model.volume is not None or pipeline.model.composited is not None
        bare = BareStep(shapes, DTYPES[precision], learns_encoding, device)
        calls: dict[str, Callable[[], Any]] = {
            "whole": step,
            "batch": lambda: pipeline.datamanager.next_batch(0),
            "encoding": lambda: pipeline.model.encode(bundle.origins, bundle.directions),
            "optimizers": step.optimize,
            "bare": bare,
        }
        with tempfile.TemporaryDirectory() as folder:
            if method in PAPER:
                per_step = pipeline.config.datamanager.train_num_rays_per_batch
                changes["pipeline.datamanager.train_num_rays_per_batch"] = per_step
                calls["published"] = PublishedStep(Step(self._pipeline(PAPER[method], changes)), Path(folder))
            taken = fastest(calls, self.seconds, device)
        found = {
            "method": method,
            "precision": precision,
            "pixels_per_step": pipeline.config.datamanager.train_num_rays_per_batch,
            "gflop_per_step": round(bare.flops / 1e9, 1),
            **{f"{name}_ms": round(ms, 1) for name, ms in taken.items()},
            "share_of_bare": round(taken["bare"] / taken["whole"], 3),
        }
        if "published" in taken:
            found["published_over_ours"] = round(taken["published"] / taken["whole"], 2)
        return found

    def _pipeline(self, method: str, changes: dict[str, Any]) -> tuple[DistillationPipeline, dict[str, Any]]:
        config = configured(method, changes)
        config.teacher, config.data = self.teacher, self.data
        config.inherit_from_teacher()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return DistillationPipeline(config.pipeline, device), config.optimizers


class Step:
    """One training iteration as `ns-train` runs it, without its log.

    Args:
        trained: pipeline, and the configuration of its optimizers.
    """

    def __init__(self, trained: tuple[DistillationPipeline, dict[str, Any]]) -> None:
        self.pipeline, optimizers = trained
        self.pipeline.train()
        self.optimizers = Optimizers(optimizers, self.pipeline.get_param_groups())

    def __call__(self) -> None:
        self.pipeline.train_step(self.optimizers, 0)

    def optimize(self) -> None:
        """Step the optimizers."""
        self.pipeline.update_weights(self.optimizers, 0)


class BareStep:
    """Run only the `torch.matmul` of all layers: outputs, and gradients of weights and of inputs.

    Args:
        shapes: rows, inner and outer width of each layer's product, the first layer first.
        dtype: precision.
        first_input: whether the gradient of the first layer's input is needed.
        device: where.
    """

    def __init__(
        self, shapes: list[tuple[int, int, int]], dtype: torch.dtype, first_input: bool, device: torch.device
    ) -> None:
        self.shapes = shapes
        self.first_input = first_input
        self.flops = sum(2 * a * b * c * (3 if first_input or i else 2) for i, (a, b, c) in enumerate(shapes))

        def matrix(*size: int) -> Tensor:
            return torch.rand(size, device=device, dtype=dtype)

        self.matrices = {
            (rows, inner, outer): [matrix(rows, inner), matrix(inner, outer), matrix(rows, outer)]
            for rows, inner, outer in set(shapes)
        }
        self.gradients = {
            key: [torch.empty_like(inputs), torch.empty_like(weights)]
            for key, (inputs, weights, _) in self.matrices.items()
        }

    def __call__(self) -> None:
        for number, shape in enumerate(self.shapes):
            inputs, weights, outputs = self.matrices[shape]
            input_gradient, weight_gradient = self.gradients[shape]
            torch.matmul(inputs, weights, out=outputs)
            torch.matmul(inputs.T, outputs, out=weight_gradient)
            if number or self.first_input:
                torch.matmul(outputs, weights.T, out=input_gradient)


class PublishedStep:
    """An iteration as R2L's public training loop runs it, re-created: fresh rays from files of 4096, a pool of hard rays of
    20 batches permuted on the host, the batch's errors sorted, fp32, autograd's anomaly detection left on.

    Args:
        step: of the published recipe, on the same network and batch.
        folder: for the files of rays.
    """

    def __init__(self, step: Step, folder: Path) -> None:
        self.step = step
        self.rays = step.pipeline.config.datamanager.train_num_rays_per_batch
        random = np.random.default_rng(0)
        self.files = [
            folder / f"{index}.npy" for index in range(max(1, round(self.rays * FRESH_SHARE / RAYS_PER_FILE)))
        ]
        for file in self.files:
            np.save(file, random.random((RAYS_PER_FILE, 9), dtype=np.float32))
        self.pool = random.random((POOL_BATCHES * len(self.files) * RAYS_PER_FILE, 9), dtype=np.float32)

    def __call__(self) -> None:
        fresh = np.concatenate([np.load(file) for file in self.files])
        order = np.random.permutation(len(self.pool))  # noqa: NPY002 - as published
        records = np.concatenate([fresh, self.pool[order[: max(0, self.rays - len(fresh))]]])
        on_device = torch.from_numpy(records).to(self.step.pipeline.model.device)
        with torch.autograd.set_detect_anomaly(True, check_nan=True):
            self.step()
        torch.sort(on_device[:, -1].cpu(), descending=True)


def as_markdown(figures: dict[str, Any]) -> str:
    """Return the figures as one table."""
    lines = [
        f"# Training on {figures['device']}",
        "",
        f"`python -m benchmarks train`, torch {figures['torch']}, one run:"
        " the fastest call of many in turns, in milliseconds.",
        "*Bare* is `torch.matmul` for the forward and backward pass of the network's layers at their own shapes, in the",
        "training's precision (fp32 where the machine has no bf16 arithmetic);",
        "*published* a re-creation of the public loop on the same network and batch.",
        "",
        "| method | precision | pixels a step | whole step | batch | encoding | optimizers | bare | bare / whole"
        " | published | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in figures["students"]:
        published = f"{row['published_ms']:g} | {row['published_over_ours']:g}x" if "published_ms" in row else "| "
        lines.append(
            f"| {row['method']} | {row['precision']} | {row['pixels_per_step']} | {row['whole_ms']:g} |"
            f" {row['batch_ms']:g} |"
            f" {row['encoding_ms']:g} | {row['optimizers_ms']:g} | {row['bare_ms']:g} | {row['share_of_bare']:.0%} |"
            f" {published} |"
        )
    return "\n".join(lines) + "\n"
