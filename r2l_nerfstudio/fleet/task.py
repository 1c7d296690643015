"""One attempt at one stage, on the machine that Ray selected. It imports neither Ray, torch nor Nerfstudio."""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import importlib.metadata
import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.fleet.captures import first_photo
from r2l_nerfstudio.fleet.config import is_url
from r2l_nerfstudio.fleet.failures import Failure, clean, judge
from r2l_nerfstudio.fleet.figures import report_figures
from r2l_nerfstudio.fleet.resume import UNUSABLE, newest_checkpoint
from r2l_nerfstudio.fleet.stages import Stage, fill_in
from r2l_nerfstudio.fleet.storage import Storage, download

THUMBNAIL_PIXELS = 320
STOP_SECONDS = 90.0
"""Seconds for a command to save and end, from SIGTERM to SIGKILL."""
HEARTBEAT_SECONDS = 20.0
_ALMOST_FULL_BYTES = 16 << 20
_PSNR = re.compile(r"(\d+\.\d+) dB against")


@dataclass(frozen=True)
class Job:
    """A stage with everything that an attempt needs; sent to the machine that runs it."""

    stage: Stage
    output: str
    """Root of all results: local folder, or URL."""
    work_dir: str
    """Local folder for copies of remote files."""
    source: str
    """Folder or URL of the capture."""
    fingerprint: str
    teacher: str
    """Config.yml of an existing teacher run, path or URL; empty: the teacher is a stage."""
    inputs: dict[str, str]
    """Results of the stages that it depends on, by id: folders in the output."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables added to the worker's environment for the command."""
    attempt: int = 1


@dataclass
class Outcome:
    """Outcome of an attempt."""

    failure: Failure | None = None
    reason: str = ""
    seconds: float = 0.0
    result: str = ""
    """Folder of the result in the output."""
    page: str = ""
    """The result's page for a browser, in its folder."""
    bytes: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    host: str = ""


def run_stage(job: Job, stop: threading.Event | None = None) -> Outcome:
    """Run the command of a stage, and leave a completion marker if it succeeds. Never raises.

    Args:
        job: the stage.
        stop: ends the command when set; a KeyboardInterrupt does the same.
    """
    started = time.time()
    try:
        outcome = _Attempt(job, stop or threading.Event()).run()
    except KeyboardInterrupt:
        outcome = Outcome("stopped", "Stopped")
    except InputError as error:
        outcome = Outcome("input", str(error).rstrip("."))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        outcome = Outcome("disk-full" if full else "crash", f"{'The disk is full: ' if full else ''}{error}")
    except MemoryError:
        outcome = Outcome("out-of-memory", "The worker is out of memory")
    except Exception as error:  # A storage driver's own exception must not end the fleet.
        outcome = Outcome("crash", f"{type(error).__name__}: {error}")
    outcome.host = socket.gethostname()
    outcome.seconds = round(time.time() - started, 2)
    return outcome


