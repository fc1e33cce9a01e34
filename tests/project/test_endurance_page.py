"""What docs/endurance.md says of the long run is what its result says."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_figures_are_those_of_the_result() -> None:
    page = (ROOT / "docs/endurance.md").read_text(encoding="utf-8")
    (name,) = set(re.findall(r"benchmarks/results/(\S+-soak-\d{4}-\d\d-\d\d\.json)", page))
    result = json.loads((ROOT / "benchmarks/results" / name).read_text())
    (row,) = result["rows"]
    assert "+changes" not in result["provenance"]["commit"]
    assert row["problems"] == []
    said = page.split("## A run of half an hour")[1]
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
