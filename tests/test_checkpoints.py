"""Checkpoints load completely and checked, or not at all, with one paragraph that names the file."""

from __future__ import annotations

import math
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import student_runs
import torch
import yaml

from r2l_nerfstudio import load_student
from r2l_nerfstudio.checkpoints import check_size, read_checkpoint
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.run_config import load_run_config
from r2l_nerfstudio.teacher import Teacher


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return student_runs.write_run(tmp_path_factory.mktemp("students") / "run", student_runs.tiny_r2l()).parent


@pytest.fixture
def run(student: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(student, tmp_path / "run"))


def checkpoint_of(run: Path) -> Path:
    (file,) = (run / "nerfstudio_models").glob("*.ckpt")
    return file


def error_of(run: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_student(run, engine="torch")
    said = str(caught.value)
    assert "\n" not in said and str(run) in said
    return said


def replaced(key: str, change: Callable[[torch.Tensor], Any]) -> Callable[[dict], Any]:
    def edit(content: dict) -> dict:
        content["pipeline"][key] = change(content["pipeline"][key])
        return content

    return edit


HEAD, BACKGROUND = "_model.network.head.weight", "_model.background"


def poisoned(weight: torch.Tensor, value: float) -> torch.Tensor:
    weight = weight.clone()
    weight.flatten()[3] = value
    return weight


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda c: torch.zeros(3), "holds a Tensor without a pipeline"),
        (lambda c: [c], "holds a list without a pipeline"),
        (lambda c: {**c, "pipeline": list(c["pipeline"].items())}, "without a pipeline"),
        (lambda c: {**c, "pipeline": {}}, "holds no model"),
        (lambda c: {**c, "pipeline": {5: torch.zeros(1)}}, "a weight is named 5"),
        (lambda c: {**c, "step": math.inf}, "its step is inf"),
        (lambda c: {**c, "step": -1}, "its step is -1"),
        (lambda c: {**c, "step": 10**30}, "its step is 1000"),
        (lambda c: {**c, "step": True}, "its step is True"),
        (lambda c: {**c, "step": None}, "its step is None"),
        (lambda c: {**c, "step": "many"}, "its step is 'many'"),
        (replaced(HEAD, lambda w: (100 * w).int()), "torch.int32, and torch.float32 is expected"),
        (replaced(HEAD, lambda w: w.bool()), "torch.bool, and torch.float32 is expected"),
        (replaced(HEAD, lambda w: torch.complex(w, w)), "not an ordinary tensor but torch.complex64"),
        (replaced(HEAD, lambda w: w.to_sparse()), "not an ordinary tensor"),
        (replaced(HEAD, lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)), "not an ordinary tensor"),
        (replaced(HEAD, lambda w: w[:1, :1].expand(10**6, 10**6)), "larger than its part of the file"),
        (replaced(HEAD, lambda w: poisoned(w, math.nan)), "are not finite"),
        (replaced(HEAD, lambda w: poisoned(w, math.inf)), "are not finite"),
        (replaced(HEAD, lambda w: w[:3]), "does not fit"),
        (replaced(HEAD, lambda w: "weights"), "head.weight is a str"),
        (replaced(BACKGROUND, lambda b: b * math.nan), "are not finite"),
        (replaced(BACKGROUND, lambda b: b * 1e30), "its background is"),
        (replaced(BACKGROUND, lambda b: -b), "its background is"),
        (replaced("_model._extra_state", lambda s: {"has_accumulation": "yes", "has_depth": True}), "_extra_state"),
        (replaced("_model._extra_state", lambda s: [1]), "_extra_state"),
        (replaced("_model.ray_encoding.radius", lambda r: -r), "radius is"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_invalid_contents(edit: Callable[[dict], Any], said: str, run: Path) -> None:
    file = checkpoint_of(run)
    torch.save(edit(torch.load(file, weights_only=True)), file)
    assert said in error_of(run)


def test_garbled_numbers(run: Path) -> None:
    file = checkpoint_of(run)
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        data = archive.read(largest)
    content = file.read_bytes()
    place = content.index(data) + len(data) // 2
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    load = torch.load(file, weights_only=True, mmap=True)  # torch itself does not notice
    assert load["step"] == student_runs.STEP
    assert "checksum" in error_of(run)


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def compressed(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    "damage",
    [pipe, device, folder, loop, compressed, lambda f: f.write_bytes(b""), lambda f: f.write_bytes(b"PK" * 500)],
)
@pytest.mark.timeout(20)
def test_files_that_are_not_checkpoints(damage: Callable[[Path], Any], run: Path) -> None:
    damage(checkpoint_of(run))
    said = error_of(run)
    assert "ns-train wrote" in said or "not a checkpoint of ns-train" in said


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("width", -1, "pipeline.model.width must be between 1"),
        ("width", 10**9, "pipeline.model.width must be between 1"),
        ("volume_resolution", 100_000, "pipeline.model.volume_resolution must be between 0 and 1024"),
        ("num_points", 0, "pipeline.model.num_points must be between 1"),
        ("eval_num_rays_per_chunk", 0, "pipeline.model.eval_num_rays_per_chunk must be at least 1"),
        ("eval_num_rays_per_chunk", -5, "pipeline.model.eval_num_rays_per_chunk must be at least 1"),
        ("depth", 1.5, "pipeline.model.depth is 1.5, and int is expected"),
        ("spacing", "cubic", "'disparity'"),
        ("engine", "steam", "'openvino'"),
        # In range each, and together more than the checkpoint can hold.
        ("volume_resolution", 1000, "a number in the file is wrong"),
    ],
)
def test_invalid_configurations(field: str, value: Any, said: str, run: Path) -> None:
    config = load_run_config(run)
    setattr(config.pipeline.model, field, value)
    (run / "config.yml").write_text(yaml.dump(config))
    assert said in error_of(run)


