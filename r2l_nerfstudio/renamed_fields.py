"""Configuration fields and weights that had other names: runs saved under the former names still open."""

from __future__ import annotations

import re
from typing import Any, ClassVar


class RenamedFields:
    """Base of configurations with renamed fields.

    Nerfstudio's loader restores a saved configuration through `__setstate__`; our own (`config_builder`) reads `RENAMED`.
    """

    RENAMED: ClassVar[dict[str, str]] = {}
    """Current names by former names."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({self.RENAMED.get(name, name): value for name, value in state.items()})


def current_name(weight: str) -> str:
    """Return the name that a student's weight has today, given its name in a checkpoint, with or without prefixes."""
    return re.sub(r"(^|\.)ray_code\.", r"\1ray_encoding.", weight)
