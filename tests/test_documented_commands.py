"""Every command in README and documentation exists and has the flags that are named with it."""

from __future__ import annotations

import copy
import functools
import importlib
import re
import sys
from pathlib import Path

import pytest
import tyro
from nerfstudio.configs.method_configs import all_methods

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *sorted(ROOT.glob("docs/*.md"))]
MODULES = {
    "r2l-export": "r2l_nerfstudio.scripts.export",
    "r2l-fleet": "r2l_nerfstudio.scripts.fleet",
    "r2l-import": "r2l_nerfstudio.scripts.import_checkpoint",
    "r2l-plan": "r2l_nerfstudio.scripts.plan",
    "r2l-quickstart": "r2l_nerfstudio.scripts.quickstart",
    "r2l-report": "r2l_nerfstudio.scripts.report",
    "r2l-view": "r2l_nerfstudio.scripts.view",
    "python -m benchmarks": "benchmarks.__main__",
}
WITH_SUBCOMMANDS = ("r2l-export", "r2l-fleet", "python -m benchmarks")
CALL = re.compile(rf"(?<![\w-])(ns-train|{'|'.join(MODULES)})(?![\w-])(?: +([a-z][\w-]*))?([^`|#\n]*)")
FLAG = re.compile(r"--[a-z][\w.-]*\w")


@functools.cache
def flags(command: str, subcommand: str) -> frozenset[str]:
    """The flags in the help of a command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        patch.setattr(sys, "argv", [command, *filter(None, [subcommand]), "--help"])
        printed: list[str] = []
        patch.setattr(sys.stdout, "write", lambda text: printed.append(text) or len(text))
        with pytest.raises(SystemExit) as ended:
            if command == "ns-train":
                config = copy.deepcopy(all_methods[subcommand or "mobile-r2l"])
                tyro.cli(type(config), default=config, args=["--help"])
            else:
                importlib.import_module(MODULES[command]).main()
    assert not ended.value.code, f"there is no {command} {subcommand}"
    return frozenset(FLAG.findall("".join(printed)))


def calls(page: Path) -> list[tuple[str, str, list[str]]]:
    """Commands on a page: name, subcommand or method, flags."""
    return [(name, word or "", FLAG.findall(rest)) for name, word, rest in CALL.findall(page.read_text())]


def test_pages_name_many_flags() -> None:
    assert sum(len(named) for page in PAGES for *_, named in calls(page)) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_exist(page: Path) -> None:
    for command, word, named in calls(page):
        if not named:
            continue
        if command in WITH_SUBCOMMANDS and not word:
            known = frozenset().union(*(flags(command, sub) for sub in subcommands(command)))
        else:
            known = flags(command, word if command in (*WITH_SUBCOMMANDS, "ns-train") else "")
        for flag in named:
            assert flag in known or flag.replace("--no-", "--", 1) in known, f"{command} {word} has no {flag}"


def subcommands(command: str) -> list[str]:
    """All subcommands, for a page that names a flag of several."""
    if command == "r2l-fleet":
        return ["run", "status"]
    return list(importlib.import_module(MODULES[command]).COMMANDS)
