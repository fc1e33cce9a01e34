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


def figures_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/figures.py over a repository of its own, without results."""
    figures = load_script("scripts/figures.py")
    results = folder / "benchmarks" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(figures, "RESULTS", results)
    monkeypatch.setattr(figures, "ROOT", folder)
    return figures


def write_result(figures: Any, day: str, ours: float = 2.0, commit: str = "0" * 40) -> None:
    """One encoder result of a GPU."""
    provenance = {
        "date": f"{day}T00:00:00+00:00", "cpu": "a cpu", "gpu": "a gpu", "threads": 2,
        "commit": commit, "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    row = {
        "workload": "base ragged b16 s128", "tokens": 32, "padded": 32,
        "ms": {"hf_sdpa": 8.0, "packed_compile_graph": 4.0, "gemms_graph": 2.5, "ours": ours},
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
