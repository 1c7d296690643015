"""A student inside programs that configure PyTorch differently."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import student_runs
import torch

from r2l_nerfstudio import load_student
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.student import Student

POSE = np.concatenate([np.eye(3), [[0.0], [0.0], [2.0]]], axis=1)


@pytest.fixture(scope="module", params=["r2l", "mobile"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = student_runs.tiny_r2l() if request.param == "r2l" else student_runs.tiny_mobile_r2l()
    return student_runs.write_run(tmp_path_factory.mktemp("students") / "run", config).parent


def picture(student: Student) -> np.ndarray:
    drawn = student.render(POSE, [30.0, 30.0, 16.0, 12.0], 32, 24)
    assert isinstance(drawn, np.ndarray)
    return drawn


@pytest.fixture(scope="module")
def truth(run: Path) -> np.ndarray:
    return picture(load_student(run, engine="torch"))


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_in_inference_mode_and_out_of_it_again(engine: str, run: Path, truth: np.ndarray) -> None:
    with torch.inference_mode():
        student = load_student(run, engine=engine)
        np.testing.assert_allclose(picture(student), truth, atol=1e-4)
        assert torch.is_inference_mode_enabled()
    np.testing.assert_allclose(picture(student), truth, atol=1e-4)
    with torch.inference_mode():
        np.testing.assert_allclose(picture(load_student(run, engine=engine)), truth, atol=1e-4)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_with_fp64_as_default(engine: str, run: Path, truth: np.ndarray) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        found = picture(load_student(run, engine=engine))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, truth, atol=1e-4)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda student: pickle.loads(pickle.dumps(student))])
def test_copies(make, run: Path, truth: np.ndarray) -> None:
    student = load_student(run, engine="torch")
    student.model.background.fill_(0.25)
    again = make(student)
    assert again.model is not student.model
    np.testing.assert_array_equal(picture(again), picture(student))
    assert float(again.model.background[0]) == 0.25


def test_a_copy_of_a_student_without_a_run(run: Path) -> None:
    with pytest.raises(TypeError, match="load it in each process"):
        copy.deepcopy(Student(load_student(run, engine="torch").model, "r2l"))


def _draw(student: Student, queue) -> None:
    try:
        queue.put(picture(student))
    except InputError as error:
        queue.put(str(error))


@pytest.mark.parametrize("way", ["fork", "spawn"])
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_in_another_process(way: str, run: Path, truth: np.ndarray) -> None:
    student = load_student(run, engine="torch")
    picture(student)
    context = multiprocessing.get_context(way)
    queue = context.Queue()
    child = context.Process(target=_draw, args=(student, queue))
    child.start()
    found = queue.get(timeout=250)
    child.join(10)
    if way == "spawn":
        np.testing.assert_allclose(found, truth, atol=1e-4)
    else:
        assert "load_student in the child" in found
