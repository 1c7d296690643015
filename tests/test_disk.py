"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from r2l_nerfstudio.disk import write_atomically


def test_text_and_bytes_replace_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "made" / "record"
    write_atomically(file, "größer")
    assert file.read_bytes() == "größer".encode()
    write_atomically(file, b"\x00\xff")
    assert file.read_bytes() == b"\x00\xff" and list(file.parent.iterdir()) == [file]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "record"
    write_atomically(file, b"before")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, b"after")
    assert file.read_bytes() == b"before" and list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_private_files_are_private_under_any_umask(tmp_path: Path) -> None:
    former = os.umask(0)
    try:
        write_atomically(tmp_path / "private", b"", is_private=True)
        write_atomically(tmp_path / "shared", b"")
    finally:
        os.umask(former)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o666
