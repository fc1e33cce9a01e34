"""Candidates sorted for a query: scores, order, cuts, bodies, limits, and neighbours in a batch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeEngine, items_of, model_info, pipeline_of, runner_of
from hypothesis import given
from hypothesis import strategies as st

from ft_handler.errors import ConfigError, ModelError
from ft_handler.predictor import Predictor
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace
from ft_handler.request.work import Bounds
from ft_handler.tasks.reranking import Candidates, Parameters
from ft_handler.tasks.scores import sigmoid
from ft_handler.text.tokenizer import load_tokenizer
from ft_handler.types import Incoming, Outputs

MODE = "reranking"
QUERY = "who built the old bridge"
TEXTS = [
    "an engineer built the bridge of the city",
    "a warm film",
    "the museum opened last year and the painter wrote a story of the old river " * 8,
    "the captain sailed on the river",
]
ONE_LABEL: dict[str, Any] = {
    "num_labels": 1, "id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


def info(**changes):
    return model_info(**{"mode": MODE, "labels": {0: "LABEL_0"}, "num_labels": 1, **changes})


@pytest.fixture
def rank(tokenizer):
    """Answers to one input for logits that the test chooses."""

    def answer(logits, *, named=False, settings=None, function=None, **params):
        runner = runner_of(
            MODE, tokenizer, info=info(function_to_apply=function), **(settings or {})
        )
        texts = tuple(f"text {i}" for i in range(len(logits)))
        asked = Candidates("query", texts, named, Parameters(**params))
        (encoding,) = runner.encode(items_of([asked]))
        values = np.array(logits, np.float32)[:, None]
        (prediction,) = runner.predict([encoding], Outputs(values, np.ones(len(logits), int)))
        return prediction

    return answer


@pytest.fixture
def make(tokenizer):
    def build(bounds=None, **settings):
        engine = FakeEngine(MODE, width=1)
        return pipeline_of(tokenizer, engine, MODE, info(), bounds=bounds, **settings), engine

    return build


def ask(pipeline, *bodies):
    return [(r.status, json.loads(r.body)) for r in pipeline.run(map_incoming(bodies))[0]]


def map_incoming(bodies):
    return [Incoming(body) for body in bodies]


# -- order and scores ----------------------------------------------------------------------------


def test_equal_logits_keep_the_order_of_the_request(rank):
    found = rank([1.0, 3.0, 1.0, 3.0, 1.0])
    assert [a["index"] for a in found] == [1, 3, 0, 2, 4]


def test_the_order_is_that_of_the_logits_where_scores_are_equal(rank):
    logits = [40.0, 60.0, 50.0]
    found = rank(logits)
    assert [a["score"] for a in found] == [1.0, 1.0, 1.0]
    assert [a["index"] for a in found] == [1, 2, 0]


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12), st.integers(0, 14))
def test_any_logits_are_sorted_whole(tokenizer, logits, top_n):
    runner = runner_of(MODE, tokenizer, info=info())
    asked = Candidates("a", ("b",) * len(logits), False, Parameters(top_n=top_n))
    (encoding,) = runner.encode(items_of([asked]))
    values = np.array(logits, np.float32)[:, None]
    (found,) = runner.predict([encoding], Outputs(values, np.ones(len(logits), int)))
    order = sorted(range(len(logits)), key=lambda i: -values[i, 0])  # Python's sort is stable
    assert [a["index"] for a in found] == order[: top_n or None]
    assert [a["score"] for a in found] == sigmoid(values[order, 0])[: top_n or None].tolist()


@pytest.mark.parametrize(
    ("function", "settings", "raw", "score"),
    [
        (None, {}, False, 1 / (1 + np.exp(-2.0))),
        ("sigmoid", {}, False, 1 / (1 + np.exp(-2.0))),
        ("none", {}, False, 2.0),
        ("none", {"function_to_apply": "sigmoid"}, False, 1 / (1 + np.exp(-2.0))),
        ("sigmoid", {"function_to_apply": "none"}, False, 2.0),
        (None, {}, True, 2.0),
        (None, {"function_to_apply": "sigmoid"}, True, 2.0),
    ],
)
def test_scores_are_what_the_checkpoint_and_the_settings_say(rank, function, settings, raw, score):
    (found,) = rank([2.0], function=function, settings=settings, raw_scores=raw)
    assert found == {"index": 0, "score": pytest.approx(score)}


def test_texts_come_back_when_they_are_asked_for(rank):
    assert rank([1.0, 2.0], return_text=True, top_n=1, raw_scores=True) == [
        {"index": 1, "score": 2.0, "text": "text 1"}
    ]
    assert rank([1.0, 2.0], return_text=True, top_n=1, raw_scores=True, named=True) == {
        "results": [{"index": 1, "relevance_score": 2.0, "document": {"text": "text 1"}}]
    }


# -- what is cut ---------------------------------------------------------------------------------


def encoded(tokenizer, texts, max_length=32, query=QUERY, **params):
    runner = runner_of(MODE, tokenizer, max_length, info())
    items = items_of([Candidates(query, tuple(texts), False, Parameters(**params))])
    return items[0], runner.encode(items)


@pytest.mark.parametrize("direction", ["right", "left"])
@pytest.mark.parametrize("query", [QUERY, QUERY * 9])
def test_pairs_are_cut_as_the_tokenizer_cuts_them(tokenizer, tiny_tokenizer, direction, query):
    """Longest first, as sentence-transformers asks for it."""
    _, (encoding,) = encoded(tokenizer, TEXTS, query=query, truncation_direction=direction)
    reference = load_tokenizer(tiny_tokenizer)
    whole = [len(reference.encode(query, text)) for text in TEXTS]
    reference.enable_truncation(32, strategy="longest_first", direction=direction)
    for place, text in enumerate(TEXTS):
        wanted = reference.encode(query, text)
        assert encoding.sequences[place].tolist() == wanted.ids
        assert encoding.splits[place] == wanted.type_ids.count(0)
        assert encoding.cut[place] == (whole[place] > 32)


def test_a_cut_is_told_of_its_own_candidate_alone(make):
    pipeline, _ = make(max_length=32)
    ((status, found),) = ask(pipeline, {"query": QUERY, "texts": TEXTS})
    assert status == 200
    assert [a["index"] for a in found if a.get("truncated")] == [2]


def test_only_second_leaves_the_query_whole(tokenizer):
    query = "old " * 20
    _, (encoding,) = encoded(tokenizer, TEXTS, query=query, truncation="only_second")
    assert all(split == 22 for split in encoding.splits)
    assert len(encoding.sequences[2]) == 32


def test_a_candidate_has_at_most_as_many_tokens_as_are_asked_for(tokenizer):
    _, (encoding,) = encoded(tokenizer, TEXTS, 128, max_tokens_per_doc=3)
    lengths = [
        len(s) - split - 1 for s, split in zip(encoding.sequences, encoding.splits, strict=True)
    ]
    assert lengths == [3, 3, 3, 3]
    assert encoding.cut == [True, False, True, True]


def test_without_truncation_a_long_pair_is_refused(make):
    pipeline, _ = make(max_length=32)
    for truncation in ({"truncate": False}, {"truncation": "do_not_truncate"}):
        ((status, found),) = ask(pipeline, {"query": QUERY, "texts": TEXTS, **truncation})
        assert status == 422
        assert "candidate 2" in found["message"]
        assert "the limit is 32 and truncation is off" in found["message"]
    ((status, _),) = ask(pipeline, {"query": QUERY, "texts": TEXTS[:2], "truncate": False})
    assert status == 200


def test_a_request_may_shorten_its_pairs_and_never_lengthen_them(make):
    pipeline, engine = make(max_length=32)
    asked = {"query": QUERY, "texts": TEXTS}
    for name, given_length, longest in (("max_length", 16, 16), ("truncate_prompt_tokens", 99, 32)):
        ((status, _),) = ask(pipeline, {**asked, name: given_length})
        assert (status, engine.batches[-1].max_seqlen) == (200, longest)
    ((status, found),) = ask(pipeline, {**asked, "max_length": 3})
    assert (status, "no room" in found["message"]) == (422, True)


# -- bodies --------------------------------------------------------------------------------------


def test_the_bodies_of_other_servers_clients(make):
    pipeline, _ = make()
    ((_, own),) = ask(pipeline, {"query": QUERY, "texts": TEXTS})
    assert {a["index"] for a in own} == {0, 1, 2, 3}
    assert [a["score"] for a in own] == sorted((a["score"] for a in own), reverse=True)
    tei = {
        "query": QUERY, "texts": TEXTS, "raw_scores": False, "return_text": True,
        "truncate": True, "truncation_direction": "Right",
    }  # fmt: skip
    cohere = {"model": "m", "query": QUERY, "documents": TEXTS, "top_n": 2,
              "max_tokens_per_doc": 4096}  # fmt: skip
    jina = {"model": "m", "query": QUERY, "documents": [{"text": t, "id": 1} for t in TEXTS],
            "top_n": 9, "return_documents": True}  # fmt: skip
    vllm = {"model": "m", "query": QUERY, "documents": TEXTS, "top_n": 0, "use_activation": False}
    found = [body for _, body in ask(pipeline, tei, cohere, jina, vllm)]
    assert found[0] == [{**a, "text": TEXTS[a["index"]]} for a in own]
    named = [{"index": a["index"], "relevance_score": a["score"]} for a in own]
    flags = [{k: True for k in a if k == "truncated"} for a in own]
    named = [{**a, **flag} for a, flag in zip(named, flags, strict=True)]
    assert found[1] == {"results": named[:2]}
    assert found[2] == {"results": [{**a, "document": {"text": TEXTS[a["index"]]}} for a in named]}
    raw = [a["relevance_score"] for a in found[3]["results"]]
    assert sigmoid(np.array(raw, np.float32)).tolist() == [a["score"] for a in own]


def test_lists_instances_tensors_and_forms(make):
    pipeline, _ = make()
    tei, cohere = {"query": QUERY, "texts": TEXTS}, {"query": QUERY, "documents": TEXTS}
    (_, own), (_, named) = ask(pipeline, tei, cohere)
    tensors = [
        {"name": "query", "shape": [1], "datatype": "BYTES", "data": [QUERY]},
        {"name": "texts", "shape": [4], "datatype": "BYTES", "data": TEXTS},
    ]
    listed, v1, under, v2, several = (
        body
        for _, body in ask(
            pipeline,
            [tei, cohere],
            {"instances": [tei, {"data": tei}], "parameters": {"top_n": 1}},
            {"inputs": tei, "parameters": {"top_n": 2}},
            {"inputs": tensors},
            {"inputs": [{**tensors[0], "shape": [2], "data": [QUERY, "a"]}, tensors[1]]},
        )
    )
    assert listed == [own, named]
    assert v1 == {"predictions": [own[:1], own[:1]]}
    assert under == own[:2]
    outputs = {o["name"]: o for o in v2["outputs"]}
    assert outputs["index"]["shape"] == outputs["score"]["shape"] == [1, 4]
    assert outputs["index"]["data"] == [a["index"] for a in own]
    assert outputs["score"]["data"] == [a["score"] for a in own]
    assert several["outputs"][0]["shape"] == [2, 4]
    assert several["outputs"][0]["data"][:4] == outputs["index"]["data"]
    fields = {"query": QUERY, "texts": TEXTS, "top_n": "1"}
    (reply,) = pipeline.run([Incoming(None, fields)])[0]
    assert json.loads(reply.body) == own[:1]


def test_duplicates_are_candidates_of_their_own(make):
    pipeline, engine = make()
    ((_, found),) = ask(pipeline, {"query": QUERY, "texts": ["a film", "warm", "a film"]})
    place = [a["index"] for a in found]
    assert place.index(2) == place.index(0) + 1
    assert engine.batches[0].batch == 3


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"query": "a"}, 400, "no 'texts'"),
        ({"texts": ["a"]}, 400, "no 'query'"),
        ({"query": "a", "texts": None}, 422, "list of strings"),
        ({"query": "a", "documents": None}, 400, "one of 'texts' and 'documents'"),
        ({"query": "a", "texts": ["a"], "documents": ["a"]}, 400, "one of"),
        ({"query": "a", "texts": []}, 422, "'texts' is empty"),
        ({"query": "a", "documents": []}, 422, "'documents' is empty"),
        ({"query": "a", "texts": "a"}, 422, "list of strings"),
        ({"query": "a", "texts": {"0": "a"}}, 422, "list of strings"),
        ({"query": "a", "texts": [1]}, 422, r"'texts'\[0\] must be a string"),
        ({"query": "a", "texts": ["a", None]}, 422, r"'texts'\[1\]"),
        ({"query": "a", "texts": ["a", " "]}, 422, r"'texts'\[1\] is empty"),
        ({"query": "a", "texts": [["a"]]}, 422, "must be a string"),
        ({"query": "a", "documents": ["b", {"title": "a"}]}, 422, r"'documents'\[1\]"),
        ({"query": "a", "documents": [{"text": 1}]}, 422, "must be a string"),
        ({"query": "a", "texts": ["\ud800"]}, 400, "lone surrogate"),
        ({"query": "\ud800", "texts": ["a"]}, 400, "lone surrogate"),
        ({"query": "", "texts": ["a"]}, 422, "'query' is empty"),
        ({"query": ["a"], "texts": ["a"]}, 422, "'query' must be a string"),
        ({"query": "a", "texts": ["a"], "top_n": -1}, 422, "'top_n' must be at least 0"),
        ({"query": "a", "texts": ["a"], "top_n": "1"}, 422, "'top_n' must be an integer"),
        ({"query": "a", "texts": ["a"], "raw_scores": 1}, 422, "must be true or false"),
        ({"query": "a", "texts": ["a"], "truncation_direction": "up"}, 422, "right, left"),
        ({"query": "a", "texts": ["a"], "secret": 1}, 400, "unknown key 'secret'"),
        ({"query": "a", "texts": ["a"], "max_tokens_per_doc": 0}, 422, "at least 1"),
        ("a plain text", 400, "an object with 'query' and 'texts'"),
        ([], 422, "empty"),
        ([{"query": "a", "texts": ["a"]}, {"query": "a"}], 400, r"inputs\[1\]"),
        ({"inputs": [{"name": "query", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}, 422,
         "'query' and 'texts'"),
    ],
)  # fmt: skip
def test_odd_requests_are_refused_alone_and_in_words(make, body, status, said):
    pipeline, _ = make()
    good = {"query": QUERY, "texts": TEXTS}
    (_, alone), = ask(pipeline, good)  # fmt: skip
    (_, before), (found, answer), (_, behind) = ask(pipeline, good, body, good)
    assert (before, behind) == (alone, alone)
    assert found == status
    assert answer["code"] == status
    assert re.search(said, answer["message"]), answer["message"]


# -- limits --------------------------------------------------------------------------------------


def test_the_most_candidates_are_a_setting_of_their_own(make):
    pipeline, _ = make(max_texts=3, max_inputs_per_request=1)
    for key in ("texts", "documents"):
        few, many = ask(pipeline, {"query": "a", key: ["b"] * 3}, {"query": "a", key: ["b"] * 4})
        assert few[0] == 200
        assert many[0] == 413
        assert f"'{key}' has 4 texts, the limit is 3" in many[1]["message"]
    ((status, _),) = ask(make()[0], {"query": "a", "texts": ["b"] * 1000})
    assert status == 200
    ((status, _),) = ask(make()[0], {"query": "a", "texts": ["b"] * 1001})
    assert status == 413


def test_a_thousand_long_candidates_are_too_much_by_themselves(make):
    pipeline, engine = make(Bounds(request=2000, batch=20_000))
    long = {"query": QUERY, "texts": [TEXTS[2]] * 1000}
    good = {"query": QUERY, "texts": TEXTS}
    first, refused, last = ask(pipeline, good, long, good)
    assert (first[0], refused[0], last[0]) == (200, 413, 200)
    assert "over 2000 tokens" in refused[1]["message"]
    assert sum(batch.batch for batch in engine.batches) == 8


def test_the_query_is_read_once(tokenizer, monkeypatch):
    runner = runner_of(MODE, tokenizer, info=info())
    read: list[str] = []
    ids = runner._reader.ids
    monkeypatch.setattr(
        runner._reader, "ids", lambda texts: read.extend(texts) or ids(texts), raising=True
    )
    runner.encode(items_of([Candidates(QUERY, tuple(TEXTS), False, Parameters())]))
    assert read == [QUERY, *TEXTS]


# -- models --------------------------------------------------------------------------------------


def test_a_head_with_more_outputs_is_refused_when_it_is_loaded(tokenizer):
    with pytest.raises(ConfigError, match=r"one output, and the traced file has 3.*sequence_class"):
        runner_of(MODE, tokenizer, info=model_info())


def test_a_checkpoint_with_more_outputs_is_not_traced(
    tiny_classification: Path, tmp_path: Path
) -> None:
    options = TraceOptions(
        mode=MODE, model_name_or_path=str(tiny_classification), output=tmp_path / "out"
    )
    with pytest.raises(ModelError, match="one output, and this checkpoint has 3"):
        trace(options)


@pytest.fixture(scope="module")
def checkpoint(make_tiny_bert: Callable[..., Path]) -> Path:
    return make_tiny_bert(**ONE_LABEL)


def by_transformers(checkpoint: Path, query: str, text: str) -> float:
    """The logit of one pair, from transformers' own model."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForSequenceClassification

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    pair = tokenizer.encode(query, text)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    with torch.inference_mode():
        ids, types = torch.tensor([pair.ids]), torch.tensor([pair.type_ids])
        return float(model(ids, token_type_ids=types).logits[0, 0])


