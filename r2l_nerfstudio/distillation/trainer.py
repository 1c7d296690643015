"""Nerfstudio's trainer, with a teacher to inherit from and checkpoints that survive."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.engine.trainer import TRAIN_INTERATION_OUTPUT, Trainer, TrainerConfig
from nerfstudio.utils import writer
from nerfstudio.utils.decorators import check_main_thread
from nerfstudio.utils.rich_utils import CONSOLE

from r2l_nerfstudio.distillation.optimization import PublishedSchedulerConfig, ScheduledRate
from r2l_nerfstudio.distillation.progress import TrainingProgress
from r2l_nerfstudio.errors import InputError, exit_on_input_error

VIEWS_SHARE = 0.4
"""Of --max-minutes, that the teacher's first views may take; those still missing come while training."""
MIN_TRAINING_SHARE = 0.1
"""Of --max-minutes, that training gets, however long the start took."""


@dataclass
class DistillationTrainerConfig(TrainerConfig):
    """Training of a student from a teacher."""

    _target: type = field(default_factory=lambda: DistillationTrainer)
    teacher: Path | None = None
    """Trained Nerfstudio run to learn from: its config.yml, or its folder."""
    max_minutes: float | None = None
    """End after so many minutes, the teacher's first views included; schedules and photographs fit themselves to it, and
    --max-num-iterations no longer counts. A run that goes on with --load-dir gets what is left of them."""

    def set_timestamp(self) -> None:
        """Name the run; `ns-train` calls this before it writes anything, so the teacher is read here.

        Raises:
            SystemExit: with a paragraph that says why, if the teacher or its capture cannot be used.
        """
        super().set_timestamp()
        if self.machine.device_type == "cuda" and not torch.cuda.is_available():
            CONSOLE.print("[yellow]No CUDA device here: training on the CPU (--machine.device-type cpu).")
            self.machine.device_type = "cpu"
        with exit_on_input_error():
            self.inherit_from_teacher()
            self._check_load_dir()
            self._check_minutes()

    def _check_minutes(self) -> None:
        if self.max_minutes is None:
            return
        if not self.max_minutes > 0:
            raise InputError(f"--max-minutes {self.max_minutes} leaves no time to train: give a number above 0.")
        self.pipeline.datamanager.fill_minutes = VIEWS_SHARE * self.max_minutes

    def inherit_from_teacher(self) -> None:
        """Take over the teacher's capture and frame: dataparser configuration, data path, experiment name.

        Raises:
            InputError: if no teacher is named, or its run cannot be used.
        """
        # Imported late: reading a run's config imports every registered method, this one among them.
        from r2l_nerfstudio.run_config import capture_path, checkpoint_path, load_run_config, resolve_run

        if self.teacher is None:
            raise InputError(
                f"ns-train {self.method_name} needs a teacher: name a trained Nerfstudio run with"
                " --teacher outputs/…/config.yml."
            )
        config_path = resolve_run(self.teacher).absolute()
        teacher = load_run_config(config_path)
        checkpoint_path(teacher, config_path)
        self.teacher = config_path
        self.pipeline.teacher = config_path
        datamanager = self.pipeline.datamanager
        taught_from = teacher.pipeline.datamanager
        if hasattr(taught_from, "dataparser"):
            datamanager.dataparser = copy.deepcopy(taught_from.dataparser)
        datamanager.camera_res_scale_factor = getattr(taught_from, "camera_res_scale_factor", 1.0)
        data = self.data or datamanager.data
        datamanager.data = (Path(data) if data is not None else capture_path(teacher, config_path)).absolute()
        if not datamanager.data.exists():
            raise InputError(f"There is no capture at {datamanager.data}: name the teacher's capture with --data.")
        if self.experiment_name is None:
            self.experiment_name = teacher.experiment_name
        for group in self.optimizers.values():
            if group["scheduler"] is not None:
                group["scheduler"].max_steps = self.max_num_iterations

    def _check_load_dir(self) -> None:
        """A wrong --load-dir is told now, not after the teacher has rendered for minutes."""
        if self.load_dir is None:
            return
        name = "step-*.ckpt" if self.load_step is None else f"step-{self.load_step:09d}.ckpt"
        if not any(Path(self.load_dir).glob(name)):
            raise InputError(
                f"There is no checkpoint to go on from: --load-dir {self.load_dir} holds no {name}. Name the"
                f" {self.relative_model_dir} folder of a run of {self.method_name}."
            )
        self._take_published_student(Path(self.load_dir).absolute().parent)

    def _take_published_student(self, run: Path) -> None:
        """Take over the network and ray encoding of an imported run, so that any method of its kind can fine-tune it.

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
                f"--load-dir {self.load_dir} is a run of a {type(model).__name__.removesuffix('ModelConfig')} student, which"
                f" ns-train {self.method_name} cannot go on from: choose the method of its kind."
            )
        CONSOLE.print(f"Taking network and ray encoding from {run / 'config.yml'}.", soft_wrap=True)
        engine = self.pipeline.model.engine
        self.pipeline.model = model
        model.engine = engine


class DistillationTrainer(Trainer):
    """Nerfstudio's trainer; a killed run can always be taken up again from its newest checkpoint."""

    config: DistillationTrainerConfig

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        """As `Trainer.setup`; a run that fails here leaves no config.yml that looks like a finished one."""
        self._setup_began = time.monotonic()
        try:
            with exit_on_input_error():
                super().setup(test_mode)
        except BaseException:
            if not any(self.checkpoint_dir.glob("*.ckpt")):
                (self.base_dir / "config.yml").unlink(missing_ok=True)
            raise

    def setup_optimizers(self) -> Optimizers:
        """As Nerfstudio's, once schedules that depend on the kind of capture are settled."""
        is_forward_facing = getattr(self.pipeline.datamanager.config.pose_sampler, "kind", None) == "box"
        for group in self.config.optimizers.values():
            if isinstance(group["scheduler"], PublishedSchedulerConfig):
                group["scheduler"].settle(is_forward_facing)
        return super().setup_optimizers()

    def _load_checkpoint(self) -> None:
        """As Nerfstudio's.

        Raises:
            InputError: if the checkpoint to go on from is damaged, or another method's.
        """
        self._check_load_frame()
        try:
            super()._load_checkpoint()
        except Exception as error:  # a damaged file may raise anything
            raise InputError(
                f"Training cannot go on from {self.config.load_dir or self.config.load_checkpoint}"
                f" ({type(error).__name__}: {' '.join(str(error).split())[:300]}): name with --load-dir the"
                f" {self.config.relative_model_dir} folder of a run of {self.config.method_name}, or leave it out to"
                " begin anew."
            ) from error

    def _check_load_frame(self) -> None:
        """A student goes on in the frame it was made in.

        Raises:
            InputError: if the run to go on from lived in another frame than the teacher.
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
            raise InputError(f"{path} is damaged ({' '.join(str(error).split())[:200]}): restore it.") from error
        outputs = self.pipeline.datamanager.train_dataparser_outputs
        ours = outputs.dataparser_transform
        same = transform.shape == ours.shape and torch.allclose(transform, ours.to(transform), atol=1e-4)
        if not same or abs(scale / outputs.dataparser_scale - 1) > 1e-4:
            raise InputError(
                f"The student of --load-dir {self.config.load_dir} lives in another frame than the teacher"
                f" {self.config.teacher}: go on with the teacher it was distilled from; an imported student, import again"
                " with r2l-import --teacher."
            )

    def train(self) -> None:
        """Train up to `max_num_iterations` in all, those before a resumed checkpoint included, or for `max_minutes`.

        Ctrl-C, or a polite kill, ends training after the iteration at hand and saves the student.

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
        try:
            with exit_on_input_error(), self._stop_on_signals():
                super().train()
        except torch.OutOfMemoryError as error:
            with exit_on_input_error():
                raise InputError(
                    f"No room on {self.device} for a training batch: lower"
                    " --pipeline.datamanager.train-num-rays-per-batch (now"
                    f" {self.config.pipeline.datamanager.train_num_rays_per_batch}) or --pipeline.datamanager.num-views."
                    f" The newest checkpoint in {self.checkpoint_dir} is kept; go on from it with --load-dir."
                ) from error
        finally:
            self.config.max_num_iterations = total

    def train_iteration(self, step: int) -> TRAIN_INTERATION_OUTPUT:
        """As Nerfstudio's; then looks whether training is over."""
        output = super().train_iteration(step)
        self.progress.update(step + 1)
        self.pipeline.note_progress()
        if self.config.max_minutes is not None:
            writer.GLOBAL_BUFFER["max_iter"] = self.progress.expected_steps(step + 1)  # for its percentage and ETA
        if self.progress.finished:
            self.stop_training = True
        return output

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """Ends training after the iteration at hand on Ctrl-C or a polite kill; at once on a second one."""
        self._former_handlers: dict[int, Any] = {}

        def stop(number: int, frame: FrameType | None) -> None:
            self._restore_handlers()
            CONSOLE.print("\nStopping after this iteration, then saving the student; once more to leave at once.")
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
        super()._after_train()

    @check_main_thread
    def save_checkpoint(self, step: int) -> None:
        """Write the checkpoint beside its place and move it there: a kill at any moment leaves the old or the new one."""
        final_dir = self.checkpoint_dir
        partial_dir = final_dir.with_name(final_dir.name + ".partial")
        self.checkpoint_dir = partial_dir
        try:
            super().save_checkpoint(step)
        finally:
            self.checkpoint_dir = final_dir
        final_dir.mkdir(parents=True, exist_ok=True)
        name = f"step-{step:09d}.ckpt"
        (partial_dir / name).replace(final_dir / name)
        shutil.rmtree(partial_dir)
        if self.config.save_only_latest_checkpoint:
            for old in final_dir.glob("*.ckpt"):
                if old.name != name:
                    old.unlink()
