"""The web page's own renderer on WebGPU in software: its images, its requests, and its failures."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from browser import PATIENCE, chromium, wait_for
from student_runs import (
    tiny_composited_mobile_r2l,
    tiny_composited_r2l,
    tiny_mobile_r2l,
    tiny_r2l,
    write_run,
)

from benchmarks.render import student as random_student
from benchmarks.web_page import ELEMENT, served, state
from r2l_nerfstudio import load_student
from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras, look_along
from r2l_nerfstudio.export.web_folder import PageOptions, drawn_rgb, export_web
from r2l_nerfstudio.export.web_single_file import export_single_file
from r2l_nerfstudio.export.web_weights import WebWeights
from r2l_nerfstudio.student import Student

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

SCREENSHOTS = Path(__file__).parents[2] / "artifacts" / "web"
TEXT = (".html", ".css", ".js", ".json")
FOCAL = 50.0
SIZES = ((48, 40), (37, 29), (33, 50))
STUDENTS = {
    "r2l": (tiny_composited_r2l(), "sphere"),
    "mobile-r2l": (tiny_composited_mobile_r2l(), "sphere"),
    "r2l-unbounded": (tiny_composited_r2l(), "disparity"),
    "mobile-r2l-unbounded": (tiny_composited_mobile_r2l(upsampling_factor=6), "near-far"),
    "points": (tiny_r2l(), "sphere"),
    "mobile-points": (tiny_mobile_r2l(margin=0, volume_resolution=5), "disparity"),
    "plucker": (tiny_r2l(ray_encoding="plucker", volume_resolution=0), "near-far"),
    "two-plane": (tiny_r2l(ray_encoding="two-plane"), "near-far"),
}


def ring(views: int = 10) -> CaptureCameras:
    """Cameras around the origin."""
    angles = torch.linspace(0, 2 * math.pi, views + 1)[:-1]
    outwards = torch.stack([angles.cos(), angles.sin(), 0.3 * (3 * angles).sin()], dim=-1)
    rotations = torch.stack([look_along(-axis, torch.tensor([0.0, 0.0, 1.0])) for axis in outwards])
    poses = torch.cat([rotations, 2.0 * outwards[..., None]], dim=-1)
    intrinsics = torch.tensor([[FOCAL, FOCAL, 24, 20]]).expand(views, 4)
    return CaptureCameras(poses, intrinsics, 48, 40)


@pytest.fixture(scope="module")
def make_student(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Student]:
    """A function from a name of `STUDENTS` to one with random weights."""

    def make(name: str) -> Student:
        config, spacing = STUDENTS[name]
        run = write_run(tmp_path_factory.mktemp("run") / name, config, spacing)
        return load_student(run, device="cpu", engine="torch")

    return make


@pytest.fixture(scope="module")
def folder(make_student: Callable[[str], Student], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of an R2L student, without the fallback."""
    output = tmp_path_factory.mktemp("page") / "page"
    export_web(make_student("r2l"), ring(), None, output, PageOptions("A ball"))
    return output


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    """A browser with WebGPU in software; skips the test if it has none."""
    with chromium(tmp_path_factory.mktemp("profile"), 400, 320, has_gpu=True) as context:
        yield context


@contextmanager
def opened(context: BrowserContext, folder: Path, query: str = "", prepare: str = "") -> Iterator[Page]:
    """A page of a served folder, from the first byte on; `prepare` runs before its scripts."""
    with served(folder) as address:
        page = context.new_page()
        try:
            if prepare:
                page.add_init_script(prepare)
            page.goto(f"{address}{query}")
            yield page
        finally:
            page.close()


def sentence(page: Page) -> str:
    """Wait for the page's error message and return it."""
    page.wait_for_selector("#message:not([hidden])", timeout=1e3 * PATIENCE)
    return page.locator("#message").inner_text()


def rest(page: Page) -> dict[str, str]:
    """Wait until the image has its final resolution."""
    wait_for(page, f"['resting', 'failed'].includes({ELEMENT}.dataset.state)")
    found = state(page)
    assert found["state"] == "resting", page.locator("#message").inner_text()
    return found


def drawn(page: Page, pose: torch.Tensor, width: int, height: int) -> np.ndarray:
    """Render a camera with the page's renderer and read it back: [height, width, 3] in [0, 1]."""
    names = ("right", "up", "backward", "position")
    camera = {
        "pose": {name: pose[:, axis].tolist() for axis, name in enumerate(names)},
        "width": width,
        "height": height,
        "focal": FOCAL,
    }
    text = page.evaluate(
        f"""async (camera) => {{
          const {{ backend }} = {ELEMENT};
          await backend.draw(camera);
          return btoa(String.fromCharCode(...await backend.read()));
        }}""",
        camera,
    )
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width, 4)[..., :3] / 255.0


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return -10 * math.log10(max(float(np.square(one - other).mean()), 1e-12))


