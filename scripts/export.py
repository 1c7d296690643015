"""A trained student in files that other programs open. Each is compared with torch before it is kept, where it can run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from nerfstudio.utils.rich_utils import CONSOLE

from r2l_nerfstudio.errors import command_line
from r2l_nerfstudio.export.graph import GraphInputs, GraphPart, GraphPrecision, GraphSpec
from r2l_nerfstudio.ranges import IntRange
from r2l_nerfstudio.run_config import load_run_config
from r2l_nerfstudio.student import Student, load_student

R2L_SIZE = 400
"""Default pixels along each side of an R2L student's image."""
R2L_SIZE_AT_ONCE = 256
"""Default pixels along each side where all rays of an R2L student's image pass through the graph in one piece."""
CELLS = 100
"""Default cells along each side of a MobileR2L student's image, as published."""


@dataclass
class GraphExport:
    """What all exports of a graph share."""

    load_config: Path
    """The student's run: its config.yml, or its folder."""
    output: Path
    """The file to write."""
    inputs: GraphInputs = "camera"
    """What goes in: a camera (camera_to_world [3, 4] and intrinsics fx, fy, cx, cy), or, for r2l, rays (origins and
    directions, any number)."""
    precision: GraphPrecision = "fp32"
    """Of the network's weights and arithmetic; the encoding stays in fp32."""
    width: Annotated[int, IntRange(1, 16384)] | None = None
    """Width of the image in pixels, fixed in the file. Default: 100 cells (400, 800 or 1200 pixels) for MobileR2L; 400
    for R2L, or 256 for parts of it and int8, whose rays pass through the graph in one piece."""
    height: Annotated[int, IntRange(1, 16384)] | None = None
    """Height of the image in pixels, fixed in the file. Default: as for the width."""
    step: Annotated[int, IntRange(0)] | None = None
    """Training step of the checkpoint; the newest by default."""
    overwrite: bool = False
    """Replace a file that is there."""

    def load(self, at_once: bool = False, **more: Any) -> tuple[Student, GraphSpec]:
        """Load the student on the CPU, and describe the graph to export.

        Args:
            at_once: whether all rays pass through the graph in one piece even if `part` is the whole.
            more: further fields of a `GraphSpec`.
        """
        student = load_student(self.load_config, device="cpu", step=self.step, engine="torch")
        if student.model.reads_ray_image:
            size = CELLS * student.model.factor
        else:
            size = R2L_SIZE_AT_ONCE if at_once or more.get("part", "whole") != "whole" else R2L_SIZE
        width = size if self.width is None else self.width
        height = size if self.height is None else self.height
        return student, GraphSpec(
            **{"precision": self.precision, **more}, inputs=self.inputs, width=width, height=height
        )


@dataclass
class Onnx(GraphExport):
    """One ONNX file: the whole student (rays, encoding, network), or a part of it for a phone's processors."""

    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """Of the network's weights and arithmetic; the encoding stays in fp32. int8 is calibrated on pseudo cameras of the
    capture, judged on its held-out photographs, and kept if it costs no more than half a decibel."""
    target: Literal["desktop", "mobile"] = "desktop"
    """mobile: fixed shapes, and only operators that a phone's own processors take by way of ONNX Runtime Mobile (NNAPI,
    QNN; Core ML unless in int8)."""
    part: GraphPart | None = None
    """whole (the default), or one of the three that it is made of: encoding (a camera, or rays, to the network's input),
    network (the default for mobile), values (the network's values to pictures)."""
    data: Path | None = None
    """For int8: where the student's capture is now; where it was in training, by default."""

    def main(self) -> None:
        """Write it, compare it, say so."""
        from r2l_nerfstudio.export.int8 import export_int8
        from r2l_nerfstudio.export.mobile_onnx import mobile_verdict
        from r2l_nerfstudio.export.onnx_file import export_onnx

        started = time.perf_counter()
        is_mobile = self.target == "mobile"
        part = self.part or ("network" if is_mobile else "whole")
        precision = "fp32" if self.precision == "int8" else self.precision
        student, spec = self.load(
            self.precision == "int8", precision=precision, part=part, is_static=is_mobile, is_plain=is_mobile
        )
        if self.precision == "int8":
            made = export_int8(student, spec, self.output, self.load_config, self.data, self.overwrite)
            CONSOLE.print(made.sentence, soft_wrap=True, highlight=False)
            psnr = made.parity
        else:
            psnr = export_onnx(student, spec, self.output, self.overwrite)
        if is_mobile:
            CONSOLE.print(mobile_verdict(self.output), soft_wrap=True, highlight=False)
        report(self.output, psnr, started)


