"""Nerfstudio's trainer with a teacher to inherit from, and checkpoints that survive interruptions."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import torch
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.engine.trainer import TRAIN_INTERATION_OUTPUT, Trainer, TrainerConfig
from nerfstudio.utils import writer
from nerfstudio.utils.decorators import check_main_thread
from nerfstudio.utils.rich_utils import CONSOLE

from r2l_nerfstudio.checkpoints import read_checkpoint, weight_bytes
from r2l_nerfstudio.dataparsers import dataparser_of, without_points
from r2l_nerfstudio.disk import check_writable, free_bytes
from r2l_nerfstudio.distillation.learning_curve import LearningCurveWriter, read_learning_curve
from r2l_nerfstudio.distillation.optimization import PublishedSchedulerConfig, ScheduledRate
from r2l_nerfstudio.distillation.pipeline import DistillationPipeline, DistillationPipelineConfig
from r2l_nerfstudio.distillation.progress import TrainingProgress
from r2l_nerfstudio.errors import InputError, command_line, exit_on_input_error, one_line
from r2l_nerfstudio.ranges import FloatRange, IntRange, check_ranges
from r2l_nerfstudio.torch_compat import OutOfMemoryError

VIEWS_SHARE = 0.4
"""Share of --max-minutes for the first teacher views; missing ones are rendered during training."""
_DISK_ERRORS = (OSError, RuntimeError)
"""Exceptions of writing a checkpoint to a full disk; PyTorch's writer has its own."""
MIN_TRAINING_SHARE = 0.1
"""Share of --max-minutes that training gets, however long the start took."""


