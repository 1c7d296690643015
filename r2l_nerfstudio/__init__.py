"""R2L and MobileR2L for Nerfstudio: distil any trained model into a neural light field."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r2l_nerfstudio.student import Student, load_student

__all__ = ["Student", "load_student"]


def __getattr__(name: str) -> Any:
    # Late, since every `ns-*` command imports this package, and most need no student.
    if name in __all__:
        from r2l_nerfstudio import student

        return getattr(student, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
