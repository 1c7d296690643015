"""int8 networks, if that costs little: quantized after training on the ray encodings of sampled cameras."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datasets.base_dataset import InputDataset
from torch import Tensor
from torch.nn.functional import interpolate

from r2l_nerfstudio.atomic_output import atomic_files
from r2l_nerfstudio.distillation.photos import read_photo, split_held_out
from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras, PoseSampler, capture_cameras
from r2l_nerfstudio.errors import InputError
from r2l_nerfstudio.export.comparison import check_export, probe_inputs
from r2l_nerfstudio.export.graph import GraphSpec
from r2l_nerfstudio.export.joined_onnx import fix_sizes, join_onnx
from r2l_nerfstudio.export.mobile_onnx import mobile_verdict
from r2l_nerfstudio.export.onnx_file import metadata, require_onnx, run_onnx, write_onnx
from r2l_nerfstudio.export.training_cameras import training_views
from r2l_nerfstudio.psnr import psnr
from r2l_nerfstudio.student import Student

CALIBRATION_VIEWS = 16
CALIBRATION_SIDE = 64
"""Longer side in pixels of a calibration view, for students that evaluate rays one by one."""
JUDGED_VIEWS = 8
JUDGED_SIDE = 200
"""Longer side in pixels of a held-out photo, for the same students."""
MOST_LOSS = 0.5
"""Maximum loss in dB."""
NEEDED_DB = 40.0
"""Minimum PSNR in dB against the student's own images, if there are no photos: it costs a student of 31 dB half a
decibel."""
SANE_DB = 25.0
"""Minimum PSNR in dB of the finished file against PyTorch on probe cameras: a wrongly assembled graph has 5 to 15."""
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Int8Report:
    """The cost of int8."""

    scheme: str
    """Which layers stayed in fp32, in words."""
    views: int
    """Images that it was measured on."""
    student: float | None
    """PSNR in dB of the student on held-out photos; None if there are none."""
    int8: float
    """The same for the int8 network; against the student's own images if there are no photos."""
    parity: float
    """PSNR in dB of the whole file against PyTorch, on probe cameras."""

    @property
    def sentence(self) -> str:
        """One line for the log."""
        if self.student is None:
            judged = f"{self.int8:.1f} dB against the student's own images of {self.views} sampled cameras"
        else:
            judged = (
                f"{self.int8:.2f} dB on {self.views} held-out training photos, the student itself {self.student:.2f}"
                f" dB: {self.student - self.int8:.2f} dB lost"
            )
        return f"int8 ({self.scheme}): {judged}."


def export_int8(
    student: Student, spec: GraphSpec, output: Path, run: Path, data: Path | None = None, overwrite: bool = False
) -> Int8Report:
    """Write an ONNX file whose network and features are in int8 (the network by QuantizeLinear and DequantizeLinear).

    Weights and features are quantized per channel, activations to uint8; the encoding stays in fp32. Layers are left in
    fp32 one after the other until int8 costs at most `MOST_LOSS`.

    Args:
        student: on the CPU.
        spec: which graph, in fp32.
        output: the file.
        run: the student's config.yml or folder: its capture has cameras to calibrate on and photos to measure on.
        data: the capture's location, if it has moved since training.
        overwrite: whether the file may exist.

    Raises:
        InputError: packages or the capture's cameras are missing, the file may not be written, or int8 costs too much;
            nothing is kept then.
    """
    require_onnx()
    if spec.part not in ("whole", "network"):
        raise InputError(f"--precision int8: --part {spec.part} has no network and stays in fp32; leave the flag out.")
    if spec.part == "whole":
        replace(spec, part="encoding").frame(student)  # Raises if it has more rays than can be joined.
    dataset, held_share = training_views(run, data)
    cameras = capture_cameras(dataset.cameras)
    with atomic_files(output, overwrite) as file:
        network = file.with_suffix(".network.onnx")
        quantized = file.with_suffix(".int8.onnx")
        write_onnx(student, replace(spec, part="network", is_static=False, precision="fp32"), network)
        encoded_rays = calibration_encodings(student, cameras)
        photos = held_out(student, dataset, held_share)
        said = []
        accepted = None
        for scheme, kept in schemes(network):
            quantize(network, quantized, encoded_rays, kept)
            report = judge(student, quantized, scheme, photos, cameras)
            if _is_good(report):
                accepted = report
                break
            said.append(report.sentence)
        if accepted is None:
            raise InputError(
                f"--precision int8: {' '.join(said)} At most {MOST_LOSS} dB may be lost"
                + ("" if photos else f" ({NEEDED_DB:.0f} dB against its own images)")
                + ", so it was not kept; choose --precision fp16."
            )
        assemble(student, spec, quantized, file)
        if spec.is_plain:
            mobile_verdict(file)
        parity = check_export(
            student, spec, lambda inputs: run_onnx(file, inputs), f"The ONNX file {output}", needed=SANE_DB
        )
        return replace(accepted, parity=parity)


