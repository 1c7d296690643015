"""Set up and run from a fresh clone, with only Python and git installed.

    python3 dev.py quickstart [options of r2l-quickstart]
    python3 dev.py test [options of pytest]
    python3 dev.py check             lint, format and types
    python3 dev.py docs              the documentation, into build/docs
    python3 dev.py test-oldest       the fast tests on the oldest supported PyTorch
    python3 dev.py test-viser        the viewer's fast tests on the viser that Nerfstudio's main branch pins

Creates .venv beside this repository's pyproject.toml and installs into it, again whenever that file changes.
"""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "installed"
OLDEST = (3, 10)

ALONE = "fleet_on_two_machines"  # Ray allows its processes 30 seconds to start, whatever else runs.

OLDEST_VENV = ROOT / ".venv-oldest"
OLDEST_PACKAGES = (
    "torch==2.1.2",  # As in Nerfstudio's installation guide.
    "torchvision==0.16.2",
    "numpy==1.26.4",
    "onnx>=1.17",
    "onnxruntime>=1.20",
    "pytest>=8,<10",
    "pytest-timeout>=2,<3",
    "hypothesis>=6.100",
)
OLDEST_TESTS = tuple(
    f"tests/test_{name}.py"
    for name in (
        "torch_compat",
        "rays",
        "students",
        "mobile_student",
        "models",
        "mobile_model",
        "optimization",
        "renamed_fields",
        "methods",
        "student",
        "examples",  # among them training, saving and loading
    )
)

VISER_FOLDER = ROOT / ".viser-newest"
# As Nerfstudio's main branch pins it, with websockets as it requires it. Of tyro, rich, trimesh and OpenCV it excludes the
# newest versions too, but the viewer does not depend on what changed there.
VISER = ("viser==1.0.0", "websockets>=13.1,<16")
VISER_TESTS = ("tests/test_viewer_panel.py",)

# uv does not read pip's settings, so they are passed on unless uv has its own.
PIP_TO_UV = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
}


def main(arguments: list[str]) -> int:
    """Set up what is missing, run the command and return its exit code."""
    if sys.version_info < OLDEST:
        return fail(
            f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, and this is {sys.version.split()[0]} ({sys.executable}). "
            "Run this script with a newer one, for example: python3.11 dev.py quickstart"
        )
    if not arguments or arguments[0] not in ("quickstart", *COMMANDS):
        print(__doc__)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    try:
        install()
    except InstallError as error:
        return fail(str(error))
    name, *rest = arguments
    if name == "quickstart":
        # In the caller's folder, since its options and output contain paths relative to it.
        return subprocess.call([str(PYTHON), "-m", "r2l_nerfstudio.scripts.quickstart", *rest])
    try:
        return COMMANDS[name](rest)
    except InstallError as error:
        return fail(str(error))


def test(rest: list[str]) -> int:
    """Run all tests in two processes, then those that need the machine to themselves; with options, pytest in one."""
    pytest = [str(PYTHON), "-m", "pytest", "--durations=15"]
    if rest:
        return call(*pytest, *rest)
    alone = f"tests/end_to_end/test_{ALONE}.py"
    # Files stay whole, for what their tests share, and start in alphabetical order: the longest are in end_to_end. A
    # process that crashes is not replaced, since the run would then wait forever (pytest-xdist issue 1378).
    two = ["--numprocesses=2", "--dist=loadfile", "--no-loadscope-reorder", "--max-worker-restart=0"]
    results = [call(*pytest, *two, f"--ignore={alone}"), call(*pytest, alone)]
    return max(results, key=abs)


def check(rest: list[str]) -> int:
    """Run linter, formatter and type checker, even if one of them fails."""
    codes = [
        call(str(PYTHON), "-m", "ruff", "check", "."),
        call(str(PYTHON), "-m", "ruff", "format", "--check", "."),
        call(str(PYTHON), "-m", "pyright", "--pythonpath", str(PYTHON)),
        call(str(PYTHON), "-m", "pyright", "--pythonpath", str(PYTHON), "--project", "tests"),
    ]
    return max(codes)


