"""Training when something outside it fails: a full disk, a teacher that stops rendering."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest
import torch
from distil import distil, student_config

from r2l_nerfstudio.distillation.datamanager import MOST_FAILURES
from r2l_nerfstudio.distillation.view_ring import ViewRenderer
from r2l_nerfstudio.student import load_student

# Whatever is written to it, the kernel answers "No space left on device".
_FULL = Path("/dev/full")
needs_a_full_device = pytest.mark.skipif(not _FULL.exists(), reason="this system has no /dev/full")


def output_of(capsys: pytest.CaptureFixture) -> str:
    return " ".join(capsys.readouterr().out.split())


def fill_disk_at(step: int, run: Path) -> None:
    """Let the kernel refuse the next write of the checkpoint of a step, and no later one."""
    partial = run / "nerfstudio_models.partial"
    partial.mkdir(parents=True)
    (partial / f"step-{step:09d}.ckpt").symlink_to(_FULL)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(file.stem.removeprefix("step-")) for file in folder.glob("*.ckpt"))


@needs_a_full_device
def test_a_full_disk_at_a_checkpoint(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = student_config(tiny_teacher, tmp_path, steps_per_save=4, save_only_latest_checkpoint=False)
    fill_disk_at(4, tmp_path / "tiny" / "r2l-lite" / "run")
    run = distil(config)
    said = output_of(capsys)
    assert said.count("The checkpoint could not be written to") == 1
    assert f"{run / 'nerfstudio_models'}, whose disk has" in said and "MB free" in said and "is tried as usual" in said
    assert steps_in(run / "nerfstudio_models") == [8, 11]
    assert not (run / "nerfstudio_models.partial").exists()
    load_student(run, engine="torch", step=11)


@needs_a_full_device
def test_a_full_disk_at_the_last_checkpoint_leaves_the_weights(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fill_disk_at(11, tmp_path / "tiny" / "r2l-lite" / "run")
    run = distil(student_config(tiny_teacher, tmp_path))
    assert "Saved the weights only" in output_of(capsys)
    load_student(run, engine="torch", step=11)
    content = torch.load(run / "nerfstudio_models" / "step-000000011.ckpt", weights_only=True)
    assert content["optimizers"] == {}


def test_a_disk_that_stays_full_sends_the_run_elsewhere(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    save, disk = torch.save, tmp_path / "disk"

    def save_where_there_is_room(content: object, path: Path) -> None:
        if disk in Path(path).parents:
            Path(path).write_bytes(bytes(100))
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, path)

    monkeypatch.setattr(torch, "save", save_where_there_is_room)
    run = distil(student_config(tiny_teacher, disk))
    (moved,) = elsewhere.glob("r2l-tiny-*")
    assert f"Saved the run in {moved} instead" in output_of(capsys)
    assert not list(disk.rglob("*.ckpt")) and not (run / "nerfstudio_models.partial").exists()
    load_student(moved, engine="torch", step=11)


def test_no_room_for_a_checkpoint_is_seen_before_any_view_is_rendered(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("r2l_nerfstudio.distillation.trainer.free_bytes", lambda folder: 1000)
    monkeypatch.setattr(ViewRenderer, "render", lambda *_: pytest.fail("a view was rendered"))
    with pytest.raises(SystemExit) as caught:
        distil(student_config(tiny_teacher, tmp_path))
    said = output_of(capsys)
    assert caught.value.code == 1 and "has 0.0 MB free, and a checkpoint takes about" in said
    assert not list(tmp_path.rglob("config.yml"))


@pytest.mark.parametrize("error", [RuntimeError("no memory for a moment"), OSError(errno.EIO, "disk error")])
def test_a_teacher_that_stops_rendering(
    error: Exception, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    render, rendered, failed = ViewRenderer.render, [], []

    def render_until(self: ViewRenderer, index: int):
        if len(rendered) < 7:  # 4 held out, 3 in the ring
            rendered.append(index)
            return render(self, index)
        failed.append(index)
        raise error

    monkeypatch.setattr(ViewRenderer, "render", render_until)
    options = {"max_num_iterations": 30, "pipeline.datamanager.refresh_share": 1.0}
    run = distil(student_config(tiny_teacher, tmp_path, **options))
    assert len(failed) == MOST_FAILURES
    assert output_of(capsys).count(f"after {MOST_FAILURES} failures ({type(error).__name__}: ") == 1
    load_student(run, engine="torch", step=29)
