"""What docs/endurance.md says of the long run is what its result says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def results() -> tuple[str, list[dict[str, Any]]]:
    """The part of the page that tells of runs, its lines joined, and the runs in their order."""
    page = (ROOT / "docs/endurance.md").read_text(encoding="utf-8")
    rows = []
    for name in re.findall(r"benchmarks/results/(\S+-soak-\d{4}-\d\d-\d\d\.json)", page):
        result = json.loads((ROOT / "benchmarks/results" / name).read_text())
        assert "+changes" not in result["provenance"]["commit"]
        (row,) = result["rows"]
        assert row["problems"] == []
        rows.append(row)
    return " ".join(page.split("## A run of half an hour")[1].split()), rows


def test_figures_of_the_later_run_are_those_of_its_result() -> None:
    said, (_, row) = results()
    requests, kills = sum(row["requests"].values()), row["events"]["kill"]
    assert f"{requests:,} requests with {kills} kills: no answer was wrong" in said
    assert row["wrong"] == 0
    most = max(event["lost"] for event in row["lost_by_event"])
    assert f"{sum(row['lost'].values())} requests were lost, at most {most} with one event" in said
    grown = [
        row["growth"][worker]["rss_end"] - row["growth"][worker]["rss_settled"]
        for worker in ("cls worker", "qa worker")
    ]
    assert f"grew by {grown[0] / 1e6:.1f} MB and {grown[1] / 1e6:.1f} MB" in said


def test_figures_are_those_of_the_result() -> None:
    said, (row, _) = results()
    mebibytes = {
        f"{row['growth'][worker][when] / 2**20:.0f} MiB"
        for worker in ("cls worker", "qa worker", "java")
        for when in ("rss_settled", "rss_end")
    }
    events = row["events"]
    for shown in (
        f"{sum(row['requests'].values()):,} requests",
        f"{row['requests']['tagged']:,} of them tagged",
        f"{events['kill']} workers were killed",
        f"{events['reload']} versions exchanged",
        f"{events['scale down']} times",
        f"{row['wrong'] or 'No'} answer was wrong",
        f"{sum(row['lost'].values())} requests were lost",
        f"at most {max(e['lost'] for e in row['lost_by_event'])} with one event",
        *mebibytes,
    ):
        assert shown in said, shown
