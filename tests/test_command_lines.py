"""Every command line is either accepted or ends with one paragraph and exit code 1 or 2, never with a traceback."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import student_runs
import tyro
from fleets import write_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nerfstudio.configs.method_configs import all_methods
from published_captures import around, blender_capture
from published_files import r2l_weights, write_tar

from r2l_nerfstudio.atomic_output import atomic_files, atomic_folder
from r2l_nerfstudio.distillation import pose_sampling
from r2l_nerfstudio.errors import InputError, command_line
from r2l_nerfstudio.export import (
    coreml_file,
    int8,
    onnx_file,
    openvino_file,
    tensorrt_plan,
    training_cameras,
    web_folder,
    web_runtime,
)
from r2l_nerfstudio.export.web_server import WebServer
from r2l_nerfstudio.report import measure
from r2l_nerfstudio.scripts import export, fleet, import_checkpoint, quickstart, report, view

EXAMPLES = int(os.environ.get("R2L_PROPERTY_EXAMPLES", "25"))
"""Calls of each command; 500 before a release."""

NUMBERS = ["0", "-1", "1", "1.5", "-5", "nan", "inf", "-inf", "1e400", str(2**70), str(10**12), "x", "", "None", "0x10"]
NOT_FINITE = ("nan", "inf", "-inf", "1e400")
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

METHODS = [
    method for method in all_methods if method.partition("-lite")[0].partition("-paper")[0] in ("r2l", "mobile-r2l")
]

EXPORT = {
    **dict.fromkeys(["--width", "--height", "--step"], NUMBERS),
    **dict.fromkeys(["--load-config", "--output", "--data"], PATHS),
    **dict.fromkeys(["--precision", "--inputs", "--target", "--part"], WORDS),
}
WEB = {
    **dict.fromkeys(["--port", "--step"], NUMBERS),
    **dict.fromkeys(["--load-config", "--data", "--runtime"], PATHS),
    **dict.fromkeys(["--title", "--host"], WORDS),
}
VIEW = {
    **dict.fromkeys(["--port", "--step"], NUMBERS),
    **dict.fromkeys(["--host", "--engine"], WORDS),
}
REPORT = {
    **dict.fromkeys(["--test-views", "--unseen-cameras"], NUMBERS),
    **dict.fromkeys(["--output", "--data", "--teacher"], PATHS),
    "--engines": WORDS,
}
IMPORT = {
    **dict.fromkeys(["--near", "--far", "--num-points", "--num-frequencies"], NUMBERS),
    **dict.fromkeys(["--data", "--output-dir", "--teacher"], PATHS),
    **dict.fromkeys(["--experiment-name", "--layout", "--scene", "--ndc"], WORDS),
}
QUICKSTART = {"--folder": PATHS, "--seed": NUMBERS, "--fast": WORDS}
FLEET = {
    **dict.fromkeys(
        [
            "--num-cpus",
            "--num-gpus",
            *(
                f"--{stage}.{name}"
                for stage in ("teacher", "students.mobile", "report", "exports.web")
                for name in ("minutes", "gpus", "cpus", "memory-gb", "disk-gb", "retries")
            ),
        ],
        NUMBERS,
    ),
    **dict.fromkeys(["--output", "--work-dir"], PATHS),
    **dict.fromkeys(
        ["--teacher.method", "--teacher.options", "--students.mobile.command", "--exports.web.format", "--address"],
        WORDS,
    ),
}


def flags_of(config: Any, prefix: str = "--") -> dict[str, list[str]]:
    """Every flag that a configuration of `ns-train` has, by the kind of its value."""
    found: dict[str, list[str]] = {}
    for declared in dataclasses.fields(config):
        value = getattr(config, declared.name)
        flag = prefix + declared.name.replace("_", "-")
        if declared.name.startswith("_") or isinstance(value, type):
            continue
        if dataclasses.is_dataclass(value):
            found |= flags_of(value, f"{flag}.")
        elif "Path" in str(declared.type):
            found[flag] = PATHS
        elif isinstance(value, bool | str):
            found[flag] = WORDS
        else:
            found[flag] = NUMBERS
    return found


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


def test_training(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    any_call = st.sampled_from(METHODS).flatmap(
        lambda method: st.tuples(st.just(method), calls(flags_of(all_methods[method])))
    )

    @_SETTINGS
    @given(method_and_call=any_call)
    def check(method_and_call: tuple[str, list[str]]) -> None:
        method, call = method_and_call
        default = all_methods[method]
        teacher = [] if "--teacher" in call else ["--teacher", str(tiny_teacher)]

        def run() -> None:
            config = tyro.cli(type(default), default=copy.deepcopy(default), args=[*teacher, *call])
            config.set_timestamp()  # all that is checked before anything is written or rendered
            numbers = [value for flag, value in zip(call[::2], call[1::2], strict=True) if value in NOT_FINITE]
            assert not numbers, f"taken: {call}"

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
        (["--pipeline.datamanager.pose-sampler.zoomed-focal-range", "2", "1"], 1),
        (["--pipeline.datamanager.cache-dir", __file__], 1),
        (["--output-dir", f"{__file__}/runs"], 1),
        (["--experiment-name", "a" * 300], 1),
        (["--load-checkpoint", "nowhere"], 1),
        (["--machine.num-devices", "0"], 1),
        (["--max-num-iterations", "100"], 0),
    ],
)
def test_training_command(call: list[str], code: int, tiny_teacher: Path) -> None:
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


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder; a call that was refused must have left nothing there."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.iterdir())


def far_enough(*_: Any, **__: Any) -> Any:
    """In place of what takes long, behind all checks."""
    raise InputError("as far as this test goes")


def with_needed(call: list[str], **needed: object) -> list[str]:
    """A call with the flags that the command cannot do without."""
    flags = {f"--{name.replace('_', '-')}": str(value) for name, value in needed.items()}
    return [*sum(([flag, value] for flag, value in flags.items() if flag not in call), []), *call]


def check_calls(
    flags: dict[str, list[str]], run: Callable[..., object], codes: tuple[int, ...] = (1, 2), *more: st.SearchStrategy
) -> None:
    """Make `EXAMPLES` calls of a command inside its boundary for errors, and look at its exit codes."""

    @_SETTINGS
    @given(st.tuples(calls(flags), *more))
    def check(drawn: tuple[Any, ...]) -> None:
        def command() -> None:
            with command_line():
                run(*drawn)

        assert outcome(command) in codes

    check()


@pytest.mark.parametrize("kind", ["onnx", "openvino", "coreml", "tensorrt", "tensorrt-rtx", "torch-tensorrt"])
def test_export(kind: str, student: Path, in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(student, spec, output, *others):
        overwrite = others[-1]
        with atomic_files(output, overwrite):
            far_enough()

    for module, name in {
        onnx_file: "export_onnx",
        openvino_file: "export_openvino",
        coreml_file: "export_coreml",
        tensorrt_plan: "export_plan",
    }.items():
        monkeypatch.setattr(module, name, written)
    monkeypatch.setattr(tensorrt_plan, "export_torch_tensorrt", written)
    monkeypatch.setattr(int8, "export_int8", far_enough)

    def run(call: list[str]) -> None:
        if kind == "coreml":
            call = ["student.mlpackage", *call]
            args = with_needed(call, load_config=student)
        else:
            args = with_needed(call, load_config=student, output="student.file")
        tyro.extras.subcommand_cli_from_dict(export.COMMANDS, args=[kind, *args]).main()

    check_calls(EXPORT, run)


def test_web(student: Path, in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(student, cameras, runtime, output, options, overwrite):
        with atomic_folder(output, overwrite, "scene.json", "web export"):
            far_enough()

    monkeypatch.setattr(web_folder, "export_web", written)
    monkeypatch.setattr(web_runtime, "_npm_pack", far_enough)
    monkeypatch.setattr(training_cameras, "training_views", lambda run, data: (SimpleNamespace(cameras=None), 0.1))
    monkeypatch.setattr(pose_sampling, "capture_cameras", lambda cameras: None)
    monkeypatch.setattr(int8, "held_out", lambda student, dataset, share: [])

    def run(call: list[str], output: str) -> None:
        args = with_needed(call, load_config=student)
        tyro.extras.subcommand_cli_from_dict(export.COMMANDS, args=["web", output, *args]).main()

    check_calls(WEB, run, (1, 2), st.sampled_from(PATHS))


def test_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / web_folder.SCENE).write_text("{}")
    (tmp_path / "index.html").write_text("")
    monkeypatch.setattr(WebServer, "serve_forever", far_enough)

    def run(call: list[str]) -> None:
        args = ["web", str(tmp_path), "--load-config", str(tmp_path), "--serve", *call]
        tyro.extras.subcommand_cli_from_dict(export.COMMANDS, args=args).main()

    check_calls(WEB, run)


def test_view(student: Path, in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "start_viewer", far_enough)
    check_calls(
        VIEW,
        lambda call, run_: tyro.cli(view.View, args=[run_, *call]).main(),
        (1, 2),
        st.sampled_from([str(student), *PATHS]),
    )


def test_report(student: Path, tiny_capture: Path, in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "InputDataset", far_enough)  # the first thing that is rendered from

    def run(call: list[str], run_: str) -> None:
        tyro.cli(report.Report, args=[run_, *with_needed(call, data=tiny_capture)]).main()

    check_calls(REPORT, run, (1, 2), st.sampled_from([str(student), *PATHS]))


def test_import(
    in_empty_folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("published")
    capture = blender_capture(folder / "scene", around(1)[0].numpy(), 16, 24, 30.0)
    file = write_tar(folder / "r2l.tar", r2l_weights())
    monkeypatch.setattr(import_checkpoint, "write_run", far_enough)

    def run(call: list[str], checkpoint: str) -> None:
        tyro.cli(import_checkpoint.ImportCheckpoint, args=[checkpoint, *with_needed(call, data=capture)]).main()

    check_calls(IMPORT, run, (1, 2), st.sampled_from([str(file), str(file), *PATHS]))


def test_quickstart(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart.Stages, "run", far_enough)
    check_calls(QUICKSTART, lambda call: tyro.cli(quickstart.Quickstart, args=call).main())


def test_fleet(
    in_empty_folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pydantic")
    folder = tmp_path_factory.mktemp("fleet")
    write_folder(folder / "barn")
    (folder / "FLEET.yaml").write_text("captures: [barn]\n")
    monkeypatch.setattr(fleet, "open_cluster", far_enough)

    def run(call: list[str], how: tuple[str, ...]) -> None:
        monkeypatch.setattr(sys, "argv", ["r2l-fleet", *how, *(call if how[0] == "run" else ())])
        fleet.main()

    file = str(folder / "FLEET.yaml")
    hows = [
        ("run", file),
        ("run", file, "--dry-run"),
        *(("run", path) for path in PATHS),
        *(("status", p) for p in PATHS),
    ]
    check_calls(FLEET, run, (0, 1, 2), st.sampled_from(hows))
