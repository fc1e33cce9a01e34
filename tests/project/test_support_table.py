"""The README says what the code supports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ft_handler import architectures, tasks

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))


def test_the_support_table_is_the_codes() -> None:
    from support_table import updated

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert updated(text) == text, "run scripts/support_table.py"


def test_what_is_refused_has_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import support_table

    one = architectures.get("mpnet")
    refused = tasks.get("question_answering")
    monkeypatch.setattr(type(one), "unserved", {refused.auto_class: "why"})
    rows = support_table.table().splitlines()[2:]
    (row,) = [row for row in rows if "MPNet" in row]
    assert "question answering" not in row
    assert "sequence classification" in row
    assert "ALBERT" not in row
