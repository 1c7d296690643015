"""The web page as one HTML file that opens without a server."""

from __future__ import annotations

import base64
import json
import re
import tempfile
from pathlib import Path

from r2l_nerfstudio.atomic_output import atomic_files
from r2l_nerfstudio.distillation.pose_sampling import CaptureCameras
from r2l_nerfstudio.export.web_folder import SCENE, PageOptions, WebExport, export_web
from r2l_nerfstudio.student import Student

_IMPORT = re.compile(r"^import [^;]*? from \"\./([\w-]+\.js)\";\n", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(async )?(function|class|const))", re.MULTILINE)


def export_single_file(
    student: Student,
    cameras: CaptureCameras,
    output: Path,
    options: PageOptions,
    overwrite: bool = False,
) -> WebExport:
    """Write the page of `export_web` as one HTML file, without the fallback, which is several times as large.

    Args: as `export_web`; `output` is the file.

    Raises:
        InputError: as `export_web`.
    """
    with atomic_files(output, overwrite) as file, tempfile.TemporaryDirectory() as scratch:
        made = export_web(student, cameras, None, Path(scratch) / "page", options)
        file.write_text(joined_page(made.folder))
        return WebExport(Path(output), made.psnr, made.notes)


def joined_page(folder: Path) -> str:
    """Return the page of a folder as one text."""
    scene = json.loads((folder / SCENE).read_text())
    names = [SCENE, scene["poster"], scene["student"]["weights"]["file"]]
    files = {name: base64.b64encode((folder / name).read_bytes()).decode() for name in names}
    page = (folder / "index.html").read_text()
    style = (folder / "page.css").read_text()
    held = f"<script>window.lightFieldFiles = {json.dumps(files)};</script>"

    page = page.replace('<link rel="stylesheet" href="page.css" />', f"<style>\n{style}</style>\n    {held}")
    module = joined_modules(folder, "light-field.js")
    return page.replace(
        '<script type="module" src="light-field.js"></script>', f'<script type="module">\n{module}</script>'
    )


def joined_modules(folder: Path, entry: str) -> str:
    """Return a module and all that it imports as one: each name is declared in one of them only.

    Raises:
        ValueError: a module would end the script that holds it.
    """
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order:
            return
        for match in _IMPORT.finditer((folder / name).read_text()):
            visit(match[1])
        order.append(name)

    visit(entry)
    parts = [_EXPORT.sub("", _IMPORT.sub("", (folder / name).read_text())) for name in order]
    text = "\n".join(parts)
    if "</script" in text:
        raise ValueError("a module holds the end of a script")
    return text
