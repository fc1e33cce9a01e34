"""Inputs that hold lists of texts: read, limited, given beside inputs and as tensors."""

from __future__ import annotations

import json

import pytest
from fakes import FakeEngine, model_info, pipeline_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_handler import tasks
from ft_handler.errors import MalformedRequest, RequestTooLarge, UnusableRequest
from ft_handler.request.documents import Decoder, Limits
from ft_handler.text.tokenizer import load_tokenizer
from ft_handler.types import Incoming

RERANKING, ZERO_SHOT = "reranking", "zero_shot_classification"
GOOD = {
    RERANKING: {"query": "the river", "texts": ["a film", "the old bridge"]},
    ZERO_SHOT: {"text": "the river", "candidate_labels": ["music", "travel"]},
}


def decoder(mode, limits=Limits(8, 100)):  # noqa: B008
    task = tasks.get(mode)
    return Decoder(task, task.parameters(), limits, {"model_name": "m"})


def test_lists_have_a_limit_of_their_own_and_else_that_of_inputs():
    for limits, most in ((Limits(2, 100, texts=5), 5), (Limits(2, 100), 2)):
        body = {"query": "a", "texts": ["b"] * most}
        (read,) = decoder(RERANKING, limits).decode(Incoming(body)).inputs
        assert read.candidates == ("b",) * most
        with pytest.raises(RequestTooLarge, match=f"the limit is {most}"):
            decoder(RERANKING, limits).decode(Incoming({**body, "texts": ["b"] * (most + 1)}))
    with pytest.raises(RequestTooLarge, match=r"'texts'\[1\] has 101 characters"):
        decoder(RERANKING).decode(Incoming({"query": "a", "texts": ["b", "c" * 101]}))


def test_what_parts_a_list_is_the_tasks():
    asked = {"text": "a", "candidate_labels": "b, c,d"}
    (read,) = decoder(ZERO_SHOT).decode(Incoming(asked)).inputs
    assert read.labels == ("b", "c", "d")
    with pytest.raises(UnusableRequest, match="'texts' must be a list of strings"):
        decoder(RERANKING).decode(Incoming({"query": "a", "texts": "b, c"}))


def test_lists_given_once_are_every_inputs():
    both = {"instances": ["a", {"text": "b", "candidate_labels": ["x"]}],
            "parameters": {"candidate_labels": ["y", "z"]}}  # fmt: skip
    first, second = decoder(ZERO_SHOT).decode(Incoming(both)).inputs
    assert (first.labels, second.labels) == (("y", "z"), ("x",))


def tensor(name, *data):
    return {"name": name, "shape": [len(data)], "datatype": "BYTES", "data": list(data)}


def test_a_tensor_that_is_a_list_belongs_to_every_row():
    tensors = [tensor("texts", "x", "y", "z"), tensor("query", "a", "b")]
    read = decoder(RERANKING).decode(Incoming({"inputs": tensors})).inputs
    assert [(i.query, i.candidates) for i in read] == [
        ("a", ("x", "y", "z")),
        ("b", ("x", "y", "z")),
    ]
    tensors = [tensor("text", "a", "b"), tensor("candidate_labels", "x")]
    read = decoder(ZERO_SHOT).decode(Incoming({"inputs": tensors})).inputs
    assert [(i.text, i.labels) for i in read] == [("a", ("x",)), ("b", ("x",))]
    for wrong, error in (
        ([tensor("query", "a")], UnusableRequest),
        ([tensor("query", "a"), tensor("documents", "x")], UnusableRequest),
        ([tensor("query", "a"), tensor("texts")], UnusableRequest),
        ([tensor("query"), tensor("texts", "x")], UnusableRequest),
        ([tensor("query", "a"), tensor("texts", "x"), tensor("query", "b")], MalformedRequest),
    ):
        with pytest.raises(error):
            decoder(RERANKING).decode(Incoming({"inputs": wrong}))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.just("\ud800")
    | st.sampled_from(("a film", "", "a, b", "{}", "{", "right")),
    lambda v: st.lists(v, max_size=3)
    | st.dictionaries(st.sampled_from(("text", "query", "texts", "b64", "data")), v, max_size=2),
    max_leaves=5,
)  # fmt: skip
KEYS = (
    "query", "texts", "documents", "text", "candidate_labels", "inputs", "instances", "parameters",
    "hypothesis_template", "multi_label", "top_n", "return_documents", "truncate", "max_length",
    "raw_scores", "truncation_direction", "max_tokens_per_doc", "use_activation", "model",
)  # fmt: skip


@pytest.mark.parametrize("mode", GOOD)
def test_whatever_is_asked_harms_no_neighbour(mode, tiny_tokenizer, caplog):
    """Good requests with any keys set to anything: no 5xx, nothing logged, answers as alone."""
    labels = {0: "LABEL_0"} if mode == RERANKING else {0: "contradiction", 1: "entailment"}
    info = model_info(mode=mode, labels=labels, num_labels=len(labels))
    engine = FakeEngine(mode, width=len(labels))
    pipeline = pipeline_of(load_tokenizer(tiny_tokenizer), engine, mode, info)
    good = Incoming(GOOD[mode])
    ((alone,), _) = pipeline.run([good])
    assert alone.status == 200
    caplog.clear()

    @settings(max_examples=150)
    @given(st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3), max_size=4),
           st.booleans())  # fmt: skip
    def mixed(changes, whole):
        odd = [change if whole else {**GOOD[mode], **change} for change in changes]
        replies, _ = pipeline.run([good, *map(Incoming, odd), good])
        assert replies[0].body == replies[-1].body == alone.body
        for reply in replies[1:-1]:
            assert reply.status == 200 or 400 <= reply.status < 500, reply.body
            json.loads(reply.body)

    mixed()
    assert not caplog.records