@pytest.mark.parametrize("name", STUDENTS)
def test_renders_what_torch_renders(
    name: str, make_student: Callable[[str], Student], context: BrowserContext, tmp_path: Path
) -> None:
    """Ten cameras at odd sizes."""
    student = make_student(name)
    export_web(student, ring(), None, tmp_path / "page", PageOptions(name))
    with opened(context, tmp_path / "page") as page:
        assert rest(page)["backend"] == "WebGPU"
        for number, pose in enumerate(ring().camera_to_worlds):
            width, height = SIZES[number % len(SIZES)]
            truth = drawn_rgb(student, pose, FOCAL, width, height).numpy()
            assert truth.std() > 0.01 and psnr(drawn(page, pose, width, height), truth) > 50


@pytest.mark.parametrize("name", ["r2l", "mobile-r2l"])
def test_int8_renders_what_its_weights_render(
    name: str, make_student: Callable[[str], Student], context: BrowserContext, tmp_path: Path
) -> None:
    student = make_student(name)
    made = export_web(student, ring(), None, tmp_path / "page", PageOptions(name, "auto"))
    assert "student.int8.safetensors" in made.psnr and "against the student's own renders" in made.notes[0]
    pose = ring().camera_to_worlds[3]
    with opened(context, tmp_path / "page") as page:
        rest(page)
        found = drawn(page, pose, 37, 29)
    assert psnr(found, drawn_rgb(student, pose, FOCAL, 37, 29).numpy()) > 40
    with WebWeights(student.model, "int8").drawing():
        assert psnr(found, drawn_rgb(student, pose, FOCAL, 37, 29).numpy()) > 50


def test_loads_only_the_student(folder: Path, context: BrowserContext) -> None:
    """Neither ONNX Runtime nor the worker, only from its own server, and the first frame soon after the weights."""
    with opened(context, folder) as page:
        loaded = rest(page)
        names = page.evaluate("performance.getEntriesByType('resource').map(({name}) => name)")
    assert all(re.match(r"http://127\.0\.0\.1:\d+/", name) for name in names)
    assert not [name for name in names if "ort" in name or "worker" in name or "onnx" in name]
    assert float(loaded["firstFrame"]) > 0


@pytest.mark.parametrize(
    ("method", "precision", "most"),
    [
        ("mobile-r2l-lite", "fp16", 1.2),
        ("mobile-r2l-lite", "int8", 0.7),
        ("mobile-r2l", "fp16", 8.8),
        ("mobile-r2l", "int8", 4.6),
    ],
)
def test_a_page_of_full_size_is_small(
    method: str, precision: Literal["fp16", "int8"], most: float, context: BrowserContext, tmp_path: Path
) -> None:
    """Megabytes that the browser requests, with as many features as allowed; text as file hosts send it, gzipped."""
    model, _ = random_student(method, 64, torch.device("cpu"))
    with model.network_run_by(lambda code: model.network(code)):
        export_web(Student(model, method), ring(), None, tmp_path / "page", PageOptions("A ball", precision))
    with opened(context, tmp_path / "page") as page:
        wait_for(page, "performance.getEntriesByType('resource').some(({name}) => name.endsWith('.safetensors'))")
        names = page.evaluate("performance.getEntriesByType('resource').map(({name}) => new URL(name).pathname)")
    files = [tmp_path / "page" / name.strip("/") for name in {"/index.html", "/poster.jpg", *names}]
    assert any(file.suffix == ".safetensors" for file in files)
    contents = [(file.suffix, file.read_bytes()) for file in files if file.exists()]
    found = sum(len(gzip.compress(content)) if suffix in TEXT else len(content) for suffix, content in contents)
    assert 0.5 * most < found / 1e6 <= most


def test_a_double_click_focuses_and_the_view_can_be_shared(folder: Path, context: BrowserContext) -> None:
    with opened(context, folder) as page:
        before = rest(page)["view"]
        page.mouse.dblclick(215, 170)
        wait_for(page, f"{ELEMENT}.dataset.view.includes('target')")
        after = rest(page)["view"]
        assert after != before
        page.get_by_role("button", name="Link to this view").click()
        wait_for(page, "location.hash.includes('target')")
        again = page.url
        page.goto("about:blank")
        page.goto(again)
        assert rest(page)["view"] == after


def test_glides_after_a_drag_unless_motion_is_reduced(folder: Path, context: BrowserContext) -> None:
    def turned(page: Page) -> tuple[float, float]:
        """Azimuth when the hand lets go, and at rest."""
        rest(page)
        page.mouse.move(200, 160)
        page.mouse.down()
        for step in range(1, 9):
            page.mouse.move(200 + 8 * step, 160)
        page.mouse.up()
        released = page.evaluate(f"{ELEMENT}.view")
        rest(page)
        first, last = (float(re.search(r"azimuth=([-\d.]+)", view)[1]) for view in (released, state(page)["view"]))
        return first, last

    with opened(context, folder) as page:
        page.emulate_media(reduced_motion="reduce")
        released, rested = turned(page)
        assert rested == pytest.approx(released, abs=0.02)
        page.emulate_media(reduced_motion="no-preference")
    with opened(context, folder, "?rotate") as page:
        wait_for(page, f"{ELEMENT}.dataset.frames > 3")
        assert state(page)["state"] == "drawing"
        page.mouse.click(30, 30)
        rest(page)


