"""The web page's own WebGPU renderer against ONNX Runtime's WebGPU, and against a bare matrix product, on one adapter."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from nerfstudio.utils.rich_utils import CONSOLE

from benchmarks.figures import RESULTS, write_figures
from benchmarks.render import fill_ball
from benchmarks.render import student as random_student
from benchmarks.web import PATIENCE_MS, ring_of_cameras
from benchmarks.web_page import browser, served
from r2l_nerfstudio.export.navigation import start_pose, view_limits
from r2l_nerfstudio.export.web_folder import RUNTIME, PageOptions, export_web, page_rays
from r2l_nerfstudio.export.web_graph import WebGraph, write_web_graph
from r2l_nerfstudio.export.web_runtime import GPU_FILES, VERSION, fetch_runtime
from r2l_nerfstudio.rays.spacing import SceneBounds
from r2l_nerfstudio.student import Student

if TYPE_CHECKING:
    from playwright.sync_api import Page

_SOFTWARE = (
    "--use-webgpu-adapter=swiftshader",
    "--use-vulkan=swiftshader",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
)
_SWITCHES = ("--enable-unsafe-webgpu", "--enable-features=Vulkan", "--disable-gpu-watchdog")
_FIELD_OF_VIEW = 0.6

_OURS = """async () => {
  const { Renderer } = await import("./renderer.js");
  const { flopsPerRow } = await import("./layers.js");
  const adapter = await navigator.gpu.requestAdapter();
  const { maxBufferSize, maxStorageBufferBindingSize } = adapter.limits;
  const device = await adapter.requestDevice({
    requiredFeatures: adapter.features.has("shader-f16") ? ["shader-f16"] : [],
    requiredLimits: { maxBufferSize, maxStorageBufferBindingSize },
  });
  const scene = await (await fetch("scene.json")).json();
  const renderer = new Renderer(scene, device);
  const all = [...renderer.layers, ...renderer.joins, renderer.tail];
  await renderer.load(new Uint8Array(await (await fetch(scene.student.weights.file)).arrayBuffer()));
  globalThis.ours = async (camera) => {
    const started = performance.now();
    await renderer.draw(camera, null);
    return performance.now() - started;
  };
  globalThis.device = device;
  const { vendor, architecture } = adapter.info;
  return { adapter: `${vendor} ${architecture}`, number: renderer.number, flops: flopsPerRow(all) };
}"""

_THEIRS = """async ({ module, loader, wasm, model }) => {
  const runtime = await import("./" + module);
  runtime.env.logLevel = "error";
  runtime.env.wasm.wasmPaths = { mjs: new URL("./" + loader, location.href).href };
  const packed = (await fetch(wasm)).body.pipeThrough(new DecompressionStream("gzip"));
  runtime.env.wasm.wasmBinary = await new Response(packed).arrayBuffer();
  runtime.env.wasm.numThreads = 1;
  const file = new Uint8Array(await (await fetch(model)).arrayBuffer());
  const session = await runtime.InferenceSession.create(file, { executionProviders: ["webgpu"] });
  const { origin, directions, shape } = await (await fetch("rays.json")).json();
  const inputs = {
    origin: new runtime.Tensor("float32", Float32Array.from(origin), [3]),
    directions: new runtime.Tensor("float32", Float32Array.from(directions), shape),
  };
  globalThis.theirs = async () => {
    const started = performance.now();
    await session.run(inputs);
    return performance.now() - started;
  };
}"""

_PRODUCT = """async ({ rows, width }) => {
  const code = `
@group(0) @binding(0) var<storage, read> a: array<f32>;
@group(0) @binding(1) var<storage, read> b: array<f32>;
@group(0) @binding(2) var<storage, read_write> c: array<f32>;
var<workgroup> left: array<f32, 512>;
var<workgroup> right: array<f32, 512>;
@compute @workgroup_size(8, 8)
fn main(
  @builtin(workgroup_id) group: vec3u,
  @builtin(local_invocation_id) id: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  var sums: array<f32, 16>;
  for (var k = 0u; k < ${width}u; k += 16u) {
    for (var i = 0u; i < 8u; i++) {
      let at = lane * 8u + i;
      left[at] = a[(group.y * 32u + at / 16u) * ${width}u + k + at % 16u];
      right[at] = b[(k + at / 32u) * ${width}u + group.x * 32u + at % 32u];
    }
    workgroupBarrier();
    for (var i = 0u; i < 16u; i++) {
      for (var r = 0u; r < 4u; r++) {
        let x = left[(id.y * 4u + r) * 16u + i];
        for (var s = 0u; s < 4u; s++) { sums[r * 4u + s] += x * right[i * 32u + id.x * 4u + s]; }
      }
    }
    workgroupBarrier();
  }
  for (var r = 0u; r < 4u; r++) {
    for (var s = 0u; s < 4u; s++) {
      c[(group.y * 32u + id.y * 4u + r) * ${width}u + group.x * 32u + id.x * 4u + s] = sums[r * 4u + s];
    }
  }
}`;
  const { device } = globalThis;
  const buffer = (count) => device.createBuffer({ size: 4 * count, usage: GPUBufferUsage.STORAGE });
  const compute = { module: device.createShaderModule({ code }), entryPoint: "main" };
  const pipeline = await device.createComputePipelineAsync({ layout: "auto", compute });
  const buffers = [buffer(rows * width), buffer(width * width), buffer(rows * width)];
  const entries = buffers.map((one, binding) => ({ binding, resource: { buffer: one } }));
  const group = device.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries });
  globalThis.product = async () => {
    const started = performance.now();
    const encoder = device.createCommandEncoder();
    const pass = encoder.beginComputePass();
    pass.setPipeline(pipeline);
    pass.setBindGroup(0, group);
    pass.dispatchWorkgroups(width / 32, rows / 32);
    pass.end();
    device.queue.submit([encoder.finish()]);
    await device.queue.onSubmittedWorkDone();
    return performance.now() - started;
  };
}"""


@dataclass
class WebRenderer:
    """Time a frame of the page's own renderer and of ONNX Runtime's WebGPU in the same browser, and compare its operations
    per second with a bare tiled matrix product. Weights are random."""

    methods: tuple[str, ...] = ("r2l-lite", "mobile-r2l-lite")
    """Methods to measure."""
    side: int = 128
    """Pixels along each side of the frame."""
    frames: int = 5
    """Timed frames of each; the median is reported."""
    adapter: Literal["software", "gpu"] = "software"
    """SwiftShader, or the GPU that Chromium selects."""
    runtime: Path | None = None
    """The npm package onnxruntime-web as a .tgz file; by default npm downloads it once."""
    results_dir: Path = RESULTS
    """Folder for the figures."""

    def main(self) -> None:
        """Measure and write `web_renderer_ADAPTER.{json,md}`."""
        runtime = fetch_runtime(self.runtime)
        switches = [*_SWITCHES, *(_SOFTWARE if self.adapter == "software" else ())]
        figures: dict[str, Any] = {
            "load_average_at_start": round(os.getloadavg()[0], 1),
            "runtime": VERSION,
            "rows": [],
        }
        stem = self.results_dir / f"web_renderer_{self.adapter}"
        with browser(*switches) as chromium, tempfile.TemporaryDirectory() as scratch:
            figures["browser"] = f"headless Chromium {chromium.version}"
            for method in self.methods:
                folder = Path(scratch) / method
                self._export(method, folder, runtime)
                with served(folder) as address:
                    page = chromium.new_page(bypass_csp=True)
                    page.set_default_timeout(PATIENCE_MS)
                    page.goto(f"{address}bare.html")
                    figures["rows"].append({"method": method, "side": self.side, **self._time(page, folder)})
                    page.close()
                write_figures(stem, figures, as_markdown(figures))
        CONSOLE.print(as_markdown(figures), markup=False, highlight=False, soft_wrap=True)

    def _export(self, method: str, folder: Path, runtime: Path) -> None:
        model, _ = random_student(method, self.side, torch.device("cpu"))
        focal = self.side / _FIELD_OF_VIEW
        # Not bounded, so that no ray is empty.
        bounds = SceneBounds("near-far", (0.0, 0.0, 0.0), 1.0, 2.0, 6.0)
        model.set_scene(bounds, torch.eye(3), torch.ones(3), has_accumulation=True, has_depth=True, focal=focal)
        fill_ball(model)
        student = Student(model, method)
        cameras = ring_of_cameras(self.side, focal)
        with model.network_run_by(lambda encoded: model.network(encoded)):
            export_web(student, cameras, None, folder, PageOptions(method))
        write_web_graph(student, "fp32", folder / "student.onnx")
        (folder / RUNTIME).mkdir()
        for name in GPU_FILES:
            shutil.copyfile(runtime / name, folder / RUNTIME / name)
        pose = start_pose(view_limits(cameras, False, 1.0))
        picture = {"width": self.side, "height": self.side, "focal": focal}
        origin, directions = page_rays(WebGraph(student, "fp32"), pose, picture)
        rays = {
            "origin": origin.tolist(),
            "directions": directions.flatten().tolist(),
            "shape": list(directions.shape),
        }
        (folder / "rays.json").write_text(json.dumps(rays))
        names = ("right", "up", "backward", "position")
        axes = {name: pose[:, axis].tolist() for axis, name in enumerate(names)}
        (folder / "camera.json").write_text(json.dumps({"pose": axes, **picture}))
        (folder / "bare.html").write_text("<!doctype html><title>Measured</title>")

    def _time(self, page: Page, folder: Path) -> dict[str, Any]:
        scene = json.loads((folder / "scene.json").read_text())["student"]
        factor, margin = scene["factor"], scene["margin"]
        rows = (-(-self.side // factor) + 2 * margin) ** 2
        width = scene["network"]["width"]
        found = page.evaluate(_OURS)
        module, loader, wasm = (f"{RUNTIME}/{name}" for name in GPU_FILES)
        page.evaluate(_THEIRS, {"module": module, "loader": loader, "wasm": wasm, "model": "student.onnx"})
        size = 32 * -(-max(rows, 1024) // 32)
        page.evaluate(_PRODUCT, {"rows": size, "width": width})
        camera = json.loads((folder / "camera.json").read_text())
        calls = {"ours": camera, "theirs": None, "product": None}
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(self.frames + 1):
            for name, argument in calls.items():
                milliseconds = page.evaluate(f"(argument) => globalThis.{name}(argument)", argument)
                if number:  # The first frame of each allocates and compiles.
                    taken[name].append(milliseconds)
        median = {name: statistics.median(values) for name, values in taken.items()}
        ours = found["flops"] * rows / median["ours"] / 1e6
        product = 2 * size * width**2 / median["product"] / 1e6
        return {
            "adapter": found["adapter"],
            "hidden_numbers": found["number"],
            "milliseconds": {name: round(value, 1) for name, value in median.items()},
            "onnxruntime_per_ours": round(median["theirs"] / median["ours"], 2),
            "gflops": {"ours": round(ours, 2), "product": round(product, 2)},
            "share_of_product": round(ours / product, 2),
        }


def as_markdown(figures: dict[str, Any]) -> str:
    """Return the figures as a table."""
    lines = [
        "# The page's own renderer",
        "",
        f"`python -m benchmarks web-renderer`, {figures['browser']}, onnxruntime-web {figures['runtime']} on WebGPU with a"
        f" network in fp32; load average {figures['load_average_at_start']} at the start. All numbers of a row come from one"
        " browser on one adapter, frames taken in turns; whole frames (encoding and network) against a bare tiled matrix"
        " product of the network's width.",
        "",
        "| student | frame | adapter | ours, ms | ONNX Runtime, ms | ratio | ours, GFLOP/s | product, GFLOP/s | share |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in figures["rows"]:
        taken, rate = row["milliseconds"], row["gflops"]
        lines.append(
            f"| `{row['method']}` | {row['side']}x{row['side']} | {row['adapter']} | {taken['ours']:g} | {taken['theirs']:g}"
            f" | {row['onnxruntime_per_ours']:g} | {rate['ours']:g} | {rate['product']:g} | {row['share_of_product']:g} |"
        )
    return "\n".join(lines) + "\n"
