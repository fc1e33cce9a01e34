"""What lies in deploy/monitoring/ asks for metrics that exist, and is what its readers take."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from monitoring import (
    DASHBOARD,
    FOLDER,
    ROOT,
    dashboard_queries,
    metrics_in,
    panels,
    program,
    rules,
)

from ft_handler.servers.torchserve.exporter import COUNTERS, GAUGES
from ft_handler.servers.torchserve.metrics import METRICS
from ft_handler.servers.torchserve.properties import METRICS_CONFIG


def known() -> set[str]:
    """Every name that can be asked for."""
    own = {m.name for m in METRICS if m.kind != "histogram"}
    own |= {m.name + s for m in METRICS if m.kind == "histogram" for s in ("_bucket", "_count")}
    of_torchserve = yaml.safe_load(METRICS_CONFIG.read_text(encoding="utf-8"))["ts_metrics"]
    own |= {m["name"] for kind in of_torchserve.values() for m in kind}
    return own | {*GAUGES, *COUNTERS} | {"up"}


def test_every_query_asks_for_metrics_that_exist() -> None:
    queries = [*dashboard_queries(), *((r.get("alert", ""), r["expr"]) for r in rules())]
    assert len(queries) > 30
    for title, query in queries:
        asked = metrics_in(query)
        assert asked, title
        assert asked <= known(), (title, asked - known())


def test_everything_that_is_exported_is_shown() -> None:
    asked = set().union(*(metrics_in(query) for _, query in dashboard_queries()))
    shown = {name.removesuffix("_bucket").removesuffix("_count") for name in asked}
    alerted = set().union(*(metrics_in(rule["expr"]) for rule in rules()))
    own = {m.name for m in METRICS} | {*GAUGES, *COUNTERS}
    # The log says more of it than a curve could.
    assert own - shown - alerted == {"ft_undecodable_total"}


def test_the_dashboard_is_in_order() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    everything = dashboard["panels"]
    assert len({p["id"] for p in everything}) == len(everything)
    places = set()
    for panel in everything:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not places & cells, panel["title"]
        places |= cells
    assert all(p["description"].endswith(".") for p in panels())
    variables = {v["name"] for v in dashboard["templating"]["list"]}
    assert variables == set(re.findall(r"\$\{?(?!__)(\w+)", json.dumps(everything)))


def test_grafana_finds_the_data_source_and_the_dashboard() -> None:
    folder = FOLDER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    (provider,) = yaml.safe_load((folder / "dashboards" / "ft_handler.yml").read_text())[
        "providers"
    ]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "--lint-fatal", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_has_nothing_against_it(arguments: tuple[str, ...]) -> None:
    ran = subprocess.run(
        [program("promtool"), *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_page_on_metrics() -> None:
    folder = str(Path(program("promtool")).parent)
    ran = subprocess.run(
        [sys.executable, "scripts/run_doc.py", "docs/metrics.md"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("SUCCESS") >= 3


def test_every_alert_is_tested_to_fire_and_to_be_silent() -> None:
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert alerts == {case["alertname"] for case in cases if case.get("exp_alerts")}
    assert alerts == {case["alertname"] for case in cases if not case.get("exp_alerts")}
