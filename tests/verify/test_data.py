"""Every format of a data file, and what is said of a file that is none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ft_handler.errors import DataError
from ft_handler.verify.data import Example, Layout, Tag, read_examples, sequences_of

SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "Ada built it in 1840.",
                    "qas": [
                        {
                            "id": "a",
                            "question": "Who?",
                            "answers": [{"text": "Ada", "answer_start": 0}, {"text": "Ada built"}],
                        },
                        {"id": "b", "question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}
CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter\tNNP\tB-NP\tB-PER
Blackburn\tNNP\tI-NP\tI-PER
"""


def read(folder: Path, name: str, content: str | bytes, **layout: Any) -> list[Example]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    limit = layout.pop("limit", None)
    return read_examples(path, Layout(**layout), limit)


def test_tables_with_a_first_line(tmp_path: Path) -> None:
    found = read(tmp_path, "dev.tsv", 'sentence\tidx\tlabel\r\nso "good\t7\t1\r\nbad\t8\t0\r\n')
    assert found == [
        Example({"text": 'so "good'}, "1", "line 2"),
        Example({"text": "bad"}, "0", "line 3"),
    ]
    pairs = read(tmp_path, "b.csv", 'premise,hypothesis,label\n"It rains, hard.","Wet.",yes\n')
    assert pairs == [Example({"text": "It rains, hard.", "text_pair": "Wet."}, "yes", "line 2")]
    asked = read(tmp_path, "c.csv", "question,context,answer\nWho?,Me.,Me\n")
    assert asked == [Example({"question": "Who?", "context": "Me."}, "Me", "line 2")]


def test_tables_without_one(tmp_path: Path) -> None:
    table = "gj04\t1\t\tOur friends won't buy it.\ngj05\t0\t*\tOne more friends.\n"
    columns = ("-", "label", "-", "text")
    found = read(tmp_path, "cola.tsv", table, columns=columns)
    assert [(e.texts["text"], e.gold) for e in found] == [
        ("Our friends won't buy it.", "1"),
        ("One more friends.", "0"),
    ]
    assert len(read(tmp_path, "cola.tsv", table, columns=columns, skip=1)) == 1
    assert len(read(tmp_path, "cola.tsv", table, columns=columns, limit=1)) == 1


def test_unicode_separators_end_no_line(tmp_path: Path) -> None:
    for name, content in (("a.tsv", "text\tlabel\na\u2028b\x85c\t1\n"), ("a.txt", "a\u2028b\x85c")):
        (found,) = read(tmp_path, name, content)
        assert found.texts == {"text": "a\u2028b\x85c"}


def test_squad(tmp_path: Path) -> None:
    texts = {"context": "Ada built it in 1840."}
    wanted = [
        Example({"question": "Who?", **texts}, ["Ada", "Ada built"], "question a"),
        Example({"question": "Why?", **texts}, [], "question b"),
    ]
    assert read(tmp_path, "dev.json", json.dumps(SQUAD)) == wanted
    bare = json.dumps(SQUAD).replace('"answers"', '"hidden"')
    assert [e.gold for e in read(tmp_path, "test.json", bare)] == [None, []]
    packed = gzip.compress(json.dumps(SQUAD).encode())
    assert read(tmp_path, "dev-v2.0.json.gz", packed) == wanted


def test_json_lines_and_lists(tmp_path: Path) -> None:
    lines = [
        {"text": "a film", "label": 1, "idx": 3},
        {"sentence1": "a", "sentence2": "b", "label": "yes"},
        {"question": "Who?", "context": "Me.", "answers": {"text": ["Me"], "answer_start": [0]}},
        {"tokens": ["EU", "rejects"], "ner_tags": [3, 0], "pos_tags": [1, 2]},
        "a bare text",
    ]
    wanted = [
        ({"text": "a film"}, 1),
        ({"text": "a", "text_pair": "b"}, "yes"),
        ({"question": "Who?", "context": "Me."}, {"text": ["Me"], "answer_start": [0]}),
        ({"text": "EU rejects"}, [Tag(0, 2, "3"), Tag(3, 10, "0")]),
        ({"text": "a bare text"}, None),
    ]
    found = read(tmp_path, "a.jsonl", "\n\n".join(map(json.dumps, lines)))
    assert [(e.texts, e.gold) for e in found] == wanted
    assert found[1].place == "line 3"
    found = read(tmp_path, "a.json", json.dumps(lines))
    assert [(e.texts, e.gold) for e in found] == wanted


