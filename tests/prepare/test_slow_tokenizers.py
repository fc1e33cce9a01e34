"""Tokenizers that transformers has in Python alone: refused by name, or served by their file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from families import write_model
from tiny import SEQUENCE_CLASSIFICATION
from tokenizers import Tokenizer

from ft_handler.errors import ModelError
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.tokenizer import alike
from ft_handler.prepare.trace import trace

pytest.importorskip("transformers")


def refusal(folder: Path, model_type: str, files: dict[str, str], **settings: Any) -> str:
    """What is said of a checkpoint with these files of a tokenizer."""
    write_model(folder, model_type, SEQUENCE_CLASSIFICATION)
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    for name, text in {**files, "tokenizer_config.json": json.dumps(settings)}.items():
        (folder / name).write_text(text, encoding="utf-8")
    options = TraceOptions(
        mode=SEQUENCE_CLASSIFICATION, model_name_or_path=str(folder), output=folder / "out"
    )
    with pytest.raises(ModelError) as refused:
        trace(options)
    assert not (folder / "out" / "traced_model.pt").exists()
    return str(refused.value)


@pytest.mark.parametrize("name", ["BertweetTokenizer", "PhobertTokenizer"])
def test_tweets_and_vietnamese(name: str, tmp_path: Path) -> None:
    files = {"vocab.txt": "a 1\nb@@ 2\n", "bpe.codes": "a b 1\n"}
    said = refusal(tmp_path, "roberta", files, tokenizer_class=name)
    assert said.endswith(f": {name} has no fast form, and no tokenizer.json brings one")


def test_a_fast_form_of_the_checkpoints_own_is_served(tmp_path: Path) -> None:
    write_model(tmp_path, "roberta", SEQUENCE_CLASSIFICATION)
    (tmp_path / "vocab.txt").write_text("a 1\nb@@ 2\n")
    (tmp_path / "bpe.codes").write_text("a b 1\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PhobertTokenizer"}')
    options = TraceOptions(
        mode=SEQUENCE_CLASSIFICATION, model_name_or_path=str(tmp_path), output=tmp_path / "out"
    )
    said: list[str] = []
    folder = trace(options, said.append)
    assert [line for line in said if "PhobertTokenizer has no fast form; its tok" in line]
    ours, theirs = (Tokenizer.from_file(str(p / "tokenizer.json")) for p in (folder, tmp_path))
    assert alike(ours, theirs)
    with pytest.raises(ModelError, match=r"no fast form; .* \(--strict\)"):
        trace(dataclasses.replace(options, strict=True))


def test_japanese(tmp_path: Path) -> None:
    """Its words need a package that is missing, or are found and then cannot be served."""
    files = {"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n"}
    settings = {"word_tokenizer_type": "mecab", "subword_tokenizer_type": "wordpiece"}
    said = refusal(tmp_path, "bert", files, tokenizer_class="BertJapaneseTokenizer", **settings)
    assert "BertJapaneseTokenizer" in said
    assert "fast form" in said
    assert "\n" not in said


def test_what_the_library_cannot_read(tmp_path: Path) -> None:
    files = {"vocab.json": '{"<s>": 0, "a": 1, "b": 2}', "merges.txt": "#version\na b\n"}
    said = refusal(tmp_path, "roberta", files, tokenizer_class="RobertaTokenizer")
    assert said.startswith(f"tokenizer {tmp_path}: ")
