"""Invalid checkpoints of composited students are refused before a grid is allocated or a kernel reads beyond it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import student_runs
import torch

from r2l_nerfstudio.checkpoints import weight_bytes
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.student import load_student
from r2l_nerfstudio.students.cpu_kernels import to_cell

ENCODING = "_model.composited."


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return student_runs.write_run(tmp_path / "run", student_runs.tiny_composited_r2l()).parent


def edited(run: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    (file,) = (run / "nerfstudio_models").glob("*.ckpt")
    content = torch.load(file, weights_only=True)
    edit(content["pipeline"])
    torch.save(content, file)
    return run


def with_state(module: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    def edit(pipeline: dict[str, Any]) -> None:
        pipeline[f"{ENCODING}{module}_extra_state"] |= fields

    return edit


def with_fewer_rows(pipeline: dict[str, Any]) -> None:
    pipeline[f"{ENCODING}volume.rows"] = pipeline[f"{ENCODING}volume.rows"][:3].clone()


def with_a_flat_box(pipeline: dict[str, Any]) -> None:
    pipeline[f"{ENCODING}occupancy.scene.extent"][1] = 0.0


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (with_state("", volume_cells=[10**6] * 3), "no grid can have"),
        (with_state("", volume_cells=[10**30, 1, 1]), "no grid can have"),
        (with_state("", volume_cells=[0, 4, 4]), "no grid can have"),
        (with_state("", volume_cells=[-4, -4, 4]), "no grid can have"),
        (with_state("", volume_cells=[4, 4]), "no resolution of a grid"),
        (with_state("", volume_cells="444"), "no resolution of a grid|does not fit"),
        (with_state("", volume_cells=[4.0, 4, 4]), "no resolution of a grid"),
        (with_state("", volume_cells=None), "no resolution of a grid|does not fit"),
        (with_state("occupancy.", shape=[10**6] * 3), "no grid can have"),
        (with_state("occupancy.", shape=[64, 64, 64]), "not stored in as many bits"),
        (with_state("occupancy.", bits=torch.zeros(3, dtype=torch.uint8)), "not stored in as many bits"),
        (with_state("occupancy.", bits=torch.zeros(64)), "not stored in as many bits"),
        (with_state("occupancy.", bits=[1, 2]), "not stored in as many bits|does not fit"),
        (with_state("occupancy.scene.", warp="knot"), "warped by 'knot'"),
        (with_fewer_rows, "it holds 2 features for"),
        (with_a_flat_box, "box has sides of"),
    ],
)
def test_invalid_grids(edit: Callable[[dict[str, Any]], None], said: str, run: Path) -> None:
    with pytest.raises(InputError, match=said) as caught:
        load_student(edited(run, edit), engine="torch")
    assert "step-000000007.ckpt" in str(caught.value) and "\n" not in str(caught.value)


def test_non_finite_points_have_a_cell() -> None:
    values = [np.nan, np.inf, -np.inf, -5.0, 3.7, 100.0, 1e30]
    assert all(0 <= int(to_cell(np.float32(value), np.uint32(7))) <= 7 for value in values)
    assert int(to_cell(np.float32(3.7), np.uint32(7))) == 3


@pytest.mark.parametrize(
    "make", [student_runs.tiny_composited_r2l, student_runs.tiny_composited_mobile_r2l, student_runs.tiny_r2l]
)
def test_the_size_of_every_student_is_known_before_it_is_built(make: Callable[..., Any]) -> None:
    config = make()
    needed = weight_bytes(lambda: config.setup(scene_box=None, num_train_data=1, metadata={}))
    model = config.setup(scene_box=None, num_train_data=1, metadata={})
    built = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    assert needed == built
