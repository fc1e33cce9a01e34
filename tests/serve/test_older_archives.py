"""Archives of the first format live on: their files, settings and a library of their own beside."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Running

from ft_handler.files import LIBRARY

FILES = Path(__file__).resolve().parents[1] / "data" / "format1"
REQUESTS = {
    "sequence_classification": {"text": "the old bridge of the city"},
    "question_answering": {"question": "who built it", "context": "an engineer built the bridge"},
}


@pytest.mark.parametrize("mode", REQUESTS)
def test_an_archive_of_the_first_format_is_served(
    running: Running,
    pack_with_stock_archiver: Callable[..., None],
    tiny_tokenizer: Path,
    tmp_path: Path,
    mode: str,
) -> None:
    shutil.copy(FILES / f"{mode}.pt", tmp_path / "traced_model.pt")
    # A library that is no library: the installed package's own is preferred.
    (tmp_path / LIBRARY).write_bytes(b"of another age")
    name = f"older_{mode}"
    settings = tmp_path / "model-config.yaml"
    settings.write_text(f"minWorkers: 1\nmaxWorkers: 1\nhandler:\n  mode: {mode}\n")
    extra = [tiny_tokenizer / "tokenizer.json", tmp_path / LIBRARY]
    pack_with_stock_archiver(name, tmp_path, extra, settings)
    added = running.manage("POST", "/models", url=f"{name}.mar", initial_workers=1,
                           synchronous="true")  # fmt: skip
    assert added.status_code == 200, added.text
    try:
        answer = running.predict_json(name, REQUESTS[mode])
        assert answer.status_code == 200, answer.text
        assert set(answer.json()) == (
            {"label", "score"} if mode == "sequence_classification"
            else {"score", "start", "end", "answer"}
        )  # fmt: skip
    finally:
        running.manage("DELETE", f"/models/{name}")