def schemes(network: Path) -> list[tuple[str, list[str]]]:
    """Return which layers to leave in fp32, from none on: in words, and their names."""
    import onnx

    layers = [node.name for node in onnx.load(str(network)).graph.node if node.op_type in LAYERS]
    return [
        ("all layers", []),
        ("all layers but the last", layers[-1:]),
        ("all layers but the first and the last", [layers[0], layers[-1]]),
    ]


def calibration_encodings(student: Student, cameras: CaptureCameras) -> list[Float[np.ndarray, "*encoded"]]:
    """Return the ray encodings of sampled cameras, each as one input of the network."""
    return [
        student.model.encoding_for_camera(pose, intrinsics, spec.height, spec.width).encoded.contiguous().numpy()
        for pose, intrinsics, spec in sampled_views(student, cameras, CALIBRATION_VIEWS, seed=0)
    ]


def sampled_views(
    student: Student, cameras: CaptureCameras, number: int, seed: int
) -> Iterator[tuple[Float[Tensor, "3 4"], Float[Tensor, "4"], GraphSpec]]:
    """Yield pose, intrinsics and size of sampled cameras, at a size that the student renders without resampling."""
    sampler = PoseSampler(cameras)
    generator = torch.Generator().manual_seed(seed)
    focal = float(cameras.intrinsics[:, :2].mean())
    is_resampled = student.model.reads_ray_image
    if is_resampled:
        scale = student.model.native_focal(focal) / focal
    else:
        scale = min(1.0, CALIBRATION_SIDE / max(cameras.width, cameras.height))
    width, height = max(1, round(scale * cameras.width)), max(1, round(scale * cameras.height))
    for _ in range(number):
        pose, intrinsics = sampler.sample(generator)
        own = intrinsics * scale
        if is_resampled:
            own[:2] = student.model.native_focal(focal)
        yield pose, own, GraphSpec("camera", "fp32", width, height)


