"""Invalid and malicious files in place of published checkpoints: one paragraph, nothing executed, nothing written."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_captures import around, blender_capture, llff_capture
from published_files import mobile_weights, r2l_weights, write_onnx, write_tar

from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.importing import pickle_reader, published_network
from r2l_nerfstudio.importing.capture_frame import read_frame, read_poses_bounds
from r2l_nerfstudio.importing.onnx_network import read_onnx
from r2l_nerfstudio.importing.pickle_reader import UnreadableError, interpret
from r2l_nerfstudio.importing.published_network import encoding_size, read_tar
from r2l_nerfstudio.importing.run_folder import place
from r2l_nerfstudio.scripts.import_checkpoint import ImportCheckpoint, main


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Blender capture of 24x16 pixels. Read only."""
    return blender_capture(tmp_path_factory.mktemp("capture") / "scene", around(1)[0].numpy(), 16, 24, 30.0)


@pytest.fixture
def refused(capture: Path, tmp_path: Path) -> Callable[..., str]:
    """A function that imports a file, sees it refused, and returns the reason; nothing may be left."""

    def refuse(checkpoint: Path, data: Path = capture, **options: Any) -> str:
        output = tmp_path / "outputs"
        with pytest.raises(InputError) as caught:
            ImportCheckpoint(checkpoint, data, output_dir=output, **options).main()
        assert not output.exists() or not any(path.is_file() for path in output.rglob("*"))
        message = str(caught.value)
        assert "\n" not in message and len(message) < 900
        return message

    return refuse


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.touched}",)


