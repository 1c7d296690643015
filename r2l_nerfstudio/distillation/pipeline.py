"""Teacher, data and student together, behind Nerfstudio's Pipeline interface."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
import torch.distributed
import tyro
from jaxtyping import Float
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.utils import writer
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor
from torch.cuda.amp.grad_scaler import GradScaler
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

from r2l_nerfstudio.checkpoints import read_checkpoint, without_module_prefix
from r2l_nerfstudio.distillation.averaging import (
    WeightAverage,
    normalization_statistics,
    put_average,
    saved_average,
)
from r2l_nerfstudio.distillation.background import background_of
from r2l_nerfstudio.distillation.datamanager import Batch, DistillationDataManager, DistillationDataManagerConfig
from r2l_nerfstudio.distillation.frame_check import check_cameras, check_frame
from r2l_nerfstudio.distillation.optimization import move_state
from r2l_nerfstudio.distillation.progress import TrainingProgress
from r2l_nerfstudio.distillation.published_scene import scene_of_capture
from r2l_nerfstudio.distillation.scene_occupancy import SceneOccupancy
from r2l_nerfstudio.distillation.survey import Survey
from r2l_nerfstudio.distillation.trial_step import training_bytes
from r2l_nerfstudio.engines.torch_engine import is_bf16_fast
from r2l_nerfstudio.errors import InputError, exit_on_input_error, one_line
from r2l_nerfstudio.models.composited_encoding import CompositedEncoding
from r2l_nerfstudio.models.light_field import LightFieldModel, LightFieldModelConfig
from r2l_nerfstudio.psnr import decibels
from r2l_nerfstudio.ranges import FloatRange, IntRange
from r2l_nerfstudio.rays.conventions import OURS
from r2l_nerfstudio.renamed_fields import RenamedFields
from r2l_nerfstudio.students.sparse_volume import moved_rows
from r2l_nerfstudio.teacher import Teacher

STATISTICS_BATCHES = 16
STEPS_PER_GROWTH = 200
PRUNED_AT = (0.15, 0.4)
"""Shares of the training after which the occupancy is pruned by the student's density."""


@dataclass
class DistillationPipelineConfig(RenamedFields, VanillaPipelineConfig):
    """A student, its data, and the teacher they come from."""

    RENAMED: ClassVar[dict[str, str]] = {"steps_per_holdout": "steps_per_eval_held_out"}

    _target: type = field(default_factory=lambda: DistillationPipeline)
    datamanager: DistillationDataManagerConfig = field(default_factory=DistillationDataManagerConfig)
    model: LightFieldModelConfig = field(default_factory=LightFieldModelConfig)
    teacher: tyro.conf.Suppress[Path | None] = None
    """The teacher's config.yml; set from --teacher."""
    teacher_time: tyro.conf.Suppress[float | None] = None
    """The instant at which a time-dependent teacher is frozen; set from --teacher-time."""
    resumes: tyro.conf.Suppress[Path | None] = None
    """Checkpoint to resume from; set from --load-dir or --load-checkpoint."""
    check_frame: bool = True
    """Before training, check that the teacher's renders match the photos."""
    bf16: bool = True
    """Train the network in bfloat16 with fp32 weights, which needs no loss scaling, unlike the fp16 of Nerfstudio's
    mixed precision on CUDA. Rays, encoding and losses stay in fp32. Without bf16 arithmetic everything is fp32."""
    steps_per_eval_held_out: Annotated[
        int, IntRange(1, 10**9), tyro.conf.arg(aliases=["--pipeline.steps-per-holdout"])
    ] = 500
    """Iterations between measurements on the held-out views."""
    sync_batch_norm: bool = False
    """On several GPUs, normalize over the batches of all of them (SyncBatchNorm), as published; CPUs have no such layer
    and keep statistics per process."""
    ema_decay: Annotated[float, FloatRange(0, 1)] = 0.0
    """Decay of the weights' moving average, which is what training saves at the end; 0 keeps none."""


