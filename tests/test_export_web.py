"""Web exports: navigation limits, weights, server, and everything else that needs no browser."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import math
import os
import socket
import subprocess
import tarfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from student_runs import tiny_composited_mobile_r2l, tiny_composited_r2l, tiny_mobile_r2l, write_run

from r2l_nerfstudio import load_student
from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras, look_along
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.export import web_folder, web_runtime, web_server
from r2l_nerfstudio.export.graph import reduced_frequency_encode
from r2l_nerfstudio.export.navigation import start_pose, view_limits
from r2l_nerfstudio.export.web_folder import to_rgb
from r2l_nerfstudio.export.web_runtime import FILES, GPU_FILES, fetch_runtime
from r2l_nerfstudio.export.web_server import WebServer
from r2l_nerfstudio.export.web_weights import WebPrecision, WebWeights
from r2l_nerfstudio.models.light_field import LightFieldModelConfig
from r2l_nerfstudio.psnr import psnr
from r2l_nerfstudio.rays.encoding import frequency_encode

UP = torch.tensor([0.0, 0.0, 1.0])


def cameras_at(positions: torch.Tensor, axes: torch.Tensor) -> CaptureCameras:
    rotations = torch.stack([look_along(axis, UP) for axis in axes])
    poses = torch.cat([rotations, positions[..., None]], dim=-1)
    return CaptureCameras(poses, torch.tensor([[50.0, 50.0, 20.0, 15.0]]).expand(len(poses), 4), 40, 30)


def around(azimuths: torch.Tensor, elevations: torch.Tensor, distance: float = 2.0) -> CaptureCameras:
    """Cameras that look at (1, 2, 3), azimuths and elevations in degrees."""
    a, e = azimuths.deg2rad(), elevations.deg2rad()
    outwards = torch.stack([a.cos() * e.cos(), a.sin() * e.cos(), e.sin()], dim=-1)
    return cameras_at(torch.tensor([1.0, 2.0, 3.0]) + distance * outwards, -outwards)


def test_all_the_way_around_an_object() -> None:
    view = view_limits(around(torch.arange(0.0, 360, 30), torch.tensor([10.0, 40.0]).repeat(6)), True, 0.5)
    assert view["kind"] == "orbit" and view["azimuth"] is None
    assert view["center"] == pytest.approx([1, 2, 3], abs=1e-3)
    assert np.degrees(view["elevation"]) == pytest.approx([8, 42], abs=0.1)
    assert view["distance"] == pytest.approx([1.5, 2.6], rel=1e-3) and view["shift"] == pytest.approx(0.175)


def test_a_capture_from_one_side_ends_where_its_cameras_end() -> None:
    cameras = around(torch.linspace(150, 210, 9), torch.linspace(0, 20, 9))
    view = view_limits(cameras, False, 0.5)
    low, high = np.degrees(view["azimuth"])
    assert high - low == pytest.approx(64, abs=0.2)
    assert low < math.degrees(view["start"]["azimuth"]) < high
    assert view["distance"] == pytest.approx([1.9, 2.1], rel=1e-3)


def test_the_start_is_a_training_camera() -> None:
    cameras = around(torch.linspace(-40, 70, 12), torch.linspace(5, 30, 12))
    pose = start_pose(view_limits(cameras, True, 0.5))
    distances = (cameras.camera_to_worlds - pose).abs().amax(dim=(1, 2))
    assert float(distances.min()) < 5e-3


def test_inward_and_outward_captures_get_different_rigs() -> None:
    angles = torch.linspace(0, 2 * math.pi, 13)[:-1]
    axes = torch.stack([angles.cos(), angles.sin(), 0.1 * torch.ones(12)], dim=-1)
    positions = 0.3 * axes + torch.tensor([0.0, 0.0, 1.0])
    view = view_limits(cameras_at(positions, axes), False, 4.0)
    assert view["kind"] == "walk" and view["azimuth"] is None and len(view["positions"]) == 12
    assert 0.1 < view["reach"] < 0.2
    pose = start_pose(view)
    match = (cameras_at(positions, axes).camera_to_worlds - pose).abs().amax(dim=(1, 2)).argmin()
    assert torch.allclose(pose, cameras_at(positions, axes).camera_to_worlds[match], atol=1e-3)


def test_angles_are_reduced_without_loss() -> None:
    values = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * 2
    exact = frequency_encode(values, 10)
    assert torch.allclose(reduced_frequency_encode(values, 10), exact, atol=2e-6)


def test_pixels_are_bytes() -> None:
    pixels = np.array([[0x00CC8010 - 2**24, -(2**24)]], dtype=np.int32)
    assert to_rgb(pixels).tolist() == [[[0x10, 0x80, 0xCC], [0, 0, 0]]]


def test_the_runtime_has_the_version_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="--runtime .*does not exist"):
        fetch_runtime(tmp_path / "gone.tgz")
    package = tmp_path / "package.tgz"
    with tarfile.open(package, "w:gz") as archive:
        for name in (*FILES, *GPU_FILES):
            inside = name.removesuffix(web_runtime.PACKED)
            (tmp_path / inside).write_text(inside)
            archive.add(tmp_path / inside, f"package/dist/{inside}")
    with pytest.raises(InputError, match="is not the npm package onnxruntime-web"):
        fetch_runtime(package)
    assert not list((tmp_path / "cache" / "r2l-nerfstudio").iterdir())
    digest = hashlib.sha512(package.read_bytes()).digest()
    monkeypatch.setattr(web_runtime, "INTEGRITY", web_runtime.base64.b64encode(digest).decode())
    folder = fetch_runtime(package)
    assert sorted(path.name for path in folder.iterdir()) == sorted((*FILES, *GPU_FILES))
    wasm = FILES[2]
    assert gzip.decompress((folder / wasm).read_bytes()).decode() == wasm.removesuffix(web_runtime.PACKED)
    # Kept: the next export needs neither npm nor a network.
    monkeypatch.setattr(web_runtime.shutil, "which", lambda name: pytest.fail("npm was looked for"))
    assert fetch_runtime() == folder


@pytest.mark.parametrize(
    ("has_npm", "said"), [(False, "npm is not installed"), (True, r"npm could not download .*E404")]
)
def test_npm_errors(has_npm: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(web_runtime.shutil, "which", lambda name: "npm" if has_npm else None)
    failed = subprocess.CompletedProcess([], 1, "", "npm error code E404")
    monkeypatch.setattr(web_runtime.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match=f"{said}.*--runtime"):
        fetch_runtime()


def test_the_server_lets_pages_use_threads(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("here")
    (tmp_path / "a.mjs").write_text("1")
    with WebServer(tmp_path) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with urllib.request.urlopen(server.address, timeout=10) as response:
                assert response.read() == b"here"
                assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
                assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            with urllib.request.urlopen(server.address + "a.mjs", timeout=10) as response:
                assert response.headers["Content-Type"] == "text/javascript"
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen(server.address + "../secret", timeout=10)
            with pytest.raises(InputError, match="Nothing can be served at --host 127.0.0.1 --port"):
                WebServer(tmp_path, port=server.server_address[1])
        finally:
            server.shutdown()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[WebServer]:
    """A folder `site` beside a secret, with a page, a subfolder, and links that lead out of it."""
    site = tmp_path / "site"
    (site / "ort").mkdir(parents=True)
    (site / "index.html").write_text("<script>here()</script>")
    (site / "ort" / "a.mjs").write_text("1")
    (site / "inside.json").symlink_to(site / "ort" / "a.mjs")
    (tmp_path / "secret").write_text("secret")
    (site / "secret.json").symlink_to(tmp_path / "secret")
    (site / "out").symlink_to(tmp_path)
    os.mkfifo(site / "pipe")
    with WebServer(site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def status(server: WebServer, path: str) -> int:
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        return int(connection.makefile("rb").readline().split()[1])


def test_the_server_stays_in_its_folder(served: WebServer) -> None:
    assert [status(served, path) for path in ("/", "/index.html", "/ort/a.mjs", "/inside.json")] == [200] * 4
    outside = [
        "/secret.json",
        "/out/secret",
        "/../secret",
        "/%2e%2e/secret",
        "//etc/passwd",
        "/ort",
        "/ort/",
        "/pipe",
        "/no",
    ]
    assert {path: status(served, path) for path in outside} == dict.fromkeys(outside, 404)
    with urllib.request.urlopen(served.address, timeout=10) as response:
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        policy = response.headers["Content-Security-Policy"]
    assert "frame-ancestors 'self'" in policy and "default-src 'none'" in policy and "unsafe-inline" not in policy
    assert base64.b64encode(hashlib.sha256(b"here()").digest()).decode() in policy


def test_the_server_survives_half_open_requests(served: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_server, "SECONDS_FOR_REQUEST", 0.5)
    before = threading.active_count()
    waiting = []
    for _ in range(200):
        waiting.append(socket.create_connection(("127.0.0.1", served.server_address[1]), timeout=10))
        with contextlib.suppress(OSError):  # closed at once, beyond the room there is
            waiting[-1].sendall(b"GET / HTTP/1.0\r\nX-Slow: ")
    assert threading.active_count() - before <= web_server.MOST_THREADS
    end = time.monotonic() + 20
    while True:
        try:
            if status(served, "/") == 200:
                break
        except (OSError, IndexError, ValueError):
            assert time.monotonic() < end
        # What trickles in does not buy time.
        for connection in waiting[:20]:
            with contextlib.suppress(OSError):
                connection.sendall(b"a")
        time.sleep(0.1)
    for connection in waiting:
        connection.close()


@pytest.mark.parametrize("host", ["", " ", "no.such.host.invalid"])
def test_the_server_refuses_an_empty_host(host: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--host.*127.0.0.1 for this machine"):
        WebServer(tmp_path, host=host)


def test_the_page_without_the_student_stays_small() -> None:
    """At most 40 KB of HTML, CSS, JavaScript and WGSL, gzipped file by file, without what only the fallback loads."""
    page = Path(web_folder.__file__).parent / "web"
    loaded = [name for name in web_folder.PAGE if name not in web_folder.UNREAD]
    assert {"light-field.js", "wgsl.js", "index.html", "page.css"} <= set(loaded)
    texts = [(page / name).read_text() for name in loaded]
    assert sum(len(gzip.compress(web_folder.without_comments(text).encode())) for text in texts) <= 40_000


def test_only_comments_are_removed() -> None:
    script = "// one\nconst a = 'http://b'; // two\n  /** three\n   * four */\n/** @type {T} */ (a).b();\n/** five */\n"
    script += "c();\n"
    left = "const a = 'http://b'; // two\n/** @type {T} */ (a).b();\nc();\n"
    assert web_folder.without_comments(script) == left


@pytest.mark.parametrize("config", [tiny_composited_r2l(), tiny_composited_mobile_r2l(), tiny_mobile_r2l(margin=0)])
def test_weights_without_batch_norm_render_the_same(config: LightFieldModelConfig, tmp_path: Path) -> None:
    student = load_student(write_run(tmp_path / "run", config), device="cpu", engine="torch")
    pose = torch.cat([torch.eye(3), torch.tensor([[0.0], [0.0], [2.0]])], dim=1)
    truth = web_folder.drawn_rgb(student, pose, 50.0, 24, 20)
    for precision, needed in (("fp16", 60), ("int8", 35)):
        weights = WebWeights(student.model, precision)
        with weights.drawing():
            found = psnr(web_folder.drawn_rgb(student, pose, 50.0, 24, 20), truth)
        assert needed < found < 100
    assert torch.equal(web_folder.drawn_rgb(student, pose, 50.0, 24, 20), truth)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_weights_file_holds_all_weights(precision: WebPrecision, tmp_path: Path) -> None:
    """A transposed convolution, read back and applied as the page does: each phase has its own matrix."""
    student = load_student(write_run(tmp_path / "run", tiny_composited_mobile_r2l()), device="cpu", engine="torch")
    weights = WebWeights(student.model, precision)
    weights.write(tmp_path / "weights.safetensors")
    tensors = load_file(tmp_path / "weights.safetensors")
    matrix = tensors["ups.0.weight"].float() * tensors.get("ups.0.weight.scale", torch.ones(()))
    assert matrix.shape == (4, 4 * 16, 8)
    hidden = torch.randn(1, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    truth = weights.network.up[0](hidden)[0, :, 2:4, 2:4]
    for down in (0, 1):
        for across in (0, 1):
            taps = [hidden[0, :, 1 + y * (2 * down - 1), 1 + x * (2 * across - 1)] for y in (0, 1) for x in (0, 1)]
            made = torch.cat(taps) @ matrix[2 * down + across] + tensors["ups.0.bias"]
            assert torch.allclose(made, truth[:, down, across], atol=1e-5)
