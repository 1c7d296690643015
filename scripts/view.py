"""Nerfstudio's viewer on a trained student: needs only its run's folder, not the capture or the teacher, and runs no
code from it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, cast

import torch
import tyro
from nerfstudio.configs.base_config import LoggingConfig, ViewerConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.pipelines.base_pipeline import Pipeline
from nerfstudio.utils import writer
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO, Viewer
from viser import CameraHandle

from r2l_nerfstudio.engines.switch import EngineOption
from r2l_nerfstudio.errors import InputError, command_line
from r2l_nerfstudio.process_memory import limit_caches, return_freed_memory
from r2l_nerfstudio.ranges import IntRange
from r2l_nerfstudio.run_config import resolve_run
from r2l_nerfstudio.student import Student, load_student


@dataclass
class View:
    """Show a trained student in Nerfstudio's viewer, without the capture that it was trained on."""

    run: tyro.conf.Positional[Path]
    """The student's run: its config.yml or folder."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is this machine only, 0.0.0.0 lets everyone on its networks connect."""
    port: Annotated[int, IntRange(1, 65535)] | None = None
    """Port to listen on; by default the first free one from 7007."""
    step: Annotated[int, IntRange(0)] | None = None
    """Training step of the checkpoint; by default the run's `load_step`, or the newest."""
    engine: EngineOption = "auto"
    """Engine that runs the network."""

    def main(self) -> None:
        """Load the student and show it until interrupted."""
        limit_caches()
        student = load_student(self.run, step=self.step, engine=self.engine)
        viewer = start_viewer(student, self.run, self.host, self.port)
        frames, seen = student.model.frame_time, None
        try:
            while True:
                time.sleep(1.0)
                if frames.newest is not seen:
                    seen = frames.newest
                    return_freed_memory()
        except KeyboardInterrupt:
            CONSOLE.print("Stopped.")
        finally:
            viewer.viser_server.stop()


class StudentPipeline(torch.nn.Module):
    """The part of a pipeline that Nerfstudio's viewer reads.

    Args:
        student: the student to show.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.model = student.model
        self.datamanager = SimpleNamespace(includes_time=False)


def start_viewer(student: Student, run: Path, host: str = "127.0.0.1", port: int | None = None) -> Viewer:
    """Start Nerfstudio's viewer on a student.

    Args:
        student: the student to show.
        run: its run, which the viewer's panels name in the commands they suggest.
        host: address to listen on.
        port: port to listen on; None for a free one.

    Raises:
        InputError: the host is empty or not an address of this machine.
    """
    if not host.strip():
        raise InputError('--host "" would listen on every network: give an address; 127.0.0.1 is this machine only.')
    folder = resolve_run(run).parent
    config = ViewerConfig(websocket_host=host, websocket_port=port, default_composite_depth=False)
    try:
        viewer = Viewer(
            config,
            log_filename=folder / config.relative_log_filename,
            datapath=folder,
            pipeline=cast(Pipeline, StudentPipeline(student)),
            train_lock=threading.Lock(),
        )
    except OSError as error:
        raise InputError(
            f"The viewer cannot listen on --host {host} --port {port} ({error}): choose another port, or 127.0.0.1"
            " for this machine only."
        ) from error
    logging = LoggingConfig()
    logging.local_writer.enable = False
    writer.setup_local_writer(logging, max_iter=1, banner_messages=viewer.viewer_info)
    viewer.viser_server.on_client_connect(lambda client: _place(client.camera, student))
    viewer.init_scene(train_dataset=cast(InputDataset, ()), train_state="completed")  # no photos to show
    viewer.update_scene(step=0)
    return viewer


def _place(camera: CameraHandle, student: Student) -> None:
    """Start outside a bounded object, or in the middle of any other scene."""
    encoding = student.model.ray_encoding
    center, radius = encoding.center.cpu().double(), float(encoding.radius)
    direction = torch.tensor([1.0, 0.0, 0.4], dtype=torch.float64)
    direction = direction / direction.norm()
    away = 3.0 * radius if encoding.spacing == "sphere" else 0.3 * radius
    camera.position = ((center + away * direction) * VISER_NERFSTUDIO_SCALE_RATIO).numpy()
    camera.look_at = (center * VISER_NERFSTUDIO_SCALE_RATIO).numpy()


def main() -> None:
    """Run `r2l-view`."""
    with command_line():
        tyro.cli(View, description=__doc__, prog="r2l-view").main()


if __name__ == "__main__":
    main()