def test_of_several_answers_the_label_counts(tmp_path: Path) -> None:
    (found,) = read(tmp_path, "a.jsonl", '{"text": "a", "score": 0.3, "label": "yes"}')
    assert found.gold == "yes"


def test_conll(tmp_path: Path) -> None:
    for name, layout in (("dev.conll", {}), ("dev.iob2", {}), ("dev", {"format": "conll"})):
        found = read(tmp_path, name, CONLL, **layout)
        assert found == [
            Example({"text": "EU rejects"}, [Tag(0, 2, "B-ORG"), Tag(3, 10, "O")], "line 3"),
            Example(
                {"text": "Peter Blackburn"}, [Tag(0, 5, "B-PER"), Tag(6, 15, "I-PER")], "line 6"
            ),
        ]


def test_plain_texts_have_no_answers(tmp_path: Path) -> None:
    found = read(tmp_path, "texts.txt", "\ufeffone\n\n  two\n")
    assert [(e.texts["text"], e.gold) for e in found] == [("one", None), ("  two", None)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.xml", "", "--format takes tsv, csv"),
        ("a.tsv", "1\tgood\n", "first line names none of the columns .*--columns"),
        ("a.tsv", "text\tlabel\ngood\n", "line 2 has 1 columns, not 2"),
        ("a.tsv", "text\tsentence\na\tb\n", "line 2: two fields are 'text'"),
        ("a.tsv", "text\tlabel\n", "holds no example"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "a"}', "line 2: has none of the fields"),
        ("a.jsonl", '{"text": 5}', "line 1: 'text' must be a text"),
        ("a.jsonl", "{", "Expecting"),
        ("a.jsonl", "7", "line 1: must be an object or a text"),
        ("a.jsonl", '{"tokens": ["a"], "tags": [1, 2]}', "a label for each of its 1 words"),
        ("a.jsonl", '{"tokens": "a b"}', "must be a list of words"),
        ("a.json", '{"articles": []}', "nor in SQuAD's format"),
        ("a.conll", "word\n", "line 1: needs a word and its label"),
        ("a.txt", b"caf\xe9", "a.txt: .*utf-8"),
        ("a.txt.gz", b"plain", "a.txt.gz: "),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(tmp_path, name, content)
    with pytest.raises(DataError, match="No such file"):
        read_examples(tmp_path / "nothing.tsv", Layout())


# -- a query with its texts ----------------------------------------------------------------------


def test_queries_have_lists_of_texts(tmp_path: Path) -> None:
    text = (
        '{"query": "who", "documents": ["a", "b"], "labels": [0, 2]}\n'
        '{"query": "who", "positive": "a", "negative": ["b", "c"]}\n'
        '{"query": "who", "negative": ["b"]}\n'
    )
    assert read(tmp_path, "dev.jsonl", text) == [
        Example({"query": "who", "texts": ["a", "b"]}, [0, 2], "line 1"),
        Example({"query": "who", "texts": ["a", "b", "c"]}, [1, 0, 0], "line 2"),
        Example({"query": "who", "texts": ["b"]}, [0], "line 3"),
    ]
    (row,) = read(tmp_path, "dev.tsv", "query\tpassage\tlabel\nwho\ta\t1\n")
    assert row == Example({"query": "who", "text": "a"}, "1", "line 2")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"query": "who", "texts": "a", "positive": ["b"]}, "beside other texts or labels"),
        ({"query": "who", "positive": ["b"], "labels": [1]}, "beside other texts or labels"),
        ({"query": "who", "texts": ["a", 1]}, "'texts' must be a list of texts"),
        ({"query": ["who"], "texts": ["a"]}, "'query' must be a text"),
        ({"query": "who", "texts": ["a"], "passages": ["b"]}, "two fields are 'texts'"),
    ],
)
def test_queries_that_are_none(tmp_path: Path, line: object, words: str) -> None:
    with pytest.raises(DataError, match=f"line 1: .*{words}"):
        read(tmp_path, "dev.jsonl", json.dumps(line))


def test_what_is_read_together() -> None:
    """Texts that stand in for a model's inputs: each candidate with its query."""
    examples = [
        Example({"query": "who", "texts": ["a", "b"]}, None, "line 1"),
        Example({"query": "who", "text": "c"}, "1", "line 2"),
        Example({"text": "d", "text_pair": "e"}, "1", "line 3"),
    ]
    assert [dict(texts) for example in examples for texts in sequences_of(example)] == [
        {"text": "who", "text_pair": "a"},
        {"text": "who", "text_pair": "b"},
        {"text": "who", "text_pair": "c"},
        {"text": "d", "text_pair": "e"},
    ]