@dataclass
class DistillationTrainerConfig(TrainerConfig):
    """Training of a student from a teacher."""

    _target: type = field(default_factory=lambda: DistillationTrainer)
    pipeline: DistillationPipelineConfig = field(default_factory=DistillationPipelineConfig)
    teacher: Path | None = None
    """Trained Nerfstudio run to distil: its config.yml or folder."""
    teacher_time: Annotated[float, FloatRange(0, 1)] | None = None
    """Instant, from 0 to 1, at which to freeze a teacher whose scene changes over time. Photos show other instants, so
    the student learns from the teacher only."""
    max_num_iterations: Annotated[int, IntRange(1, 10**9)] = 30000
    """Training iterations, those before a resumed checkpoint included."""
    max_minutes: Annotated[float, FloatRange(0, above=True)] | None = None
    """Length of the training in minutes, including the first teacher views; schedules and the photo stage adapt, and
    --max-num-iterations is ignored. A run resumed with --load-dir continues for the remaining minutes."""

    def set_timestamp(self) -> None:
        """Name the run. `ns-train` calls this before it writes anything, so the teacher is read here.

        Raises:
            SystemExit: with a paragraph with the reason, if the teacher or its capture cannot be used.
        """
        with command_line():
            check_ranges(self)
            self.pipeline.datamanager.pose_sampler.check_focal_range()
            self._check_names()
        super().set_timestamp()
        if self.machine.device_type == "cuda" and not torch.cuda.is_available():
            CONSOLE.print("[yellow]No CUDA device: training on the CPU (--machine.device-type cpu).")
            self.machine.device_type = "cpu"
        with command_line():
            self.inherit_from_teacher()
            self._check_resumed()
            self._check_folders()
            if self.max_minutes is not None:
                self.pipeline.datamanager.fill_minutes = VIEWS_SHARE * self.max_minutes

    def _check_names(self) -> None:
        """Check names that become folders."""
        for name in ("experiment_name", "method_name", "timestamp", "project_name"):
            value = getattr(self, name)
            if value is not None and (not value.strip() or len(value.encode()) > 200 or "\0" in value):
                shown = value if len(value) < 60 else f"{value[:60]}..."
                raise InputError(
                    f"--{name.replace('_', '-')} must have between 1 and 200 bytes and no NUL (got {shown!r})."
                )

    def _check_folders(self) -> None:
        """Check that the output folders exist or can be made.

        Raises:
            InputError: if not.
        """
        folders = {
            "--output-dir": self.get_base_dir(),
            "--pipeline.datamanager.cache-dir": self.pipeline.datamanager.cache_dir,
        }
        for flag, folder in folders.items():
            if folder is not None:
                check_writable(flag, Path(folder))

    def save_config(self) -> None:
        """Save the configuration without settings that only concern the start of this training, which other tools would
        look for in the run.

        Raises:
            SystemExit: with a paragraph with the reason, if the file cannot be written.
        """
        kept = self.load_step, self.pipeline.resumes
        self.load_step = self.pipeline.resumes = None
        try:
            with exit_on_input_error():
                try:
                    super().save_config()
                except OSError as error:
                    raise InputError(
                        f"The run's configuration cannot be written to {self.get_base_dir()}"
                        f" ({error.strerror or error}): free space there, or choose another --output-dir."
                    ) from error
        finally:
            self.load_step, self.pipeline.resumes = kept

    def inherit_from_teacher(self) -> None:
        """Inherit the teacher's capture and frame: dataparser configuration, data path, experiment name.

        Raises:
            InputError: if no teacher is given, or its run cannot be used.
        """
        # Imported late: reading a run's config imports every registered method, this one among them.
        from r2l_nerfstudio.run_config import capture_path, checkpoint_path, load_run_config, resolve_run

        if self.teacher is None:
            raise InputError(
                f"ns-train {self.method_name} needs a teacher: give a trained Nerfstudio run with --teacher"
                " outputs/…/config.yml."
            )
        config_path = resolve_run(self.teacher).absolute()
        teacher = load_run_config(config_path)
        checkpoint_path(teacher, config_path)
        self.teacher = config_path
        self.pipeline.teacher = config_path
        self.pipeline.teacher_time = self.teacher_time
        datamanager = self.pipeline.datamanager
        if self.teacher_time is not None and (datamanager.photo_iterations or self.pipeline.check_frame):
            CONSOLE.print(
                f"The teacher is frozen at time {self.teacher_time:g}: learning from it only, without photos."
            )
            datamanager.photo_iterations, self.pipeline.check_frame = 0, False
        taught_from = teacher.pipeline.datamanager
        dataparser = dataparser_of(teacher)
        if dataparser is not None:
            datamanager.dataparser = without_points(dataparser)
        datamanager.camera_res_scale_factor = getattr(taught_from, "camera_res_scale_factor", 1.0)
        data = self.data or datamanager.data
        datamanager.data = (Path(data) if data is not None else capture_path(teacher, config_path)).absolute()
        if not datamanager.data.exists():
            raise InputError(f"There is no capture at {datamanager.data}: give the teacher's capture with --data.")
        if self.experiment_name is None:
            self.experiment_name = teacher.experiment_name
        for group in self.optimizers.values():
            if group["scheduler"] is not None:
                group["scheduler"].max_steps = self.max_num_iterations

    def _check_resumed(self) -> None:
        """Fail early on a checkpoint that training cannot resume from, not after the teacher has rendered for
        minutes."""
        self.pipeline.resumes = None
        if self.load_dir is not None:
            folder = Path(self.load_dir)
            name = "step-*.ckpt" if self.load_step is None else f"step-{self.load_step:09d}.ckpt"
            found = sorted(folder.glob(name)) if folder.is_dir() else []
            if not found:
                raise InputError(
                    f"There is no checkpoint to resume from: --load-dir {self.load_dir} has no {name}. Give the"
                    f" {self.relative_model_dir} folder of a run of {self.method_name}."
                )
            self._take_published_student(folder.absolute().parent)
            self.pipeline.resumes = found[-1]
        elif self.load_checkpoint is not None:
            self.pipeline.resumes = Path(self.load_checkpoint)
            if not self.pipeline.resumes.is_file():
                raise InputError(
                    f"There is no checkpoint to resume from: --load-checkpoint {self.load_checkpoint} is not a file."
                    f" Give a step-*.ckpt of a run of {self.method_name}."
                )
        if self.pipeline.resumes is not None:
            try:
                read_checkpoint(self.pipeline.resumes, "student")
            except InputError as error:
                flag = "--load-checkpoint" if self.load_dir is None else "--load-dir"
                raise InputError(f"Training cannot resume from {flag}: {error}") from error

    def _take_published_student(self, run: Path) -> None:
        """Adopt the network and ray encoding of an imported run, so that any method of its kind can fine-tune it.

        Raises:
            InputError: if it is of the other kind.
        """
        from r2l_nerfstudio.run_config import load_run_config

        if not (run / "config.yml").is_file():
            return
        model = load_run_config(run).pipeline.model
        if not getattr(model, "published_rays", False) or model == self.pipeline.model:
            return
        if type(model) is not type(self.pipeline.model):
            raise InputError(
                f"--load-dir {self.load_dir} is a run of a {type(model).__name__.removesuffix('ModelConfig')}"
                f" student, from which ns-train {self.method_name} cannot resume: choose a method of its kind."
            )
        CONSOLE.print(f"Adopting network and ray encoding of {run / 'config.yml'}.", soft_wrap=True)
        engine = self.pipeline.model.engine
        self.pipeline.model = model
        model.engine = engine


