"""Configuration fields that had other names: runs saved under the old names still open."""

from __future__ import annotations

from typing import Any, ClassVar


class RenamedFields:
    """Base of configurations with renamed fields.

    Nerfstudio's loader restores a saved configuration through `__setstate__`; our own (`config_builder`) reads `RENAMED`.
    """

    RENAMED: ClassVar[dict[str, str]] = {}
    """Current names by former names."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({self.RENAMED.get(name, name): value for name, value in state.items()})