@dataclass
class Coreml(GraphExport):
    """A Core ML package for iOS 16, macOS 13 and newer: the whole student, or a part of it."""

    output: tyro.conf.Positional[Path]
    """The .mlpackage to write."""
    precision: GraphPrecision = "fp16"
    """Of the network's weights and arithmetic; the encoding stays in fp32."""
    part: GraphPart = "whole"
    """whole, or one of the three that it is made of: encoding (a camera, or rays, to the network's input), network, values
    (the network's values to pictures)."""

    def main(self) -> None:
        """Write it, check its structure, on a Mac compare it, say so."""
        from r2l_nerfstudio.export.coreml_file import export_coreml

        started = time.perf_counter()
        # Apple's GPUs take sines of small angles only.
        student, spec = self.load(part=self.part, is_static=True, reduce_angles=True)
        psnr = export_coreml(student, spec, self.output, self.overwrite)
        report(self.output, psnr, started, not_compared="Core ML runs on a Mac alone")


@dataclass
class Openvino(GraphExport):
    """OpenVINO's .xml and .bin of the whole student."""

    def main(self) -> None:
        """Write them, compare them, say so."""
        from r2l_nerfstudio.export.openvino_file import export_openvino

        started = time.perf_counter()
        student, spec = self.load()
        psnr = export_openvino(student, spec, self.output, self.overwrite)
        report(self.output, psnr, started, self.output.with_suffix(".bin"))


@dataclass
class Tensorrt(GraphExport):
    """A plan for TensorRT, for the GPU of this machine; its metadata beside it in a .json."""

    def main(self) -> None:
        """Build it, compare it, say so."""
        self.build("tensorrt")

    def build(self, flavour: Literal["tensorrt", "tensorrt-rtx"]) -> None:
        """Either library's plan."""
        from r2l_nerfstudio.export.tensorrt_plan import export_plan

        started = time.perf_counter()
        student, spec = self.load()
        psnr = export_plan(student, spec, self.output, flavour, self.overwrite)
        report(self.output, psnr, started)


@dataclass
class TensorrtRtx(Tensorrt):
    """A plan for TensorRT-RTX, built without a GPU for any that it serves; its metadata beside it in a .json."""

    def main(self) -> None:
        """Build it, compare it where there is a GPU, say so."""
        self.build("tensorrt-rtx")


@dataclass
class TorchTensorrt(GraphExport):
    """A Torch-TensorRT program, for the GPU of this machine."""

    def main(self) -> None:
        """Build it, compare it, say so."""
        from r2l_nerfstudio.export.tensorrt_plan import export_torch_tensorrt

        started = time.perf_counter()
        student, spec = self.load()
        psnr = export_torch_tensorrt(student, spec, self.output, self.overwrite)
        report(self.output, psnr, started)


