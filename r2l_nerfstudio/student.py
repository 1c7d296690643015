"""Trained students, loaded from their run's folder only: no capture, no teacher, no data manager."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import SceneBox
from torch import Tensor

from r2l_nerfstudio.checkpoints import check_fit, check_size, read_checkpoint
from r2l_nerfstudio.distillation.averaging import put_average, saved_average
from r2l_nerfstudio.engines.switch import EngineOption
from r2l_nerfstudio.errors import InputError, one_line
from r2l_nerfstudio.models.light_field import LightFieldModel, LightFieldModelConfig
from r2l_nerfstudio.run_config import checkpoint_path, load_run_config, resolve_run
from r2l_nerfstudio.user_cache import engine_cache_folder

Array = np.ndarray | Tensor


class Student:
    """A trained student.

    Cameras are in the run's frame with OpenGL axes: x right, y up, looking along -z. The frame is the teacher's, to
        which its dataparser transformed the capture; the run's `dataparser_transforms.json` has that transform.

    Args:
        model: model with its trained weights, on its device, in evaluation mode.
        method_name: name of the method in `ns-train`.
    """

    def __init__(self, model: LightFieldModel, method_name: str) -> None:
        self.model = model
        self.method_name = method_name
        self._source: tuple[str, str, int, EngineOption] | None = None
        self._process = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, in this process or another, is loaded from the run again and takes over the current weights."""
        if self._source is None:
            raise TypeError("only students from load_student can be copied or pickled: load it in each process")
        weights = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in self.model.state_dict().items()}
        return load_student, self._source, weights

    def __setstate__(self, weights: dict[str, Any]) -> None:
        with plain_torch():
            self.model.load_state_dict(weights)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of its outputs: `rgb`, and of `accumulation` and `depth` those that its teacher has."""
        known = {"rgb": True, "accumulation": self.model.has_accumulation, "depth": self.model.has_depth}
        return tuple(name for name, is_known in known.items() if is_known)

    def render(
        self, camera_to_world: Any, intrinsics: Any, width: int, height: int, output: str = "rgb"
    ) -> Float[Array, "height width channels"]:
        """Render an undistorted perspective camera.

        Args:
            camera_to_world: [3, 4] or [4, 4], in the run's frame.
            intrinsics: [4], fx, fy, cx, cy in pixels, or the matrix [3, 3]; the center of the first pixel is at (0.5,
                0.5).
            width: in pixels.
            height: in pixels.
            output: one of `outputs`.

        Returns:
            fp32; a tensor on the student's device if the camera is a tensor, else a NumPy array. `rgb` has three
            channels in [0, 1], on the student's background; `accumulation` has one in [0, 1]; `depth` has one, the
            distance along the pixel's ray in the run's unit.

        Raises:
            InputError: for an unknown output, an invalid camera, or an engine chosen by name that fails.
        """
        if output not in self.outputs:
            raise InputError(
                f"This student renders {', '.join(self.outputs)}, not {output!r}: it has only the outputs of its"
                " teacher."
            )
        return self.render_all(camera_to_world, intrinsics, width, height)[output]

    def render_all(
        self, camera_to_world: Any, intrinsics: Any, width: int, height: int
    ) -> dict[str, Float[Array, "height width channels"]]:
        """Render all `outputs` of one camera, by name; see `render`.

        Raises:
            InputError: for an invalid camera, or in a process forked from the one that loaded the student.
        """
        if os.getpid() != self._process:
            raise InputError(
                "This student was loaded before its process was forked, and the libraries that render it stop in the"
                " child: call load_student in the child, or start processes with"
                ' multiprocessing.get_context("spawn").'
            )
        with plain_torch():
            return self._render_all(camera_to_world, intrinsics, width, height)

    def _render_all(
        self, camera_to_world: Any, intrinsics: Any, width: int, height: int
    ) -> dict[str, Float[Array, "height width channels"]]:
        pose = _numbers(camera_to_world, "camera_to_world", {(3, 4), (4, 4)})[:3]
        lens = _numbers(intrinsics, "intrinsics", {(4,), (3, 3)})
        fx, fy, cx, cy = lens if lens.ndim == 1 else (lens[0, 0], lens[1, 1], lens[0, 2], lens[1, 2])
        if min(fx, fy) <= 0:
            raise InputError(f"intrinsics: both focal lengths must be above 0 (got {fx:g} and {fy:g} pixels).")
        for name, size in (("width", width), ("height", height)):
            if int(size) != size or size < 1:
                raise InputError(f"{name} must be a positive integer (got {size}).")
        camera = Cameras(
            pose[None], float(fx), float(fy), float(cx), float(cy), width=int(width), height=int(height)
        ).to(self.model.device)
        outputs = self.model.render_camera(camera)
        found: dict[str, Array] = {name: outputs[name] for name in self.outputs}
        if isinstance(camera_to_world, Tensor):
            return found
        return {name: outputs[name].cpu().numpy() for name in self.outputs}


def load_student(
    path: Path | str,
    device: torch.device | str | None = None,
    step: int | None = None,
    engine: EngineOption = "auto",
) -> Student:
    """Load a trained student from its run's folder; nothing else has to be on the disk.

    Args:
        path: the run's config.yml or folder.
        device: device to run on; by default the GPU if there is one.
        step: training step of the checkpoint; the newest by default.
        engine: engine that runs the network: a name, or `auto`: PyTorch at first, and a faster engine once rendering
            has taken long enough to justify building one. All run in fp32, or on GPUs in fp16 if that agrees.

    Raises:
        InputError: there is no such run or checkpoint, it is damaged, it is not a student's, or the engine cannot run
            here.
    """
    with plain_torch():
        student = _load(Path(path), device, step, engine)
    return student


@contextmanager
def plain_torch() -> Iterator[None]:
    """PyTorch's default state, whatever the surrounding program has set: no inference mode, no gradients, fp32."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(kept)


