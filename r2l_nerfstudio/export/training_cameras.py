"""The training views of a student's run, for exports that need its cameras or photos."""

from __future__ import annotations

from pathlib import Path

from nerfstudio.data.datasets.base_dataset import InputDataset

from r2l_nerfstudio.capture import CaptureError, parse_capture
from r2l_nerfstudio.dataparsers import dataparser_at
from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras, capture_cameras
from r2l_nerfstudio.errors import InputError, one_line
from r2l_nerfstudio.run_config import capture_path, load_run_config, resolve_run


def training_views(run: Path, data: Path | None = None) -> tuple[InputDataset, float]:
    """Return the training views of a student's run, in its frame, and the share of them that training held out.

    Args:
        run: the run's config.yml or folder.
        data: the capture's location, if it has moved since training.

    Raises:
        InputError: the capture is missing or cannot be read.
    """
    config_path = resolve_run(run)
    config = load_run_config(config_path)
    datamanager = config.pipeline.datamanager
    place = capture_path(config, config_path) if data is None else Path(data)
    try:
        outputs = parse_capture(dataparser_at(config, place))
    except CaptureError as error:
        raise InputError(
            f"The capture {place} of the student {config_path} cannot be read ({one_line(error)}), and"
            " its training cameras are needed: give its location with --data."
        ) from error
    dataset = InputDataset(outputs, getattr(datamanager, "camera_res_scale_factor", 1.0))
    return dataset, getattr(datamanager, "held_out_fraction", 0.0)


def training_cameras(run: Path, data: Path | None = None) -> CaptureCameras:
    """Return the training cameras of a student's run, in its frame; arguments and errors as `training_views`."""
    return capture_cameras(training_views(run, data)[0].cameras)
