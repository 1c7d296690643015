"""The papers' tables: two tiny scenes are measured, resumed, and written beside the published rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distil import TINY_STUDENT
from teachers import TINY, write_blender_capture, write_capture

# The package of benchmarks lies beside the installed one.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables  # noqa: E402
from benchmarks.tables import Scene, Tables, as_tables, find_scenes  # noqa: E402
from r2l_nerfstudio.errors import InputError  # noqa: E402
from r2l_nerfstudio.models import metrics  # noqa: E402


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the datasets are laid out, with one tiny scene of each set. Read only."""
    root = tmp_path_factory.mktemp("scenes")
    write_blender_capture(root / "nerf_synthetic" / "lego")
    write_capture(root / "nerf_llff_data" / "fern")
    (root / "nerf_llff_data" / ".hidden").mkdir()
    return root


QUIET = ("machine.device_type", "logging.local_writer.enable", "logging.profiler")
STUDENT = {
    **{name: TINY_STUDENT[name] for name in (*QUIET, "pipeline.check_frame", "pipeline.model.width")},
    "pipeline.datamanager.train_num_rays_per_batch": 256,
    "pipeline.datamanager.photo_iterations": 2,
    "pipeline.model.depth": 4,
}
TEACHER = {**{name: TINY_STUDENT[name] for name in QUIET}, "pipeline.datamanager.train_num_rays_per_batch": 128} | {
    name: TINY["nerfacto"][name]
    for name in ("pipeline.model.num_levels", "pipeline.model.max_res", "pipeline.model.hidden_dim")
}