def repacked(source: Path, target: Path, compression: int = zipfile.ZIP_STORED, **changes: bytes | None) -> Path:
    """A copy of a torch archive with some entries replaced, or left out (None), by the last part of their name."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            name = entry.filename.split("/", 1)[1]
            content = changes.get(name, old.read(entry))
            if content is not None:
                new.writestr(zipfile.ZipInfo(entry.filename), content, compression)
    return target


# What can be imported.


def test_a_published_r2l_becomes_a_run(capture: Path, tmp_path: Path) -> None:
    file = write_tar(tmp_path / "r2l.tar", r2l_weights(), {"act": "relu", "use_residual": True})
    ImportCheckpoint(file, capture, output_dir=tmp_path / "outputs").main()
    (config,) = (tmp_path / "outputs").rglob("config.yml")
    assert [path.name for path in config.parent.glob("*/*.ckpt")] == ["step-000000000.ckpt"]
    assert (config.parent / "dataparser_transforms.json").is_file()


def test_weights_of_several_gpus(tmp_path: Path) -> None:
    weights = {f"module.{name}": value for name, value in r2l_weights().items()}
    network = read_tar(write_tar(tmp_path / "r2l.tar", weights))
    assert network.kind == "r2l" and network.sizes == {"width": 8, "depth": 6}
    assert (network.num_points, network.num_frequencies) == (4, 3)


def test_half_precision_weights_are_widened(tmp_path: Path) -> None:
    weights = {name: value.half() for name, value in r2l_weights().items()}
    assert read_tar(write_tar(tmp_path / "r2l.tar", weights)).state["tail.weight"].dtype == torch.float32


@pytest.mark.parametrize(("kernels", "factor"), [((4, 4), 4), ((4, 3), 6), ((4, 4, 3), 12)])
def test_sizes_of_a_mobile_r2l(kernels: tuple[int, ...], factor: int, tmp_path: Path) -> None:
    arguments = {"activation_fn": "gelu", "input_height": 5, "input_width": 6}
    file = write_tar(tmp_path / "mobile.tar", mobile_weights(kernels=kernels, blocks=2), arguments)
    network = read_tar(file)
    assert network.sizes == {"width": 8, "blocks": 2, "upsampling_factor": factor, "up_width": 6, "last_width": 4}
    assert network.cells == (5, 6)


@pytest.mark.parametrize(
    ("in_dim", "points", "octaves"), [(1008, 16, 10), (312, 8, 6), (3 * 2 * 9, 2, 4), (3 * 64 * 5, 64, 2)]
)
def test_points_and_octaves_of_the_first_layer(in_dim: int, points: int, octaves: int) -> None:
    assert encoding_size(Path("file"), in_dim, {}) == (points, octaves)


def test_points_and_octaves_by_the_arguments() -> None:
    assert encoding_size(Path("file"), 3 * 12 * 13, {"n_sample_per_ray": 12, "multires": 6}) == (12, 6)
    assert encoding_size(Path("file"), 3 * 12 * 13, {}, num_points=12) == (12, 6)
    assert encoding_size(Path("file"), 3 * 12 * 13, {}, num_frequencies=6) == (12, 6)
    with pytest.raises(InputError, match="--num-points"):
        encoding_size(Path("file"), 3 * 12 * 13, {}, num_points=5)


# Hostile files.


def test_nothing_in_a_file_is_run(capture: Path, tmp_path: Path) -> None:
    """Whatever it names, wherever it is: the weights are read all the same."""
    touched = tmp_path / "touched"
    file = write_tar(tmp_path / "evil.tar", r2l_weights(), network_fn=Evil(touched), optimizer_state_dict=Evil(touched))
    ImportCheckpoint(file, capture, output_dir=tmp_path / "outputs").main()
    assert not touched.exists()
    torch.load(file, weights_only=False)
    assert touched.exists()  # it does run where it is unpickled


def test_a_weight_that_is_a_call(refused, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    weights = r2l_weights() | {"head.0.bias": Evil(touched)}
    assert "head.0.bias is not a tensor" in refused(write_tar(tmp_path / "evil.tar", weights))
    assert not touched.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch /nowhere'\ntR.",  # a call by the oldest opcodes
        b"(S'touch /nowhere'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch /nowhere'\no.",  # OBJ
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x05\x97.",  # an out-of-band buffer
        b"Phello\n.",  # a persistent id in text
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # a string that is longer than the file
        b"\x80\x02\x8b\xff\xff\xff\x7f1.",  # a number of two gigabytes
        b"\x80\x02h\x07.",  # a memo that was never written
        b"\x80\x02t.",  # a tuple without its mark
        b"\x80\x02}K\x01u.",  # items without their mark
        b"\x80\x02K\x01K\x02s.",  # an item of no dictionary
        b"\x80\x02K\x01",  # no end
        b"",
        b"\x80\x02]q\x00(h\x00h\x00e",  # a list that holds itself, and no end
    ],
)
def test_programs_that_no_checkpoint_needs(program: bytes) -> None:
    try:
        result = interpret(program)
    except UnreadableError as error:
        assert str(error).startswith("its pickle")
    else:
        assert isinstance(result, pickle_reader.Record) and result.args == ("touch /nowhere",)


def test_deep_and_wide_pickles_end() -> None:
    deep = b"\x80\x02" + b"(" * 200_000 + b"K\x01" + b"t" * 200_000 + b"."
    assert isinstance(interpret(deep), tuple)
    laughs = b"\x80\x02]q\x00" + b"".join(b"](h\x00h\x00eq" + bytes([n]) + b"h" + bytes([n]) for n in range(1, 60))
    with pytest.raises(UnreadableError):
        interpret(laughs)


def crafted(tmp_path: Path, *arguments: Any) -> bytes:
    """A pickle whose only weight is a tensor rebuilt from these arguments."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(value, Storage) else None

    class Tensor:
        def __reduce__(self) -> tuple:
            return torch._utils._rebuild_tensor_v2, (Storage(), *arguments, False, None)

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump({"network_fn_state_dict": {"head.0.weight": Tensor()}})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (5,), (1,)),  # more numbers than there are
        (2, (3,), (1,)),  # beyond the end
        (-1, (2,), (1,)),
        (0, (2, 2), (1,)),
        (0, (-1,), (1,)),
        (0, (2,), (-1,)),
        (0, (1 << 50,), (0,)),
        (0, (4, 4), (0, 1)),  # a few numbers as many
        (0, ("2",), (1,)),
        (0, (True,), (1,)),
        (0, (1,) * 9, (1,) * 9),
    ],
)
def test_tensors_larger_than_their_storage(offset: Any, shape: Any, stride: Any, refused, tmp_path: Path) -> None:
    sound = write_tar(tmp_path / "sound.tar", r2l_weights())
    content = crafted(tmp_path, offset, shape, stride)
    file = repacked(sound, tmp_path / "crafted.tar", **{"data.pkl": content, "data/0": b"\0" * 16})
    message = refused(file)
    assert "reaches beyond" in message or "an invalid shape" in message