def docs(rest: list[str]) -> int:
    """Build the documentation, with warnings as errors."""
    return call(str(PYTHON), "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", "build/docs", *rest)


def test_oldest(rest: list[str]) -> int:
    """Run the fast tests in an environment of the oldest supported PyTorch.

    Raises:
        InstallError: if that cannot be installed.
    """
    python = OLDEST_VENV / BIN.name / PYTHON.name
    stamp = OLDEST_VENV / "installed"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + repr(OLDEST_PACKAGES).encode()).hexdigest()
    if not (python.exists() and stamp.exists() and stamp.read_text() == wanted):
        stamp.unlink(missing_ok=True)
        uv = [str(PYTHON), "-m", "uv"]
        what = "the oldest supported PyTorch"
        run([*uv, "venv", "--quiet", "--clear", "--python", python_for_oldest(), str(OLDEST_VENV)], what)
        run(
            [*uv, "pip", "install", "--quiet", "--python", str(python), "--editable", str(ROOT), *OLDEST_PACKAGES],
            what,
            uv_environment(),
        )
        stamp.write_text(wanted)
    return call(str(python), "-m", "pytest", "-p", "no:cacheprovider", *OLDEST_TESTS, *rest)


def test_viser(rest: list[str]) -> int:
    """Run the viewer's fast tests on the viser that Nerfstudio's main branch pins, in a folder that is put before the
    environment's packages.

    Raises:
        InstallError: if that cannot be installed.
    """
    stamp = VISER_FOLDER / "installed"
    wanted = "\n".join(VISER)
    if not (stamp.exists() and stamp.read_text() == wanted):
        stamp.unlink(missing_ok=True)
        target = ("--target", str(VISER_FOLDER), "--no-deps", "--upgrade")
        command = [str(PYTHON), "-m", "uv", "pip", "install", "--quiet", "--python", str(PYTHON), *target, *VISER]
        run(command, VISER[0], uv_environment())
        stamp.write_text(wanted)
    version = VISER[0].partition("==")[2]
    check = f"import viser; assert viser.__version__ == {version!r}, viser.__version__"
    environment = {**os.environ, "PYTHONPATH": str(VISER_FOLDER)}
    for command in (["-c", check], ["-m", "pytest", "-q", "-p", "no:cacheprovider", *VISER_TESTS, *rest]):
        code = subprocess.call([str(PYTHON), *command], cwd=ROOT, env=environment)
        if code:
            return code
    return 0


def python_for_oldest() -> str:
    """Return a Python 3.10 or 3.11, for which the oldest PyTorch has wheels; if there is none, a version for uv to
    download."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [*sorted(pyenv.glob("3.10.*/bin/python")), "python3.10", sys.executable, "python3.11"]
    for python in map(str, found):
        try:
            code = "import sys; print(sys.version_info[:2] in ((3, 10), (3, 11)))"
            if subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip() == "True":
                return python
        except OSError:
            continue
    return "3.10"


def call(*command: str) -> int:
    """Run a command in the repository's folder and return its exit code."""
    return subprocess.call(command, cwd=ROOT)


class InstallError(Exception):
    """What could not be installed, and what to do."""


def install() -> None:
    """Create the environment, unless it exists for this pyproject.toml and this Python.

    Raises:
        InstallError: if a step fails; the next call starts again.
    """
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + sys.version.encode()).hexdigest()
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == wanted:
        return
    STAMP.unlink(missing_ok=True)
    print(f"Setting up {VENV} (once; several minutes, some gigabytes) ...", flush=True)
    try:
        # An environment of another Python, or an incomplete one, is recreated; a good one is updated.
        venv.create(VENV, with_pip=True, clear=not usable())
    except (OSError, subprocess.CalledProcessError) as error:
        raise InstallError(
            f"{VENV} could not be created ({error}): on Debian and Ubuntu, install python3-venv; elsewhere, check"
            " that this folder is writable."
        ) from error
    run([str(PYTHON), "-m", "pip", "install", "--quiet", "uv"], "uv, the installer,")
    run(
        [str(PYTHON), "-m", "uv", "pip", "install", "--python", str(PYTHON), "--editable", f"{ROOT}[dev]"],
        "this package with its dependencies",
        uv_environment(),
    )
    check_multiprocess()
    check_nerfacto()
    STAMP.write_text(wanted)