def test_a_model_larger_than_the_machine(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config.yml describes takes 4000000.0 GB, and .* GB are free here"):
        check_size(lambda: torch.nn.Linear(10**9, 10**6, bias=False), tmp_path / "config.yml")
    check_size(lambda: torch.nn.Linear(10, 10), tmp_path / "config.yml")


def test_a_complete_checkpoint(student: Path) -> None:
    found = read_checkpoint(checkpoint_of(student), "student")
    assert found.step == student_runs.STEP and HEAD.removeprefix("_model.") in found.model_weights()


@pytest.mark.parametrize("share", ["all", "some"])
def test_a_teacher_that_has_diverged(share: str, tiny_teacher: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    file = checkpoint_of(run)
    content = torch.load(file, weights_only=False)
    for value in content["pipeline"].values():
        if value.is_floating_point() and value.numel() > 1:
            value.fill_(math.nan) if share == "all" else value.flatten()[:1].fill_(math.nan)
    torch.save(content, file)
    if share == "all":
        with pytest.raises(InputError, match=f"{file} cannot be used: .* are not finite"):
            Teacher.load(run)
    else:  # some methods draw well with a few such numbers
        assert Teacher.load(run).step == 29


def test_a_pinned_checkpoint(run: Path) -> None:
    file = checkpoint_of(run)
    content = torch.load(file, weights_only=True)
    content["pipeline"][BACKGROUND] = torch.tensor([0.0, 0.5, 0.0])
    content["step"] = 3
    torch.save(content, file.with_name("step-000000003.ckpt"))
    text = (run / "config.yml").read_text()
    assert float(load_student(run, engine="torch").model.background[1]) == pytest.approx(0.9)
    (run / "config.yml").write_text(text.replace("load_step: null", "load_step: 3"))
    assert float(load_student(run, engine="torch").model.background[1]) == 0.5
    assert float(load_student(run, engine="torch", step=7).model.background[1]) == pytest.approx(0.9)
