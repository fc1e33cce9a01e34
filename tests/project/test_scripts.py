"""The scripts behind the demo, the documentation and the benchmarks' figures."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_script(path: str) -> Any:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_marked_blocks_run() -> None:
    run_doc = load_script("scripts/run_doc.py")
    text = "```bash run\necho one\n```\n```bash\nrm -rf x\n```\n```bash run\necho two\n```\n"
    assert run_doc.script(text).split("\n") == ["set -euo pipefail", "echo one", "", "echo two", ""]


def test_padding_avoided_adds_up() -> None:
    script = load_script("scripts/padding_avoided.py")
    labels = 'ModelName="m",Level="Model",Hostname="h",'
    text = (
        f"# TYPE ft_tokens_total counter\nft_tokens_total{{{labels}}} 75.0\n"
        f"ft_padding_avoided_total{{{labels}}} 25.0\nother_total{{{labels}}} 9.0\n"
    )
    assert script.counters(text) == {
        "m": {"ft_tokens_total": 75.0, "ft_padding_avoided_total": 25.0}
    }
    assert script.share(25, 75) == "25%"
    assert script.share(0, 0) == "0%"


class _Answers(http.server.BaseHTTPRequestHandler):
    """200 for a body that says good, 503 for any other."""

    protocol_version = "HTTP/1.1"
    seen: list[bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append(body)  # type: ignore[attr-defined]
        self.send_response(200 if body.startswith(b"good") else 503)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    server.daemon_threads = True
    server.seen = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_load_generator_counts(answering: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    load = load_script("benchmarks/load.py").load
    bodies = tmp_path / "bodies.txt"
    lines = [b"good one", b"bad", b"good two"]
    bodies.write_bytes(b"\n".join(lines) + b"\n")
    url = f"http://127.0.0.1:{answering.server_port}/predictions/m"
    seen = answering.seen  # type: ignore[attr-defined]
    for connections in (1, 3):
        seen.clear()
        found = load(url, bodies, "text/plain", connections, 0.3)
        # However few the machine finds time for: every connection sends at least one.
        assert len(seen) >= connections
        if connections == 1:
            assert seen == [body for body, _ in zip(cycle(lines), seen, strict=False)]
        good = len(seen) - seen.count(b"bad")
        assert (found["requests"], found["errors"]) == (good, seen.count(b"bad"))
        assert found["requests_per_s"] == pytest.approx(good / 0.3)
        assert 0 < found["p50_ms"] <= found["p99_ms"]


def test_figures_come_from_the_newest_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = figures_in(tmp_path, monkeypatch)
    assert figures.figures() == ""
    assert figures.summary() == ""
    write_result(figures, "2026-01-01", ours=9.0)
    write_result(figures, "2026-01-02", ours=2.0)
    text = figures.figures()
    assert "| base ragged b16 s128 | 32 | 8.000 | 4.000 | 2.500 | **2.000** | 0.50 | 0.80 |" in text
    assert "(results/gpu-encoder-2026-01-02.json)" in text
    assert "| 8.00 ms | 4.00 ms | **2.00 ms** |" in figures.summary()
    page = "a\n<!-- figures: x -->\nold\n<!-- end of figures -->\nb\n"
    assert "old" not in figures.updated(page)
    assert figures.updated(figures.updated(page)) == figures.updated(page)


def test_figures_of_fp8_stand_beside_those_of_fp16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = figures_in(tmp_path, monkeypatch)
    write_result(figures, "2026-01-02", ours_fp8=1.5, gemms_fp8=1.2, packed_fp8_tensor=1.0)
    text = figures.figures()
    # Another system in FP8 is no other system of the row in fp16.
    assert "| **2.000** | 0.50 | 0.80 | **1.500** | 0.75 | 1.25 |" in text
    assert "| 8.00 ms | 4.00 ms | **2.00 ms** |" in figures.summary()


def figures_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/figures.py over a repository of its own, without results."""
    figures = load_script("scripts/figures.py")
    results = folder / "benchmarks" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(figures, "RESULTS", results)
    monkeypatch.setattr(figures, "ROOT", folder)
    return figures


def write_result(
    figures: Any, day: str, ours: float = 2.0, commit: str = "0" * 40, **more: float
) -> None:
    """One encoder result of a GPU."""
    provenance = {
        "date": f"{day}T00:00:00+00:00", "cpu": "a cpu", "gpu": "a gpu", "threads": 2,
        "commit": commit, "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    row = {
        "workload": "base ragged b16 s128", "tokens": 32, "padded": 32,
        "ms": {
            "hf_sdpa": 8.0, "packed_compile_graph": 4.0, "gemms_graph": 2.5, "ours": ours, **more
        },
    }  # fmt: skip
    path = figures.RESULTS / f"gpu-encoder-{day}.json"
    path.write_text(json.dumps({"provenance": provenance, "rows": [row]}))


