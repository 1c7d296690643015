"""Measurements as a self-contained HTML page and as Markdown."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from r2l_nerfstudio.distillation.learning_curve import CurvePoint
from r2l_nerfstudio.report.measure import ComparedView, EngineTime, Measurements

LARGEST = 1000
"""Largest width in pixels; wider images are shrunk for the page."""
COLORS = ("#2f7fd0", "#d0612f", "#2f9e5a")

Table = tuple[list[str], list[list[str]]]
"""Column titles and rows."""


def as_markdown(found: Measurements) -> str:
    """Return the report's tables as Markdown."""
    parts = [f"# {_title(found)}", "", _about(found), ""]
    for title, (columns, rows) in _tables(found).items():
        parts += [f"## {title}", ""]
        parts += [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
        parts.append("")
    if found.learning_curve:
        last = found.learning_curve[-1]
        parts += [
            f"Learning curve: {len(found.learning_curve)} measurements, the last one after {last.minutes:.1f} min."
        ]
    return "\n".join(parts).rstrip() + "\n"


def as_html(found: Measurements) -> str:
    """Return the report as one page that loads nothing else."""
    tables = _tables(found)
    template = Template(files("r2l_nerfstudio.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(_title(found)),
        about=escape(_about(found)),
        facts="".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in _facts(found)),
        figures="\n".join(_figure(view, found) for view in found.shown),
        quality=_html_table(tables["Quality"]) + _html_table(tables["Worst views"]),
        engines=_html_table(tables["Frame time by engine"]),
        sizes=_html_table(tables["Size"]),
        curve=_curve(found.learning_curve),
    )


def _title(found: Measurements) -> str:
    return f"{'MobileR2L' if 'mobile' in found.method else 'R2L'} student ({found.method})"


def _about(found: Measurements) -> str:
    teacher = "" if found.teacher is None else f" distilled from {found.teacher['method']},"
    width, height = found.resolution
    return (
        f"{found.run},{teacher} measured on {found.device}."
        f" {len(found.views)} of {found.photos_in_test_split} test views of {width}x{height} pixels."
    )


def _number(value: float | None, unit: str = "", digits: int = 2) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}{unit}" if math.isfinite(value) else "equal"


def _facts(found: Measurements) -> list[tuple[str, str]]:
    facts = [("against photos", _number(found.mean("student", "psnr"), " dB"))]
    if found.teacher is not None:
        facts.append(("teacher against photos", _number(found.mean("teacher", "psnr"), " dB")))
    if found.unseen is not None:
        facts.append(("against the teacher, unseen cameras", _number(found.unseen.mean, " dB")))
    times = [time for time in found.engines if time.milliseconds is not None]
    if times:
        fastest = min(times, key=lambda time: time.milliseconds or math.inf)
        facts.append((f"per frame, {fastest.engine} {fastest.precision}", _number(fastest.milliseconds, " ms", 1)))
    facts.append(("weights in fp16", _number(found.sizes["network_megabytes_fp16"], " MB", 1)))
    return facts


def _tables(found: Measurements) -> dict[str, Table]:
    quality: list[list[str]] = []
    for metric, unit, digits in (("psnr", " dB", 2), ("ssim", "", 3), ("lpips", "", 3), ("gmsd", "", 3)):
        student, teacher = found.mean("student", metric), found.mean("teacher", metric)
        if student is not None:
            values = [_number(student, unit, digits), _number(teacher, unit, digits)]
            quality.append([f"{metric.upper()} against photos, mean", *values])
    if found.detail is not None:
        quality.append(["fine detail, share of the teacher's energy", _number(found.detail), ""])
    if found.unseen is not None:
        unseen = found.unseen
        quality.append(
            [f"PSNR against the teacher, {unseen.cameras} unseen cameras, mean", _number(unseen.mean, " dB"), ""]
        )
        quality.append(["the same, lowest", _number(unseen.lowest, " dB"), ""])
        quality += [
            [f"the same at {zoom} times the focal length, mean", _number(value, " dB"), ""]
            for zoom, value in unseen.zoom.items()
        ]
    sizes_apart = [_number(value, " dB") for value in (found.between_sizes, found.teacher_between_sizes)]
    quality.append(["PSNR of one camera at other sizes, lowest", *sizes_apart])
    worst = [
        [
            view.name,
            _number(view.student["psnr"], " dB"),
            "" if view.teacher is None else _number(view.teacher["psnr"], " dB"),
            _number(view.against_teacher, " dB"),
        ]
        for view in found.worst()
    ]
    sizes = [
        ["parameters", f"{found.sizes['network_parameters']:,.0f}"],
        ["weights in fp16", _number(found.sizes["network_megabytes_fp16"], " MB", 1)],
        ["checkpoint", _number(found.sizes["checkpoint_megabytes"], " MB", 1)],
        ["operations per pixel", f"{found.sizes['flop_per_pixel'] / 1e3:,.1f} kFLOP"],
    ]
    if found.teacher is not None:
        sizes.append(["teacher's checkpoint", _number(found.teacher["checkpoint_megabytes"], " MB", 1)])
    engines = [_engine_row(time) for time in found.engines]
    teacher_time = found.frame_milliseconds.get("teacher")
    if teacher_time is not None and found.teacher is not None:
        engines.append([f"teacher ({found.teacher['method']})", "", _number(teacher_time, " ms", 1), "", ""])
    return {
        "Quality": (["", "student", "teacher"], quality),
        "Worst views": (["photo", "student", "teacher", "student against teacher"], worst),
        "Frame time by engine": (["engine", "precision", "frame", "agreement with fp32", ""], engines),
        "Size": (["", ""], sizes),
    }


