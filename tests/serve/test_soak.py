"""A short soak: traffic, kills, reloads and scaling; and that its verdict notices what is wrong."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psutil", reason="psutil is not installed")


@pytest.fixture(scope="module")
def soak() -> Any:
    """benchmarks/soak.py as a module."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    try:
        return importlib.import_module("soak")
    finally:
        sys.path.pop(0)


def test_nothing_is_lost_but_what_a_killed_worker_held(
    soak: Any, traced: Mapping[str, Path], tmp_path: Path
) -> None:
    folders = {kind: traced[mode] for kind, mode in soak.MODES.items()}
    tagged = soak.tagged_requests(folders, 20)
    server = soak.started(soak.make_store(folders, tmp_path), tmp_path, io.StringIO())
    try:
        record, grown = soak.soak(server, tagged, seconds=20, clients=4, pause=2)
    finally:
        server.stop()
    assert soak.verdict(record, grown) == []
    assert record.events == {"kill": 2, "reload": 1, "scale up": 1, "scale down": 1} | {
        name: count for name, count in record.events.items() if count > 2
    }
    assert min(record.sent["tagged"], record.sent["odd"]) > 100
    assert record.statuses[200] > 100
    assert record.statuses[400] > 0
    assert set(grown) == {"java", "cls worker", "qa worker"}


def test_the_verdict_notices(soak: Any) -> None:
    ended = soak.Ended("cls", 10.0, 10.1, "kill")

    def said(*lost: Any, wrong: tuple[str, ...] = (), **of: float) -> str:
        record = soak.Record(lost=list(lost), wrong=list(wrong), ended=[ended])
        mib = 1 << 20
        settled = {"rss_settled": 100.0 * mib, "rss_end": 100.0 * mib, "handles_settled": 5.0,
                   "handles_end": 5.0, "rss_slope_per_hour": 0.0}  # fmt: skip
        return " ".join(soak.verdict(record, {"cls worker": settled | of}))

    held = soak.Sent("cls", 9.9, 10.2, 507)
    assert said(*[held] * soak.BATCH_SIZE) == ""
    assert "over a worker's batch" in said(*[held] * (soak.BATCH_SIZE + 1))
    for other in (
        soak.Sent("qa", 9.9, 10.2, 507),
        soak.Sent("cls", 2.0, 9.0, 500),
        soak.Sent("cls", 12.0, 12.5, None),
    ):
        assert "while no process of it was ended" in said(other)
    assert "wrong answer" in said(wrong=("cls: b'{}'",))
    assert "memory grew" in said(rss_end=200.0 * (1 << 20))
    assert "handles" in said(handles_end=60.0)


def test_a_tagged_answer_is_right_or_wrong(soak: Any) -> None:
    tagged = soak.Tagged("cls", {"text": "a"}, {"label": "good", "score": 0.5})
    assert tagged.right({"label": "good", "score": 0.50001})
    for wrong in (
        {"label": "bad", "score": 0.5},
        {"label": "good", "score": 0.6},
        [],
        {"code": 400},
    ):
        assert not tagged.right(wrong)