def _load(path: Path, device: torch.device | str | None, step: int | None, engine: EngineOption) -> Student:
    config_path = resolve_run(path)
    config = load_run_config(config_path)
    target = getattr(config.pipeline.model, "_target", None)
    if not (isinstance(target, type) and issubclass(target, LightFieldModel)):
        raise InputError(
            f"The run {config_path} is a '{config.method_name}' run, not a student: pass the config.yml of a run of"
            " r2l, mobile-r2l or a variant of theirs."
        )
    checkpoint = checkpoint_path(config, config_path, step)
    loaded = read_checkpoint(checkpoint, "student")
    weights, average, trained_step = loaded.model_weights(), saved_average(loaded.pipeline), loaded.step
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model_config = cast(LightFieldModelConfig, config.pipeline.model)
    model_config.engine = engine
    # The student's checkpoint has its bounds: it depends on neither the box nor the number of images.
    scene_box = SceneBox(torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]))

    def build() -> LightFieldModel:
        return model_config.setup(
            scene_box=scene_box, num_train_data=1, metadata={}, device=str(device), grad_scaler=None
        )

    check_size(build, config_path, most=checkpoint.stat().st_size)
    model = build().to(device)  # before its weights: loading compiles what their device needs
    check_fit(model, weights, checkpoint, "student")
    try:
        model.update_to_step(trained_step)
        model.load_state_dict(weights, strict=True)
        put_average(model, average)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"The checkpoint {checkpoint} does not fit the student that {config_path} describes"
            f" ({one_line(error)}): a run's config.yml goes with its own checkpoints; restore both from one copy."
        ) from error
    _check_scene(model, checkpoint)
    model.eval().requires_grad_(False)
    split = model.teacher_split
    split.teacher_path, split.device = getattr(config.pipeline, "teacher", None), device
    split.teacher_time = getattr(config.pipeline, "teacher_time", None)
    model.engines.check()
    model.engines.cache_folder = engine_cache_folder()
    student = Student(model, config.method_name or "")
    student._source = (str(config_path.absolute()), str(device), trained_step, engine)
    return student


def _check_scene(model: LightFieldModel, checkpoint: Path) -> None:
    """Refuse an invalid scene, on which the meaning of the network's values depends."""
    background = model.background
    if not bool(((background >= 0) & (background <= 1)).all()):
        raise InputError(
            f"The student's checkpoint {checkpoint} is damaged: its background is {background.tolist()}, and colors lie"
            " between 0 and 1. Restore it from a copy, or train the student again."
        )
    for name, holder in (("radius", model.ray_encoding), ("focal", model)):
        value = getattr(holder, name, None)
        if isinstance(value, Tensor) and value.numel() == 1 and not float(value) > 0:
            raise InputError(
                f"The student's checkpoint {checkpoint} is damaged: its {name} is {float(value):g} and must be above 0."
                " Restore it from a copy, or train the student again."
            )


def _numbers(values: Any, name: str, shapes: set[tuple[int, ...]]) -> Float[Tensor, "..."]:
    """Return finite fp32 numbers of one of some shapes, on the CPU."""
    try:
        numbers = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is not numeric ({one_line(error)}): pass an array or a tensor.") from error
    if tuple(numbers.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in sorted(shapes))
        raise InputError(f"{name} has the shape {list(numbers.shape)}: pass {wanted}.")
    if not bool(numbers.isfinite().all()):
        raise InputError(f"{name} has non-finite numbers: pass a valid camera.")
    return numbers
