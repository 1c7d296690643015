"""Memory of a process that renders for long, at ever new image sizes: what was freed goes back to the system.

Nothing here is needed for a few frames. `r2l-view` uses it; a program that renders with `load_student` for days may.
"""

from __future__ import annotations

import ctypes
import os

_ARENA_MAX = -8
"""`M_ARENA_MAX` of glibc's malloc.h."""
_KERNELS = "64"
"""That oneDNN keeps. One is made for each shape; 1024, its default, are 100 MB and no frame is faster."""


def limit_caches() -> bool:
    """Bound what PyTorch's kernels and the heap keep; call it before the first student is loaded.

    oneDNN reads its bound from ONEDNN_PRIMITIVE_CACHE_CAPACITY, which stays as it is if it is set. glibc gives new
    threads heaps of their own, and each browser that connects to a viewer brings threads: let them share one.

    Returns:
        Whether the C library can: only glibc.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS)
    try:
        return ctypes.CDLL(None).mallopt(_ARENA_MAX, 1) == 1
    except (OSError, AttributeError, TypeError):  # not glibc; Windows names its libraries
        return False


def return_freed_memory() -> bool:
    """Give pages of the heap that are free back to the system, in about 10 ms; glibc itself returns only the last ones.

    Returns:
        Whether there were any.
    """
    try:
        return ctypes.CDLL(None).malloc_trim(0) == 1
    except (OSError, AttributeError, TypeError):
        return False
