"""Writes the tables of docs/configuration.md from the code; a test fails when they differ.

python scripts/settings_docs.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from ft_handler import tasks
from ft_handler.config import ENVIRONMENT, CoreSettings, Settings, settings_table
from ft_handler.servers.torchserve.settings import TorchServeSettings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"


def _shown(default: object) -> str:
    if isinstance(default, str):
        return default
    return json.dumps(default)  # null, true, numbers: as YAML has them


def groups() -> dict[str, type[Settings]]:
    """Title -> settings: those of every model, of each task, of each server."""
    own = {f"Of `{name}`": tasks.get(name).settings for name in tasks.names()}
    return {"Of every model": CoreSettings, **own, "Of TorchServe's worker": TorchServeSettings}


def settings() -> str:
    """Every setting of the handler with its default, a table a group."""
    lines: list[str] = []
    for title, group in groups().items():
        lines += [f"### {title}", "", "| setting | default | meaning |", "|---|---|---|"]
        lines += [
            f"| `{n}` | `{_shown(value)}` | {text} |" for n, value, text in settings_table(group)
        ]
        lines.append("")
    return "\n".join(lines[:-1])


def environment() -> str:
    """Every environment variable of the package."""
    rows = [f"| `{name}` | {text} |" for name, text in ENVIRONMENT.items()]
    return "\n".join(["| variable | meaning |", "|---|---|", *rows])


def updated(page: str) -> str:
    """The page with both tables as they should be."""
    for name, table in (("settings", settings()), ("environment", environment())):
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)"
        page, count = re.subn(
            pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", page, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"error: {PAGE} has {count} places for '{name}', not 1")
    return page


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
