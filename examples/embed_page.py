"""Embed the web page of a student, made with `r2l-export web PAGE`, into a page of your own.

    python examples/embed_page.py PAGE my_site/index.html
    python -m http.server --directory my_site

The student's page is copied beside yours, and shown from a chosen view, without its controls.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

TEMPLATE = """<!doctype html>
<meta charset="utf-8">
<title>My scene</title>
<h1>My scene</h1>
<iframe src="student/?plain#azimuth=30&elevation=20" width="640" height="400" style="border: 0"></iframe>
"""


def main(page: Path, output: Path) -> None:
    """Write `output`, and copy the exported page into `student/` beside it."""
    if not (page / "index.html").is_file():
        sys.exit(f"{page} holds no exported page: make one with r2l-export web {page} --load-config …")
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(page, output.parent / "student", dirs_exist_ok=True)
    output.write_text(TEMPLATE, encoding="utf-8")
    print(f"{output}: open it through a server, for example python -m http.server --directory {output.parent}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