@pytest.fixture(scope="module")
def command(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tables]:
    """A function that makes a small call of the command."""
    place = tmp_path_factory.mktemp("tables")

    def make(**options: Any) -> Tables:
        return Tables(
            **{
                "data": scenes,
                "methods": ("r2l-lite",),
                "teacher_iterations": 8,
                "iterations": 6,
                "num_views": 3,
                "scale": 1.0,
                "test_views": 2,
                "output_dir": place / "outputs",
                "results_dir": place / "results",
                "changes": STUDENT,
                "teacher_changes": TEACHER,
                **options,
            }
        )

    return make


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where its weights cannot be loaded."""
    monkeypatch.setattr(metrics, "lpips", lambda image, truth, network="alex": None)


def test_two_scenes_are_measured_and_resumed(
    command: Callable[..., Tables], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = command()
    first.main()
    figures = json.loads((first.results_dir / "tables.json").read_text())
    assert [(one["group"], one["settings"]["scene"]) for one in figures] == [
        ("NeRF-Synthetic", "lego"),
        ("LLFF", "fern"),
    ]
    for one in figures:
        assert one["settings"]["capture"] == one["settings"]["scene"]  # not where it lies
        assert one["width"] == one["height"] == 24 and one["student"]["psnr"] > 0 and 0 < one["megabytes_fp16"] < 2
        assert set(one["student"]) == set(one["teacher"]) == {"psnr", "ssim"}
        assert one["student_milliseconds"] > 0 and one["mflop_per_pixel"] > 0
    assert [one["test_views"] for one in figures] == ["1 of 1", "1 of 1"]
    written = (first.results_dir / "tables.md").read_text()
    assert "| NeRF-Synthetic | MobileR2L | 31.34 |" in written and "Reduced scale" in written
    lego = next(line for line in written.splitlines() if line.startswith("| NeRF-Synthetic | **r2l-lite** (reduced)"))
    assert f"| {figures[0]['student']['psnr']:.2f} |" in lego
    for said in ("lego at 24x24", "shrunk nerfacto, 8 iterations", "budget: 6 iterations"):
        assert said in lego

    # Again: nothing is trained.
    monkeypatch.setattr(tables, "_train", lambda config: pytest.fail("trained again"))
    again = command()
    again.main()
    assert json.loads((again.results_dir / "tables.json").read_text()) == figures
    assert capsys.readouterr().out.count("measured before") == 2


def test_other_settings_are_measured_again_by_the_same_teacher(
    command: Callable[..., Tables], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(scenes=("lego",)).main()
    trained = []
    train = tables._train
    monkeypatch.setattr(tables, "_train", lambda config: (trained.append(config.method_name), train(config)))
    more = command(scenes=("lego",), iterations=7)
    more.main()
    assert trained == ["r2l-lite"]
    (figures,) = json.loads((more.results_dir / "tables.json").read_text())
    assert figures["settings"]["budget"] == "7 iterations" and figures["step"] == 6


def test_a_scene_that_fails_leaves_the_others(command: Callable[..., Tables], monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(self: Tables, scene: Scene, method: str) -> dict[str, Any]:
        if scene.name == "lego":
            raise InputError("its photos are gone")
        return FIGURES

    monkeypatch.setattr(Tables, "measured", measured)
    broken = command()
    with pytest.raises(InputError, match="No figures of lego with r2l-lite"):
        broken.main()
    assert len(json.loads((broken.results_dir / "tables.json").read_text())) == 1


FIGURES: dict[str, Any] = {
    "group": "LLFF",
    "settings": {
        "scene": "fern",
        "method": "r2l-lite",
        "teacher": "given",
        "budget": "5 min",
        "scale": 1.0,
        "engine": "torch",
        "device": "a machine",
    },
    "width": 1008,
    "height": 756,
    "student": {"psnr": 25.0, "ssim": 0.8, "lpips": 0.2, "lpips_vgg": 0.3},
    "teacher": {"psnr": 26.0, "ssim": 0.85, "lpips": 0.1, "lpips_vgg": 0.2},
    "student_milliseconds": 12.0,
    "teacher_milliseconds": 900.0,
    "megabytes_fp16": 1.5,
    "mflop_per_pixel": 0.7,
}


def test_means_over_scenes() -> None:
    others = [
        {**FIGURES, "settings": {**FIGURES["settings"], "scene": name}, "student": {"psnr": 27.0, "ssim": 0.9}}
        for name in tables.SCENES["LLFF"][1:]
    ]
    written = as_tables([FIGURES, *others])
    assert "Reduced" not in written  # at the published size
    row = next(line for line in written.splitlines() if line.startswith("| LLFF | **r2l-lite**"))
    assert "| 26.75 | 0.888 | – | – | all 8 at 1008x756" in row  # LPIPS only where every scene has it
    teacher = next(line for line in written.splitlines() if line.startswith("| LLFF | teacher of **r2l-lite**"))
    assert "| 26.00 | 0.850 | 0.200 | 0.100 |" in teacher
    assert "| LLFF, 1008x756 | **r2l-lite** | 0.700 | 26.75 | +0.75 | 1.50 | 12.0 (teacher 900.0) |" in written
    assert "| **r2l-lite** | a machine, engine torch | – | 12.0 | 1008x756 | measured |" in written


def test_published_rows() -> None:
    written = as_tables([FIGURES])
    for row in (
        "| LLFF | MobileR2L's teacher | 26.85 |",
        "| SNeRG | 86.8 | 337.3 |",
        "| MobileR2L | iPhone 13 | 26.21 | 18.04 |",
        "| NeRF-Synthetic, 400x400 | R2L | 11.79 | 31.87 | +1.40 | 23.7 |",
    ):
        assert row in written
    assert ".99" in written and "400x400" in written and "test images" in written
    assert round(303.8 / 11.79) == 26


def test_scenes_are_found_where_the_datasets_have_them(scenes: Path, tmp_path: Path) -> None:
    found = find_scenes(scenes)
    assert [(scene.name, scene.group) for scene in found] == [("lego", "NeRF-Synthetic"), ("fern", "LLFF")]
    assert [scene.name for scene in find_scenes(scenes / "nerf_synthetic" / "lego")] == ["lego"]
    other = write_capture(tmp_path / "garden_full")
    assert find_scenes(other) == [Scene("garden_full", other, "other captures")]
    assert find_scenes(write_capture(tmp_path / "fern_504").parent)[0].name == "fern"


def test_folders_without_scenes(scenes: Path, tmp_path: Path, command: Callable[..., Tables]) -> None:
    with pytest.raises(InputError, match="no folder"):
        find_scenes(tmp_path / "nowhere")
    (tmp_path / "leaves").mkdir()
    (tmp_path / "leaves" / "poses_bounds.npy").touch()
    with pytest.raises(InputError, match="poses_bounds.npy only"):
        find_scenes(tmp_path)
    with pytest.raises(InputError, match="--scenes ship: choose from fern, lego"):
        find_scenes(scenes, ("ship",))
    write_capture(tmp_path / "twice" / "a" / "lego")
    write_capture(tmp_path / "twice" / "b" / "lego")
    with pytest.raises(InputError, match="two scenes of the name lego"):
        find_scenes(tmp_path / "twice")
    with pytest.raises(InputError, match="--methods nerfacto"):
        command(methods=("nerfacto",)).main()
    with pytest.raises(InputError, match="--scale"):
        command(scale=2.0).main()
    with pytest.raises(InputError, match="no lego/config.yml"):
        command(teachers=tmp_path, scenes=("lego",), output_dir=tmp_path / "outputs").measured(
            find_scenes(scenes)[0], "r2l"
        )


def test_teachers_that_saw_the_evaluation_views(
    scenes: Path, tiny_teacher: Path, tmp_path: Path, command: Callable[..., Tables]
) -> None:
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / "fern").symlink_to(tiny_teacher)
    (fern,) = find_scenes(scenes, ("fern",))
    with pytest.raises(InputError, match="every eighth view"):
        command(teachers=tmp_path / "teachers", output_dir=tmp_path / "outputs").measured(fern, "r2l")
