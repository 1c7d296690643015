"""The wheel works without the checkout and contains nothing that users do not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from student_runs import tiny_r2l, write_run

ROOT = Path(__file__).parents[2]

COMMANDS = """
import json, sys
from contextlib import redirect_stdout
from io import StringIO

import r2l_nerfstudio

STUDENT = sys.argv[1]
assert r2l_nerfstudio.__file__.startswith(sys.prefix), r2l_nerfstudio.__file__

def printed(entrypoint, *arguments):
    sys.argv = list(arguments)
    with redirect_stdout(StringIO()) as text:
        try:
            entrypoint()
        except SystemExit as end:
            assert not end.code, text.getvalue()
    return text.getvalue()

from nerfstudio.scripts import train
from r2l_nerfstudio.scripts import export

found = {
    "train": printed(train.entrypoint, "ns-train", "r2l", "--help"),
    "export": printed(export.main, "r2l-export", "--help"),
}
student = r2l_nerfstudio.load_student(STUDENT, device="cpu", engine="torch")
image = student.render([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4]], [30, 30, 10, 8], 20, 16)
found["student"] = [student.method_name, list(image.shape), bool(0 <= image.min() <= image.max() <= 1)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def found(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What commands print where only the wheel is installed, all run by one process: most of their time is importing."""
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
    student = write_run(folder / "student", tiny_r2l())
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-W", "ignore", "-c", COMMANDS, str(student)],
        cwd=folder,
        env={**variables, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


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


def test_ns_train_lists_the_methods_and_their_flags(found: dict[str, Any]):
    assert "--pipeline.model.ray-encoding" in found["train"]


def test_r2l_export_lists_its_formats(found: dict[str, Any]):
    for name in ("onnx", "coreml", "openvino", "tensorrt", "web"):
        assert name in found["export"]


def test_a_student_is_rendered_from_python(found: dict[str, Any]):
    assert found["student"] == ["r2l-lite", [16, 20, 3], True]
