"""A fleet's configuration, captures, keys, storage, failures and pages, with stand-in commands and without Ray."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fleets import QUIET, ThreadCluster, need, ran, run_fleet, stand_in_fleet, statuses, write_folder
from test_report import measurements

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.fleet import task
from r2l_nerfstudio.fleet.captures import find_captures, folder_fingerprint
from r2l_nerfstudio.fleet.cluster import Capacity, check_loopback, listening_addresses
from r2l_nerfstudio.fleet.config import CaptureConfig, FleetConfig, TeacherConfig, check_fleet, load_fleet
from r2l_nerfstudio.fleet.failures import judge
from r2l_nerfstudio.fleet.figures import report_figures
from r2l_nerfstudio.fleet.gallery import gallery_html
from r2l_nerfstudio.fleet.plan import make_plan, read_state, state_of
from r2l_nerfstudio.fleet.resume import make_loadable, newest_checkpoint
from r2l_nerfstudio.fleet.scheduler import Scheduler
from r2l_nerfstudio.fleet.storage import Storage, download
from r2l_nerfstudio.fleet.table import fleet_table
from r2l_nerfstudio.scripts import fleet as script


@pytest.fixture(autouse=True)
def empty_memory_file_system() -> None:
    """fsspec keeps one for the whole process."""
    need("pydantic")
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def captures(tmp_path: Path) -> list[str]:
    """Two captures for stand-ins."""
    return [
        str(write_folder(tmp_path / "captures" / name, json.dumps({"name": name, "frames": [1]})))
        for name in ("barn", "church")
    ]


# Configuration


def test_a_fleet_file_gives_typed_settings_and_paths_from_its_own_folder(tmp_path: Path) -> None:
    file = tmp_path / "FLEET.yaml"
    file.write_text(
        "output: s3://bucket/fleet\n"
        "captures: [scans/*, {path: gs://bucket/barn, name: big-barn, options: {teacher: --a 1}}]\n"
        "teacher: {method: splatfacto, gpus: 0.5}\n"
        "students: {page: , best: {method: r2l, minutes: 45}}\n"
        "report: null\n"
        "exports: {onnx: {format: onnx}}\n"
    )
    fleet = load_fleet(file)
    assert fleet.output == "s3://bucket/fleet"
    assert [capture.path for capture in fleet.captures] == [str(tmp_path / "scans/*"), "gs://bucket/barn"]
    assert fleet.teacher.method == "splatfacto" and fleet.teacher.gpus == 0.5
    assert fleet.students["page"].method == "mobile-r2l" and fleet.students["best"].minutes == 45
    assert fleet.report is None and fleet.exports["onnx"].format == "onnx"
    check_fleet(fleet)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "captures: [a]\nstudents: {m: {minuts: 3}}",
            "`students.m.minuts` is not a setting. Did you mean `minutes`?",
        ),
        ("captures: [a]\nteacher: {gpus: many}", r"`teacher.gpus`: .*valid number.*'many'"),
        ("captures: [a]\nteacher: {gpus: -1}", r"`teacher.gpus` must be 0 or more, at most 1,000,000 \(got -1"),
        ("captures: [a]\nteacher: {gpus: .inf}", r"`teacher.gpus` must be 0 or more, at most 1,000,000 \(got inf"),
        ("captures: [a]\nreport: {memory_gb: 1.0e+300}", r"`report.memory_gb` must be 0 or more, at most"),
        ("captures: [a]\nteacher: {minutes: .inf}", r"`teacher.minutes` must be above 0, at most"),
        ("captures: [a]\nteacher: {gpus: 1.5}", r"share of one GPU or a whole number \(got 1.5"),
        ("captures: [a]\nexports: {w: {format: gif}}", r"`exports.w.format`: .*'web', 'onnx'.*got 'gif'"),
        ("captures: [a]\nteacher: {minutes: 0}", r"`teacher.minutes` must be above 0, at most 1,000,000 \(got 0"),
        ("captures: [a]\nstudents: {'a/b': {}}", "'a/b' cannot name a stage"),
        ("captures: [a]\nstudents: {teacher: {}}", "'teacher' cannot name a stage"),
        ("captures: [a]\nteacher: {options: '--load-config evil.yml'}", "--load-config, which r2l-fleet sets itself"),
        ("captures: [a]\nteacher: {options: '--output_dir=/x'}", "--output_dir=/x, which r2l-fleet sets itself"),
        ('captures: [a]\nteacher: {options: "\'"}', "is not a command line"),
        ("captures: [{path: a, options: {mobil: --x}}]", "'mobil', which is not a stage: use one of"),
        ("captures: []", "has no captures"),
        ("captures: [{name: a}]", "neither `path` nor `teacher`"),
        ("- a", "holds no settings"),
        ("a: [", "cannot be read"),
        ("captures: !!python/object/apply:os.system [true]", "cannot be read"),
    ],
)
def test_a_fleet_file_that_cannot_be_used_is_refused_with_the_setting_and_its_value(
    tmp_path: Path, text: str, wanted: str
) -> None:
    file = tmp_path / "FLEET.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=wanted):
        check_fleet(load_fleet(file))


def test_the_command_line_overrides_the_file_and_a_dry_run_runs_nothing(
    tmp_path: Path, captures: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "FLEET.yaml"
    file.write_text("captures: [captures/*]\noutput: out\nreport: null\nteacher: {gpus: 0, cpus: 1}\n")
    write_folder(tmp_path / "captures" / "broken", "{")
    monkeypatch.setattr(script, "CONSOLE", script.Console(width=160))
    monkeypatch.setattr(
        "sys.argv", f"r2l-fleet run {file} --dry-run --students.mobile.minutes 6 --students.mobile.gpus 0".split()
    )
    script.main()
    said = capsys.readouterr().out
    # Two captures of 60 minutes x 1 core, 6 x 4 and 10 x 1.
    assert "At most 0.0 GPU hours and 3.1 core hours" in said
    assert "3 captures, 1 of them unreadable; 6 stages." in said
    assert "Unreadable: broken:" in said and "is not valid JSON" in said
    assert "Disk space: about 1.5 GB" in said
    assert not (tmp_path / "out").exists()


# Captures


def test_captures_are_named_by_the_shortest_end_of_their_path_that_is_unique(tmp_path: Path) -> None:
    for place in ("day 1/barn/colmap", "day 2/barn/colmap", "day 2/church"):
        write_folder(tmp_path / place)
    (tmp_path / "day 2" / "notes.txt").write_text("no capture")
    entries = [CaptureConfig(path=str(tmp_path / "*/*/colmap")), CaptureConfig(path=str(tmp_path / "day 2/church"))]
    assert [capture.name for capture in find_captures(entries)] == ["day-1-barn-colmap", "day-2-barn-colmap", "church"]
    with pytest.raises(InputError, match="2 captures are named 'x'"):
        find_captures([CaptureConfig(path="/a", name="x"), CaptureConfig(path="/b", name="x")])
    with pytest.raises(InputError, match="matches no folder"):
        find_captures([CaptureConfig(path=str(tmp_path / "nothing/*"))])


def test_a_fingerprint_depends_on_content_and_not_on_location(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", '{"fl_x": 1, "frames": [1]}')
    first = folder_fingerprint(str(folder))
    moved = Path(shutil.move(folder, tmp_path / "b"))
    os.utime(moved / "transforms.json", (1, 1))
    assert folder_fingerprint(str(moved)) == first
    (moved / "transforms.json").write_text('{"fl_x": 2, "frames": [1]}')
    second = folder_fingerprint(str(moved))
    assert second != first
    (moved / "images" / "1.png").write_bytes(b"photo")
    assert folder_fingerprint(str(moved)) not in (first, second)
    fsspec.filesystem("memory").put(str(moved), "/barn", recursive=True)
    assert folder_fingerprint("memory://barn") == folder_fingerprint(str(moved))


# What depends on what


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        (lambda fleet: setattr(fleet.teacher, "options", "--setting 2"), "teacher student report web"),
        (lambda fleet: setattr(fleet.students["mobile"], "options", "--setting 2"), "student report web"),
        (lambda fleet: setattr(fleet.report, "options", "--setting 2"), "report"),
        (lambda fleet: setattr(fleet.exports["web"], "options", "--setting 2"), "web"),
        (lambda fleet: setattr(fleet.exports["web"], "retries", 0), ""),
        (lambda fleet: setattr(fleet.teacher, "minutes", 2.0), ""),
        (lambda fleet: setattr(fleet, "work_dir", "elsewhere"), ""),
    ],
)
def test_a_changed_option_repeats_exactly_what_depends_on_it(
    tmp_path: Path, captures: list[str], change, redone
) -> None:
    fleet = stand_in_fleet(tmp_path, captures)
    cluster = ThreadCluster()
    run_fleet(fleet, cluster)
    before = ran(tmp_path)
    assert before == {
        f"{name}-{stage}": 1 for name in ("barn", "church") for stage in "teacher student report web".split()
    }
    change(fleet)
    state = run_fleet(fleet, cluster)
    assert ran(tmp_path) - before == {f"{name}-{stage}": 1 for name in ("barn", "church") for stage in redone.split()}
    assert set(sum(statuses(state).values(), [])) == {"done"}


def test_a_changed_capture_repeats_only_its_own_stages(tmp_path: Path, captures: list[str]) -> None:
    fleet, cluster = stand_in_fleet(tmp_path, captures), ThreadCluster()
    run_fleet(fleet, cluster)
    before = ran(tmp_path)
    (Path(captures[0]) / "transforms.json").write_text('{"frames": [1, 2]}')
    run_fleet(fleet, cluster)
    assert ran(tmp_path) - before == {f"barn-{stage}": 1 for stage in "teacher student report web".split()}


def test_going_back_to_an_earlier_option_finds_its_trained_runs(tmp_path: Path, captures: list[str]) -> None:
    fleet, cluster = stand_in_fleet(tmp_path, captures[:1]), ThreadCluster()
    run_fleet(fleet, cluster)
    fleet.teacher.options = "--setting 2"
    run_fleet(fleet, cluster)
    before = ran(tmp_path)
    fleet.teacher.options = ""
    run_fleet(fleet, cluster)
    assert ran(tmp_path) - before == {"barn-report": 1, "barn-web": 1}


def test_minutes_identify_a_student_unless_iterations_are_given(captures: list[str]) -> None:
    def student(options: str, minutes: float):
        fleet = FleetConfig(captures=[CaptureConfig(path=captures[0])], report=None, exports={})
        fleet.students["mobile"].options, fleet.students["mobile"].minutes = options, minutes
        return make_plan(fleet, QUIET).stages["barn"][1]

    assert student("", 5).key != student("", 6).key
    assert "--max-minutes 5 " in student("", 5).values["options"]
    assert student("", 5).limit_minutes > 5
    fixed = student("--max-num-iterations 9", 5)
    assert fixed.key == student("--max-num-iterations 9", 6).key
    assert "max-minutes" not in fixed.values["options"] and fixed.limit_minutes == 5


def test_a_removed_result_is_made_again(tmp_path: Path, captures: list[str]) -> None:
    fleet, cluster = stand_in_fleet(tmp_path, captures[:1]), ThreadCluster()
    run_fleet(fleet, cluster)
    shutil.rmtree(tmp_path / "out/captures/barn/mobile-web")
    before = ran(tmp_path)
    run_fleet(fleet, cluster)
    assert ran(tmp_path) - before == {"barn-web": 1}


# Storage


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_files_are_complete_or_absent_on_every_file_system(tmp_path: Path, kind: str) -> None:
    storage = Storage(str(tmp_path / "out") if kind == "local" else "memory://out")
    assert storage.read_json("state/a.json") is None and storage.names("state") == []
    assert storage.read_all_json("state") == {}
    storage.write_json("state/a.json", {"one": 1})
    storage.write("state/damaged.json", b"{")
    storage.write_json("state/deep/b.json", {"two": 2})
    assert storage.read_json("state/a.json") == {"one": 1} and storage.read_json("state/damaged.json") is None
    assert storage.read_all_json("state") == {"a.json": {"one": 1}, "deep/b.json": {"two": 2}}
    assert sorted(storage.names("state")) == ["a.json", "damaged.json", "deep"]
    storage.remove("state/a.json")
    storage.remove("state/a.json")
    assert not storage.exists("state/a.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    storage.write_json("a.json", {"old": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_json("a.json", {"new": 1})
    assert storage.read_json("a.json") == {"old": 1} and os.listdir(tmp_path) == ["a.json"]


def test_an_interrupted_download_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/barn/images/0.png": b"photo", "/barn/transforms.json": b"{}"})
    real = type(memory).get_file

    def cut(self, source: str, target: str, **options) -> None:
        if source.endswith(".json"):
            raise ConnectionError("reset by peer")
        real(self, source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "get_file", cut)
        with pytest.raises(ConnectionError):
            download("memory://barn", tmp_path / "copy")
    assert os.listdir(tmp_path) == []
    assert (download("memory://barn", tmp_path / "copy") / "images/0.png").read_bytes() == b"photo"


def test_a_fleet_runs_on_remote_captures_and_a_remote_output(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("barn", "church"):
        memory.put(str(write_folder(tmp_path / name)), f"/captures/{name}", recursive=True)
    memory.pipe({"/captures/broken/transforms.json": b"{", "/captures/empty/transforms.json": b'{"frames": []}'})
    fleet = stand_in_fleet(tmp_path, ["memory://captures/*"], output="memory://fleet")
    state = run_fleet(fleet, ThreadCluster())
    assert statuses(state) == {"barn": ["done"] * 4, "broken": [], "church": ["done"] * 4, "empty": []}
    errors = {capture.name: capture.error for capture in state.captures if capture.error}
    assert "is not valid JSON" in errors["broken"] and "lists no frames" in errors["empty"]
    found = set(memory.find("/fleet"))
    assert {
        "/fleet/captures/barn/mobile-web/index.html",
        "/fleet/thumbnails/barn.jpg",
        "/fleet/logs/barn/mobile.log",
    } <= found
    assert not any(path.endswith((".partial", ".running.json", "fleet.running.json")) for path in found)
    # Another machine, with nothing copied yet, has nothing to do but the changed export.
    fleet.work_dir = str(tmp_path / "other machine")
    fleet.exports["web"].options = "--setting 2"
    before = ran(tmp_path)
    run_fleet(fleet, ThreadCluster())
    assert ran(tmp_path) - before == {"barn-web": 1, "church-web": 1}
    assert memory.cat_file("/fleet/captures/barn/mobile-web/index.html") == b"<p>2</p>"
    assert statuses(read_state(Storage("memory://fleet")))["church"] == ["done"] * 4


# Failures


@pytest.mark.parametrize(
    ("code", "lines", "kind", "reason"),
    [
        (1, ["Traceback", "OSError: [Errno 28] No space left on device: 'x'"], "disk-full", "No space left on device"),
        (
            1,
            ["RuntimeError: [enforce fail] . PytorchStreamWriter failed writing file data/7"],
            "disk-full",
            "StreamWriter",
        ),
        (
            1,
            ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"],
            "out-of-memory",
            "CUDA out of memory",
        ),
        (1, ["Error: No memory on cuda:0 for a training batch: lower --x."], "out-of-memory", "No memory on cuda:0"),
        (1, ["Error: There is no capture at /x: name it."], "input", "There is no capture at /x: name it"),
        (2, ["Unrecognized options: --max-iterations", "For full helptext, run ns-train"], "input", "--max-iterations"),
        (1, ["Traceback", "FileNotFoundError: images/000.png", ""], "crash", "FileNotFoundError: images/000.png"),
        (-11, ["Step 5"], "crash", r"killed by signal 11 \(SIGSEGV\)"),
        (3, ["something"], "crash", "exit code 3: something"),
        (3, [], "crash", "exit code 3 without any output"),
    ],
)
def test_the_reason_of_a_failure_is_read_from_its_output(code: int, lines: list[str], kind: str, reason: str) -> None:
    found, said = judge(code, lines, is_disk_full=False, killed_for_memory=False)
    assert found == kind
    assert re.search(reason, said), said


def test_out_of_memory_kills_and_full_disks_are_recognized() -> None:
    killed = -signal.SIGKILL
    assert judge(killed, [], is_disk_full=False, killed_for_memory=False)[0] == "crash"
    assert judge(killed, [], is_disk_full=False, killed_for_memory=True)[0] == "out-of-memory"
    assert judge(1, ["RuntimeError: write failed"], is_disk_full=True, killed_for_memory=False)[0] == "disk-full"


def test_failures_stop_dependents_and_only_some_are_retried(tmp_path: Path) -> None:
    names = {"fine": "", "full": "fill-disk", "hungry": "out-of-memory", "broken": "crash", "shaky": "crash-once"}
    entries = [
        CaptureConfig(
            path=str(write_folder(tmp_path / "captures" / name)), options={"mobile": f"--do {do}"} if do else {}
        )
        for name, do in names.items()
    ]
    fleet = stand_in_fleet(tmp_path, entries)
    lines: list[str] = []
    state = run_fleet(fleet, ThreadCluster(), lines)
    stopped = ["done", "failed", "blocked", "blocked"]
    assert statuses(state) == {
        "fine": ["done"] * 4, "full": stopped, "hungry": stopped, "broken": stopped, "shaky": ["done"] * 4
    }  # fmt: skip
    attempts = {name: count for name, count in ran(tmp_path).items() if name.endswith("student")}
    # The same crash twice is no accident.
    assert attempts == {
        "fine-student": 1,
        "full-student": 1,
        "hungry-student": 1,
        "broken-student": 2,
        "shaky-student": 2,
    }
    failed = {capture.name: capture.stages[1].details for capture in read_state(Storage(fleet.output)).captures}
    assert failed["full"]["failure"] == "disk-full" and "No space left on device" in failed["full"]["reason"]
    assert failed["hungry"]["failure"] == "out-of-memory" and "20.00 GiB" in failed["hungry"]["reason"]
    assert failed["broken"]["failure"] == "crash" and failed["broken"]["reason"] == "ValueError: 0 images were found"
    assert "ValueError: 0 images" in (tmp_path / "out" / failed["broken"]["log"]).read_text()
    # With the cause gone, the same command does the rest.
    for entry in fleet.captures:
        entry.options = {}
    before = ran(tmp_path)
    assert set(sum(statuses(run_fleet(fleet, ThreadCluster())).values(), [])) == {"done"}
    assert "fine-teacher" not in ran(tmp_path) - before and (ran(tmp_path) - before)["full-student"] == 1


def test_a_stage_that_takes_too_long_is_ended_and_not_repeated(tmp_path: Path, captures: list[str]) -> None:
    fleet = stand_in_fleet(tmp_path, captures[:1])
    fleet.teacher.options, fleet.teacher.minutes = "--do sleep-once=60", 0.02
    started = time.time()
    state = run_fleet(fleet, ThreadCluster())
    assert time.time() - started < 20
    teacher = state.captures[0].stages[0]
    assert teacher.details["failure"] == "timeout" and "longer than its 0.02 minutes" in teacher.details["reason"]
    assert ran(tmp_path)["barn-teacher"] == 1


def test_out_of_memory_on_a_shared_gpu_is_retried_once_on_a_whole_one(tmp_path: Path, captures: list[str]) -> None:
    class OneGpu(ThreadCluster):
        def capacity(self) -> Capacity:
            return Capacity(2.0, 1.0)

    fleet = stand_in_fleet(tmp_path, captures[:1])
    fleet.teacher.gpus, fleet.teacher.options = 0.25, "--do out-of-memory"
    cluster = OneGpu()
    run_fleet(fleet, cluster)
    assert [job.stage.gpus for job in cluster.jobs] == [0.25, 1.0]


def test_a_claim_beyond_this_machine_is_refused_before_anything_runs(tmp_path: Path, captures: list[str]) -> None:
    fleet = stand_in_fleet(tmp_path, captures)
    fleet.students["mobile"].gpus = 1.0
    with pytest.raises(InputError, match="stage mobile claims 1 GPUs, and Ray found 0 on this machine"):
        run_fleet(fleet, ThreadCluster())
    assert not ran(tmp_path)


def test_two_fleets_do_not_run_in_one_output(tmp_path: Path, captures: list[str]) -> None:
    fleet = stand_in_fleet(tmp_path, captures)
    storage = Storage(fleet.output)
    storage.write_json("fleet.running.json", {"host": "other", "pid": 7, "seen": time.time()})
    with pytest.raises(InputError, match="process 7 on other"):
        run_fleet(fleet, ThreadCluster())
    storage.write_json("fleet.running.json", {"host": "other", "pid": 7, "seen": time.time() - 1000})
    assert set(sum(statuses(run_fleet(fleet, ThreadCluster())).values(), [])) == {"done"}


def test_an_interrupt_stops_the_commands_and_the_next_run_continues(tmp_path: Path, captures: list[str]) -> None:
    fleet = stand_in_fleet(tmp_path, captures)
    fleet.students["mobile"].options = "--do sleep-once=60"
    running = 0

    def interrupt(state, capacity) -> None:
        nonlocal running
        running = sum(ran(tmp_path)[f"{name}-student"] for name in ("barn", "church"))
        if running == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Scheduler(make_plan(fleet, QUIET), Storage(fleet.output), ThreadCluster(), look=interrupt).run()
    state = read_state(Storage(fleet.output))
    assert statuses(state) == {"barn": ["done"] + ["waiting"] * 3, "church": ["done"] + ["waiting"] * 3}
    assert set(sum(statuses(run_fleet(fleet, ThreadCluster())).values(), [])) == {"done"}
    assert ran(tmp_path)["barn-teacher"] == 1 and ran(tmp_path)["barn-student"] == 2


# Continuing an interrupted training


def test_a_checkpoint_with_numpy_scalars_loads_after_it_was_made_loadable(tmp_path: Path) -> None:
    path = tmp_path / "step-000000007.ckpt"
    state = {"schedulers": {"all": {"_last_lr": [np.float64(0.5)]}}, "pipeline": {"w": torch.ones(2)}, "step": 7}
    torch.save(state, path)
    make_loadable(path)
    loaded = torch.load(path, weights_only=True)
    assert loaded["schedulers"]["all"]["_last_lr"] == [0.5] and loaded["step"] == 7
    assert torch.equal(loaded["pipeline"]["w"], torch.ones(2))


def test_a_truncated_checkpoint_is_skipped(tmp_path: Path) -> None:
    torch.save({"step": 5}, tmp_path / "step-000000005.ckpt")
    whole = (tmp_path / "step-000000005.ckpt").read_bytes()
    (tmp_path / "step-000000009.ckpt").write_bytes(whole[: len(whole) // 2])
    assert newest_checkpoint(tmp_path) == tmp_path / "step-000000005.ckpt"
    assert (tmp_path / "step-000000009.ckpt.unusable").exists()
    assert newest_checkpoint(tmp_path / "none") is None


RECORDER = """
import pathlib, sys
arguments = sys.argv[2:]
with open(sys.argv[1], "a") as file:
    print(*arguments, file=file)
