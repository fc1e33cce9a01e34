"""The GEMM table: where it lives, what it keeps, what it refuses. Measuring needs a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from ft_handler import tune
from ft_handler.errors import EnvironmentProblem


def entry(rows: int, plan: str = "sm90:ping-pong 128x192") -> tune.Entry:
    return tune.Entry("float16", rows, 2304, 768, False, False, plan, 8.5)


def test_the_default_place_is_named_after_the_gpu(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = tmp_path / ".cache/ft_handler/tuning/nvidia-h200-nvl.json"
    assert tune.default_path("NVIDIA H200 (NVL)") == expected


def test_a_second_run_replaces_what_it_measured_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "table.json"
    tune.write_table(path, "GPU", [entry(32), entry(64)])
    tune.write_table(path, "GPU", [entry(64, "sm90:other"), entry(128)])
    table = tune.read_table(path)
    assert table["gpu"] == "GPU"
    assert {e["rows"]: e["plan"] for e in table["entries"]} == {
        32: "sm90:ping-pong 128x192",
        64: "sm90:other",
        128: "sm90:ping-pong 128x192",
    }


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}'])
def test_other_files_are_refused_in_words(tmp_path: Path, content: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(EnvironmentProblem, match="not a GEMM table"):
        tune.read_table(path)


def test_an_encoder_layer_has_four_linear_layers() -> None:
    layers = tune.layers_of(768, 3072)
    assert [(x.n, x.k, x.gelu, x.norm) for x in layers] == [
        (2304, 768, False, False),
        (768, 768, False, True),
        (3072, 768, True, False),
        (768, 3072, False, True),
    ]
