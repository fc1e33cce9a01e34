"""Two versions of a model in one store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ft_handler.servers.torchserve.archive import archive


def test_versions_are_served_beside_each_other(
    traced: Mapping[str, Path], start_server: Callable[..., Any], tmp_path: Path
) -> None:
    for version in ("1.0", "2.0"):
        archive(traced["sequence_classification"], "cls", version, tmp_path)
    running = start_server(tmp_path, [])
    assert running.describe("cls")["modelVersion"] == "2.0"
    one = running.predict("cls", "a good film").json()
    for version in ("1.0", "2.0"):
        answer = running.predict(f"cls/{version}", "a good film")
        assert (answer.status_code, answer.json()) == (200, one)
    assert running.manage("PUT", "/models/cls/1.0/set-default").status_code == 200
    assert running.describe("cls")["modelVersion"] == "1.0"
