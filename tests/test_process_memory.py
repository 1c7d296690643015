"""What a process that renders for long does about its memory."""

from __future__ import annotations

import platform

import numpy as np
import psutil
import pytest

from r2l_nerfstudio.process_memory import limit_caches, return_freed_memory

IS_GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.mark.parametrize(("before", "after"), [({}, "64"), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}, "7")])
def test_caches_are_limited_unless_the_user_has_chosen(
    before: dict[str, str], after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", before)
    assert limit_caches() == IS_GLIBC
    assert before == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": after}


@pytest.mark.skipif(not IS_GLIBC, reason="only glibc has malloc_trim")
def test_freed_memory_is_returned() -> None:
    # Smaller than what malloc maps by itself, and the last one keeps the heap's end in place.
    blocks = [np.ones(12_000) for _ in range(2_000)]
    full = psutil.Process().memory_info().rss
    del blocks[:-1]
    assert return_freed_memory()
    assert psutil.Process().memory_info().rss < full - 120e6
