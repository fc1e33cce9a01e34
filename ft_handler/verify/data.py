"""Data files: what people have of texts with answers, read as examples."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_handler.errors import DataError


@dataclass(frozen=True, slots=True)
class Example:
    """One input, and the right answer where the file has one.

    texts  by the keys of a request: a text each, or a list of them
    gold   as the file has it: a label, answers, `Tag`s; None without one
    place  where it stands in the file, for messages
    """

    texts: Mapping[str, str | list[str]]
    gold: object
    place: str


@dataclass(frozen=True, slots=True)
class Tag:
    """The label of a word: characters of the text, and the label."""

    begin: int
    end: int
    label: str


@dataclass(frozen=True, slots=True)
class Layout:
    """How to read a file whose name and first line do not say it.

    format   one of `FORMATS`; None goes by the file's name
    columns  of a table, in their order; "-" is left out. None: the first line names them
    skip     lines left out at the beginning of a table
    """

    format: str | None = None
    columns: tuple[str, ...] | None = None
    skip: int = 0


#: The answer's own name among the columns.
GOLD = "label"
#: Usual names of columns and fields -> what they are.
_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("text", "text_a", "sentence", "sentence1", "question1", "premise"), "text"),
    **dict.fromkeys(("passage", "document"), "text"),
    **dict.fromkeys(("text_pair", "text_b", "sentence2", "question2", "hypothesis"), "text_pair"),
    **dict.fromkeys(
        (GOLD, "labels", "gold_label", "score", "answer", "answers", "tags", "ner_tags"), GOLD
    ),
    "question": "question",
    "context": "context",
    "tokens": "tokens",
    "words": "tokens",
    "query": "query",
    **dict.fromkeys(("texts", "documents", "passages"), "texts"),
    "positive": "positive",
    "negative": "negative",
}
#: Of these, whose values are lists of texts; one text is a list of one.
_LISTS = ("texts", "positive", "negative")
_KNOWN = ", ".join(_NAMES)
#: Of several columns with the answer, the one that is more of a label than the other.
_PREFERRED = (GOLD, "labels", "gold_label", "answers", "answer")


def read_examples(path: Path, layout: Layout, limit: int | None = None) -> list[Example]:
    """The examples of a file, the first `limit` of them; raises DataError saying what is wrong."""
    name = path.name.lower().removesuffix(".gz")
    suffix = name.rpartition(".")[2]
    kind = layout.format or _SUFFIXES.get(suffix)
    if kind is None:
        raise DataError(
            f"{path}: its name does not say what it is; --format takes {', '.join(FORMATS)}"
        )
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.name.lower().endswith(".gz") else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    examples: list[Example] = []
    try:
        for example in FORMATS[kind](text.removeprefix("\ufeff"), layout):
            examples.append(example)
            if len(examples) == limit:
                break
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path}: {error}") from None
    if not examples:
        raise DataError(f"{path}: holds no example")
    return examples


def sequences_of(example: Example) -> Iterator[Mapping[str, str]]:
    """What of an example a model reads together: a text, or a pair, by the keys of requests."""
    alone = {key: text for key, text in example.texts.items() if isinstance(text, str)}
    several = [
        text for texts in example.texts.values() if isinstance(texts, list) for text in texts
    ]
    if "query" in alone:
        several += [alone["text"]] if "text" in alone else []
        yield from ({"text": alone["query"], "text_pair": text} for text in several)
    elif alone:
        yield alone


# -- formats: a text and a layout to examples; ValueError says what is wrong ----------------------


def _tabs(text: str, layout: Layout) -> Iterator[Example]:
    # Of GLUE's files quotes are part of the text.
    yield from _table(csv.reader(_lines(text), delimiter="\t", quoting=csv.QUOTE_NONE), layout)


def _commas(text: str, layout: Layout) -> Iterator[Example]:
    yield from _table(csv.reader(io.StringIO(text, newline="")), layout)


def _lines(text: str) -> Iterator[str]:
    """Lines that end at line ends alone, not at every character that Unicode calls one."""
    return (line.removesuffix("\n").removesuffix("\r") for line in io.StringIO(text, newline="\n"))


def _table(rows: Any, layout: Layout) -> Iterator[Example]:
    csv.field_size_limit(1 << 24)
    columns = layout.columns
    for number, row in enumerate(rows, 1):
        if number <= layout.skip or not row:
            continue
        if columns is None:
            columns = _columns(row)
            continue
        if len(row) < len(columns):
            raise ValueError(f"line {number} has {len(row)} columns, not {len(columns)}")
        yield _example(
            {n: v for n, v in zip(columns, row, strict=False) if n != "-"}, f"line {number}"
        )


def _columns(header: Sequence[str]) -> tuple[str, ...]:
    names = [name.strip().lower() for name in header]
    if not any(name in _NAMES for name in names):
        raise ValueError(
            f"its first line names none of the columns {_KNOWN}; --columns says what they are"
        )
    return tuple(name if name in _NAMES else "-" for name in names)


def _example(fields: Mapping[str, object], place: str) -> Example:
    """An example of named fields; those of no known name are left out."""
    texts: dict[str, str | list[str]] = {}
    answers: dict[str, object] = {}
    tokens: list[str] | None = None
    for name, value in fields.items():
        key = _NAMES.get(name.lower())
        if key == GOLD:
            if value is not None:
                answers[name.lower()] = value
        elif key == "tokens":
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise ValueError(f"{place}: '{name}' must be a list of words")
            tokens = value
        elif key is not None and value is not None:
            if key in texts:
                raise ValueError(f"{place}: two fields are '{key}'; --columns says which one is")
            texts[key] = (
                _listed(value, name, place) if key in _LISTS else _single(value, name, place)
            )
    order = sorted(answers, key=lambda n: (n not in _PREFERRED, n))
    gold = answers[order[0]] if order else None
    if "positive" in texts or "negative" in texts:
        if gold is not None or "texts" in texts:
            raise ValueError(f"{place}: has 'positive' or 'negative' beside other texts or labels")
        kinds = [texts.pop(key, []) for key in ("positive", "negative")]
        texts["texts"] = [text for kind in kinds for text in kind]
        gold = [label for label, kind in zip((1, 0), kinds, strict=True) for _ in kind]
    if tokens is not None:
        return _tagged(tokens, gold, place)
    if not texts:
        raise ValueError(f"{place}: has none of the fields {_KNOWN}")
    return Example(texts, gold, place)


def _single(value: object, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: '{name}' must be a text")
    return value


def _listed(value: object, name: str, place: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{place}: '{name}' must be a list of texts")
    return texts


def _tagged(words: Sequence[str], labels: object, place: str) -> Example:
    """Words and their labels as a text with a blank between two words."""
    if labels is None:
        return Example({"text": " ".join(words)}, None, place)
    if not isinstance(labels, list) or len(labels) != len(words):
        raise ValueError(f"{place}: needs a label for each of its {len(words)} words")
    tags, begin = [], 0
    for word, label in zip(words, labels, strict=True):
        tags.append(Tag(begin, begin + len(word), str(label)))
        begin += len(word) + 1
    return Example({"text": " ".join(words)}, tags, place)


def _json_lines(text: str, layout: Layout) -> Iterator[Example]:
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            yield _of_object(json.loads(line), f"line {number}")


def _json(text: str, layout: Layout) -> Iterator[Example]:
    document = json.loads(text)
    if isinstance(document, list):
        for number, value in enumerate(document):
            yield _of_object(value, f"[{number}]")
        return
    try:
        paragraphs = [p for article in document["data"] for p in article["paragraphs"]]
        asked = [(paragraph, question) for paragraph in paragraphs for question in paragraph["qas"]]
        for paragraph, question in asked:
            texts = {"question": str(question["question"]), "context": str(paragraph["context"])}
            answers: list[str] | None = None
            if question.get("is_impossible"):
                answers = []
            elif "answers" in question:
                answers = [str(answer["text"]) for answer in question["answers"]]
            yield Example(texts, answers, f"question {question.get('id')}")
    except (KeyError, TypeError):
        raise ValueError("is neither a list of objects nor in SQuAD's format") from None


def _of_object(value: object, place: str) -> Example:
    if isinstance(value, str):
        return Example({"text": value}, None, place)
    if not isinstance(value, dict):
        raise ValueError(f"{place}: must be an object or a text")
    return _example(value, place)


def _conll(text: str, layout: Layout) -> Iterator[Example]:
    words: list[str] = []
    labels: list[object] = []
    first = 1
    for number, line in enumerate([*_lines(text), ""], 1):
        cells = line.split()
        if cells and cells[0] != "-DOCSTART-":
            if len(cells) < 2:
                raise ValueError(f"line {number}: needs a word and its label")
            words.append(cells[0])
            labels.append(cells[-1])
            continue
        if words:
            yield _tagged(words, labels, f"line {first}")
        words, labels, first = [], [], number + 1


def _plain(text: str, layout: Layout) -> Iterator[Example]:
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            yield Example({"text": line}, None, f"line {number}")


#: Name -> its reader.
FORMATS: Mapping[str, Callable[[str, Layout], Iterator[Example]]] = {
    "tsv": _tabs,
    "csv": _commas,
    "json": _json,
    "jsonl": _json_lines,
    "conll": _conll,
    "txt": _plain,
}
#: Ends of file names -> the format; `.gz` may follow.
_SUFFIXES = {
    **{name: name for name in FORMATS},
    "ndjson": "jsonl",
    **dict.fromkeys(("bio", "iob", "iob2", "bioes"), "conll"),
}
