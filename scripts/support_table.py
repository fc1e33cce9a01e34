"""Writes the README's table of what is supported from the code; a test fails when they differ.

    python scripts/support_table.py

Architectures that serve the same tasks share a row, precisions that the same devices serve too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ft_handler import architectures, precisions, tasks
from ft_handler.errors import ModelError

PAGE = Path(__file__).resolve().parent.parent / "README.md"
DEVICES = {"cpu": "CPU", "cuda": "NVIDIA GPU"}


def served(model_type: str) -> tuple[str, ...]:
    """The tasks that an architecture serves."""
    architecture = architectures.get(model_type)
    found = []
    for name in tasks.names():
        try:
            architecture.head(tasks.get(name))
        except ModelError:
            continue
        found.append(name)
    return tuple(found)


def grouped(names: Iterable[str], key: Callable[[str], tuple[str, ...]]) -> dict[str, list[str]]:
    """What the key gives, as text -> the names that give it."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(", ".join(key(name)), []).append(name)
    return groups


def titled(model_type: str) -> str:
    """An architecture's name, with transformers' own where that is another word."""
    title = architectures.get(model_type).title
    return title if title.lower() == model_type else f"{title} (`{model_type}`)"


def table() -> str:
    """The table in Markdown."""
    families = grouped(architectures.names(), served)
    kinds = grouped(precisions.names(), lambda n: tuple(DEVICES[d] for d in devices_of(n)))
    lines = ["| architecture | task | precision | device |", "|---|---|---|---|"]
    for of_tasks, model_types in families.items():
        for devices, of_precisions in kinds.items():
            cells = [
                ", ".join(map(titled, model_types)),
                of_tasks.replace("_", " "),
                ", ".join(of_precisions),
                devices,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def devices_of(precision: str) -> tuple[str, ...]:
    """The types of devices that serve a precision."""
    return precisions.get(precision).devices


def updated(page: str) -> str:
    """The page with the table between its two marks."""
    pattern = r"(<!-- support: [^\n]*-->\n).*?(<!-- end of support -->)"
    page, count = re.subn(pattern, lambda m: f"{m[1]}{table()}\n{m[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"error: {PAGE} has {count} places for the table, not 1")
    return page


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
