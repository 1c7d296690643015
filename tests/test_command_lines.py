"""Whatever is on a command line, it ends with one paragraph and exit code 1 or 2, or is taken; never with a traceback."""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import student_runs
import tyro
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nerfstudio.configs.method_configs import all_methods

from r2l_nerfstudio.atomic_output import atomic_files
from r2l_nerfstudio.errors import InputError, command_line
from r2l_nerfstudio.export import onnx_file
from r2l_nerfstudio.scripts import export, view

EXAMPLES = int(os.environ.get("R2L_PROPERTY_EXAMPLES", "25"))
"""Calls of each command; 500 before a release."""

NUMBERS = ["0", "-1", "1", "1.5", "-5", "nan", "inf", "-inf", "1e400", str(2**70), str(10**12), "x", "", "None", "0x10"]
PATHS = [
    "",
    "/",
    ".",
    "/dev/null",
    "/dev/zero",
    "/proc/nothing/here",
    "a" * 300,
    "a/" * 3000,
    "/nowhere/\udcff",
    "nowhere",
]
WORDS = ["", "None", "spiral", "a" * 300, "../up", "\U0001f600", "True", "-"]

TRAIN = {
    **dict.fromkeys(
        [
            "--max-num-iterations",
            "--max-minutes",
            "--teacher-time",
            "--machine.seed",
            "--machine.num-devices",
            "--steps-per-save",
            "--load-step",
            "--viewer.websocket-port",
            "--logging.steps-per-log",
            "--pipeline.ema-decay",
            "--pipeline.steps-per-holdout",
            "--pipeline.model.width",
            "--pipeline.model.num-points",
            "--pipeline.model.volume-resolution",
            "--pipeline.model.eval-num-rays-per-chunk",
            "--pipeline.datamanager.num-views",
            "--pipeline.datamanager.view-downscale",
            "--pipeline.datamanager.photo-iterations",
            "--pipeline.datamanager.seed",
            "--pipeline.datamanager.refresh-share",
            "--pipeline.datamanager.train-num-rays-per-batch",
            "--pipeline.datamanager.pose-sampler.jitter",
            "--pipeline.datamanager.pose-sampler.num-neighbours",
        ],
        NUMBERS,
    ),
    **dict.fromkeys(
        ["--teacher", "--data", "--output-dir", "--load-dir", "--load-checkpoint", "--pipeline.datamanager.cache-dir"],
        PATHS,
    ),
    **dict.fromkeys(
        ["--experiment-name", "--timestamp", "--vis", "--pipeline.model.engine", "--machine.device-type"], WORDS
    ),
}
EXPORT = {
    **dict.fromkeys(["--width", "--height", "--step"], NUMBERS),
    **dict.fromkeys(["--load-config", "--output", "--data"], PATHS),
    **dict.fromkeys(["--precision", "--inputs", "--target", "--part"], WORDS),
}
VIEW = {
    **dict.fromkeys(["--port", "--step"], NUMBERS),
    **dict.fromkeys(["--host", "--engine"], WORDS),
}


def calls(flags: dict[str, list[str]]) -> st.SearchStrategy[list[str]]:
    one = st.sampled_from(sorted(flags)).flatmap(lambda flag: st.tuples(st.just(flag), st.sampled_from(flags[flag])))
    return st.lists(one, min_size=1, max_size=3, unique_by=lambda pair: pair[0]).map(lambda pairs: [*sum(pairs, ())])


def outcome(run: Callable[[], None]) -> int:
    """The exit code of a command: 0, or 1 or 2 with a paragraph."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run()
    except SystemExit as exit_:
        assert exit_.code in (1, 2)
        assert "Traceback" not in out.getvalue() + err.getvalue()
        return int(exit_.code)
    return 0


_SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("method", ["r2l-lite", "mobile-r2l-lite"])
def test_training(method: str, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    default = all_methods[method]

    @_SETTINGS
    @given(call=calls(TRAIN))
    def check(call: list[str]) -> None:
        teacher = [] if "--teacher" in call else ["--teacher", str(tiny_teacher)]

        def run() -> None:
            config = tyro.cli(type(default), default=copy.deepcopy(default), args=[*teacher, *call])
            config.set_timestamp()  # all that is checked before anything is written or rendered

        outcome(run)

    check()
    assert not list(tmp_path.iterdir())


# Calls that were taken, or ended in a traceback, before ranges were declared.
@pytest.mark.parametrize(
    ("call", "code"),
    [
        (["--max-num-iterations", "0"], 2),
        (["--machine.seed", str(2**70)], 1),
        (["--pipeline.datamanager.view-downscale", "-1"], 2),
        (["--pipeline.ema-decay", "1.5"], 2),
        (["--pipeline.datamanager.photo-iterations", "-5"], 2),
        (["--max-minutes", "nan"], 2),
        (["--pipeline.datamanager.pose-sampler.focal-range", "2", "1"], 1),
        (["--pipeline.datamanager.cache-dir", __file__], 1),
        (["--output-dir", f"{__file__}/runs"], 1),
        (["--experiment-name", "a" * 300], 1),
        (["--load-checkpoint", "nowhere"], 1),
        (["--machine.num-devices", "0"], 1),
        (["--max-num-iterations", "100"], 0),
    ],
)
def test_training_in_particular(call: list[str], code: int, tiny_teacher: Path) -> None:
    default = all_methods["r2l-lite"]

    def run() -> None:
        args = ["--teacher", str(tiny_teacher), *call]
        tyro.cli(type(default), default=copy.deepcopy(default), args=args).set_timestamp()

    assert outcome(run) == code


def test_ranges_are_in_the_help() -> None:
    default = all_methods["r2l-lite"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        tyro.cli(type(default), default=copy.deepcopy(default), args=["--help"])
    assert "[1..8192]" in out.getvalue() and "[0..1]" in out.getvalue()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return student_runs.write_run(tmp_path_factory.mktemp("students") / "run", student_runs.tiny_r2l()).parent


def test_export(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def written(student, spec, output, overwrite):
        with atomic_files(output, overwrite):
            raise InputError("as far as this test goes")

    monkeypatch.setattr(onnx_file, "export_onnx", written)

    @_SETTINGS
    @given(call=calls(EXPORT))
    def check(call: list[str]) -> None:
        needed = {"--load-config": str(student), "--output": "student.onnx"}
        given_ = [part for flag, value in needed.items() if flag not in call for part in (flag, value)]

        def run() -> None:
            with command_line():
                tyro.extras.subcommand_cli_from_dict(export.COMMANDS, args=["onnx", *given_, *call]).main()

        assert outcome(run) in (1, 2)

    check()
    assert not list(tmp_path.iterdir())


def test_view(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_):
        raise InputError("as far as this test goes")

    monkeypatch.setattr(view, "start_viewer", started)

    @_SETTINGS
    @given(call=calls(VIEW), run_=st.sampled_from([str(student), *PATHS]))
    def check(call: list[str], run_: str) -> None:
        def run() -> None:
            with command_line():
                tyro.cli(view.View, args=[run_, *call]).main()

        assert outcome(run) in (1, 2)

    check()