def test_missing_or_truncated_numbers(refused, tmp_path: Path) -> None:
    sound = write_tar(tmp_path / "sound.tar", r2l_weights())
    assert "truncated" in refused(repacked(sound, tmp_path / "missing.tar", **{"data/0": None}))
    assert "bytes" in refused(repacked(sound, tmp_path / "cut.tar", **{"data/0": b"\0" * 12}))


def test_an_archive_that_unpacks_to_more(refused, tmp_path: Path) -> None:
    sound = write_tar(tmp_path / "sound.tar", r2l_weights())
    bomb = repacked(sound, tmp_path / "bomb.tar", zipfile.ZIP_DEFLATED, **{"data/0": b"\0" * (1 << 22)})
    assert "compressed" in refused(bomb)


def test_a_storage_that_names_another_file(refused, tmp_path: Path) -> None:
    sound = write_tar(tmp_path / "sound.tar", r2l_weights())
    content = crafted(tmp_path, 0, (4,), (1,)).replace(b"X\x01\x00\x00\x000", b"X\x04\x00\x00\x00../0")
    assert "not in the file" in refused(repacked(sound, tmp_path / "outside.tar", **{"data.pkl": content}))


def test_a_large_pickle(refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_reader, "MOST_PICKLE_BYTES", 100)
    assert "at most 100 were expected" in refused(write_tar(tmp_path / "r2l.tar", r2l_weights()))


def test_two_entries_of_one_name(refused, tmp_path: Path) -> None:
    file = write_tar(tmp_path / "r2l.tar", r2l_weights())
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"other")
    assert "two entries" in refused(file)


def test_big_endian_numbers(refused, tmp_path: Path) -> None:
    sound = write_tar(tmp_path / "sound.tar", r2l_weights())
    assert "big-endian" in refused(repacked(sound, tmp_path / "big.tar", byteorder=b"big"))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
def test_truncated_files(share: float, refused, tmp_path: Path) -> None:
    content = write_tar(tmp_path / "r2l.tar", r2l_weights()).read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(content[: int(share * len(content))])
    assert "truncated" in refused(cut)


def test_damaged_numbers(refused, tmp_path: Path) -> None:
    file = write_tar(tmp_path / "r2l.tar", r2l_weights())
    content = bytearray(file.read_bytes())
    place = content.find(r2l_weights()["head.0.weight"].numpy().tobytes())
    assert place > 0
    content[place] ^= 0xFF
    file.write_bytes(content)
    assert "truncated" in refused(file) or "CRC" in refused(file)


# Files of another kind.


def test_missing_files_folders_and_other_file_types(refused, tmp_path: Path) -> None:
    assert "no checkpoint at" in refused(tmp_path / "nowhere.tar")
    assert "no checkpoint at" in refused(tmp_path / "nowhere.onnx")
    assert "is a folder" in refused(tmp_path)
    text = tmp_path / "text.tar"
    text.write_text("not an archive")
    assert "not an archive of torch" in refused(text)
    empty = tmp_path / "empty.tar"
    empty.touch()
    assert "not an archive of torch" in refused(empty)
    foreign = tmp_path / "foreign.tar"
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "no data.pkl" in refused(foreign)
    old = tmp_path / "old.tar"
    torch.save({"network_fn_state_dict": r2l_weights()}, old, _use_new_zipfile_serialization=False)
    assert "torch 1.6" in refused(old)


def test_checkpoints_of_neither_kind(refused, tmp_path: Path) -> None:
    assert "no network_fn_state_dict" in refused(write_tar(tmp_path / "a.tar", {}, network_fn_state_dict=None))
    nerf = {"pts_linears.0.weight": torch.zeros(4, 4), "pts_linears.0.bias": torch.zeros(4)}
    assert "neither R2L's nor MobileR2L's" in refused(write_tar(tmp_path / "nerf.tar", nerf))
    plain = tmp_path / "list.tar"
    torch.save([1, 2, 3], plain)
    assert "no network_fn_state_dict" in refused(plain)
    ours = tmp_path / "ours.tar"
    torch.save({"step": 1, "pipeline": {"_model.network.head.weight": torch.zeros(2, 2)}}, ours)
    assert "pipeline" in refused(ours)


