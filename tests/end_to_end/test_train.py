"""Training end to end: killed, resumed, short of memory, with a teacher that sometimes fails."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
import yaml
from distil import distil, own_writers, set_up, student_config
from forked_command import start_command
from nerfstudio.utils.eval_utils import eval_setup
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r2l_nerfstudio.distillation import ray_datamanager
from r2l_nerfstudio.distillation.trainer import DistillationTrainer
from r2l_nerfstudio.run_config import load_run_config
from r2l_nerfstudio.student import load_student
from r2l_nerfstudio.teacher import Teacher


def read(checkpoint: Path) -> dict[str, Any]:
    """As anyone may: without running what a pickle names."""
    return torch.load(checkpoint, weights_only=True)


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ckpt"))


@pytest.fixture
def iterations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Step and loss of every iteration that any trainer makes."""
    made: list[tuple[int, float]] = []
    original = DistillationTrainer.train_iteration

    def recorded(self: DistillationTrainer, step: int):
        result = original(self, step)
        made.append((step, float(result[0])))
        return result

    monkeypatch.setattr(DistillationTrainer, "train_iteration", recorded)
    return made


# Killed, and gone on from.


@pytest.fixture(scope="module")
def killed(
    train_student: Callable[..., list[str]], environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """The arguments and the folder of an `ns-train` run that got a SIGKILL while it saved after every iteration."""
    output = tmp_path_factory.mktemp("killed")
    command = train_student(output, "--steps-per-save", 1, "--max-num-iterations", 5000)  # ends by itself in any case
    log, folder = output / "log.txt", output / "tiny" / "r2l-lite" / "run"
    process = start_command(command, environment, output, log)
    try:
        deadline = time.monotonic() + 600
        while not (folder / "nerfstudio_models" / "step-000000012.ckpt").exists():
            if not process.is_alive() or time.monotonic() > deadline:
                pytest.fail(f"no checkpoint was saved:\n{log.read_text()[-4000:]}")
            if any(int(file.stem[5:]) > 12 for file in checkpoints(folder / "nerfstudio_models")):
                break
            time.sleep(0.02)
    finally:
        process.kill()
        process.join()
    return command[1:], folder


def test_a_killed_run_leaves_a_complete_checkpoint(killed: tuple[list[str], Path]) -> None:
    _, folder = killed
    files = list((folder / "nerfstudio_models").iterdir())
    assert files and all(file.suffix == ".ckpt" for file in files)  # Nerfstudio stumbles over anything else
    for file in files:  # two, if the kill came before the older one was deleted
        assert read(file)["step"] == int(file.stem[5:])
    assert int(max(files).stem[5:]) >= 12
    # What the kill left half-written lies elsewhere, and hinders nobody.
    partial = folder / "nerfstudio_models.partial"
    partial.mkdir(exist_ok=True)
    (partial / "step-000099999.ckpt").write_bytes(b"PK half a file")
    _, pipeline, checkpoint, step = eval_setup(folder / "config.yml")
    assert checkpoint == max(files) and step == int(max(files).stem[5:])
    weights = read(max(files))["pipeline"]
    assert torch.equal(pipeline.model.network.head.weight, weights["_model.network.head.weight"])


def test_a_killed_run_resumes(
    killed: tuple[list[str], Path],
    iterations: list[tuple[int, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion
    from nerfstudio.scripts.train import main

    arguments, folder = killed
    newest = max(checkpoints(folder / "nerfstudio_models"))
    saved = read(newest)
    total = saved["step"] + 13
    flags = {
        "--load-dir": newest.parent,
        "--output-dir": tmp_path,
        "--max-num-iterations": total,
        "--steps-per-save": 5,
        "--pipeline.datamanager.photo-iterations": 6,
        "--logging.local-writer.enable": False,
    }
    config = tyro.cli(
        AnnotatedBaseConfigUnion, args=[*arguments, *(str(part) for pair in flags.items() for part in pair)]
    )
    begun: dict[str, Any] = {}
    real: list[int] = []
    train = DistillationTrainer.train

    def watched_train(trainer: DistillationTrainer) -> None:
        begun["model"] = {key: value.clone() for key, value in trainer.pipeline.model.named_parameters()}
        begun["buffers"] = {key: value.clone() for key, value in trainer.pipeline.model.named_buffers()}
        begun["spacing"] = trainer.pipeline.model.ray_encoding.spacing
        begun["rates"] = [scheduler.last_epoch for scheduler in trainer.optimizers.schedulers.values()]
        begun["momenta"] = {
            name: copy.deepcopy(optimizer.state_dict()) for name, optimizer in trainer.optimizers.optimizers.items()
        }
        datamanager = trainer.pipeline.datamanager
        draw = datamanager.draw

        def counted(num_photo_pixels: int):
            if num_photo_pixels:
                real.append(trainer.step)
            return draw(num_photo_pixels)

        datamanager.draw = counted
        train(trainer)

    monkeypatch.setattr(DistillationTrainer, "train", watched_train)
    with own_writers():
        main(config)

    # It began with all that the killed run had saved: weights, scene, momenta and learning rates.
    kept = {**begun["model"], **begun["buffers"]}
    kept = {
        key: value for key, value in kept.items() if f"_model.{key}" in saved["pipeline"]
    }  # some follow from others
    assert kept.keys() >= begun["model"].keys()
    for key, value in kept.items():
        assert torch.equal(value, saved["pipeline"][f"_model.{key}"])
    assert begun["spacing"] == saved["pipeline"]["_model.ray_encoding._extra_state"]["spacing"]
    assert set(begun["rates"]) == {saved["step"] + 1}
    for group, state in begun["momenta"].items():
        assert state["state"].keys() == saved["optimizers"][group]["state"].keys() != set()
        for index, values in state["state"].items():
            for key, value in values.items():
                assert torch.equal(
                    torch.as_tensor(value), torch.as_tensor(saved["optimizers"][group]["state"][index][key])
                )
    # It continued with the next step, up to the requested total.
    assert [step for step, _ in iterations] == list(range(saved["step"] + 1, total))
    assert real == list(range(total - 6, total))
    resumed = load_run_config(tmp_path / "tiny" / "r2l-lite" / "run")
    assert resumed.max_num_iterations == total
    (last,) = checkpoints(tmp_path / "tiny" / "r2l-lite" / "run" / "nerfstudio_models")
    assert read(last)["step"] == total - 1
    assert read(last)["schedulers"]["ends"]["last_epoch"] == total
    assert newest.exists()


def test_resuming_a_finished_run_trains_nothing(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path, iterations: list[tuple[int, float]]
) -> None:
    shape = {"pipeline.model.width": 32, "pipeline.model.depth": 6, "max_num_iterations": 30}
    run = distil(student_config(tiny_teacher, tmp_path, load_dir=tiny_student / "nerfstudio_models", **shape))
    assert iterations == []
    before, after = (read(*checkpoints(folder / "nerfstudio_models"))["pipeline"] for folder in (tiny_student, run))
    assert torch.equal(before["_model.network.tail.weight"], after["_model.network.tail.weight"])
    assert checkpoints(run / "nerfstudio_models")[0].name == "step-000000029.ckpt"


def test_a_checkpoint_is_complete_or_absent(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with set_up(student_config(tiny_teacher, tmp_path)) as trainer:
        folder = trainer.checkpoint_dir
        trainer.save_checkpoint(3)
        (good,) = checkpoints(folder)
        content = good.read_bytes()

        def no_space(state: object, file: Path) -> None:
            Path(file).write_bytes(content[: len(content) // 2])
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as context:
            context.setattr(torch, "save", no_space)
            capsys.readouterr()
            trainer.save_checkpoint(4)  # training goes on
        said = " ".join(capsys.readouterr().out.split())
        assert (
            "could not be written" in said
            and "No space left on device" in said
            and "the next checkpoint is tried" in said
        )
        assert list(folder.iterdir()) == [good] and good.read_bytes() == content
        assert trainer.checkpoint_dir == folder
        trainer.save_checkpoint(5)
        assert [file.name for file in folder.iterdir()] == ["step-000000005.ckpt"]
        assert not folder.with_name("nerfstudio_models.partial").exists()
        trainer.config.save_only_latest_checkpoint = False
        trainer.save_checkpoint(6)
        assert [read(file)["step"] for file in checkpoints(folder)] == [5, 6]


# What a run leaves.


def test_configuration_is_saved_resolved(tiny_student: Path, tiny_teacher: Path, tiny_capture: Path) -> None:
    config = load_run_config(tiny_student)  # refuses pickled tensors and the like
    assert config.teacher == config.pipeline.teacher == tiny_teacher / "config.yml" and config.teacher.is_absolute()
    data = config.pipeline.datamanager
    assert data.data == data.dataparser.data == tiny_capture and data.data.is_absolute()
    assert data.pose_sampler.kind in ("neighbour", "sphere", "box")
    theirs = load_run_config(tiny_teacher).pipeline.datamanager
    ours = {**vars(data.dataparser), "data": theirs.dataparser.data}
    assert type(data.dataparser) is type(theirs.dataparser) and ours == vars(theirs.dataparser)
    assert config.max_num_iterations == 30
    assert {group["scheduler"].max_steps for group in config.optimizers.values()} == {30}


def test_checkpoint_is_small_and_safe(tiny_student: Path) -> None:
    (file,) = checkpoints(tiny_student / "nerfstudio_models")
    content = read(file)
    assert content["step"] == 29
    others = {key for key in content["pipeline"] if not key.startswith("_model.")}
    assert others == {"done"}  # neither teacher nor photos
    weights = sum(value.nbytes for value in content["pipeline"].values() if isinstance(value, torch.Tensor))
    assert file.stat().st_size < 4 * weights + 100_000


def test_the_student_inherits_the_teachers_resolution(tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    config = load_run_config(teacher)
    config.pipeline.datamanager.camera_res_scale_factor = 0.5
    (teacher / "config.yml").write_text(yaml.dump(config))
    with set_up(student_config(teacher, tmp_path / "students")) as trainer:
        data = trainer.pipeline.datamanager
        assert (data.ring.height, data.ring.width) == (12, 12)
        assert len(data.photos.pixels) == 5 * 12 * 12  # one of six is held out
        assert data.eval_dataset[0]["image"].shape == (12, 12, 3)


def test_a_capture_that_has_moved(tiny_teacher: Path, tiny_capture: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tiny_capture, tmp_path / "moved"))
    with set_up(student_config(tiny_teacher, tmp_path / "students", data=moved)) as trainer:
        assert trainer.pipeline.datamanager.train_dataset.image_filenames[0].is_relative_to(moved)
    saved = load_run_config(tmp_path / "students" / "tiny" / "r2l-lite" / "run")
    assert saved.pipeline.datamanager.data == moved


# Kinds of ray encoding and spacings.


@pytest.mark.parametrize(
    ("method", "kind", "spacing", "sampler"),
    [
        ("r2l-lite", "plucker", "auto", "box"),
        ("r2l-lite", "two-plane", "near-far", "neighbour"),
        ("r2l", "points", "sphere", "sphere"),
    ],
)
def test_every_ray_encoding_learns_and_is_restored(
    method: str, kind: str, spacing: str, sampler: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    config = student_config(
        tiny_teacher,
        tmp_path,
        method,
        **{
            "max_num_iterations": 60,
            "pipeline.model.ray_encoding": kind,
            "pipeline.model.spacing": spacing,
            "pipeline.datamanager.pose_sampler.kind": sampler,
            "pipeline.datamanager.photo_iterations": 0,
        },
    )
    for group in config.optimizers.values():
        group["optimizer"].lr = 0.004
        group["scheduler"].warmup_steps = 0
    with set_up(config) as trainer:
        pipeline = trainer.pipeline
        assert pipeline.datamanager.photos is None
        # So short a training teaches little but the mean color: begin far from it.
        pipeline.model.network.tail.bias.data[:3] = 2.0
        before = pipeline.held_out_psnr(pipeline.datamanager.held_views)
        trainer.train()
        assert pipeline.held_out_psnr(pipeline.datamanager.held_views) > before + 2
    _, restored, _, _ = eval_setup(config.get_base_dir() / "config.yml")
    theirs, ours = pipeline.model.ray_encoding, restored.model.ray_encoding
    assert ours.kind == kind and ours.spacing == theirs.spacing
    assert spacing == "auto" or ours.spacing == spacing
    for name in ("center", "radius", "near", "far", "axes"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert 0 < ours.near < ours.far
    camera = restored.datamanager.train_dataset.cameras[0]
    expected = pipeline.model.eval().get_outputs_for_camera(camera)
    for key, value in restored.model.get_outputs_for_camera(camera).items():
        assert torch.equal(value, expected[key])


# Trouble while training.


def test_non_finite_colors_are_dropped(
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    iterations: list[tuple[int, float]],
    capsys: pytest.CaptureFixture,
) -> None:
    original = Teacher._outputs

    def broken(self: Teacher, outputs: dict, shape: tuple[int, ...]) -> Any:
        answer = original(self, outputs, shape)
        answer.rgb = answer.rgb.clone()
        answer.rgb[..., ::5, :] = float("nan")
        answer.rgb[..., 3, 0] = float("inf")
        answer.depth[..., 1::5, :] = float("nan")
        return answer

    monkeypatch.setattr(Teacher, "_outputs", broken)
    run = distil(student_config(tiny_teacher, tmp_path))
    said = " ".join(capsys.readouterr().out.split())
    assert "non-finite colors" in said and "dropped" in said
    assert len(iterations) == 12 and all(torch.tensor(loss).isfinite() for _, loss in iterations)
    for value in read(*checkpoints(run / "nerfstudio_models"))["pipeline"].values():
        assert not isinstance(value, torch.Tensor) or value.isfinite().all()


def test_no_room_for_a_batch(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with set_up(student_config(tiny_teacher, tmp_path, steps_per_save=2)) as trainer:
        original = trainer.pipeline.get_train_loss_dict

        def full(step: int):
            if step == 5:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(step=step)

        trainer.pipeline.get_train_loss_dict = full
        with pytest.raises(SystemExit) as caught:
            trainer.train()
        assert caught.value.code == 1
    *_, last = capsys.readouterr().out.rstrip().splitlines()
    assert last.startswith("Error: ") and "--load-dir" in last
    assert "--pipeline.datamanager.train-num-rays-per-batch (now 256)" in last
    (kept,) = checkpoints(trainer.checkpoint_dir)
    assert read(kept)["step"] == 4


# Overfitting.


def test_the_best_weights_on_held_out_photos_are_restored(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_datamanager, "HELD_OUT_RAYS", 512)
    config = student_config(
        tiny_teacher,
        tmp_path,
        **{
            "max_num_iterations": 30,
            "pipeline.datamanager.photo_iterations": 20,
            "pipeline.datamanager.photo_fraction": 0.9,
            "pipeline.datamanager.held_out_fraction": 0.3,
            "pipeline.steps_per_eval_held_out": 2,
        },
    )
    for group in config.optimizers.values():
        group["optimizer"].lr = 0.02
        group["scheduler"].warmup_steps = 0
        group["scheduler"].final_share = 1.0
    with set_up(config) as trainer:
        pipeline = trainer.pipeline
        photos = pipeline.datamanager.held_out_photos
        # What is learned from the others does not carry over to the held-out ones.
        pipeline.datamanager.photos.pixels = 255 - pipeline.datamanager.photos.pixels
        seen: dict[int, float] = {}
        watch = pipeline.held_out_psnr

        def recorded(sample) -> float:
            psnr = watch(sample)
            if sample is photos:
                seen[trainer.step] = psnr
            return psnr

        pipeline.held_out_psnr = recorded
        trainer.train()
        last = watch(photos)
    assert list(seen) == [*range(2, 30, 2), 29]  # and once more at the end
    with_photos = [psnr for step, psnr in seen.items() if step >= 10]
    assert with_photos[-1] < max(with_photos) - 0.1  # it had got worse
    assert last == pytest.approx(max(with_photos), abs=1e-4)
    _, restored, _, _ = eval_setup(config.get_base_dir() / "config.yml")
    for (name, ours), (_, theirs) in zip(
        restored.model.named_parameters(), pipeline.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_final_weights_that_are_best_are_kept(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with set_up(student_config(tiny_teacher, tmp_path)) as trainer:
        pipeline = trainer.pipeline
        pipeline._evaluate_held_out(5)  # before the photos: not a choice
        assert pipeline._best is None
        pipeline.finish(5)
        pipeline.datamanager.in_photo_stage = True
        pipeline._evaluate_held_out(10)
        weights = {key: value.clone() for key, value in pipeline.model.named_parameters()}
        pipeline.finish(11)
        assert "restored the best weights" not in capsys.readouterr().out
        with torch.no_grad():
            pipeline.model.network.tail.bias[:3] += 5.0
        pipeline._evaluate_held_out(12)
        pipeline.finish(12)
        assert "restored the best weights" in capsys.readouterr().out
        for key, value in pipeline.model.named_parameters():
            assert torch.equal(value, weights[key])


@pytest.mark.parametrize(("ray_encoding", "stages"), [("composited", "rrrrrcccpp"), ("points", "ccccccccpp")])
def test_single_rays_come_first_then_crops_then_photos(
    ray_encoding: str, stages: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    overrides = {
        "max_num_iterations": 10,
        "pipeline.datamanager.single_ray_share": 0.5,
        "pipeline.datamanager.photo_iterations": 2,
        "pipeline.model.ray_encoding": ray_encoding,
    }
    found = []
    with set_up(student_config(tiny_teacher, tmp_path, "mobile-r2l-lite", **overrides)) as trainer:
        datamanager = trainer.pipeline.datamanager
        draw = datamanager.draw

        def recorded(num_photo_pixels: int):
            batch = draw(num_photo_pixels)
            is_crop = batch.ray_bundle.origins.ndim == 4
            found.append("p" if num_photo_pixels else "c" if is_crop else "r")
            if not is_crop:
                assert batch.ray_bundle.origins.shape == (datamanager.get_train_rays_per_batch(), 3)
                assert float((batch.target.geometry_weight == 0).float().mean()) == 0.5  # photos
            return batch

        def has_silent_cells() -> bool:
            network = trainer.pipeline.model.network
            return bool(network.joined) and not network.join.weight[:, : -network.joined].any()

        assert has_silent_cells() == (ray_encoding == "composited")
        # Zoomed views are for single rays: nobody else would learn from them.
        assert (datamanager.ring.crop_views is not None) == (ray_encoding == "composited")
        datamanager.draw = recorded
        trainer.train()
        assert not has_silent_cells()
        trainer.pipeline.restart(trainer.config.pipeline)
        assert has_silent_cells() == (ray_encoding == "composited")
    trained = "".join(found)[: len(stages)]
    assert trained == stages
    assert set("".join(found)[len(stages) :]) <= {"c"}  # normalization statistics at the end: never of single rays


def test_without_held_out_photos_none_are_measured(tiny_teacher: Path, tmp_path: Path) -> None:
    overrides = {"pipeline.datamanager.held_out_fraction": 0.0, "pipeline.steps_per_eval_held_out": 2}
    with set_up(student_config(tiny_teacher, tmp_path, **overrides)) as trainer:
        assert trainer.pipeline.datamanager.held_out_photos is None
        assert len(trainer.pipeline.datamanager.photos.pixels) == 6 * 24 * 24
        trainer.train()
    assert trainer.pipeline._best is None


def test_the_average_of_the_weights_survives_a_kill_and_is_what_training_leaves(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    overrides = {"steps_per_save": 5, "save_only_latest_checkpoint": False, "pipeline.steps_per_eval_held_out": 4}
    config = student_config(tiny_teacher, tmp_path / "whole", "mobile-r2l-lite", **overrides)
    with set_up(config) as trainer:
        trainer.train()
        assert trainer.pipeline.average is None
        left = {key: value.clone() for key, value in trainer.pipeline.model.state_dict().items() if "network" in key}
    *_, middle, last = checkpoints(config.get_base_dir() / "nerfstudio_models")
    assert not [key for key in read(last)["pipeline"] if key.startswith("average.")]
    for key, value in left.items():
        assert torch.equal(read(last)["pipeline"][f"_model.{key}"], value)
    saved = read(middle)["pipeline"]
    assert int(saved["average.updates"]) == 11

    # A checkpoint from the middle can be gone on from, and what one sees of it is its average.
    last.unlink()
    resumed = student_config(
        tiny_teacher, tmp_path / "resumed", "mobile-r2l-lite", load_dir=config.get_base_dir() / "nerfstudio_models"
    )
    with set_up(resumed) as trainer:
        for key, value in trainer.pipeline.average.state_dict().items():
            assert torch.equal(value, saved[f"average.{key}"])
        assert not torch.equal(
            trainer.pipeline.model.network.head.weight, trainer.pipeline.average.get_buffer("weight_0")
        )
        trainer.pipeline.average.swap()
        averaged = trainer.pipeline.model.state_dict()
    _, restored, _, _ = eval_setup(config.get_base_dir() / "config.yml")
    for key, value in restored.model.state_dict().items():
        if isinstance(value, torch.Tensor) and not key.endswith("num_batches_tracked"):
            assert torch.equal(value, averaged[key]), key
    student = load_student(config.get_base_dir(), device="cpu", engine="torch")
    for (name, ours), theirs in zip(student.model.named_parameters(), restored.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_resumed_run_continues_with_the_pruned_occupancy(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r2l_nerfstudio.distillation.pipeline.STEPS_PER_GROWTH", 2)
    overrides = {"max_num_iterations": 20, "steps_per_save": 6, "save_only_latest_checkpoint": False}
    config = student_config(tiny_teacher, tmp_path / "whole", **overrides)
    with set_up(config) as trainer:
        encoding = trainer.pipeline.model.composited
        before = encoding.occupancy.share()
        trainer.train()
        assert encoding.prunings == 2
        assert encoding.occupancy.share() < before
        assert len(encoding.volume.rows) == encoding.volume.num_grid_points + 1
    saved = config.get_base_dir() / "nerfstudio_models"
    resumed = student_config(tiny_teacher, tmp_path / "resumed", load_dir=saved, load_step=6, **overrides)
    with set_up(resumed) as trainer:
        encoding = trainer.pipeline.model.composited
        assert encoding.prunings == 1
        rows = encoding.volume.rows
        (state,) = (o.state[rows] for o in trainer.optimizers.optimizers.values() if rows in o.state)
        assert state["exp_avg"].shape == rows.shape
        trainer.train()
        assert encoding.prunings == 2
    student = load_student(resumed.get_base_dir(), device="cpu", engine="torch")
    assert torch.equal(student.model.composited.volume.index, encoding.volume.index)


def test_measuring_the_average_does_not_change_training(tiny_teacher: Path, tmp_path: Path) -> None:
    with set_up(student_config(tiny_teacher, tmp_path, "mobile-r2l-lite")) as trainer:
        pipeline = trainer.pipeline
        for step in range(3):
            pipeline.model.network.tail.bias.data.add_(0.5)
            pipeline.update_average(step)
        before = {k: v.clone() for k, v in pipeline.state_dict().items() if isinstance(v, torch.Tensor)}
        with pipeline.averaged():
            assert not torch.equal(pipeline.model.network.tail.bias, before["_model.network.tail.bias"])
            statistics = "network.blocks.0.first_norm.running_var"
            assert not torch.equal(pipeline.model.state_dict()[statistics], before[f"_model.{statistics}"])
        for key, value in pipeline.state_dict().items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, before[key]), key


# A budget in minutes, and a user who stops early.


@pytest.mark.parametrize("method", ["r2l-lite", "mobile-r2l-lite"])
def test_max_minutes_is_respected(method: str, tiny_teacher: Path, tmp_path: Path, iterations: list, capsys) -> None:
    overrides = {"max_minutes": 0.15, "max_num_iterations": 40, "pipeline.datamanager.photo_iterations": 10}
    with set_up(student_config(tiny_teacher, tmp_path, method, **overrides)) as trainer:
        real: list[float] = []
        draw = trainer.pipeline.datamanager.draw

        def watched(num_photo_pixels: int):
            if num_photo_pixels:
                real.append(trainer.progress.fraction)
            return draw(num_photo_pixels)

        trainer.pipeline.datamanager.draw = watched
        start = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - start
    assert seconds < 9 + 20  # the end of it, on a busy machine
    assert len(iterations) > 0 and trainer.progress.fraction == 1.0
    assert trainer.config.max_num_iterations == 40
    # As much of it as of the iterations: the last quarter.
    assert real and 0.75 <= min(real) < 0.9
    rate = trainer.optimizers.optimizers["ends"].param_groups[0]["lr"]
    assert rate < 0.05 * trainer.optimizers.config["ends"]["optimizer"].lr
    assert len(checkpoints(trainer.checkpoint_dir)) == 1


def test_rendering_teacher_views_leaves_time_to_train(tiny_teacher: Path, tmp_path: Path) -> None:
    overrides = {"max_minutes": 0.2, "pipeline.datamanager.num_views": 5000}
    with set_up(student_config(tiny_teacher, tmp_path, **overrides)) as trainer:
        ring = trainer.pipeline.datamanager.ring
        assert 1 <= len(ring) < 5000
        at_start = len(ring)
        trainer.pipeline.datamanager.config.refresh_share = 1.0
        trainer.train()
        assert at_start < len(ring) <= 5000


def test_no_iteration_waits_for_the_teacher(tiny_teacher: Path, tmp_path: Path) -> None:
    overrides = {"pipeline.datamanager.refresh_share": 1.0, "max_num_iterations": 1000}
    with set_up(student_config(tiny_teacher, tmp_path, **overrides)) as trainer:
        datamanager = trainer.pipeline.datamanager
        before = datamanager.ring.camera_to_worlds.clone()
        may_render, asked = threading.Event(), threading.Event()
        render = datamanager.ring.renderer.render

        def slow(index: int):
            asked.set()
            may_render.wait(60)
            return render(index)

        datamanager.ring.renderer.render = slow
        for step in range(20):
            datamanager.next_batch(step)
        assert asked.wait(60)
        assert torch.equal(datamanager.ring.camera_to_worlds, before)
        may_render.set()
        deadline = time.monotonic() + 60
        while torch.equal(datamanager.ring.camera_to_worlds, before) and time.monotonic() < deadline:
            datamanager.next_batch(20)
        assert not torch.equal(datamanager.ring.camera_to_worlds, before)


class DeviceWaits(TorchDispatchMode):
    """Records the iterations at which the host waits for a number from the device."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        super().__init__()
        self.trainer = trainer
        self.names: dict[int, list[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith(("index", "_index")) and any(
            isinstance(where, Tensor) and where.dtype == torch.bool for where in tree_leaves(args[1:2])
        )
        waits = by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")
        # Adam reads its count of steps, which torch keeps on the host.
        if waits and not any("/torch/optim/" in frame.filename for frame in traceback.extract_stack()):
            self.names.setdefault(self.trainer.step, []).append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["r2l", "r2l-lite", "mobile-r2l-lite", "r2l-paper"])
def test_no_iteration_waits_for_a_number_from_the_device(method: str, tiny_teacher: Path, tmp_path: Path) -> None:
    overrides = {
        "max_num_iterations": 40,
        "pipeline.datamanager.photo_iterations": 20,
        "pipeline.datamanager.refresh_share": 0.0,
        "pipeline.steps_per_eval_held_out": 10,
        "logging.steps_per_log": 10,
        "steps_per_save": 10,
    }
    with set_up(student_config(tiny_teacher, tmp_path, method, **overrides)) as trainer:
        waits = DeviceWaits(trainer)
        with waits:
            trainer.train()
    assert trainer.step == 39
    # Every tenth is measured, logged or saved. The first sets things up.
    assert {step: names for step, names in waits.names.items() if step % 10 in range(2, 9)} == {}
    assert waits.names  # those that are measured wait


def test_without_max_minutes_there_is_no_time_budget(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        student_config(tiny_teacher, tmp_path, max_minutes=0.0).set_timestamp()
    assert "--max-minutes must be above 0" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_early_leaves_a_usable_student(
    number: int, tiny_teacher: Path, tmp_path: Path, iterations: list
) -> None:
    overrides = {"max_num_iterations": 5000, "pipeline.steps_per_eval_held_out": 10**6}
    before = signal.getsignal(number)
    with set_up(student_config(tiny_teacher, tmp_path, "mobile-r2l-lite", **overrides)) as trainer:
        train_iteration = trainer.train_iteration

        def impatient(step: int):
            if step == 30:
                os.kill(os.getpid(), number)
            return train_iteration(step)

        trainer.train_iteration = impatient
        trainer.train()
    assert len(iterations) == 31  # the one available is finished
    assert signal.getsignal(number) is before
    folder = trainer.base_dir
    _, pipeline, _, _ = eval_setup(folder / "config.yml")
    ours = trainer.pipeline.model.state_dict()
    for name, value in pipeline.model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, ours[name]), name
    with set_up(
        student_config(
            tiny_teacher,
            tmp_path,
            "mobile-r2l-lite",
            timestamp="again",
            load_dir=folder / "nerfstudio_models",
            max_num_iterations=40,
        )
    ) as again:
        again.train()
    assert [step for step, _ in iterations[31:]] == list(range(again._start_step, 40))
