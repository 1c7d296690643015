"""Export a trained student to files that other programs open. Each is reloaded and checked against PyTorch where the
platform can run it."""

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
"""Default pixels along each side where all rays of an R2L student's image pass through the graph at once."""
CELLS = 100
"""Default cells along each side of a MobileR2L student's ray image, as published."""


@dataclass
class GraphExport:
    """Options shared by all exports of a graph."""

    load_config: Path
    """The student's run: its config.yml or folder."""
    output: Path
    """The file to write."""
    inputs: GraphInputs = "camera"
    """Inputs of the graph: a camera (camera_to_world [3, 4] and intrinsics fx, fy, cx, cy), or, for r2l, rays (origins
    and directions, any number)."""
    precision: GraphPrecision = "fp32"
    """Precision of the network's weights and arithmetic; the encoding stays in fp32."""
    width: Annotated[int, IntRange(1, 16384)] | None = None
    """Width of the image in pixels, fixed in the file. Default: 100 cells (400, 800 or 1200 pixels) for MobileR2L; 400
    for R2L, or 256 for parts of it and int8, whose rays pass through the graph at once."""
    height: Annotated[int, IntRange(1, 16384)] | None = None
    """Height of the image in pixels, fixed in the file. Default: as for --width."""
    step: Annotated[int, IntRange(0)] | None = None
    """Training step of the checkpoint; the newest by default."""
    overwrite: bool = False
    """Replace an existing file."""

    def load(self, at_once: bool = False, **more: Any) -> tuple[Student, GraphSpec]:
        """Load the student on the CPU and describe the graph to export.

        Args:
            at_once: whether all rays pass through the graph at once even if `part` is the whole.
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
    """One ONNX file: the whole student (rays, encoding, network), or a part of it for the processors of phones."""

    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """Precision of the network's weights and arithmetic; the encoding stays in fp32. int8 is calibrated on sampled
    cameras of the capture, measured on its held-out photos, and kept if it costs at most 0.5 dB."""
    target: Literal["desktop", "mobile"] = "desktop"
    """mobile: fixed shapes, and only operators that phone processors support through ONNX Runtime Mobile (NNAPI, QNN;
    Core ML unless in int8)."""
    part: GraphPart | None = None
    """whole (the default), or one of its three parts: encoding (camera or rays to the network's input), network (the
    default for mobile), values (the network's values to images)."""
    data: Path | None = None
    """int8: the capture's location, if it has moved since training."""

    def main(self) -> None:
        """Write the file, check it and report."""
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
    """A Core ML package for iOS 16, macOS 13 and newer: the whole student or a part of it."""

    output: tyro.conf.Positional[Path]
    """The .mlpackage to write."""
    precision: GraphPrecision = "fp16"
    """Precision of the network's weights and arithmetic; the encoding stays in fp32."""
    part: GraphPart = "whole"
    """whole, or one of its three parts: encoding (camera or rays to the network's input), network, values (the
    network's values to images)."""

    def main(self) -> None:
        """Write the package, check its structure (on a Mac also its values) and report."""
        from r2l_nerfstudio.export.coreml_file import export_coreml

        started = time.perf_counter()
        # The sine of Apple's GPUs is accurate for small angles only.
        student, spec = self.load(part=self.part, is_static=True, reduce_angles=True)
        psnr = export_coreml(student, spec, self.output, self.overwrite)
        report(self.output, psnr, started, not_compared="Core ML runs on a Mac only")


@dataclass
class Openvino(GraphExport):
    """OpenVINO's .xml and .bin files of the whole student."""

    def main(self) -> None:
        """Write the files, check them and report."""
        from r2l_nerfstudio.export.openvino_file import export_openvino

        started = time.perf_counter()
        student, spec = self.load()
        psnr = export_openvino(student, spec, self.output, self.overwrite)
        report(self.output, psnr, started, self.output.with_suffix(".bin"))


@dataclass
class Tensorrt(GraphExport):
    """A TensorRT plan for this machine's GPU, with its metadata in a .json beside it."""

    def main(self) -> None:
        """Build the plan, check it and report."""
        self.build("tensorrt")

    def build(self, flavour: Literal["tensorrt", "tensorrt-rtx"]) -> None:
        """Build a plan with either library."""
        from r2l_nerfstudio.export.tensorrt_plan import export_plan

        started = time.perf_counter()
        student, spec = self.load()
        psnr = export_plan(student, spec, self.output, flavour, self.overwrite)
        report(self.output, psnr, started)


@dataclass
class TensorrtRtx(Tensorrt):
    """A TensorRT-RTX plan, built without a GPU for any GPU that the library supports, with its metadata in a .json
    beside it."""

    def main(self) -> None:
        """Build the plan, check it if there is a GPU, and report."""
        self.build("tensorrt-rtx")


@dataclass
class TorchTensorrt(GraphExport):
    """A Torch-TensorRT program for this machine's GPU."""

    def main(self) -> None:
        """Build the program, check it and report."""
        from r2l_nerfstudio.export.tensorrt_plan import export_torch_tensorrt

        started = time.perf_counter()
        student, spec = self.load()
        psnr = export_torch_tensorrt(student, spec, self.output, self.overwrite)
        report(self.output, psnr, started)


@dataclass
class Web:
    """A static web page that renders the student in the browser, offline."""

    output: tyro.conf.Positional[Path]
    """The folder to write."""
    load_config: Path
    """The student's run: its config.yml or folder."""
    title: str | None = None
    """Title of the page; the run's experiment name by default."""
    data: Path | None = None
    """The capture's location, if it has moved since training. Its cameras limit where a visitor may move."""
    runtime: Path | None = None
    """The npm package onnxruntime-web as a .tgz file; by default npm downloads it once."""
    precision: Literal["auto", "fp16", "int8"] = "auto"
    """Precision of the weights that browsers with WebGPU load; auto: int8 if it loses at most 0.5 dB, else fp16."""
    fallback: bool = True
    """Include ONNX Runtime Web, which browsers without WebGPU load."""
    single_file: bool = False
    """Write one HTML file instead of a folder, with everything inside. It opens without a server, and needs WebGPU."""
    step: Annotated[int, IntRange(0)] | None = None
    """Training step of the checkpoint; the newest by default."""
    overwrite: bool = False
    """Replace an existing export."""
    serve: bool = False
    """Serve the folder until interrupted. An existing export is served as it is, unless --overwrite is given."""
    host: str = "127.0.0.1"
    """Interface to serve on; the default is this machine only, 0.0.0.0 is all its networks."""
    port: Annotated[int, IntRange(0, 65535)] = 8090
    """Port to serve on; 0 for any free port."""

    def main(self) -> None:
        """Write the folder, and serve it with --serve."""
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
        from r2l_nerfstudio.distillation.pose_sampling import capture_cameras
        from r2l_nerfstudio.export.int8 import held_out
        from r2l_nerfstudio.export.training_cameras import training_views
        from r2l_nerfstudio.export.web_folder import RUNTIME, PageOptions, export_web
        from r2l_nerfstudio.export.web_runtime import fetch_runtime
        from r2l_nerfstudio.export.web_single_file import export_single_file

        started = time.perf_counter()
        dataset, held_share = training_views(self.load_config, self.data)
        cameras = capture_cameras(dataset.cameras)
        student = load_student(self.load_config, device="cpu", step=self.step, engine="torch")
        photos = [] if self.precision == "fp16" else held_out(student, dataset, held_share)
        title = self.title or load_run_config(self.load_config).experiment_name or student.method_name
        options = PageOptions(title, self.precision, photos)
        if self.single_file:
            made = export_single_file(student, cameras, self.output, options, self.overwrite)
            for note in made.notes:
                CONSOLE.print(f"  {note}", soft_wrap=True, highlight=False)
            size = self.output.stat().st_size
            CONSOLE.print(
                f"Written: {self.output} ({size / 1e6:.2f} MB; {time.perf_counter() - started:.0f} s).", soft_wrap=True
            )
            return
        runtime = fetch_runtime(self.runtime) if self.fallback else None
        made = export_web(student, cameras, runtime, self.output, options, self.overwrite)
        for note in made.notes:
            CONSOLE.print(f"  {note}", soft_wrap=True, highlight=False)
        for name, size in made.bytes.items():
            if not name.startswith(f"{RUNTIME}/"):
                quality = f", {made.psnr[name]:.0f} dB against PyTorch" if name in made.psnr else ""
                CONSOLE.print(f"  {name}: {size / 1e6:.2f} MB{quality}", soft_wrap=True, highlight=False)
        total = sum(made.bytes.values())
        CONSOLE.print(
            f"Written: {self.output} ({total / 1e6:.1f} MB, of which a visitor with WebGPU loads"
            f" {made.visitor_bytes / 1e6:.2f} MB; {time.perf_counter() - started:.0f} s).",
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
    not_compared: str = "it runs on GPUs only",
) -> None:
    """Print one line on a finished export; a PSNR of None means that it could not be run here."""
    files = [file for path in (output, *more) for file in (path.rglob("*") if path.is_dir() else (path,))]
    size = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
    seconds = time.perf_counter() - started
    quality = (
        f"not compared with PyTorch: {not_compared}"
        if psnr is None
        else f"{psnr:.0f} dB against PyTorch on probe cameras"
    )
    CONSOLE.print(f"Written: {output} ({size:.1f} MB, {quality}, {seconds:.0f} s).", soft_wrap=True)


def main() -> None:
    """Run `r2l-export`."""
    with command_line():
        tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__, prog="r2l-export").main()


if __name__ == "__main__":
    main()