@pytest.mark.parametrize("commit", ["0" * 40 + "+changes", "unknown", "None"])
def test_figures_of_an_uncommitted_tree_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit: str
) -> None:
    figures = figures_in(tmp_path, monkeypatch)
    write_result(figures, "2026-01-02")
    write_result(figures, "2026-01-01", commit=commit)
    for write in (figures.figures, figures.summary):
        with pytest.raises(SystemExit, match=r"gpu-encoder-2026-01-01\.json .*not on a commit"):
            write()


def test_figures_older_than_the_kernels_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By history where the clone has the commit, else by date; other folders do not age them."""
    figures = figures_in(tmp_path, monkeypatch)
    kernels = tmp_path / "csrc/kernels/cuda"
    kernels.mkdir(parents=True)

    def commit(path: Path, day: str) -> str:
        path.write_text(f"// {day}\n")
        when = {"GIT_AUTHOR_DATE": f"{day}T12:00:00Z", "GIT_COMMITTER_DATE": f"{day}T12:00:00Z"}
        name = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        for command in (("add", "-A"), (*name, "commit", "-qm", day)):
            subprocess.run(["git", *command], cwd=tmp_path, check=True, env={**os.environ, **when})
        return str(figures.git("rev-parse", "HEAD")[1])

    write_result(figures, "2026-01-05")
    assert figures.OLDER not in figures.figures()  # no history at all
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    before = commit(kernels / "a.cu", "2026-01-01")
    after = commit(tmp_path / "README.md", "2026-01-02")
    for known in (before, after):
        write_result(figures, "2026-01-05", commit=known)
        assert figures.OLDER not in figures.figures() + figures.summary()
    changed = commit(kernels / "a.cu", "2026-01-04")
    write_result(figures, "2026-01-05", commit=after)  # measured later, of an older tree
    assert figures.OLDER in figures.figures()
    assert figures.OLDER in figures.summary()
    write_result(figures, "2026-01-05", commit=changed)
    assert figures.OLDER not in figures.figures()
    write_result(figures, "2026-01-05")  # a commit that this clone lacks
    assert figures.OLDER not in figures.figures()
    (figures.RESULTS / "gpu-encoder-2026-01-05.json").unlink()
    write_result(figures, "2026-01-03")
    assert figures.OLDER in figures.figures()


def test_lengths_of_the_mixes() -> None:
    table = json.loads((ROOT / "benchmarks/lengths.json").read_text())
    assert sum(count for _, count in table["sst2"]) == 872
    assert sum(count for _, count in table["squad"]) == 10570
    mean = sum(n * c for n, c in table["sst2"]) / 872
    assert mean == pytest.approx(25.2, abs=0.1)
    assert max(n for n, _ in table["squad"]) == 384


def test_lengths_stand_for_a_set() -> None:
    lengths_like = load_script("benchmarks/encoder.py").lengths_like
    table = json.loads((ROOT / "benchmarks/lengths.json").read_text())["sst2"]
    every = sorted(length for length, count in table for _ in range(count))
    assert lengths_like("sst2", 1).tolist() == [every[len(every) // 2]]
    many = lengths_like("sst2", 64)
    assert many.mean() == pytest.approx(sum(every) / len(every), abs=0.3)
    assert sorted(many) != many.tolist()
    assert many.tolist() == lengths_like("sst2", 64).tolist()


#: Column of the encoder benchmark -> the packages without which it is left out.
ENGINES = {
    "onnxruntime_fp32": ("onnx", "onnxscript", "onnxruntime"),
    "onnxruntime_int8": ("onnx", "onnxscript", "onnxruntime"),
    "openvino_int8": ("onnx", "onnxscript", "openvino", "nncf"),
    "ctranslate2_int8": ("ctranslate2",),
}


def test_encoder_rows_hold_every_engine_that_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_script("benchmarks/encoder.py")
    monkeypatch.setitem(encoder.MODELS, "tiny", (2, 64, 128, 4))
    ours = [f"ours_{precision}" for precision in encoder.PRECISIONS]
    out = tmp_path / "rows.json"
    encoder.main(
        ["--model", "tiny", "--lengths", "sst2", "ragged", "--batch", "1", "3", "--rounds", "2",
         "--max-length", "16", "--columns", "ours", "gemms_fp32", *ENGINES, "--no-plot",
         "--folder", str(tmp_path / "kept"), "--out", str(out)]
    )  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    names = [f"tiny {kind}" for kind in ("sst2 b1", "sst2 b3", "ragged b1 s16", "ragged b3 s16")]
    assert [row["workload"] for row in rows] == names
    present = [
        column
        for column, packages in ENGINES.items()
        if all(importlib.util.find_spec(package) for package in packages)
    ]
    for row in rows:
        assert set(row["ms"]) == {*ours, "gemms_fp32", *present}
        assert all(time > 0 for time in row["ms"].values())
        assert bool(row["missing"]) == (len(present) < len(ENGINES))
        errors = row["max_difference_from_hf_fp32"]
        assert errors["ours_fp32"] < 1e-5 < errors["ours_int8"] < 0.3


def write_cpu_result(figures: Any, name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """A result of a processor."""
    provenance = {
        "date": "2026-01-02T00:00:00+00:00", "cpu": "a cpu", "threads": 2, "commit": "0" * 40,
        "versions": {"torch": "2.13.0"}, "library": {"cpu_isa": "avx2"}, **more,
    }  # fmt: skip
    data = {"provenance": provenance, "rows": rows}
    (figures.RESULTS / f"cpu-{name}.json").write_text(json.dumps(data))


def test_figures_by_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = figures_in(tmp_path, monkeypatch)
    assert figures.precisions() == ""
    ms = {"ours_fp32": 120.0, "ours_bf16": 130.0, "ours_int8": 60.0, "gemms_fp32": 100.0}
    row = {
        "workload": "base sst2 b16", "tokens": 400, "padded": 800,
        "ms": {**ms, "ctranslate2_int8": 75.0, "openvino_int8": 150.0},
    }  # fmt: skip
    alone = {**row, "workload": "minilm sst2 b1", "ms": {"ours_fp32": 4.0, "gemms_fp32": 3.2}}
    write_cpu_result(figures, "precisions-a", [row, alone])
    page = figures.precisions()
    # Speeds beside fp32, and beside the fastest other engine; of BERT-base, with int8.
    assert "| a cpu, avx2, 2 threads | 16 sentences | 120 ms | 0.92x | 2.00x | 1.25x C" in page
    assert "minilm" not in page
    assert "](../benchmarks/results/cpu-precisions-a.json)" in page
    full = figures.figures()
    cells = (
        "| base sst2 b16 | 400 | 120 | 130 | 1.20 | **60.0** | 75.0 | 150 | 0.50 | 0.46 | 0.80 |"
    )
    assert cells in full
    assert "| minilm sst2 b1 | 400 | 4.00 |  | 1.25 |" in full
    taken = {"rss": 300.4}
    memory = {"without": {"rss": 200.0}, "loaded": taken, "answered": taken, "peak": 410.0}
    write_cpu_result(
        figures, "memory-a", [{"precision": "int8", "file": 99.6, **memory}], model="base"
    )
    assert "| int8 | 100 | 200 | 300 | 300 | 410 |" in figures.precisions()


def test_figures_of_serving_in_several_precisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = figures_in(tmp_path, monkeypatch)
    case = {"mix": "sst2", "batch_size": 32, "workers": 1, "connections": 64}
    rows = [
        {"system": system, "precision": precision, "requests_per_s": rate, "p50_ms": 1, "p99_ms": 2,
         **case}
        for system, precision, rate in (
            ("published", "fp32", 40), ("ours", "fp32", 280), ("ours", "int8", 520)
        )
    ]  # fmt: skip
    rows += [{**row, "mix": "squad"} for row in rows]
    named = {"model": "minilm", "precision": "fp32"}
    write_cpu_result(figures, "serving-a", rows, **named)
    full = figures.figures()
    assert "| published | ours fp32 | ours int8 | ours fp32 / published | ours int8 / pub" in full
    assert "| 40, 1/2 | 280, 1/2 | 520, 1/2 | **7.0x** | **13.0x** |" in full
    summary = figures.summary()
    assert "64 connections, fp32 | 40/s |  | **280/s** |" in summary
    assert "64 connections, int8 | 40/s |  | **520/s** |" in summary
    # A result of one precision, as older ones are, names no precision by row.
    plain = [{k: v for k, v in row.items() if k != "precision"} for row in rows[:2]]
    write_cpu_result(figures, "serving-a", plain + [{**r, "mix": "squad"} for r in plain], **named)
    assert "| published | ours | ours / published |" in figures.figures()
    assert figures.summary().count("| **280/s** |") == 2


def test_memory_of_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = load_script("benchmarks/memory.py")
    monkeypatch.setitem(memory.MODELS, "tiny", (2, 64, 128, 4))
    out = tmp_path / "memory.json"
    memory.main(["--model", "tiny", "--precision", "int8", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["precision"] == "int8"
    assert row["file"] > 1
    for when in ("without", "loaded", "answered"):
        assert 0 < row[when]["unique"] <= row[when]["rss"] <= row["peak"]
    assert row["loaded"]["rss"] > row["without"]["rss"]
