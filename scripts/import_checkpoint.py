"""Import a published R2L or MobileR2L checkpoint as an ordinary run, for ns-viewer, ns-eval, ns-render and r2l-export.

Nothing in the file is executed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from nerfstudio.utils.rich_utils import CONSOLE

from r2l_nerfstudio.distillation.frame_check import OWN_SHARE
from r2l_nerfstudio.errors import InputError, command_line
from r2l_nerfstudio.importing.capture_frame import LLFF_CENTERS, read_frame
from r2l_nerfstudio.importing.onnx_network import read_onnx
from r2l_nerfstudio.importing.published_network import PublishedNetwork, read_tar
from r2l_nerfstudio.importing.run_folder import check_layout, place, write_run
from r2l_nerfstudio.psnr import decibels


@dataclass
class ImportCheckpoint:
    """Read a published .tar (R2L, MobileR2L) or .onnx (MobileR2L), find its frame in the capture, render one image,
    compare it with the file's own weights, and write a run folder."""

    checkpoint: tyro.conf.Positional[Path]
    """The published .tar or .onnx file."""
    data: Path
    """Capture of the checkpoint's scene: a Blender scene, or an LLFF scene with poses_bounds.npy and a transforms.json."""
    output_dir: Path = Path("outputs")
    """Folder of all runs, as for ns-train."""
    experiment_name: str | None = None
    """Experiment name; by default that of the capture's folder."""
    teacher: Path | None = None
    """A trained run of this capture, to adopt its frame: needed to fine-tune the student with that teacher, unless both
    use the dataparser's defaults."""
    layout: Literal["auto", "blender", "llff"] = "auto"
    """Kind of capture; auto: llff if it has a poses_bounds.npy."""
    scene: str | None = None
    """LLFF scene of a published MobileR2L with a hard-coded origin: fern, flower, room, …; by default as the file
    says."""
    center: tuple[float, float, float] | None = None
    """Origin of an LLFF capture's frame in the coordinates of its poses_bounds.npy, for other MobileR2L checkpoints
    trained with one; the mean camera by default."""
    ndc: Literal["auto", "yes", "no"] = "auto"
    """Normalized device coordinates; auto: for a MobileR2L in an LLFF capture."""
    cells: tuple[int, int] | None = None
    """Rows and columns of the ray image that a MobileR2L was trained on; by default those of the file, or else the
    published ones."""
    near: float | None = None
    """Position of the first sample point, which may be negative; as published by default."""
    far: float | None = None
    """Position of the last sample point; as published by default."""
    num_points: int | None = None
    """Sample points per ray; read from the file by default."""
    num_frequencies: int | None = None
    """Octaves of the frequency encoding; read from the file by default."""

    def main(self) -> None:
        """Read the checkpoint, place it in the capture, compare it and write the run."""
        started = time.perf_counter()
        network = self._read()
        sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in network.sizes.items())
        CONSOLE.print(
            f"Read {self.checkpoint}: {network.kind}, {sizes}, {network.num_points} points, {network.num_frequencies}"
            " octaves.",
            soft_wrap=True,
            highlight=False,
        )
        layout = None if self.layout == "auto" else self.layout
        frame = read_frame(self.data, layout, self._center(network), self.teacher)
        check_layout(network, frame)
        CONSOLE.print(f"{frame.report}.", soft_wrap=True, highlight=False)
        is_ndc = {"auto": None, "yes": True, "no": False}[self.ndc]
        placement = place(network, frame, self.cells, self.near, self.far, is_ndc)
        made = write_run(placement, self.output_dir, self.experiment_name)
        if made.photos is not None:
            own, other = made.photos
            CONSOLE.print(
                f"Training photos: {decibels(own):.1f} dB from each photo's own camera, {decibels(other):.1f} dB from"
                " other photos' cameras (at thumbnail size).",
                soft_wrap=True,
                highlight=False,
            )
            if own > OWN_SHARE * other:
                CONSOLE.print(
                    "[yellow]From a photo's own camera the student renders it no better than from others: --data is"
                    " another scene than the checkpoint was trained on, or the checkpoint is barely trained.",
                    soft_wrap=True,
                )
        CONSOLE.print(
            f"Written: {made.folder} ({made.psnr:.0f} dB against the file's own weights, largest difference"
            f" {made.largest:.1e}; {time.perf_counter() - started:.0f} s).",
            soft_wrap=True,
            highlight=False,
        )
        CONSOLE.print(f"  ns-viewer --load-config {made.folder / 'config.yml'}", soft_wrap=True, highlight=False)

    def _read(self) -> PublishedNetwork:
        for name in ("num_points", "num_frequencies"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be a positive integer (got {value}).")
        if self.checkpoint.exists() and not self.checkpoint.is_file():  # A folder, a pipe, an endless device.
            kind = "a folder" if self.checkpoint.is_dir() else "not a regular file"
            raise InputError(f"{self.checkpoint} is {kind}: give a published .tar or .onnx file.")
        read = read_onnx if self.checkpoint.suffix.lower() == ".onnx" else read_tar
        return read(self.checkpoint, self.num_points, self.num_frequencies)

    def _center(self, network: PublishedNetwork) -> tuple[float, float, float] | None:
        if self.scene is None and self.center is None and network.kind == "mobile-r2l":
            # If the file names its scene, the published code used that scene's origin.
            return LLFF_CENTERS.get(network.arguments.get("scene", ""))
        if self.scene is None:
            return self.center
        if self.center is not None:
            raise InputError("--scene and --center both set the origin: give one of them.")
        if self.scene not in LLFF_CENTERS:
            raise InputError(
                f"--scene must be one of {', '.join(LLFF_CENTERS)} (got {self.scene}); for other scenes"
                " give --center X Y Z."
            )
        return LLFF_CENTERS[self.scene]


def main() -> None:
    """Run `r2l-import`."""
    with command_line():
        tyro.cli(ImportCheckpoint, description=__doc__, prog="r2l-import").main()


if __name__ == "__main__":
    main()
