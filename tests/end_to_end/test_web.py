"""`r2l-export web` in a real browser: what a visitor sees, and the messages if rendering is impossible."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pytest
import yaml
from browser import PATIENCE, chromium, wait_for
from published_files import mobile_weights, r2l_weights, write_tar
from teachers import write_blender_capture

from benchmarks.web_page import canvas_image, served, state
from r2l_nerfstudio import load_student
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.export.navigation import start_pose, view_limits
from r2l_nerfstudio.export.training_cameras import training_cameras
from r2l_nerfstudio.export.web_runtime import fetch_runtime
from r2l_nerfstudio.run_config import load_run_config
from r2l_nerfstudio.scripts import export as script
from r2l_nerfstudio.scripts.import_checkpoint import ImportCheckpoint
from r2l_nerfstudio.student import Student

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

SCREENSHOTS = Path(__file__).parents[2] / "artifacts" / "web"
WEB = Path(script.__file__).parents[1] / "r2l_nerfstudio" / "export" / "web"
TYPESCRIPT = "typescript@5.9.3"
GPU_TYPES = "@webgpu/types@0.1.66"
SIDE = 24
POSES = ((-60, 25, 1.0), (-180, 15, 1.04), (110, 29, 0.97))
"""Azimuth and elevation in degrees, distance as a share of the start's; all where the capture's cameras were."""


def lacks(what: str) -> NoReturn:
    """Fail in CI, skip elsewhere."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(what)


@pytest.fixture(scope="module")
def runtime() -> Path:
    """ONNX Runtime Web, fetched once for all exports of this machine."""
    try:
        return fetch_runtime()
    except InputError as error:
        lacks(str(error))


@pytest.fixture(scope="module")
def pages(
    tiny_student: Path, tiny_mobile_student: Path, runtime: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Student]]:
    """Web folders by student, made by the command line, and the students."""
    made = {}
    for name, run in (("r2l", tiny_student), ("mobile-r2l", tiny_mobile_student)):
        folder = tmp_path_factory.mktemp("web") / name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["r2l-export", "web", str(folder), "--load-config", str(run), "--title", name])
            script.main()
        made[name] = (folder, load_student(run, device="cpu", engine="torch"))
    return made


@pytest.fixture(scope="module")
def addresses(pages: dict[str, tuple[Path, Student]]) -> Iterator[dict[str, str]]:
    """Of the served web folders, by student."""
    with served(pages["r2l"][0]) as r2l, served(pages["mobile-r2l"][0]) as mobile:
        yield {"r2l": r2l, "mobile-r2l": mobile}


@pytest.fixture(scope="module")
def requested() -> list[str]:
    """The address of every request that any page made."""
    return []