def test_a_lost_gpu_is_reopened(folder: Path, context: BrowserContext) -> None:
    with opened(context, folder) as page:
        before = rest(page)
        page.evaluate(f"{ELEMENT}.backend.device.destroy()")
        wait_for(page, f"{ELEMENT}.dataset.restarts === '1' && {ELEMENT}.dataset.state === 'resting'")
        after = state(page)
        assert after["backend"] == "WebGPU" and after["view"] == before["view"]
        assert int(after["frames"]) > int(before["frames"])


@pytest.mark.parametrize(
    "prepare",
    [
        "delete Navigator.prototype.gpu",
        "Navigator.prototype.__defineGetter__('gpu', () => ({requestAdapter: async () => null}))",
        "GPUAdapter.prototype.requestDevice = async () => { throw new Error('too few') }",
        "GPUDevice.prototype.createComputePipelineAsync = async () => { throw new Error('no memory') }",
    ],
)
def test_without_webgpu_and_fallback_a_message_is_shown(prepare: str, folder: Path, context: BrowserContext) -> None:
    with opened(context, folder, prepare=prepare) as page:
        assert "it needs WebGPU" in sentence(page)
        page.locator("#poster").wait_for(state="visible")  # It may load after the sentence.


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("cut", "is incomplete"),
        ("flipped", "is damaged"),
        ("missing", "is missing on the server"),
        ("no header", "is damaged (its header is cut short)"),
        ("no tensor", "is damaged (it has no"),
    ],
)
def test_bad_weights_are_described(
    damage: str, said: str, folder: Path, context: BrowserContext, tmp_path: Path
) -> None:
    site = Path(shutil.copytree(folder, tmp_path / "site"))
    (file,) = site.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "flipped":
        content[len(content) // 2] ^= 255
    elif damage == "no header":
        content[:8] = b"\xff" * 8
    elif damage == "no tensor":
        content = bytearray(content.replace(b'"head.weight"', b'"heap.weight"'))
    file.write_bytes(content)
    if damage == "missing":
        file.unlink()
    if damage.startswith("no "):
        # As an export would write it that went wrong: the listed digest is right.
        import hashlib

        scene = json.loads((site / "scene.json").read_text())
        scene["student"]["weights"]["sha256"] = hashlib.sha256(content).hexdigest()
        (site / "scene.json").write_text(json.dumps(scene))
    with opened(context, site) as page:
        assert said in sentence(page)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 3}, "of version 3 and this page is of version 2"),
        ({"background": [0, 0, "1.0); evil("]}, "invalid: background"),
        ({"poster": "https://elsewhere.example/poster.jpg"}, "invalid: poster"),
        ({"student": {}}, "invalid: student.weights"),
    ],
)
def test_a_bad_scene_is_described(
    change: dict[str, Any], said: str, folder: Path, context: BrowserContext, tmp_path: Path
) -> None:
    site = Path(shutil.copytree(folder, tmp_path / "site"))
    scene = json.loads((site / "scene.json").read_text())
    (site / "scene.json").write_text(json.dumps(scene | change))
    with opened(context, site) as page:
        assert said in sentence(page)


def test_the_element_works_in_other_pages(folder: Path, context: BrowserContext, tmp_path: Path) -> None:
    """Two of them in one page, without controls, one of them without its background."""
    site = tmp_path / "site"
    shutil.copytree(folder, site / "scene")
    (site / "index.html").write_text(
        '<!doctype html><script type="module" src="scene/light-field.js"></script>'
        '<light-field id="one" plain style="width: 150px; height: 120px"></light-field>'
        '<light-field id="two" src="scene" transparent view="azimuth=30" style="width: 150px; height: 120px"></light-field>'
    )
    with opened(context, site) as page:
        for name in ("one", "two"):
            wait_for(page, f"document.getElementById('{name}').dataset.state === 'resting'")
        assert page.locator("#one #buttons").is_hidden() and page.locator("#two #buttons").is_visible()
        assert "azimuth=30.00" in page.evaluate("document.getElementById('two').view")


def test_a_single_file_opens_without_a_server(
    make_student: Callable[[str], Student], context: BrowserContext, tmp_path: Path
) -> None:
    export_single_file(make_student("mobile-r2l"), ring(), tmp_path / "scene.html", PageOptions("One file"))
    page = context.new_page()
    page.goto((tmp_path / "scene.html").as_uri())
    assert rest(page)["backend"] == "WebGPU"
    assert page.title() == "One file" and page.locator("#browser").is_hidden()
    page.close()


@pytest.mark.parametrize(("name", "width", "height"), [("desktop", 1280, 800), ("phone", 390, 844)])
def test_layout(name: str, width: int, height: int, folder: Path, context: BrowserContext) -> None:
    with opened(context, folder) as page:
        page.set_viewport_size({"width": width, "height": height})
        rest(page)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"gpu_{name}.png")
        figures, buttons = (page.locator(selector).bounding_box() for selector in ("#figures", "#buttons"))
        assert figures["x"] + figures["width"] <= buttons["x"] and buttons["x"] + buttons["width"] <= width