@pytest.mark.parametrize("mode", [MODE, "sequence_classification"])
def test_scores_are_those_of_transformers_pair_by_pair(
    checkpoint: Path, tmp_path: Path, mode: str
) -> None:
    """Of a file traced for the task, and of one for the task whose head it shares."""
    output = tmp_path / "traced"
    trace(TraceOptions(mode=mode, model_name_or_path=str(checkpoint), output=output))
    predictor = Predictor.load(output, settings={"mode": MODE, "raw_scores": True})
    found: Any = predictor.predict({"query": QUERY, "texts": TEXTS})
    logits = [by_transformers(checkpoint, QUERY, text) for text in TEXTS]
    assert [a["index"] for a in found] == sorted(range(4), key=lambda i: -logits[i])
    for answer in found:
        assert answer["score"] == pytest.approx(logits[answer["index"]], abs=1e-4)
    if mode == MODE:
        sample = json.loads((output / "sample_request.json").read_text())
        assert len(predictor.predict(sample)) == 2  # type: ignore[arg-type]


def test_what_sentence_transformers_configured_counts(
    make_tiny_bert: Callable[..., Path], tmp_path: Path
) -> None:
    identity = {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.0.0"}
    source = make_tiny_bert(**ONE_LABEL, sentence_transformers=identity)
    trace(TraceOptions(mode=MODE, model_name_or_path=str(source), output=tmp_path))
    predictor = Predictor.load(tmp_path)
    found: Any = predictor.predict({"query": QUERY, "texts": TEXTS[:1]})
    assert found[0]["score"] == pytest.approx(by_transformers(source, QUERY, TEXTS[0]), abs=1e-4)
