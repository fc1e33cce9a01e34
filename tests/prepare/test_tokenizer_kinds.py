"""Tokenizers of other kinds than BERT's on their way into a traced folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from families import write_model, write_tokenizer_of
from readings import byte_level
from tiny import SEQUENCE_CLASSIFICATION
from tokenizers import AddedToken, Tokenizer

from ft_handler.errors import ConfigError, ModelError
from ft_handler.prepare import tokenizer as prepare
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.tokenizer import HARD_TEXTS, WrittenTokenizer, write_tokenizer
from ft_handler.text.tokenizer import load_tokenizer

pytest.importorskip("transformers")

ROBERTA = {
    "tokenizer_class": "RobertaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
    "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
    "mask_token": "<mask>",
}  # fmt: skip


def written(folder: Path, vocab_size: int, **changes: Any) -> WrittenTokenizer:
    """What tracing writes of the tokenizer in a folder."""
    (folder / "out").mkdir()
    options = TraceOptions(
        mode=SEQUENCE_CLASSIFICATION,
        model_name_or_path=str(folder),
        output=folder / "out",
        **changes,
    )
    return write_tokenizer(options, folder / "out", vocab_size)


def spelt(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = tokenizer.encode(text)
    return encoding.ids, encoding.offsets


@pytest.mark.parametrize("prefix", [None, False, True])
@pytest.mark.parametrize("trim", [None, False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_byte_level_flags_are_those_that_transformers_applies(
    tmp_path: Path, prefix: bool | None, trim: bool | None, inside: bool
) -> None:
    """The settings beside tokenizer.json win over it, and where they are silent the class's."""
    from transformers import AutoTokenizer

    own = byte_level(prefix=inside, trim=not inside)
    own.save(str(tmp_path / "tokenizer.json"))
    flags = {"add_prefix_space": prefix, "trim_offsets": trim}
    settings = ROBERTA | {name: value for name, value in flags.items() if value is not None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    made = written(tmp_path, own.get_vocab_size())
    assert not made.doubts
    served = load_tokenizer(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer
    for text in ("the old bridge", " The film. ", "caf\u00e9  \U0001f600", *HARD_TEXTS):
        assert spelt(served, text) == spelt(theirs, text)
    first = served.encode("the film", add_special_tokens=False)
    assert first.tokens[0].startswith("Ġ") == bool(prefix)
    second = served.encode("the film", add_special_tokens=False).offsets[-1]
    assert ("the film"[second[0]] == " ") == (trim is False)


@pytest.mark.parametrize(("model_type", "asked"), [("roberta", True), ("albert", False)])
def test_lower_casing_that_cannot_be_set_says_where_it_can(
    tmp_path: Path, model_type: str, asked: bool
) -> None:
    write_tokenizer_of(tmp_path, model_type)
    size = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size()
    with pytest.raises(ModelError, match=r"BERT's normalizer; this one .*tokenizer\.json"):
        written(tmp_path, size, do_lower_case=asked)


@pytest.mark.parametrize(("model_type", "asked"), [("roberta", False), ("albert", True)])
def test_lower_casing_as_it_is_may_be_asked_for(
    tmp_path: Path, model_type: str, asked: bool
) -> None:
    write_tokenizer_of(tmp_path, model_type)
    size = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size()
    assert written(tmp_path, size, do_lower_case=asked).lower_case is asked


def test_a_sentencepiece_model_alone_names_the_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    write_tokenizer_of(tmp_path, "xlm-roberta")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    with pytest.raises(ModelError, match=r"bpe\.model .*needs sentencepiece.*tokenizer\.json"):
        written(tmp_path, 300)


def empty_tokens(folder: Path) -> None:
    """A tokenizer with a token of controls, which BERT's normalizer drops."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("\u200b\u0007", normalized=True)])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_token_that_normalizes_to_nothing_is_refused_before_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, "bert", SEQUENCE_CLASSIFICATION)
    empty_tokens(tmp_path)

    def looked_for(*_: Any) -> Any:
        raise AssertionError("a text was tokenized")

    monkeypatch.setattr(prepare, "alike", looked_for)
    monkeypatch.setattr(prepare, "Template", looked_for)
    with pytest.raises(ModelError, match=r"added token .*normalizes to nothing"):
        written(tmp_path, 300)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: added token .* to nothing"):
        load_tokenizer(tmp_path)