def quantize(network: Path, output: Path, encoded_rays: list[Float[np.ndarray, "*encoded"]], kept: list[str]) -> None:
    """Write a network with QuantizeLinear and DequantizeLinear where they save work.

    Args:
        network: in fp32.
        output: file to write.
        encoded_rays: ray encodings to measure the ranges of all activations on.
        kept: names of layers that stay in fp32.
    """
    from onnxruntime import quantization

    class EncodedCameras(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{"encoded": encoded} for encoded in encoded_rays])

        def get_next(self) -> dict:
            return next(self.left, cast(dict, None))  # Annotated as a dictionary; documented to end with None.

    with _quiet():
        quantization.quantize_static(
            network,
            output,
            EncodedCameras(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=kept,
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the library's advice to shrink a graph that is already small."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def held_out(student: Student, dataset: InputDataset, share: float) -> list[tuple[Cameras, Float[Tensor, "h w 3"]]]:
    """Return cameras and photos that no training used, if the capture still has them.

    The teacher's pose corrections are not applied: they affect student and int8 equally.

    Args:
        student: its background is behind photos with an alpha channel.
        dataset: the training views.
        share: share of the views that was held out; a tenth if none was.
    """
    _, held = split_held_out(len(dataset), share or 0.1)
    chosen = [held[round(index)] for index in np.linspace(0, len(held) - 1, min(JUDGED_VIEWS, len(held)))]
    if not all(Path(dataset.image_filenames[index]).is_file() for index in chosen):
        return []
    found = []
    for index in chosen:
        camera = dataset.cameras[index : index + 1]
        truth = torch.from_numpy(read_photo(dataset, index, student.model.background).rgb).float() / 255
        side = max(truth.shape[:2])
        if not student.model.reads_ray_image and side > JUDGED_SIDE:
            camera.rescale_output_resolution(JUDGED_SIDE / side)
            size = (int(camera.height), int(camera.width))
            truth = interpolate(truth.permute(2, 0, 1)[None], size, mode="area")[0].permute(1, 2, 0)
        found.append((camera, truth))
    return found


def judge(
    student: Student,
    network: Path,
    scheme: str,
    photos: list[tuple[Cameras, Float[Tensor, "h w 3"]]],
    cameras: CaptureCameras,
) -> Int8Report:
    """Measure a quantized network on photos or, without any, against the student."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])

    def run(encoded: Float[Tensor, "*encoded"]) -> Float[Tensor, "*values"]:
        return torch.from_numpy(session.run(None, {"encoded": encoded.contiguous().numpy()})[0])

    model = student.model
    features = nullcontext() if model.composited is None else model.composited.in_int8()
    own: list[float] = []
    other: list[float] = []
    if photos:
        own += [psnr(model.render_camera(camera)["rgb"], truth) for camera, truth in photos]
        with model.network_run_by(run), features:
            other += [psnr(model.render_camera(camera)["rgb"], truth) for camera, truth in photos]
    else:
        seen = list(sampled_views(student, cameras, JUDGED_VIEWS, seed=1))
        views = [(pose.numpy(), intrinsics.numpy(), size.width, size.height) for pose, intrinsics, size in seen]
        truths = [torch.from_numpy(student.render(*view)) for view in views]
        with model.network_run_by(run), features:
            other += [
                psnr(torch.from_numpy(student.render(*view)), truth) for view, truth in zip(views, truths, strict=True)
            ]
    return Int8Report(
        scheme, len(other), sum(own) / len(own) if own else None, sum(other) / len(other), parity=math.nan
    )


def _is_good(report: Int8Report) -> bool:
    if report.student is None:
        return report.int8 >= NEEDED_DB
    return report.int8 >= report.student - MOST_LOSS


def assemble(student: Student, spec: GraphSpec, network: Path, output: Path) -> None:
    """Write the requested graph around a quantized network."""
    import onnx

    model = onnx.load(str(network))
    if spec.is_static or (spec.part == "whole" and spec.inputs == "camera"):
        inputs, outputs = probe_inputs(student, replace(spec, part="network"), 0)
        fix_sizes(model, {name: value.shape for name, value in (inputs | outputs).items()})
    if spec.part == "whole":
        before, after = output.with_suffix(".before.onnx"), output.with_suffix(".after.onnx")
        # Features are weighted and summed in fp32; those of a dense volume are stored in half precision.
        write_onnx(student, replace(spec, part="encoding", precision="fp16", int8_features=True), before)
        write_onnx(student, replace(spec, part="values"), after)
        model = join_onnx(onnx.load(str(before)), model, onnx.load(str(after)))
    onnx.helper.set_model_props(model, {**metadata(student, spec), "precision": "int8"})
    onnx.checker.check_model(model)
    onnx.save_model(model, str(output))