def changed(weights: dict[str, torch.Tensor], **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    found = {**weights, **{name.replace("__", "."): value for name, value in changes.items()}}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tail__0__bias": None}, "lacks tail.0.bias"),
        ({"tail__0__weight": torch.zeros(4, 8)}, "shape [4, 8]"),
        ({"body__1__body__0__weight": torch.zeros(8, 7)}, "shape [8, 7]"),
        ({"body__3__body__0__weight": torch.zeros(8, 8)}, "missing"),
        ({"extra__weight": torch.zeros(3)}, "unknown layers"),
        ({"head__0__weight": torch.zeros(8, 85)}, "first layer reads 85"),
        ({"head__0__weight": torch.full((8, 84), float("nan"))}, "non-finite"),
        ({"head__0__bias": torch.zeros(8, dtype=torch.int64)}, "not floating-point"),
        ({"head__0__bias": torch.zeros(())}, "shape []"),
    ],
)
def test_r2l_weights_that_do_not_fit(changes: dict[str, Any], said: str, refused, tmp_path: Path) -> None:
    assert said in refused(write_tar(tmp_path / "r2l.tar", changed(r2l_weights(), **changes)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"body__0__conv_block__1__running_var": None}, "lacks body.0.conv_block.1.running_var"),
        ({"body__0__conv_block__1__running_var": torch.full((8,), -1.0)}, "negative variances"),
        ({"tail__3__weight": torch.zeros(6, 4, 5, 5)}, "kernel of [5, 5]"),
        ({"tail__6__bias": None, "tail__6__weight": None}, "upsampling has 6 layers"),
    ],
)
def test_mobile_weights_that_do_not_fit(changes: dict[str, Any], said: str, refused, tmp_path: Path) -> None:
    assert said in refused(write_tar(tmp_path / "mobile.tar", changed(mobile_weights(), **changes)))


def test_networks_of_other_settings(refused, tmp_path: Path) -> None:
    assert "act 'elu'" in refused(write_tar(tmp_path / "a.tar", r2l_weights(), {"act": "elu"}))
    file = write_tar(tmp_path / "b.tar", mobile_weights(), {"activation_fn": "relu"})
    assert "activation_fn 'relu'" in refused(file)
    wrong = mobile_weights(kernels=(3, 4))
    assert "upsampling of x3 x2" in refused(write_tar(tmp_path / "c.tar", wrong))


