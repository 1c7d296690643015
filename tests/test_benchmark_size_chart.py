"""The chart of a page's bytes against quality."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

# The package of benchmarks lies beside the installed one.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.size_chart import CHART, SizeChart, measured  # noqa: E402
from r2l_nerfstudio.errors import InputError  # noqa: E402


def test_every_measured_student_is_a_point(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="benchmarks distil"):
        SizeChart(tmp_path).main()
    row = {
        "method": "r2l-lite",
        "capture": "barn",
        "resolution": "60x40",
        "network_megabytes_fp16": 1.5,
        "student_psnr": 30.0,
    }
    (tmp_path / "distil_barn_r2l-lite.json").write_text(json.dumps(row))
    assert measured(tmp_path) == [("r2l-lite, barn 60x40", pytest.approx(1.54), 30.0)]
    SizeChart(tmp_path).main()
    with Image.open(tmp_path / CHART) as chart:
        assert min(chart.size) > 400
        colors = {color for _, color in chart.convert("RGB").getcolors(1 << 20) or ()}
    assert {(31, 119, 180), (127, 127, 127)} <= colors, "ours and the published ones"