class DistillationPipeline(VanillaPipeline):
    """Trains a student from a teacher; without training, runs the student only.

    Args: as `VanillaPipeline`. In `test_mode` "val" (training) the teacher is loaded; in "test" and "inference" it is
    neither needed nor read.
    """

    config: DistillationPipelineConfig
    datamanager: DistillationDataManager
    _model: LightFieldModel | DistributedDataParallel
    done: Tensor
    """Share of the training that is done, in [0, 1]."""

    def __init__(
        self,
        config: DistillationPipelineConfig,
        device: str,
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        grad_scaler: GradScaler | None = None,
    ) -> None:
        with exit_on_input_error():
            # The teacher first: its errors describe best what is wrong with a capture.
            teacher = load_teacher(config, device) if test_mode == "val" else None
            if teacher is not None:
                config.model.fit_to(*view_size(config.datamanager, teacher))
            super().__init__(config, device, test_mode, 1, local_rank, grad_scaler)
            self.datamanager.world_size = self.world_size = world_size
            self.average: WeightAverage | None = None
            self.scene_occupancy: SceneOccupancy | None = None
            if teacher is not None:
                if config.resumes is not None:
                    self._check_resumed(config.resumes)
                self._attach_teacher(teacher)
            if world_size > 1:  # Only now, since the scene determines the number of features.
                self._model = self._distributed(local_rank)
            if teacher is not None:
                if config.ema_decay > 0:
                    self.average = WeightAverage(self.model, config.ema_decay)
        self.model.teacher_split.teacher_path = config.teacher
        self.model.teacher_split.teacher_time = config.teacher_time
        self.model.teacher_split.device = device
        self._best: tuple[float, dict[str, Any]] | None = None
        self._optimizers: Optimizers | None = None
        self.progress: TrainingProgress | None = None
        self.register_buffer("done", torch.zeros(()))

    @property
    def model(self) -> LightFieldModel:
        """The student, without the wrapper of data-parallel training."""
        return cast(LightFieldModel, super().model)

    def _distributed(self, local_rank: int) -> DistributedDataParallel:
        # Nerfstudio's wrapper names a GPU, and so fails between CPUs; it also searches every batch for unused weights,
        # of which only single rays have some.
        unused = self.datamanager.begins_with_single_rays()
        # In no loss, so ranks would wait for it.
        self.model.device_indicator_param.requires_grad_(False)
        on_gpu = self.model.device.type == "cuda"
        if self.config.sync_batch_norm and on_gpu:
            self._model = cast(LightFieldModel, torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model))
        devices = [local_rank] if on_gpu else None
        return DistributedDataParallel(self.model, device_ids=devices, find_unused_parameters=unused)

    def _attach_teacher(self, teacher: Teacher) -> None:
        cameras = self.datamanager.train_dataset.cameras
        check_cameras(teacher, self.datamanager.train_dataparser_outputs.cameras)
        # First of all, since it distinguishes a teacher that has diverged from one in another frame.
        survey = Survey.take(teacher, cameras)
        background = background_of(teacher)
        if self.config.check_frame:
            check_frame(teacher, self.datamanager.train_dataset, background)
        self._set_scene(survey, background)
        CONSOLE.print(f"Scene: {self.model.describe_scene()}.")
        model = self.model
        room = 0
        if model.device.type == "cuda":
            views = self.datamanager.view_cameras()
            room = training_bytes(self.config, views.width, views.height, model.device)
        self.datamanager.attach_teacher(teacher, survey, background, model.rays, room)
        self._survey = survey
        self._prepare_student()

    def _prepare_student(self) -> None:
        """Fit a new student to what the data manager draws and shows."""
        self.model.crop_margin = self.datamanager.rays.margin
        if self.datamanager.begins_with_single_rays():
            self.model.begin_with_single_rays()
        self._start_occupancy()

    def _start_occupancy(self) -> None:
        encoding = self.model.composited
        if encoding is None:
            self.scene_occupancy = None
            return
        config = self.model.config
        self.scene_occupancy = SceneOccupancy(
            encoding, config.occupancy_cells, config.max_grid_points, self._survey.has_depth
        )
        self.scene_occupancy.start(self.datamanager.ring, self.datamanager.view_cameras())
        if not self._survey.has_depth:
            CONSOLE.print(
                "The teacher has no depth: occupancy comes from its accumulation."
                if self._survey.has_accumulation
                else "The teacher has neither depth nor accumulation: sample points are spread over the whole scene."
            )
        CONSOLE.print(f"Occupancy: {self.scene_occupancy.describe()}.")

    def _set_scene(self, survey: Survey, background: Float[Tensor, "3"]) -> None:
        capture = self.datamanager.view_cameras()
        bounds, conventions = survey.bounds(capture, self.model.config.forced_spacing), OURS
        if self.model.config.published_rays:
            outputs = self.datamanager.train_dataparser_outputs
            scene = scene_of_capture(capture, outputs, bounds, self.model.reads_ray_image)
            bounds = dataclasses.replace(bounds, near=scene.near, far=scene.far)
            conventions = scene.conventions
        self.model.set_scene(
            bounds=bounds,
            axes=capture.mean_axes,
            background=background,
            has_accumulation=survey.has_accumulation,
            has_depth=survey.has_depth,
            focal=float(capture.intrinsics[:, :2].median()),
            conventions=conventions,
        )

    def restart(self, config: DistillationPipelineConfig) -> None:
        """Restart with another student on the existing teacher views.

        Args:
            config: configuration of the same method, with the same views to learn from.
        """
        self.config = config
        dataset = self.datamanager.train_dataset
        self._model = config.model.setup(
            scene_box=dataset.scene_box, num_train_data=len(dataset), metadata=dataset.metadata
        ).to(self.datamanager.device)
        self._set_scene(self._survey, self.datamanager.background)
        self.datamanager.restart(config.datamanager, self.model.rays)
        self._prepare_student()
        self.average = WeightAverage(self.model, config.ema_decay) if config.ema_decay > 0 else None
        self._best = None

    def _check_resumed(self, checkpoint: Path) -> None:
        """Refuse another model's checkpoint before the teacher renders for minutes."""
        weights = read_checkpoint(checkpoint, "student").model_weights()
        mine = {k: v for k, v in self.model.state_dict().items() if isinstance(v, Tensor)}
        theirs = {k: v for k, v in weights.items() if isinstance(v, Tensor)}
        for key in dict.fromkeys([*mine, *theirs]):
            shapes = [list(state[key].shape) if key in state else "absent" for state in (theirs, mine)]
            # The number of features of a composited encoding is known only after the teacher has rendered.
            if shapes[0] != shapes[1] and not key.startswith("composited"):
                raise InputError(
                    f"The checkpoint {checkpoint} does not belong to the student that the command line describes"
                    f" ({key} is {shapes[0]} in it, and {shapes[1]} here): to resume from it with --load-dir, give"
                    " the same --pipeline.model options."
                )

    def load_pipeline(self, loaded_state: dict[str, Any], step: int) -> None:
        """Load a student completely: Nerfstudio would silently leave what does not fit at random.

        Raises:
            SystemExit: with a paragraph with the reason, if it does not fit.
        """
        state = without_module_prefix(loaded_state)
        averages = saved_average(state)
        state = {key: value for key, value in state.items() if not key.startswith("average.")}
        self.model.update_to_step(step)
        with exit_on_input_error():
            try:
                self.load_state_dict(state, strict=True)
            except RuntimeError as error:
                raise InputError(
                    f"The checkpoint of step {step} does not belong to the student that config.yml and the command"
                    f" line describe ({one_line(error)}). A run's config.yml goes with its own checkpoints; to resume"
                    " from one with --load-dir, give the same --pipeline.model options."
                ) from error
            self._check_conventions(step)
        if self.scene_occupancy is not None:
            # The checkpoint decides the number of features, on which ranks and averages depend.
            self.scene_occupancy.resume(self.datamanager.ring)
            if self.world_size > 1:
                self._model = self._distributed(self.datamanager.local_rank)
            if self.average is not None:
                self.average = WeightAverage(self.model, self.config.ema_decay)
        if self.average is not None:
            if averages:
                self.average.load_state_dict(averages)
            else:  # The weights of a finished run are their average.
                self.average.reset()
        elif self.test_mode != "val":
            put_average(self.model, averages)

    def _check_conventions(self, step: int) -> None:
        """Check that the encoding reads rays as the data manager makes them.

        Raises:
            InputError: if the checkpoint's ray encoding reads other rays than the data manager makes.
        """
        read, rays = self.model.ray_encoding.conventions, getattr(self.datamanager, "rays", None)
        if rays is None:  # No teacher: nothing is trained.
            return
        made = rays.conventions
        if (read.is_planar, read.pixel_offset) == (made.is_planar, made.pixel_offset):
            return
        raise InputError(
            f"The checkpoint of step {step} reads rays by {'the published' if read.is_planar else 'our'} conventions:"
            f" add --pipeline.model.published-rays {read.is_planar} to resume from it."
        )

    def get_train_loss_dict(self, step: int) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
        """Run one batch through the student, and pass its errors to the data manager."""
        batch = self.datamanager.next_batch(step)
        outputs = self._predict(batch, self._model)
        _, truth = batch.as_nerfstudio()
        metrics_dict = self.model.get_metrics_dict(outputs, truth)
        loss_dict = self.model.get_loss_dict(outputs, truth, metrics_dict)
        with torch.no_grad():
            errors = (outputs["rgb"].float() - batch.target.rgb).square().sum(-1) * batch.target.weight[..., 0]
        self.datamanager.learn_from(batch, errors)
        return outputs, loss_dict, metrics_dict

    def train_step(self, optimizers: Optimizers, step: int) -> None:
        """Run one training iteration: batch, loss, gradients, optimizers, average of the weights.

        `ns-train` runs the same calls with its callbacks, log and checkpoints around them.
        """
        optimizers.zero_grad_all()
        _, losses, _ = self.get_train_loss_dict(step)
        torch.stack([*losses.values()]).sum().backward()
        self.update_weights(optimizers, step)

    def update_weights(self, optimizers: Optimizers, step: int) -> None:
        """Step the optimizers and the average of the weights for the current gradients."""
        optimizers.optimizer_step_all()
        self.update_average(step)

    def _predict(self, batch: Batch, model: torch.nn.Module) -> dict[str, Tensor]:
        bundle = batch.ray_bundle
        with self._autocast():
            return model(bundle)

    def _autocast(self) -> torch.autocast:
        """bf16 where the machine multiplies it: on a CPU that does not, a step takes ten times as long as in fp32."""
        device = self.model.device
        is_used = self.config.bf16 and is_bf16_fast(device)
        return torch.autocast(device_type=device.type, dtype=torch.bfloat16, enabled=is_used)

    @torch.no_grad()
    def held_out_psnr(self, held: Batch) -> float:
        """Return the PSNR in dB of the student on held-out pixels; NaN if none of them counts."""
        was_training = self.training
        self.eval()
        rgb = self.model(held.ray_bundle)["rgb"]
        self.train(was_training)
        weight = held.target.weight
        if not bool(weight.any()):
            return math.nan
        error = ((rgb.float() - held.target.rgb).square() * weight).sum() / (3 * weight.sum().clamp_min(1))
        return decibels(float(error))

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """Return Nerfstudio's callbacks, and those that update the average, the occupancy and the held-out PSNR."""
        attributes = training_callback_attributes
        if attributes.trainer is not None and self.datamanager.local_rank == 0:
            # Settings of "auto" are resolved only now.
            attributes.trainer.config.save_config()
        self._optimizers = attributes.optimizers
        return [
            *super().get_training_callbacks(attributes),
            self._after_iterations(self.update_average, 1),
            self._after_iterations(self._update_occupancy, STEPS_PER_GROWTH),
            self._after_iterations(self._evaluate_held_out, self.config.steps_per_eval_held_out),
        ]

    def follow(self, progress: TrainingProgress) -> None:
        """Use this progress for the stages of the training and the time left."""
        self.progress = progress
        self.note_progress()

    def note_progress(self) -> None:
        """Start each stage of the training when the progress reaches it."""
        assert self.progress is not None
        self.done.fill_(self.progress.fraction)
        self.datamanager.note_progress(self.progress.fraction, self.progress.steps)

    def _after_iterations(self, function: Callable[[int], None], every: int) -> TrainingCallback:
        where = [TrainingCallbackLocation.AFTER_TRAIN_ITERATION]
        return TrainingCallback(where_to_run=where, update_every_num_iters=every, func=function)

    def _update_occupancy(self, step: int) -> None:
        """Add to the occupancy what new teacher views show, or prune it; resize features, optimizer state and average."""
        ring, encoding = self.datamanager.ring, self.model.composited
        # Ranks would have to agree, and weights that may be restored must still fit.
        if self.scene_occupancy is None or encoding is None or self.world_size > 1 or self.datamanager.in_photo_stage:
            return
        is_due = self._is_pruning_due(encoding)
        convert = self.scene_occupancy.prune(ring) if is_due else self.scene_occupancy.grow(ring)
        if convert is None:
            return
        rows = encoding.volume.rows
        self._move_state(rows, convert)
        if self.average is not None:
            self.average.restart(rows)
        if is_due:
            CONSOLE.print(f"Occupancy after pruning: {self.scene_occupancy.describe()}.")

    def _is_pruning_due(self, encoding: CompositedEncoding) -> bool:
        fraction = 0.0 if self.progress is None else self.progress.fraction
        return encoding.prunings < sum(fraction >= at for at in PRUNED_AT)

    def _move_state(self, rows: Parameter, convert: Callable[[Tensor], Tensor]) -> None:
        rows.grad = None
        for optimizer in () if self._optimizers is None else self._optimizers.optimizers.values():
            move_state(optimizer, rows, convert)

    def update_average(self, step: int) -> None:
        """Update the average with the current weights, if there is one."""
        if self.average is not None:
            self.average.update()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the average of the weights, if there is one, and normalization statistics that fit it."""
        if self.average is None:
            yield
            return
        self.average.swap()
        statistics = normalization_statistics(self.model)
        kept = [tensor.clone() for tensor in statistics]
        try:
            self._estimate_statistics()
            yield
        finally:
            for tensor, value in zip(statistics, kept, strict=True):
                tensor.copy_(value)
            self.average.swap()

    def _estimate_statistics(self) -> None:
        def batches() -> Iterator[RayBundle]:
            for _ in range(STATISTICS_BATCHES):
                with torch.autocast(device_type=self.model.device.type, enabled=False):  # Rays are fp32.
                    bundle = self.datamanager.draw(0).ray_bundle
                yield bundle

        with self._autocast():
            update_bn(batches(), self.model)
        if self.world_size > 1:
            for statistic in normalization_statistics(self.model):
                if statistic.is_floating_point():
                    torch.distributed.all_reduce(statistic)
                    statistic /= self.world_size

    def _evaluate_held_out(self, step: int) -> None:
        if step == 0:
            return
        with self.averaged():
            against_teacher = self.held_out_psnr(self.datamanager.held_views)
            writer.put_scalar(name="Held-out PSNR (teacher views)", scalar=against_teacher, step=step)
            writer.put_scalar(name="Training done", scalar=float(self.done), step=step)
            line = f"Step {step}: {against_teacher:.2f} dB against the teacher on held-out views"
            if self.datamanager.held_out_photos is not None:
                against_photos = self.held_out_psnr(self.datamanager.held_out_photos)
                if not math.isnan(against_photos):
                    writer.put_scalar(name="Held-out PSNR (photos)", scalar=against_photos, step=step)
                    line += f", {against_photos:.2f} dB against held-out photos"
                if (
                    not math.isnan(against_photos)
                    and self.datamanager.in_photo_stage
                    and (self._best is None or against_photos > self._best[0])
                ):
                    self._best = (against_photos, self._weights())
        if self.datamanager.local_rank == 0:
            CONSOLE.print(f"{line}{self._time_left(step)}.")

    def _time_left(self, step: int) -> str:
        left = None if self.progress is None else self.progress.seconds_left(step)
        return (
            "" if left is None else f"; about {left / 60:.0f} min left" if left > 90 else f"; about {left:.0f} s left"
        )

    def _weights(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}

    def finish(self, step: int) -> None:
        """At the end of training, use the average of the weights, or those with the best PSNR on held-out photos."""
        if self.average is not None:
            self.average.swap()
            self._estimate_statistics()
            self.average = None
        self._restore_best()
        if self.model.composited is not None and self.scene_occupancy is not None:
            volume = self.model.composited.volume
            self._move_state(volume.rows, partial(moved_rows, volume.trim()))

    def _restore_best(self) -> None:
        if self._best is None or self.datamanager.held_out_photos is None:
            return
        now = self.held_out_psnr(self.datamanager.held_out_photos)
        best, state = self._best
        if best > now + 0.02:
            CONSOLE.print(
                f"Overfitting to photos: restored the best weights (held-out PSNR {now:.2f} → {best:.2f} dB)."
            )
            self.model.load_state_dict(state, strict=False)


def load_teacher(config: DistillationPipelineConfig, device: str) -> Teacher:
    """Load the teacher of a configuration.

    Raises:
        InputError: if it has none, or the run or its capture cannot be used.
    """
    if config.teacher is None:
        raise InputError("A student needs a teacher: give a trained Nerfstudio run with --teacher …/config.yml.")
    return Teacher.load(config.teacher, device=device, data=config.datamanager.data, time=config.teacher_time)


def view_size(config: DistillationDataManagerConfig, teacher: Teacher) -> tuple[int, int]:
    """Return the width and height in pixels of future teacher views, before there is a data manager."""
    cameras = teacher.dataparser_outputs.cameras
    scale = config.camera_res_scale_factor / config.view_downscale
    width, height = (round(float(sizes.float().median()) * scale) for sizes in (cameras.width, cameras.height))
    return width, height
