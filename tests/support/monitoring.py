"""Prometheus' programs, and the queries of what lies in deploy/monitoring/."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "monitoring"
DASHBOARD = FOLDER / "grafana" / "dashboards" / "ft_handler.json"
ALERTS = FOLDER / "alerts.yml"


def program(name: str) -> str:
    """Path of `prometheus` or `promtool`; skips where there is none, and fails in CI."""
    found = shutil.which(name) or shutil.which(name, path=ROOT / "build" / "prometheus/usr/bin")
    if found is None and not os.environ.get("CI"):
        pytest.skip(f"{name} is not installed (scripts/prometheus.sh)")
    assert found is not None, name
    return found


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels that show something."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def dashboard_queries(model: str = ".+", interval: str = "1m") -> Iterator[tuple[str, str]]:
    """(title of the panel, query) of every target, with the variables put in."""
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"].replace("$model", model)
            yield panel["title"], query.replace("$__rate_interval", interval)


def rules() -> list[dict[str, str]]:
    """Recording rules and alerts."""
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def metrics_in(query: str) -> set[str]:
    """Names of the metrics that a query asks for."""
    found = re.findall(r"\b(?:ft|ts)_\w+|\bRequests\dXX\b|\bup\b", query)
    return set(found) - {"ft_handler"}