if "REFUSE" in arguments and "--load-dir" in arguments:
    raise RuntimeError("Error(s) in loading state_dict")
value = lambda name: arguments[arguments.index(name) + 1]
run = pathlib.Path(value("--output-dir"), value("--experiment-name"), arguments[0], value("--timestamp"))
(run / "nerfstudio_models").mkdir(parents=True, exist_ok=True)
(run / "nerfstudio_models" / "step-000000029.ckpt").write_bytes(b"weights")
(run / "config.yml").touch()
"""


@pytest.mark.parametrize("refuses", [False, True])
def test_an_interrupted_teacher_continues_with_the_remaining_iterations(
    tmp_path: Path, captures: list[str], monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    recorder, record = tmp_path / "recorder.py", tmp_path / "arguments.txt"
    recorder.write_text(RECORDER)
    real = task.find_program
    monkeypatch.setattr(
        task,
        "find_program",
        lambda name: [sys.executable, str(recorder), str(record)] if name == "ns-train" else real(name),
    )
    fleet = FleetConfig(
        output=str(tmp_path / "out"), captures=[CaptureConfig(path=captures[0])], students={}, report=None
    )
    fleet.teacher.gpus, fleet.teacher.cpus = 0, 1
    fleet.teacher.options = "--max-num-iterations 30 " + ("REFUSE" if refuses else "")
    (stage,) = make_plan(fleet, QUIET).stages["barn"]
    run = tmp_path / "out/captures/barn/nerfacto" / stage.folder
    (run / "nerfstudio_models").mkdir(parents=True)
    (run / "config.yml").write_text("max_num_iterations: 30\n")
    torch.save({"step": 9, "schedulers": [np.float64(1)]}, run / "nerfstudio_models" / "step-000000009.ckpt")
    assert statuses(run_fleet(fleet, ThreadCluster())) == {"barn": ["done"]}
    calls = record.read_text().splitlines()
    assert f"--load-dir {run / 'nerfstudio_models'} --max-num-iterations 20" in calls[0]
    assert calls[0].startswith("nerfacto --data") and "--machine.device-type cpu --mixed-precision False" in calls[0]
    if refuses:
        assert len(calls) == 2 and "--load-dir" not in calls[1]
        assert (run / "nerfstudio_models" / "step-000000009.ckpt.unusable").exists()
    else:
        assert len(calls) == 1
        assert torch.load(run / "nerfstudio_models" / "step-000000009.ckpt", weights_only=True)["schedulers"] == [1.0]


# Ray


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.5", "fe80::1", "::ffff:10.0.0.1"])
def test_a_ray_that_others_can_reach_is_refused(address: str) -> None:
    check_loopback({"127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1"})
    with pytest.raises(InputError, match=f"Ray listens on {address} instead of 127.0.0.1"):
        check_loopback({"127.0.0.1", address})


def test_listening_sockets_are_found() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.5", 0))
        server.listen()
        assert "127.0.0.5" in listening_addresses()
    assert "127.0.0.5" not in listening_addresses()


# What a user sees


@pytest.mark.parametrize("has_teacher", [True, False])
def test_a_reports_figures_are_found(has_teacher: bool, tmp_path: Path) -> None:
    figures = measurements(has_teacher).as_dict()
    (tmp_path / "report.json").write_text(json.dumps(figures))
    teacher = {"teacher_psnr": 28.0} if has_teacher else {}
    assert report_figures(tmp_path) == {"student_psnr": 24.5, **teacher}


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"mean": null}', '{"mean": {"teacher": {}}}', '{"mean": {"teacher": {"psnr": NaN}}}']
)
def test_figures_missing_from_a_report_stay_empty(text: str, tmp_path: Path) -> None:
    assert report_figures(tmp_path) == {}
    (tmp_path / "report.json").write_text(text)
    assert report_figures(tmp_path) == {}


def test_the_gallery_links_results_and_escapes_foreign_text(tmp_path: Path, captures: list[str]) -> None:
    fleet = stand_in_fleet(tmp_path, [*captures, str(write_folder(tmp_path / "captures" / "odd", "<b>"))])
    state = run_fleet(fleet, ThreadCluster())
    page = gallery_html(state, {"barn.jpg"}, is_running=True)
    assert 'src="thumbnails/barn.jpg"' in page and 'http-equiv="refresh"' in page
    assert (
        'href="captures/barn/mobile-web/index.html"' in page and 'href="captures/barn/mobile-report/index.html"' in page
    )
    assert "24.50 dB" in page and "Teacher 26.25 dB" in page and "no photo yet" in page
    for link in re.findall(r'(?:href|src)="([^"]+)"', page):
        assert (tmp_path / "out" / link).exists(), link
    state.captures[0].name, state.captures[0].error = "<script>alert(1)</script>", "<img src=x>"
    page = gallery_html(state, set(), is_running=False)
    assert "<script>alert" not in page and "<img src=x>" not in page and "http-equiv" not in page


def test_the_table_shows_running_and_failed_captures_first_when_there_are_many() -> None:
    fleet = FleetConfig(captures=[CaptureConfig(path="/a")], report=None)
    state = state_of(make_plan(fleet, QUIET))
    assert state.captures[0].error == "There is no capture at /a."
    console = script.Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(fleet_table(state))
    assert "1 capture unreadable" in console.export_text()


def test_the_time_left_counts_the_scarcest_resource_and_the_longest_chain(captures: list[str]) -> None:
    fleet = FleetConfig(
        captures=[CaptureConfig(path=path) for path in captures],
        teacher=TeacherConfig(gpus=1, minutes=40, cpus=1),
        report=None,
        exports={},
    )
    fleet.students["mobile"].minutes = 20
    state = state_of(make_plan(fleet, QUIET))
    assert state.minutes_left(Capacity(cpus=64, gpus=1)) == 120
    assert state.minutes_left(Capacity(cpus=64, gpus=8)) == 60


def test_status_reads_a_fleet_from_its_output(
    tmp_path: Path, captures: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_fleet(stand_in_fleet(tmp_path, captures), ThreadCluster())
    monkeypatch.setattr(script, "CONSOLE", script.Console(width=200))
    monkeypatch.setattr("sys.argv", ["r2l-fleet", "status", str(tmp_path / "out")])
    script.main()
    said = capsys.readouterr().out
    assert "church" in said and "26.25" in said and "8 of 8 stages done, 0 running." in said
    monkeypatch.setattr("sys.argv", ["r2l-fleet", "status", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit):
        script.main()
