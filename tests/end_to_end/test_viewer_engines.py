"""Engines in the viewer, in a real browser: selected automatically, changed by the user, shown in the panel."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import CHANGED, SAME, SIMILAR, ViewerPage, chromium, difference
from test_viewer import MAX_RES, SCREENSHOTS, Served, serve

STUDENTS = {"r2l-lite": "visible_student", "mobile-r2l-lite": "visible_mobile_student"}
BY_HAND = ["torch", "onnxruntime", "openvino"]
"""Not inductor, which compiles for a quarter of a minute: `test_engines` has it."""


def running(page: ViewerPage) -> str:
    """The panel's line about the network: what ran it, in which precision, and what is on its way."""
    found = re.search(r"Network: ([\d.e+-]+) ms, (.+)", page.panel())
    return "" if found is None else found[2]


def another_picture(page: ViewerPage) -> None:
    """Have it drawn again, from where the camera is: what is ready draws from the next picture on."""
    page.limit_resolution(MAX_RES - 2)
    page.limit_resolution(MAX_RES)


@pytest.fixture(scope="module", params=STUDENTS)
def student(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A method and the folder of a run: the viewer leaves in it which engine is the fastest."""
    return request.param, request.getfixturevalue(STUDENTS[request.param])


@pytest.fixture(scope="module")
def opened(
    student: tuple[str, Path],
    command: Callable[..., list[str]],
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[ViewerPage, Served]]:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    arguments = command("ns-viewer", "--load-config", student[1] / "config.yml")
    folder = tmp_path_factory.mktemp("viewer")
    with serve(arguments, environment, folder) as served, chromium(tmp_path_factory.mktemp("browser")) as browser:
        page = ViewerPage(browser.new_page(), served.port, check=served.check)
        page.limit_resolution(MAX_RES)
        yield page, served
        served.check()
        assert not page.crashes


def test_engines_are_selected_shown_and_changed(
    opened: tuple[ViewerPage, Served], student: tuple[str, Path], user_cache: Path
):
    method, _ = student
    page, served = opened
    # Idle, a viewer draws nothing: a picture more, once the choice has been made, shows what came of it.
    page.wait_until(lambda: "Engine: " in served.log.read_text(), "auto to choose")
    another_picture(page)
    before = page.settle()
    line = next(line for line in served.log.read_text().splitlines() if line.startswith("Engine: "))
    chosen = re.match(r"Engine: (\S+ \S+), ([\d.]+) ms, (\d+ dB|equal to fp32) \(", line)
    assert chosen, line
    page.wait_until(lambda: running(page) == chosen[1], "the chosen engine to draw")
    page.save(SCREENSHOTS / f"engine_auto_{method}.png")
    assert list((user_cache / "r2l-nerfstudio" / "engines").glob("*/*.json")), "the choice was not remembered"

    for name in BY_HAND:
        page.row("Engine").first.click()
        page.page.get_by_role("option", name=name, exact=True).click()

        def is_drawing(name: str = name) -> bool:
            another_picture(page)
            return re.fullmatch(rf"{name} (bf16|fp32)", running(page)) is not None

        page.wait_until(is_drawing, f"{name} to draw", pause=1.0)
        # Students so briefly trained draw noise, of which JPEG makes more or less as the viewer is in haste or not.
        assert difference(before, page.settle()) < SIMILAR, f"{name} draws another picture"
        served.check()
    page.save(SCREENSHOTS / f"engine_by_hand_{method}.png")
    assert page.pace("Student") > 0

    # Two browsers move at once, and that engine draws for both.
    other = ViewerPage(page.page.context.new_page(), served.port, full=MAX_RES, check=served.check)
    aside = other.settle()
    page.settle()
    other.start_drag(120, 0)
    page.drag(-60, 0)
    other.page.mouse.up()
    assert difference(aside, other.settle()) > CHANGED, "the second browser's picture stayed"
    still = page.settle()
    other.drag(-60, 0)
    assert difference(still, page.settle()) < SAME, "the second browser moved the first one's camera"
    for browser in (page, other):
        assert running(browser).split()[0] == BY_HAND[-1] and not browser.crashes
    served.check()
    other.page.close()


def test_ns_eval_gives_the_same_figures_by_every_engine(student: tuple[str, Path], tmp_path: Path):
    from nerfstudio.scripts.eval import ComputePSNR

    text = (student[1] / "config.yml").read_text()
    psnr = {}
    for name in ("auto", "torch", "openvino", "onnxruntime"):
        config, figures = tmp_path / "config.yml", tmp_path / f"{name}.json"
        config.write_text(text.replace("engine: auto", f"engine: {name}"))
        assert f"engine: {name}" in config.read_text()
        ComputePSNR(load_config=config, output_path=figures).main()
        psnr[name] = json.loads(figures.read_text())["results"]["psnr"]
    assert max(psnr.values()) - min(psnr.values()) < 1e-3, psnr


def test_ns_eval_with_an_unavailable_engine_is_an_error_with_the_reason(
    student: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    from nerfstudio.scripts.eval import ComputePSNR

    config = tmp_path / "config.yml"
    config.write_text((student[1] / "config.yml").read_text().replace("engine: auto", "engine: tensorrt"))
    with pytest.raises(SystemExit):
        ComputePSNR(load_config=config, output_path=tmp_path / "figures.json").main()
    said = " ".join(capsys.readouterr().out.split())
    assert "The engine tensorrt cannot run" in said and "NVIDIA GPU" in said and "Traceback" not in said