@pytest.fixture(scope="module")
def context(requested: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    """A browser without a GPU."""
    with chromium(tmp_path_factory.mktemp("profile")) as context:
        context.on("request", lambda request: requested.append(request.url))
        yield context


@pytest.fixture
def visit(context: BrowserContext) -> Iterator[Callable[..., Page]]:
    """A function that opens an address in a page of its own, of `width` x `height`."""
    opened = []

    def open_page(address: str, width: int = 320, height: int = 320, wait: bool = True) -> Page:
        page = context.new_page()
        opened.append(page)
        page.set_viewport_size({"width": width, "height": height})
        page.goto(address)
        if wait:
            settle(page)
        return page

    yield open_page
    for page in opened:
        page.close()


def settle(page: Page) -> None:
    """Wait until the image has its final resolution."""
    wait_for(page, "['resting', 'failed'].includes(document.querySelector('light-field').dataset.state)")
    assert state(page)["state"] == "resting", sentence(page)


def sentence(page: Page) -> str:
    """Wait for the page's error message and return it."""
    page.wait_for_selector("#message:not([hidden])", timeout=1e3 * PATIENCE)
    return page.locator("#message").inner_text()


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    return -10 * math.log10(max(float(np.square(one - other).mean()), 1e-12))


def change(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference in steps of 8-bit color."""
    return 255 * float(np.abs(one - other).mean())


def rendered(student: Student, run: Path, angles: tuple[float, float, float]) -> np.ndarray:
    """The picture that torch makes of a view of the page."""
    cameras = training_cameras(run)
    encoding = student.model.ray_encoding
    view = view_limits(cameras, encoding.spacing == "sphere", float(encoding.radius))
    view["start"] = {
        "azimuth": math.radians(angles[0]),
        "elevation": math.radians(angles[1]),
        "distance": view["start"]["distance"] * angles[2],
    }
    focal = float(cameras.intrinsics[:, :2].mean())
    return np.asarray(student.render(start_pose(view).numpy(), [focal, focal, SIDE / 2, SIDE / 2], SIDE, SIDE))


@pytest.mark.parametrize("name", ["r2l", "mobile-r2l"])
def test_renders_what_torch_renders(
    name: str,
    pages: dict[str, tuple[Path, Student]],
    addresses: dict[str, str],
    tiny_student: Path,
    visit: Callable[..., Page],
) -> None:
    """On the processor, and from poses in the address."""
    folder, student = pages[name]

    scene = json.loads((folder / "scene.json").read_text())
    assert (scene["picture"]["width"], scene["picture"]["height"]) == (SIDE, SIDE)
    page = visit(f"{addresses[name]}?size={SIDE}")
    assert state(page)["backend"].startswith("WebAssembly")
    distance = scene["view"]["start"]["distance"]
    for azimuth, elevation, share in POSES:
        frames = int(state(page)["frames"])
        page.evaluate(f"location.hash = 'azimuth={azimuth}&elevation={elevation}&distance={share * distance}'")
        wait_for(page, f"document.querySelector('light-field').dataset.frames > {frames}")
        settle(page)
        view = dict(part.split("=") for part in state(page)["view"].split("&"))
        angles = (float(view["azimuth"]), float(view["elevation"]), float(view["distance"]) / distance)
        assert math.remainder(angles[0] - azimuth, 360) == pytest.approx(0, abs=0.01)
        truth = rendered(student, tiny_student, angles)
        assert truth.std() > 0.01 and psnr(canvas_image(page), truth) > 45


@pytest.mark.parametrize("weights", [r2l_weights, mobile_weights])
def test_published_students_render_what_torch_renders(
    weights: Callable, runtime: Path, tmp_path: Path, visit: Callable[..., Page]
) -> None:
    """Planar rays through pixel corners, or a ray image without a margin."""
    capture = write_blender_capture(tmp_path / "ball", size=SIDE)
    file = write_tar(tmp_path / "published.tar", weights())
    ImportCheckpoint(file, capture, output_dir=tmp_path / "outputs", cells=(6, 6)).main()
    (run,) = (tmp_path / "outputs").rglob("config.yml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["r2l-export", "web", str(tmp_path / "page"), "--load-config", str(run)])
        script.main()
    with served(tmp_path / "page") as address:
        page = visit(f"{address}?size={SIDE}")
        view = dict(part.split("=") for part in state(page)["view"].split("&"))
        angles = (float(view["azimuth"]), float(view["elevation"]), 1.0)
        truth = rendered(load_student(run, "cpu", engine="torch"), run, angles)
        assert truth.std() > 0.01 and psnr(canvas_image(page), truth) > 45


def test_moves_by_mouse_wheel_and_keys_within_limits(addresses: dict[str, str], visit: Callable[..., Page]) -> None:
    page = visit(f"{addresses['mobile-r2l']}")

    def after(act: Callable[[], Any]) -> tuple[np.ndarray, dict[str, float]]:
        frames = int(state(page)["frames"])
        act()
        wait_for(page, f"document.querySelector('light-field').dataset.frames > {frames}")
        settle(page)
        view = dict(part.split("=") for part in state(page)["view"].split("&"))
        return canvas_image(page), {key: float(value) for key, value in view.items() if key != "target"}

    def drag(right: int, down: int, button: str = "left") -> None:
        page.mouse.move(160, 160)
        page.mouse.down(button=button)
        page.mouse.move(160 + right, 160 + down, steps=6)
        page.mouse.up(button=button)

    first, start = after(lambda: page.keyboard.press("r"))
    turned, view = after(lambda: drag(80, 0))
    assert view["azimuth"] < start["azimuth"] - 10 and change(first, turned) > 0.5
    _, view = after(lambda: page.keyboard.press("ArrowRight"))
    _, nearer = after(lambda: page.mouse.wheel(0, -200))
    assert nearer["distance"] < start["distance"]
    shifted, same = after(lambda: drag(30, 10, "right"))
    assert same["azimuth"] == nearer["azimuth"] and change(shifted, turned) > 0.1
    # Far beyond what the student knows: it gives way a little, and comes back.
    for _ in range(3):
        _, view = after(lambda: drag(0, 150))
    _, top = after(lambda: page.keyboard.press("ArrowDown"))
    assert top["elevation"] == pytest.approx(view["elevation"], abs=0.5) and top["elevation"] < 89
    for _ in range(3):
        _, view = after(lambda: page.mouse.wheel(0, 900))
    assert view["distance"] < 2 * start["distance"]
    back, view = after(lambda: page.keyboard.press("r"))
    assert view == start and "target" not in state(page)["view"] and np.array_equal(back, first)


def test_moves_by_touch(addresses: dict[str, str], visit: Callable[..., Page]) -> None:
    page = visit(f"{addresses['mobile-r2l']}")
    before = dict(part.split("=") for part in state(page)["view"].split("&"))
    client = page.context.new_cdp_session(page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        fingers = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})

    touch("touchStart", (130, 160), (190, 160))
    for spread in (40, 60, 80):
        touch("touchMove", (160 - spread, 160), (160 + spread, 160))
    touch("touchEnd")
    wait_for(
        page,
        f"document.querySelector('light-field').dataset.view !== {'&'.join(f'{k}={v}' for k, v in before.items())!r}",
    )
    settle(page)
    after = dict(part.split("=") for part in state(page)["view"].split("&"))
    assert float(after["distance"]) < float(before["distance"]) and after["azimuth"] == before["azimuth"]


def test_resizes_reloads_and_shares_the_machine(addresses: dict[str, str], visit: Callable[..., Page]) -> None:
    page = visit(f"{addresses['r2l']}?size=32", 480, 320)
    other = visit(f"{addresses['mobile-r2l']}", 320, 320)
    assert canvas_image(page).shape[1] / canvas_image(page).shape[0] == pytest.approx(1.5, abs=0.1)
    frames = int(state(page)["frames"])
    page.bring_to_front()
    page.set_viewport_size({"width": 240, "height": 400})
    wait_for(page, f"document.querySelector('light-field').dataset.frames > {frames}")
    settle(page)
    assert canvas_image(page).shape[1] / canvas_image(page).shape[0] == pytest.approx(0.6, abs=0.1)
    before = canvas_image(page)
    page.reload()
    settle(page)
    assert np.array_equal(canvas_image(page), before)
    other.bring_to_front()
    other.keyboard.press("ArrowLeft")
    settle(other)


@pytest.mark.parametrize(
    ("file", "body", "said"),
    [
        ("student.onnx", "flipped", "student.onnx is damaged. To fix this, copy the whole folder"),
        ("student.onnx", "cut", "student.onnx is incomplete"),
        ("student.onnx", None, "student.onnx is missing on the server"),
        ("ort/ort-wasm-simd-threaded.wasm.gzip", None, "ort-wasm-simd-threaded.wasm.gzip is missing"),
        ("ort/ort-wasm-simd-threaded.wasm.gzip", "flipped", "ort-wasm-simd-threaded.wasm.gzip is damaged"),
        ("ort/ort.wasm.min.mjs", None, "cannot render the scene"),
        ("scene.json", "cut", "scene.json is missing or damaged"),
        ("worker.js", None, "A part of this page did not load"),
        ("scene.json", "older", "scene.json is of version 1 and this page is of version 2"),
    ],
)
def test_a_bad_file_is_named(
    file: str,
    body: str | None,
    said: str,
    pages: dict[str, tuple[Path, Student]],
    addresses: dict[str, str],
    context: BrowserContext,
    visit: Callable[..., Page],
) -> None:
    content = bytearray((pages["mobile-r2l"][0] / file).read_bytes())
    if body == "flipped":
        content[len(content) // 2] ^= 255
    elif body == "older":
        content = bytearray(json.dumps({"version": 1}).encode())
    elif body == "cut":
        del content[len(content) // 2 :]
    pattern = re.compile(rf"/{re.escape(file)}$")
    answer = {"status": 404} if body is None else {"body": bytes(content)}
    context.route(pattern, lambda route: route.fulfill(**answer))
    try:
        page = visit(addresses["mobile-r2l"], wait=False)
        assert said in sentence(page)
        assert page.locator("#loading").is_hidden()
    finally:
        context.unroute(pattern)


def test_an_unsupported_browser_shows_a_message(addresses: dict[str, str], context: BrowserContext) -> None:
    page = context.new_page()
    page.add_init_script("delete globalThis.WebAssembly")
    page.goto(addresses["r2l"])
    assert "This browser cannot render the scene" in sentence(page)
    page.close()


def test_a_page_opened_as_a_file_shows_a_message(
    pages: dict[str, tuple[Path, Student]], visit: Callable[..., Page]
) -> None:
    page = visit((pages["r2l"][0] / "index.html").as_uri(), wait=False)
    assert "only from a web server" in page.locator("#browser").inner_text()


def test_works_from_any_server_and_in_a_frame(
    pages: dict[str, tuple[Path, Student]], visit: Callable[..., Page], tmp_path: Path
) -> None:
    """Without the headers that allow threads, in a subfolder, inside another page."""
    site = tmp_path / "site"
    shutil.copytree(pages["mobile-r2l"][0], site / "below", copy_function=os.link)
    (site / "index.html").write_text('<iframe src="below/?plain" width="300" height="300"></iframe>')
    handler = functools.partial(_Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = visit(f"http://127.0.0.1:{server.server_address[1]}/", wait=False)
        frame = page.frames[1]
        wait_for(frame, "document.querySelector('light-field').dataset.state === 'resting'")
        assert frame.evaluate("document.querySelector('light-field').dataset.backend") == "WebAssembly, 1 thread"
        assert frame.locator("#buttons").is_hidden() and frame.locator("#figures").is_hidden()
        server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("name", "width", "height"), [("desktop", 1280, 800), ("phone", 390, 844), ("sideways", 844, 390)]
)
def test_layout(name: str, width: int, height: int, addresses: dict[str, str], visit: Callable[..., Page]) -> None:
    """Nothing overlaps or is cut off."""
    page = visit(f"{addresses['r2l']}?size=64", width, height)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
    boxes = [page.locator(selector).bounding_box() for selector in ("#figures", "#buttons")]
    for box in boxes:
        assert box["x"] >= 0 and box["y"] >= 0
        assert box["x"] + box["width"] <= width and box["y"] + box["height"] <= height
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert re.match(r"[\d.]+ fps · [\d.]+ ms", page.locator("#figures").inner_text())
    page.get_by_role("button", name="Controls").click()
    dialog = page.locator("dialog").bounding_box()
    assert dialog["x"] >= 0 and dialog["y"] >= 0 and dialog["y"] + dialog["height"] <= height
    page.screenshot(path=SCREENSHOTS / f"{name}_keys.png")


def test_no_request_leaves_the_origin(addresses: dict[str, str], requested: list[str]) -> None:
    """Over all requests of the tests above."""
    assert len(requested) > 50
    elsewhere = [url for url in requested if not re.match(r"(http://127\.0\.0\.1:\d+/|file:|blob:|data:)", url)]
    assert not elsewhere


def test_scripts_pass_the_type_checker(tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        lacks("the page's types are checked by TypeScript: apt install npm")
    shutil.copytree(WEB, tmp_path / "web")
    install = [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(tmp_path), TYPESCRIPT, GPU_TYPES]
    subprocess.run(install, check=True, timeout=300)
    command = [str(tmp_path / "node_modules" / ".bin" / "tsc"), "-p", str(tmp_path / "web")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def test_command_line_errors(
    pages: dict[str, tuple[Path, Student]],
    tiny_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def call(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["r2l-export", "web", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            script.main()
        assert caught.value.code == 1
        return " ".join(capsys.readouterr().out.split())

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "not empty and is not a web export" in call(tmp_path / "mine", "--load-config", tiny_student, "--overwrite")
    assert "replace it with --overwrite" in call(pages["r2l"][0], "--load-config", tiny_student)
    run = Path(shutil.copytree(tiny_student, tmp_path / "run"))
    config = load_run_config(run)
    config.pipeline.datamanager.data = tmp_path / "gone"
    (run / "config.yml").write_text(yaml.dump(config))
    assert "cannot be read" in call(tmp_path / "new", "--load-config", run)
    assert "does not exist" in call(tmp_path / "new", "--load-config", tiny_student, "--runtime", tmp_path / "gone.tgz")
    assert not (tmp_path / "new").exists()