class DistillationTrainer(Trainer):
    """Nerfstudio's trainer; an interrupted run can always be resumed from its newest checkpoint."""

    config: DistillationTrainerConfig
    pipeline: DistillationPipeline

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        """Set up as `Trainer.setup`; a run that fails here leaves no config.yml that resembles a finished run's."""
        self._setup_began = time.monotonic()
        try:
            with exit_on_input_error():
                self._check_room()
                super().setup(test_mode)
        except BaseException:
            if not any(self.checkpoint_dir.glob("*.ckpt")):
                (self.base_dir / "config.yml").unlink(missing_ok=True)
            raise

    def _check_room(self) -> None:
        """Check that the disk has space for a checkpoint, before the teacher renders for minutes.

        Raises:
            InputError: not even for the weights.
        """
        config = copy.deepcopy(self.config.pipeline.model)
        weights = weight_bytes(lambda: config.setup(scene_box=None, num_train_data=1, metadata={}))
        free = free_bytes(self.checkpoint_dir)
        if weights is None or free is None:
            return
        # Two moments of Adam for each weight, and its average.
        checkpoint = weights * (4 if self.config.pipeline.ema_decay > 0 else 3)
        if free < weights:
            raise InputError(
                f"The disk of {self.checkpoint_dir} has {free / 1e6:.1f} MB free, and a checkpoint takes about"
                f" {checkpoint / 1e6:.1f} MB: free space there, or choose another --output-dir."
            )
        if free < 2 * checkpoint:
            CONSOLE.print(
                f"[bold yellow]The disk of {self.checkpoint_dir} has {free / 1e6:.1f} MB free, and a checkpoint takes"
                f" about {checkpoint / 1e6:.1f} MB, briefly together with the previous one.",
                soft_wrap=True,
            )

    def setup_optimizers(self) -> Optimizers:
        """Set up Nerfstudio's optimizers after settling schedules that depend on the kind of capture."""
        is_forward_facing = getattr(self.pipeline.datamanager.config.pose_sampler, "kind", None) == "box"
        for group in self.config.optimizers.values():
            if isinstance(group["scheduler"], PublishedSchedulerConfig):
                group["scheduler"].settle(is_forward_facing)
        return super().setup_optimizers()

    def _load_checkpoint(self) -> None:
        """Load a checkpoint as Nerfstudio does.

        Raises:
            InputError: if the checkpoint to resume from is damaged, or another method's.
        """
        self._check_load_frame()
        try:
            super()._load_checkpoint()
        except Exception as error:  # A damaged file may raise anything.
            raise InputError(
                f"Training cannot resume from {self.config.load_dir or self.config.load_checkpoint}"
                f" ({type(error).__name__}: {one_line(error)}): give with --load-dir the"
                f" {self.config.relative_model_dir} folder of a run of {self.config.method_name}, or leave it out to"
                " start from scratch."
            ) from error

    def _check_load_frame(self) -> None:
        """Check that a resumed student stays in its frame.

        Raises:
            InputError: if the run to resume from has another frame than the teacher.
        """
        if self.config.load_dir is None:
            return
        path = Path(self.config.load_dir).absolute().parent / "dataparser_transforms.json"
        if not path.is_file():
            return
        try:
            saved = json.loads(path.read_text(encoding="utf8"))
            transform, scale = torch.tensor(saved["transform"]), float(saved["scale"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} is damaged ({one_line(error, 200)}): restore it.") from error
        outputs = self.pipeline.datamanager.train_dataparser_outputs
        ours = outputs.dataparser_transform
        same = transform.shape == ours.shape and torch.allclose(transform, ours.to(transform), atol=1e-4)
        if not same or abs(scale / outputs.dataparser_scale - 1) > 1e-4:
            raise InputError(
                f"The student of --load-dir {self.config.load_dir} is in another frame than the teacher"
                f" {self.config.teacher}: resume with the teacher it was distilled from; import an imported student"
                " again with r2l-import --teacher."
            )

    def train(self) -> None:
        """Train up to `max_num_iterations` in all, those before a resumed checkpoint included, or for `max_minutes`.

        Ctrl-C or SIGTERM finishes the iteration and saves.

        Raises:
            SystemExit: with the flag to change, if the device has no room for a batch.
        """
        total = self.config.max_num_iterations
        # Nerfstudio counts the iterations from the checkpoint on; the schedules here count them from the start.
        self.config.max_num_iterations = max(0, total - self._start_step)
        self.step = max(0, self._start_step - 1)
        self.progress = TrainingProgress(total)
        if self.config.max_minutes is not None:
            done = float(self.pipeline.done)
            spent = time.monotonic() - self._setup_began
            left = max(
                60 * self.config.max_minutes * (1 - done) - spent, MIN_TRAINING_SHARE * 60 * self.config.max_minutes
            )
            self.progress = TrainingProgress(total, left, done)
            self.config.max_num_iterations = sys.maxsize - self._start_step
        self.pipeline.follow(self.progress)
        for scheduler in self.optimizers.schedulers.values():
            if isinstance(scheduler, ScheduledRate):
                scheduler.progress = lambda: self.progress.fraction
        self.progress.update(self._start_step)
        curve = LearningCurveWriter(self.base_dir, resumed=self._resumed_minutes())
        if self.local_rank == 0:
            writer.EVENT_WRITERS.append(curve)
        try:
            with exit_on_input_error(), self._stop_on_signals():
                super().train()
        except OutOfMemoryError as error:
            with exit_on_input_error():
                raise InputError(
                    f"No memory on {self.device} for a training batch: lower"
                    " --pipeline.datamanager.train-num-rays-per-batch (now"
                    f" {self.config.pipeline.datamanager.train_num_rays_per_batch}) or"
                    f" --pipeline.datamanager.num-views. The newest checkpoint in {self.checkpoint_dir} is kept;"
                    " resume from it with --load-dir."
                ) from error
        finally:
            self.config.max_num_iterations = total
            if curve in writer.EVENT_WRITERS:
                writer.EVENT_WRITERS.remove(curve)

    def _resumed_minutes(self) -> float:
        """Return the minutes on the learning curve of the run that this one resumes."""
        former = [] if self.config.load_dir is None else read_learning_curve(Path(self.config.load_dir).parent)
        return former[-1].minutes if former else 0.0

    def train_iteration(self, step: int) -> TRAIN_INTERATION_OUTPUT:
        """Run an iteration as Nerfstudio does; then check whether training is over."""
        output = super().train_iteration(step)
        self.progress.update(step + 1)
        self.pipeline.note_progress()
        if self.config.max_minutes is not None:
            writer.GLOBAL_BUFFER["max_iter"] = self.progress.expected_steps(step + 1)  # For its percentage and ETA.
        if self.progress.finished:
            self.stop_training = True
        return output

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """End training after the current iteration on Ctrl-C or SIGTERM, and at once on a second one."""
        self._former_handlers: dict[int, Any] = {}

        def stop(number: int, frame: FrameType | None) -> None:
            self._restore_handlers()
            CONSOLE.print("\nStopping after this iteration, then saving the student; Ctrl-C again to leave at once.")
            self.progress.ask_to_stop()
            if self.training_state == "paused":
                self.stop_training = True

        if threading.current_thread() is threading.main_thread():
            self._former_handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        self._former_handlers = {}

    def _after_train(self) -> None:
        self._restore_handlers()
        self.pipeline.finish(self.step)
        if self.progress.stopped:
            self.config.viewer.quit_on_train_completion = True
        CONSOLE.print(f"Measure this student: r2l-report {self.base_dir}", markup=False, soft_wrap=True)
        super()._after_train()

    @check_main_thread
    def save_checkpoint(self, step: int) -> None:
        """Write the checkpoint to a temporary folder and move it into place: an interruption at any moment leaves the
        old or the new one.

        A full disk does not end training: it is reported, and tried again at the next checkpoint. At the end of
            training the weights are saved without what resuming needs, or else in the system's temporary folder.

        Raises:
            SystemExit: with a paragraph with the reason, if training has ended and the student cannot be saved anywhere.
        """
        try:
            self._write_checkpoint(step, self.checkpoint_dir)
            return
        except _DISK_ERRORS as error:
            self._complain(
                error,
                "saving less now"
                if self.training_state == "completed"
                else "training continues, and the next checkpoint is tried as usual",
            )
        if self.training_state != "completed":
            return
        elsewhere = Path(tempfile.gettempdir()) / f"r2l-{self.config.experiment_name}-{self.config.timestamp}"
        for folder, is_whole in ((self.checkpoint_dir, False), (elsewhere / self.checkpoint_dir.name, True)):
            try:
                self._write_checkpoint(step, folder, is_whole)
            except _DISK_ERRORS:
                continue
            if not is_whole:
                CONSOLE.print("Saved the weights only: the student is complete, but training cannot resume from it.")
            else:
                self._copy_run(elsewhere)
                CONSOLE.print(f"[bold yellow]Saved the run in {elsewhere} instead: move it to a disk with space.")
            return
        with exit_on_input_error():
            raise InputError(f"The student of step {step} could not be saved in {self.checkpoint_dir} or {elsewhere}.")

    def _copy_run(self, folder: Path) -> None:
        """Copy the run's small files beside a checkpoint that was saved elsewhere."""
        for name in ("config.yml", "dataparser_transforms.json"):
            if (self.base_dir / name).is_file():
                shutil.copyfile(self.base_dir / name, folder / name)

    def _complain(self, error: BaseException, then: str) -> None:
        free = free_bytes(self.checkpoint_dir)
        room = "" if free is None else f", whose disk has {free / 1e6:.1f} MB free"
        reason = getattr(error, "strerror", None) or one_line(error, 200)
        CONSOLE.print(
            f"[bold yellow]The checkpoint could not be written to {self.checkpoint_dir}{room} ({reason}): free space"
            f" there; {then}.",
            soft_wrap=True,
        )

    def _write_checkpoint(self, step: int, final_dir: Path, is_whole: bool = True) -> None:
        partial_dir = final_dir.with_name(final_dir.name + ".partial")
        name = f"step-{step:09d}.ckpt"
        own_dir, optimizers, schedulers = self.checkpoint_dir, self.optimizers.optimizers, self.optimizers.schedulers
        self.checkpoint_dir = partial_dir
        if not is_whole:
            self.optimizers.optimizers, self.optimizers.schedulers = {}, {}
        try:
            super().save_checkpoint(step)
            final_dir.mkdir(parents=True, exist_ok=True)
            (partial_dir / name).replace(final_dir / name)
        finally:
            self.checkpoint_dir = own_dir
            self.optimizers.optimizers, self.optimizers.schedulers = optimizers, schedulers
            shutil.rmtree(partial_dir, ignore_errors=True)
        if self.config.save_only_latest_checkpoint:
            for old in final_dir.glob("*.ckpt"):
                if old.name != name:
                    old.unlink()
