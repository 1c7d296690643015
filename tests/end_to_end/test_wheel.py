"""The wheel works without the checkout and contains nothing that users do not run."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from student_runs import tiny_r2l, write_run

ROOT = Path(__file__).parents[2]

RENDER = """
import sys
import r2l_nerfstudio
from r2l_nerfstudio import load_student

assert r2l_nerfstudio.__file__.startswith(sys.prefix), r2l_nerfstudio.__file__
student = load_student(sys.argv[1], device="cpu", engine="torch")
image = student.render([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4]], [30, 30, 10, 8], 20, 16)
print(student.method_name, image.shape, 0 <= image.min() <= image.max() <= 1)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def run(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A function that runs this Python's arguments where only the wheel is installed, and returns what was printed."""
    folder = tmp_path_factory.mktemp("clean")
    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    (wheel,) = built.glob("*.whl")
    site = next(environment.glob("lib/python*/site-packages"), environment / "Lib" / "site-packages")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    # Its dependencies are this environment's; an editable installation among them is not followed from there.
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))

    def run(*arguments: str) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [str(python), "-W", "ignore", *arguments],
            cwd=folder,
            env={**environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return run


def test_the_wheel_contains_only_the_package(built: Path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"r2l_nerfstudio"}
    assert not [name for name in names if "benchmark" in name or "test" in name or name.endswith("/dev.py")]
    for needed in ("py.typed", "method_configs/r2l.py", "scripts/export.py", "export/web/index.html"):
        assert f"r2l_nerfstudio/{needed}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_ns_train_lists_the_methods_and_their_flags(run: Callable[..., str]):
    command = "import sys; from nerfstudio.scripts.train import entrypoint; sys.argv[0] = 'ns-train'; entrypoint()"
    assert "--pipeline.model.ray-encoding" in run("-c", command, "r2l", "--help")


def test_r2l_export_lists_its_formats(run: Callable[..., str]):
    printed = run("-m", "r2l_nerfstudio.scripts.export", "--help")
    for name in ("onnx", "coreml", "openvino", "tensorrt", "web"):
        assert name in printed


def test_a_student_is_rendered_from_python(run: Callable[..., str], tmp_path: Path):
    config = write_run(tmp_path / "student", tiny_r2l())
    assert "r2l-lite (16, 20, 3) True" in run("-c", RENDER, str(config))