def test_a_network_wider_than_memory(refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 1000

    file = write_tar(tmp_path / "r2l.tar", r2l_weights())
    monkeypatch.setattr(published_network.psutil, "virtual_memory", Memory)
    assert "does not fit into memory" in refused(file)


def test_invalid_options(refused, tmp_path: Path) -> None:
    file = write_tar(tmp_path / "r2l.tar", r2l_weights())
    assert "--near must be below --far" in refused(file, near=7.0)
    assert "positive integer" in refused(file, num_points=0)
    assert "--ndc" in refused(file, ndc="yes")
    assert "must be one of" in refused(file, scene="lego")
    assert "both set the origin" in refused(file, scene="fern", center=(0.0, 0.0, 0.0))
    mobile = write_tar(tmp_path / "mobile.tar", mobile_weights())
    assert "--cells" in refused(mobile, cells=(4, 40))


def test_a_negative_near_is_taken(capture: Path, tmp_path: Path) -> None:
    """Third parties' samplers have one."""
    file = write_tar(tmp_path / "r2l.tar", r2l_weights())
    ImportCheckpoint(file, capture, output_dir=tmp_path / "outputs", near=-3.26).main()
    assert list((tmp_path / "outputs").rglob("config.yml"))


def test_the_command_prints_one_paragraph(
    capture: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["r2l-import", str(tmp_path / "nowhere.tar"), "--data", str(capture)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1 and "Error: There is no checkpoint" in capsys.readouterr().out


def test_a_student_that_renders_differently_is_not_kept(
    refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(points: int, octaves: int) -> torch.Tensor:
        return torch.arange(3 * points * (2 * octaves + 1))

    monkeypatch.setattr(published_network, "our_columns", other)
    assert "does not render" in refused(write_tar(tmp_path / "r2l.tar", r2l_weights()))


# Captures.


def test_folders_that_are_not_captures(refused, tmp_path: Path) -> None:
    file = write_tar(tmp_path / "r2l.tar", r2l_weights())
    assert "no capture at" in refused(file, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "neither transforms_train.json" in refused(file, tmp_path / "empty")
    (tmp_path / "empty" / "transforms_train.json").write_text("{")
    assert "cannot be read" in refused(file, tmp_path / "empty")
    assert "poses_bounds.npy" in refused(file, tmp_path / "empty", layout="llff")


def test_a_capture_in_another_format(refused, tmp_path: Path) -> None:
    data = blender_capture(tmp_path / "scene", around(1)[0].numpy(), 16, 24, 30.0)
    file = data / "transforms_train.json"
    content = json.loads(file.read_text())
    for frame in content["frames"]:  # cameras at less than half the distance
        frame["transform_matrix"] = [[*row[:3], 0.4 * row[3]] for row in frame["transform_matrix"]]
    file.write_text(json.dumps(content))
    message = refused(write_tar(tmp_path / "r2l.tar", r2l_weights()), data)
    assert "deviate by 0.6" in message and "--data" in message


@pytest.fixture
def forward(tmp_path: Path) -> Path:
    """An LLFF capture, to be damaged."""
    pose = np.concatenate([np.eye(3), [[0.2], [-0.1], [0.0]]], axis=1)
    return llff_capture(tmp_path / "forward", pose, 16, 24, 30.0)


def test_a_dataset_of_the_other_kind(refused, capture: Path, forward: Path, tmp_path: Path) -> None:
    of_llff = write_tar(tmp_path / "llff.tar", mobile_weights(), {"dataset_type": "Colmap"})
    assert "trained on a Colmap dataset" in refused(of_llff, capture)
    of_blender = write_tar(tmp_path / "blender.tar", r2l_weights(), {"dataset_type": "blender"})
    assert "trained on a blender dataset" in refused(of_blender, forward)


def test_training_arguments_in_the_file_are_used(forward: Path, tmp_path: Path) -> None:
    arguments = {"dataset_type": "Colmap", "scene": "fern", "ndc": False, "input_height": 4, "input_width": 6}
    network = read_tar(write_tar(tmp_path / "mobile.tar", mobile_weights(), arguments))
    command = ImportCheckpoint(tmp_path / "mobile.tar", forward)
    center = command._center(network)
    assert center == pytest.approx((-0.857, -0.156, 29.990), abs=1e-3)
    placement = place(network, read_frame(forward, center=center))
    assert placement.scene.conventions.ndc is None and placement.cells == (4, 6)
    # The frame's origin is that of the scene, in the coordinates of poses_bounds.npy.
    raw = read_poses_bounds(forward / "poses_bounds.npy")[0]
    ours = placement.frame.similarity.poses(placement.frame.cameras.camera_to_worlds)
    apart = (raw[:, :, 3] - torch.tensor(center)).norm(dim=-1) / 3.7
    assert torch.allclose(ours[:, :, 3].norm(dim=-1), apart, rtol=1e-4)
    weights = r2l_weights()
    with_trial = read_tar(write_tar(tmp_path / "r2l.tar", weights))
    with_trial.arguments.update({"trial.near": 1.5, "trial.far": 7})
    scene = place(with_trial, read_frame(forward)).scene
    assert (scene.near, scene.far) == (1.5, 7.0)


def test_cameras_of_another_llff_scene(refused, forward: Path, tmp_path: Path) -> None:
    table = np.load(forward / "poses_bounds.npy")
    np.save(forward / "poses_bounds.npy", table[[2, 0, 1, 4, 3]])
    message = refused(write_tar(tmp_path / "r2l.tar", r2l_weights()), forward)
    assert "not from one scene" in message and "of their spread" in message and "degrees" in message


@pytest.mark.parametrize(
    "content",
    [np.zeros((4, 15)), np.zeros((2, 17)), np.full((5, 17), np.nan), np.zeros((5, 17)), np.zeros((5, 17), dtype=int)],
)
def test_damaged_llff_poses(content: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "poses_bounds.npy", content)
    with pytest.raises(InputError, match="restore it"):
        read_poses_bounds(tmp_path / "poses_bounds.npy")


def test_llff_poses_with_pickled_code(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    np.save(tmp_path / "poses_bounds.npy", np.array([Evil(touched)], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        read_poses_bounds(tmp_path / "poses_bounds.npy")
    assert not touched.exists()


def test_images_that_do_not_match_the_poses(refused, forward: Path, tmp_path: Path) -> None:
    shutil.copy(forward / "images" / "image000.png", forward / "images" / "image999.png")
    message = refused(write_tar(tmp_path / "r2l.tar", r2l_weights()), forward)
    assert "6 images" in message and "5 poses" in message


def test_the_frame_of_a_real_llff_capture(capture_data) -> None:
    frame = read_frame(capture_data("fern_504"))
    assert frame.layout == "llff" and frame.bounds[0] == pytest.approx(4 / 3, rel=1e-3)


# ONNX.


@pytest.mark.parametrize("activation", ["Relu", "GeluSnap", "Gelu"])
def test_an_onnx_network_is_that_of_the_tar(activation: str, tmp_path: Path) -> None:
    weights = mobile_weights(blocks=2, kernels=(4, 4, 3))
    from_tar = read_tar(write_tar(tmp_path / "mobile.tar", weights))
    from_onnx = read_onnx(write_onnx(tmp_path / "mobile.onnx", weights, activation))
    assert from_onnx.sizes == from_tar.sizes and from_onnx.cells == (5, 6)
    encoded = torch.randn(1, 84, 5, 6)
    # Before the sigmoid, numbers are as large as 10, and rounded in another order.
    assert torch.allclose(from_onnx.run(encoded), from_tar.run(encoded), atol=5e-5)


def test_an_onnx_becomes_a_run(capture: Path, tmp_path: Path) -> None:
    file = write_onnx(tmp_path / "mobile.onnx", mobile_weights(), rows=4, columns=6)
    ImportCheckpoint(file, capture, output_dir=tmp_path / "outputs").main()
    assert list((tmp_path / "outputs").rglob("config.yml"))


def edited_onnx(path: Path, change: Callable[[Any], None]) -> Path:
    import onnx

    model = onnx.load(str(write_onnx(path, mobile_weights())))
    change(model)
    onnx.save_model(model, str(path))
    return path


def test_files_that_are_not_onnx(refused, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(write_onnx(tmp_path / "sound.onnx", mobile_weights()).read_bytes()[:900])
    assert "cannot be imported" in refused(damaged)
    text = tmp_path / "text.onnx"
    text.write_text("no protobuf")
    assert "cannot be imported" in refused(text)
    (tmp_path / "empty.onnx").touch()
    assert "cannot be imported" in refused(tmp_path / "empty.onnx")


def test_onnx_files_with_other_operators(refused, tmp_path: Path) -> None:
    def softmax(model: Any) -> None:
        model.graph.node[1].op_type = "Softmax"

    assert "operators that are not MobileR2L's (Softmax)" in refused(edited_onnx(tmp_path / "a.onnx", softmax))

    def sampler(model: Any) -> None:
        del model.graph.node[:]
        model.graph.node.add(op_type="MatMul", input=["input", "input"], output=["output"])

    assert "MatMul" in refused(edited_onnx(tmp_path / "b.onnx", sampler))


def test_onnx_files_with_other_connections(refused, tmp_path: Path) -> None:
    def unskipped(model: Any) -> None:
        """Without the long skip: every layer is there, and the picture another."""
        adds = [node for node in model.graph.node if node.op_type == "Add"]
        adds[1].input[0] = adds[1].input[1]

    assert "not connected" in refused(edited_onnx(tmp_path / "a.onnx", unskipped))

    def strided(model: Any) -> None:
        for attribute in model.graph.node[0].attribute:
            if attribute.name == "strides":
                attribute.ints[:] = [2, 2]

    assert "is not MobileR2L's" in refused(edited_onnx(tmp_path / "b.onnx", strided))

    def cut(model: Any) -> None:
        del model.graph.node[-2]

    assert "cannot be imported" in refused(edited_onnx(tmp_path / "c.onnx", cut))


def test_onnx_weights_in_other_files_are_not_read(refused, tmp_path: Path) -> None:
    def outside(model: Any) -> None:
        import onnx

        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../../../etc/passwd")

    assert "stored in another file" in refused(edited_onnx(tmp_path / "a.onnx", outside))


def test_onnx_weights_that_are_not_numbers(refused, tmp_path: Path) -> None:
    def infinite(model: Any) -> None:
        from onnx import numpy_helper

        tensor = model.graph.initializer[0]
        array = numpy_helper.to_array(tensor).copy()
        array.flat[0] = np.inf
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    assert "non-finite" in refused(edited_onnx(tmp_path / "a.onnx", infinite))

    def short(model: Any) -> None:
        model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]

    assert "damaged" in refused(edited_onnx(tmp_path / "b.onnx", short))