LOCK = "import multiprocess; multiprocess.get_context('spawn').Lock()"
"""The first call of Nerfstudio's data managers."""


def check_multiprocess() -> None:
    """Check that `multiprocess` is the wheel of this Python, and repair it if not.

    It has one wheel per Python, and tags all of them as compatible with newer ones. With several indexes uv takes the
    first index's wheel; pip takes the best one.

    Raises:
        InstallError: if it cannot be repaired.
    """
    if subprocess.run([str(PYTHON), "-c", LOCK], capture_output=True).returncode == 0:
        return
    version = "import importlib.metadata; print(importlib.metadata.version('multiprocess'))"
    found = subprocess.run([str(PYTHON), "-c", version], capture_output=True, text=True).stdout.strip()
    wanted = f"multiprocess=={found}" if found else "multiprocess"
    run(
        [str(PYTHON), "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", "--no-cache-dir", wanted],
        "multiprocess for this Python",
    )
    if subprocess.run([str(PYTHON), "-c", LOCK]).returncode:
        raise InstallError(
            f"The package multiprocess does not work with this Python ({sys.version.split()[0]}; the reason is above):"
            f" ns-train cannot start with it. Install another version of it into {VENV}, or use another Python."
        )


def check_nerfacto() -> None:
    """See that Nerfstudio's own `ns-train nerfacto` starts; the tests train with it.

    Raises:
        InstallError: if not; its last lines have been printed.
    """
    found = subprocess.run([str(BIN / "ns-train"), "nerfacto", "--help"], capture_output=True, text=True)
    if found.returncode:
        print((found.stdout + found.stderr)[-2000:], file=sys.stderr)
        raise InstallError(
            f"ns-train nerfacto does not start in {VENV} (the reason is above). Delete that folder and run this again; if it"
            " stays so, a package in it is broken: install another version of the one that the reason names."
        )


def usable() -> bool:
    """Return whether .venv is a working environment of this Python version."""
    code = "import sys; print(*sys.version_info[:2])"
    try:
        found = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
    return found.split() == [str(part) for part in sys.version_info[:2]]


def uv_environment() -> dict[str, str]:
    """Return the environment for uv: the current one, with pip's indexes, links, certificates and proxy unless uv has
    its own."""
    environment = dict(os.environ)
    settings = pip_settings()
    for option, variable in PIP_TO_UV.items():
        value = settings.get(option)
        if not value or variable in os.environ or (option == "index-url" and "UV_INDEX_URL" in os.environ):
            continue
        # uv separates links by commas, the rest by spaces, like pip.
        environment[variable] = ",".join(value.split()) if option == "find-links" else value
    if "UV_INDEX" in environment and "UV_INDEX" not in os.environ:
        # pip takes the best version from all its indexes; uv would stop at the first that has the package.
        environment.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    return environment


def pip_settings() -> dict[str, str]:
    """Return pip's options for an installation, from its variables and configuration files."""
    listed = subprocess.run([str(PYTHON), "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in found:
            found[section][option] = " ".join(ast.literal_eval(value).split())
    return {**found["global"], **found["install"], **found[":env:"]}


def run(command: list[str], what: str, environment: dict[str, str] | None = None) -> None:
    """Run one step of the installation.

    Raises:
        InstallError: if it fails; its own messages have been printed.
    """
    code = subprocess.call(command, env=environment, cwd=ROOT)
    if code:
        raise InstallError(
            f"Installing {what} failed (exit code {code}; the reason is above). Check the network and pip's configuration"
            f" (python3 -m pip config list), then run this again. To start over, delete {VENV}."
        )


def fail(message: str) -> int:
    """Print an error and return the exit code for it."""
    print(f"Error: {message}", file=sys.stderr)
    return 1


COMMANDS = {"test": test, "check": check, "docs": docs, "test-oldest": test_oldest, "test-viser": test_viser}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