class _Attempt:
    def __init__(self, job: Job, stop: threading.Event) -> None:
        self.job, self.stage, self.stop = job, job.stage, stop
        self.storage = Storage(job.output)
        work = Path(job.work_dir).expanduser()
        # One place for each output, the same on every machine: runs refer to their teacher and capture by path.
        self.copies = work / hashlib.sha256(self.storage.root.encode()).hexdigest()[:12]
        self.root = Path(self.storage.root) if self.storage.is_local else self.copies
        self.captures = self.root / "captures"
        self.log = self.root / self.stage.log
        self.tail: deque[str] = deque(maxlen=400)
        self.psnr: float | None = None

    def run(self) -> Outcome:
        done = self.storage.read_json(f"{self.stage.state}.done.json")
        if done is not None:
            # An attempt whose machine seemed lost has finished after all.
            return Outcome(result=done["result"], page=done["page"], bytes=done["bytes"], figures=done["figures"])
        started = time.time()
        self.beat(started)
        try:
            values = self.prepare()
            outcome = self.train(values) if self.stage.is_training else self.make(values)
            if outcome.failure is None:
                self.keep(outcome, started)
            return outcome
        finally:
            try:
                self.storage.remove(f"{self.stage.state}.running.json")
                if not self.storage.is_local and self.log.exists():
                    self.storage.write(self.stage.log, self.log.read_bytes())
            except OSError:
                pass

    def prepare(self) -> dict[str, str]:
        """Bring capture and earlier results to this machine. Return the replacements in the command line."""
        capture = Path(self.job.source)
        if is_url(self.job.source):
            capture = download(
                self.job.source, self.copies / "sources" / f"{self.stage.capture}-{self.job.fingerprint[:8]}"
            )
        if not capture.is_dir():
            raise InputError(f"There is no folder {capture} on {socket.gethostname()}")
        values = {
            **self.stage.values,
            "capture": str(capture),
            "captures": str(self.captures),
            "folder": self.stage.folder,
        }
        teacher = self.job.teacher
        if is_url(teacher):
            folder = teacher.rpartition("/")[0]
            name = hashlib.sha256(f"{folder}{self.job.fingerprint}".encode()).hexdigest()[:12]
            teacher = str(download(folder, self.copies / "teachers" / name))
        runs = {}
        for name, result in self.job.inputs.items():
            if not self.storage.is_local:
                download(f"{self.storage.root}/{result}", self.root / result)
            runs[name] = str(self.root / result)
            if not Path(runs[name]).is_dir():
                raise InputError(
                    f"The result {runs[name]} of stage {name} is missing. Start the fleet again to redo it"
                )
        values["teacher"] = runs.get("teacher", teacher)
        values["run"] = runs.get(self.stage.values["student"], "")
        self.thumbnail(capture)
        return values

    def train(self, values: dict[str, str]) -> Outcome:
        """Run `ns-train`, from the newest checkpoint of an interrupted attempt if there is one."""
        values["run"] = str(self.captures / self.stage.capture / self.stage.values["method"] / self.stage.folder)
        is_usual = self.stage.words[0] == "ns-train"
        checkpoint = self.interrupted() if is_usual else None
        if checkpoint is not None and self.stage.kind == "teacher":
            # Fails only for a damaged file, which the fallback below moves out of the way.
            self.command([sys.executable, "-m", "r2l_nerfstudio.fleet.resume", str(checkpoint)])
        outcome = Outcome()
        if checkpoint is None or (more := self.resume_options(checkpoint)) is None:
            more = ""
        if checkpoint is None or more:
            outcome = self.command(fill_in(self.stage.words, {**values, "options": f"{values['options']} {more}"}))
        if (
            checkpoint is not None
            and more
            and outcome.failure in ("crash", "input")
            and self.interrupted() == checkpoint
        ):
            self.note(f"The checkpoint {checkpoint} cannot be continued from: starting from scratch.")
            checkpoint.replace(checkpoint.with_name(checkpoint.name + UNUSABLE))
            outcome = self.command(fill_in(self.stage.words, values))
        if outcome.failure is not None:
            return outcome
        runs = self.runs()
        if not runs or not any(runs[-1].rglob("*.ckpt")):
            return Outcome("crash", f"The command ended without a trained run in {self.captures / self.stage.capture}")
        outcome.result = runs[-1].relative_to(self.root).as_posix()
        return outcome

    def runs(self) -> list[Path]:
        """Return the run folders of this stage; a method's configuration may name its folder differently."""
        found = (self.captures / self.stage.capture).glob(f"*/{self.stage.folder}/config.yml")
        return sorted((path.parent for path in found), key=lambda run: run.stat().st_mtime)

    def interrupted(self) -> Path | None:
        """Return the newest checkpoint of an attempt that did not finish."""
        runs = self.runs()
        return newest_checkpoint(runs[-1] / "nerfstudio_models") if runs else None

    def resume_options(self, checkpoint: Path) -> str | None:
        """Return options to train what is left; None if nothing is."""
        options = f"--load-dir {shlex.quote(str(checkpoint.parent))}"
        if self.stage.kind == "student":
            return options  # It counts the iterations of both attempts.
        # Nerfstudio trains --max-num-iterations more, and saves that number in the new config.yml.
        state = f"{self.stage.state}.train.json"
        total = (self.storage.read_json(state) or {}).get("max_num_iterations")
        if total is None:
            text = (checkpoint.parents[1] / "config.yml").read_text("utf8")
            match = re.search(r"^max_num_iterations: *(\d+)", text, re.MULTILINE)
            if match is None:
                return None
            total = int(match[1])
            self.storage.write_json(state, {"max_num_iterations": total})
        left = total - int(checkpoint.stem.partition("-")[2]) - 1
        return f"{options} --max-num-iterations {left}" if left > 0 else None

    def make(self, values: dict[str, str]) -> Outcome:
        """Run a command that writes {output}; it replaces an earlier result only if it succeeds."""
        final = self.captures / self.stage.capture / self.stage.folder
        partial = final.with_name(f".{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        values["output"] = str(partial)
        try:
            outcome = self.command(fill_in(self.stage.words, values))
            if outcome.failure is not None:
                return outcome
            if not partial.is_dir() or not any(partial.iterdir()):
                return Outcome("crash", "The command ended without writing a result")
            for old in self.storage.names(f"state/{self.stage.capture}"):
                if re.fullmatch(rf"{re.escape(self.stage.id)}-[0-9a-f]{{8}}\.done\.json", old):
                    self.storage.remove(f"state/{self.stage.capture}/{old}")
            if final.exists():
                shutil.rmtree(final)
            partial.replace(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        outcome.result = final.relative_to(self.root).as_posix()
        if self.stage.kind == "report":
            outcome.figures = report_figures(final)
        return outcome

    def keep(self, outcome: Outcome, started: float) -> None:
        """Measure and upload a result. The marker comes last: without it, the stage counts as not done."""
        folder = self.root / outcome.result
        outcome.bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        pages = sorted(folder.glob("*.html"), key=lambda path: (path.name != "index.html", path.name))
        outcome.page = pages[0].name if pages else ""
        if self.psnr is not None:
            outcome.figures.setdefault("psnr_against_teacher", self.psnr)
        if not self.storage.is_local:
            self.storage.upload(folder, outcome.result)
        marker = {**asdict(outcome), "key": self.stage.key, "seconds": round(time.time() - started, 2)}
        marker |= {"host": socket.gethostname(), "finished": time.time(), "attempt": self.job.attempt}
        self.storage.write_json(f"{self.stage.state}.done.json", marker)
        self.storage.remove(f"{self.stage.state}.failed.json")

    def command(self, words: list[str]) -> Outcome:
        """Run one command with its output in the log."""
        program = find_program(words[0])
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        self.note(f"Attempt {self.job.attempt} on {socket.gethostname()}, {when}: {shlex.join(words)}")
        environment = {**os.environ, **self.job.environment}
        environment["OMP_NUM_THREADS"] = str(max(1, int(self.stage.cpus)))
        environment.setdefault("PYTHONUNBUFFERED", "1")
        # A console without a width breaks error messages into lines of 80 characters.
        environment.setdefault("COLUMNS", "400")
        if self.stage.gpus == 0:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.tail.clear()
        kills_before = _out_of_memory_kills()
        process = subprocess.Popen(
            [*program, *words[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        reader = threading.Thread(target=self.read, args=(process,), daemon=True)
        reader.start()
        try:
            is_late = self.wait(process)
        except BaseException:
            _end(process)
            raise
        # A surviving grandchild may hold the pipe open.
        reader.join(timeout=5)
        if self.stop.is_set():
            return Outcome("stopped", "Stopped")
        if is_late:
            return Outcome("timeout", f"The command took longer than its {self.stage.limit_minutes:g} minutes")
        if process.returncode == 0:
            return Outcome()
        is_full = shutil.disk_usage(self.root).free < _ALMOST_FULL_BYTES
        return Outcome(*judge(process.returncode, list(self.tail), is_full, _out_of_memory_kills() > kills_before))

    def wait(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait until the command ends, or end it. Return whether it ran out of time."""
        started = time.time()
        beaten, reported = started, self.psnr
        while True:
            try:
                process.wait(timeout=0.25)
                return False
            except subprocess.TimeoutExpired:
                pass
            now = time.time()
            if self.stop.is_set() or now - started > 60 * self.stage.limit_minutes:
                _end(process)
                return not self.stop.is_set()
            if now - beaten > HEARTBEAT_SECONDS or self.psnr != reported:
                beaten, reported = now, self.psnr
                self.beat(started)

    def read(self, process: subprocess.Popen[bytes]) -> None:
        """Copy the command's output to the log, and keep its last lines."""
        assert process.stdout is not None
        rest = b""
        output = cast(io.BufferedReader, process.stdout)
        while chunk := output.read1(1 << 16):
            self.append(chunk)
            *lines, rest = re.split(rb"[\r\n]+", rest + chunk)
            for line in lines:
                self.hear(line)
        self.hear(rest)

    def hear(self, line: bytes) -> None:
        text = clean(line.decode("utf-8", "replace"))
        if text:
            self.tail.append(text)
            if self.stage.kind == "student" and (match := _PSNR.search(text)):
                self.psnr = float(match[1])

    def note(self, line: str) -> None:
        self.append(f"=== {line}\n".encode())

    def append(self, data: bytes) -> None:
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "ab") as file:
                file.write(data)
        except OSError:
            pass  # A full disk: the reason of the failure is kept without the log.

    def beat(self, started: float) -> None:
        """Record in the output that this stage is running."""
        state: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": started,
            "seen": time.time(),
        }
        if self.psnr is not None:
            state["psnr"] = self.psnr
        try:
            self.storage.write_json(f"{self.stage.state}.running.json", state)
        except OSError:
            pass  # Only tables read it.

    def thumbnail(self, capture: Path) -> None:
        """Write a small copy of the capture's first photo for the gallery, which has a gap without it."""
        name = f"thumbnails/{self.stage.capture}.jpg"
        try:
            photo = None if self.storage.exists(name) else first_photo(capture)
            if photo is None:
                return
            import io

            from PIL import Image

            with Image.open(photo) as image:
                image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
                if "A" in image.getbands():
                    white = Image.new("RGBA", image.size, "white")
                    white.alpha_composite(image.convert("RGBA"))
                    image = white
                data = io.BytesIO()
                image.convert("RGB").save(data, "JPEG", quality=85)
            self.storage.write(name, data.getvalue())
        except Exception:  # The training command reports a damaged photo.
            pass


@functools.lru_cache
def find_program(name: str) -> list[str]:
    """Return how to start a command: a console script of an installed package with this interpreter, else a program.

    Console scripts need not be on PATH, and those of another environment are never taken.

    Raises:
        InputError: there is no such command.
    """
    if name in ("python", "python3"):
        return [sys.executable]
    for script in importlib.metadata.entry_points(group="console_scripts", name=name):
        module, _, function = script.value.partition(":")
        code = f"import sys; sys.argv[0] = {name!r}; from {module} import {function} as main; sys.exit(main())"
        return [sys.executable, "-c", code]
    program = shutil.which(name)
    if program is None:
        raise InputError(f"The command {name} is not installed on {socket.gethostname()}")
    return [program]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and everything that it started: SIGTERM lets students save, SIGKILL follows."""
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass
        try:
            process.wait(timeout=seconds)
            if number == signal.SIGTERM:
                continue
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass


def _out_of_memory_kills() -> int:
    """Return the number of processes that the kernel has killed for lack of memory, on this machine or in this
    container."""
    count = 0
    for path in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        try:
            with open(path, encoding="ascii") as file:
                count += sum(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
        except (OSError, ValueError):
            pass
    return count


try:
    _prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
except (OSError, AttributeError):
    _prctl = None


def _die_with_parent() -> None:
    """Runs in a command before it starts: end it when the worker dies, or two attempts would train in one folder."""
    if _prctl is not None:
        _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