def _engine_row(time: EngineTime) -> list[str]:
    if time.milliseconds is None:
        return [time.engine, "", "", "", f"not available: {time.skipped}"]
    fps = f"{1e3 / time.milliseconds:.1f} frames per second"
    return [
        time.engine,
        time.precision or "",
        _number(time.milliseconds, " ms", 1),
        _number(time.parity, " dB", 0),
        fps,
    ]


def _html_table(table: Table) -> str:
    columns, rows = table
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure(view: ComparedView, found: Measurements) -> str:
    images = {"photo": view.photo, "teacher": view.teacher, "student": view.student}
    sources = {name: _data_url(image) for name, image in images.items() if image is not None}
    pairs = [(a, "student") for a in ("teacher", "photo") if a in sources]
    if "photo" in sources and "teacher" in sources:
        pairs.append(("photo", "teacher"))
    left, right = pairs[0]
    options = "".join(f'<option value="{a}|{b}">{a} and {b}</option>' for a, b in pairs)
    score = next(score for score in found.views if score.name == view.name)
    return (
        f"<figure><figcaption><span>{escape(view.name)}, {_number(score.student['psnr'], ' dB')} against the photo</span>"
        f'<select aria-label="Images to compare">{options}</select></figcaption>'
        f'<div class="slider" style="--cut: 50%"><img class="left" alt="{left}" src="{sources[left]}">'
        f'<img class="right" alt="{right}" src="{sources[right]}"><span class="from">{left}</span>'
        f'<span class="to">{right}</span><input type="range" min="0" max="100" value="50" step="0.1"'
        f' aria-label="Position of the dividing line"></div>'
        f'<script type="application/json">{json.dumps(sources)}</script></figure>'
    )


def _data_url(image: Float[Tensor, "height width 3"]) -> str:
    picture = Image.fromarray((image.clamp(0, 1) * 255).round().byte().numpy())
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=92, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _curve(points: Sequence[CurvePoint]) -> str:
    """Return the learning curve as SVG: training minutes across, PSNR in dB up."""
    if not points:
        return '<p class="note">This run has no learning curve: nothing was measured on held-out views.</p>'
    width, height, left, top, right, bottom = 720, 300, 50, 10, 150, 40
    low, high = math.floor(min(point.psnr for point in points)), math.ceil(max(point.psnr for point in points))
    high = max(high, low + 1)
    last = max(max(point.minutes for point in points), 1e-3)

    def across(minutes: float) -> float:
        return left + minutes / last * (width - left - right)

    def up(psnr: float) -> float:
        return height - bottom - (psnr - low) / (high - low) * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="PSNR on held-out views over training time">']
    step = max(1, math.ceil((high - low) / 6))
    for value in range(low, high + 1, step):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{up(value) + 4:.1f}" text-anchor="end">{value} dB</text>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        minutes = share * last
        label = f"{minutes:.1f}" if last < 20 else f"{minutes:.0f}"
        parts.append(f'<text x="{across(minutes):.1f}" y="{height - bottom + 18}" text-anchor="middle">{label}</text>')
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">minutes of training</text>'
    )
    for number, name in enumerate(dict.fromkeys(point.name for point in points)):
        own = [point for point in points if point.name == name]
        color = COLORS[number % len(COLORS)]
        path = " ".join(f"{across(point.minutes):.1f},{up(point.psnr):.1f}" for point in own)
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{path}"/>')
        parts += [
            f'<circle cx="{across(point.minutes):.1f}" cy="{up(point.psnr):.1f}" r="2.5" fill="{color}">'
            f"<title>{point.psnr:.2f} dB, iteration {point.step}</title></circle>"
            for point in own
        ]
        label = name[name.find("(") + 1 :].rstrip(")") if "(" in name else name
        parts.append(f'<text x="{width - right + 10}" y="{up(own[-1].psnr) + 4:.1f}">{escape(label)}</text>')
    return "".join(parts) + "</svg>"