@dataclass
class Web:
    """A static web page that draws the student in a visitor's browser, offline."""

    output: tyro.conf.Positional[Path]
    """The folder to make."""
    load_config: Path
    """The student's run: its config.yml, or its folder."""
    title: str | None = None
    """Of the page; the run's experiment name by default."""
    data: Path | None = None
    """Where the student's capture is now; where it was in training, by default. Its cameras say where a visitor may go."""
    runtime: Path | None = None
    """The npm package onnxruntime-web as a .tgz file; fetched by npm once, by default."""
    step: Annotated[int, IntRange(0)] | None = None
    """Training step of the checkpoint; the newest by default."""
    overwrite: bool = False
    """Replace an export that is there."""
    serve: bool = False
    """Serve the folder when it is made, until interrupted; one that holds an export is served as it is, unless
    --overwrite is given."""
    host: str = "127.0.0.1"
    """Interface to serve on: this machine alone by default, 0.0.0.0 for all its networks."""
    port: Annotated[int, IntRange(0, 65535)] = 8090
    """Port to serve on; 0 for any free one."""

    def main(self) -> None:
        """Write the folder, and serve it if asked to."""
        from r2l_nerfstudio.export.web_folder import SCENE
        from r2l_nerfstudio.export.web_server import WebServer

        if not (self.serve and not self.overwrite and (self.output / SCENE).is_file()):
            self.write()
        if self.serve:
            with WebServer(self.output, self.host, self.port) as server:
                CONSOLE.print(f"Serving {self.output} at {server.address} until Ctrl+C.", soft_wrap=True)
                try:
                    server.serve_forever()
                except KeyboardInterrupt:
                    CONSOLE.print("Stopped.")

    def write(self) -> None:
        """Write the folder."""
        from r2l_nerfstudio.export.training_cameras import training_cameras
        from r2l_nerfstudio.export.web_folder import RUNTIME, export_web
        from r2l_nerfstudio.export.web_runtime import fetch_runtime

        started = time.perf_counter()
        cameras = training_cameras(self.load_config, self.data)
        student = load_student(self.load_config, device="cpu", step=self.step, engine="torch")
        runtime = fetch_runtime(self.runtime)
        title = self.title or load_run_config(self.load_config).experiment_name or student.method_name
        made = export_web(student, cameras, runtime, self.output, title, self.overwrite)
        for name, size in made.bytes.items():
            if not name.startswith(f"{RUNTIME}/"):
                quality = f", {made.psnr[name]:.0f} dB against torch" if name in made.psnr else ""
                CONSOLE.print(f"  {name}: {size / 1e6:.2f} MB{quality}", soft_wrap=True, highlight=False)
        total = sum(made.bytes.values())
        runtimes = sum(size for name, size in made.bytes.items() if name.startswith(f"{RUNTIME}/"))
        CONSOLE.print(
            f"Written: {self.output} ({total / 1e6:.1f} MB, {runtimes / 1e6:.1f} MB of them two builds of ONNX Runtime Web,"
            f" of which a visitor loads one; {time.perf_counter() - started:.0f} s).",
            soft_wrap=True,
        )


COMMANDS = {
    "onnx": Onnx,
    "coreml": Coreml,
    "openvino": Openvino,
    "tensorrt": Tensorrt,
    "tensorrt-rtx": TensorrtRtx,
    "torch-tensorrt": TorchTensorrt,
    "web": Web,
}


def report(
    output: Path,
    psnr: float | None,
    started: float,
    *more: Path,
    not_compared: str = "it runs on a GPU only",
) -> None:
    """One line on a finished export; a PSNR of None: it could not be run here, and why."""
    files = [file for path in (output, *more) for file in (path.rglob("*") if path.is_dir() else (path,))]
    size = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
    seconds = time.perf_counter() - started
    quality = (
        f"not compared with torch: {not_compared}" if psnr is None else f"{psnr:.0f} dB against torch on probe cameras"
    )
    CONSOLE.print(f"Written: {output} ({size:.1f} MB, {quality}, {seconds:.0f} s).", soft_wrap=True)


def main() -> None:
    """Console entry point `r2l-export`."""
    with command_line():
        tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__, prog="r2l-export").main()


if __name__ == "__main__":
    main()
