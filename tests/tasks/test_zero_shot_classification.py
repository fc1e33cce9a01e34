"""Labels of the client's own choice: scores, order, templates, cuts, bodies, limits, models."""

from __future__ import annotations

import json
import logging
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
from pydantic import ValidationError

from ft_handler.errors import ConfigError, ModelError
from ft_handler.predictor import Predictor
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace
from ft_handler.request.work import Bounds
from ft_handler.tasks.scores import sigmoid, softmax
from ft_handler.tasks.zero_shot_classification import LabelledText, Parameters
from ft_handler.text.tokenizer import load_tokenizer
from ft_handler.types import Incoming, Outputs

MODE = "zero_shot_classification"
TEXT = "the captain sailed on the river and wrote a story of the old city"
LABELS = ["travel", "a film", "music"]
NLI = {0: "contradiction", 1: "neutral", 2: "entailment"}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


def info(labels=None, **changes):
    labels = NLI if labels is None else labels
    return model_info(**{"mode": MODE, "labels": labels, "num_labels": len(labels), **changes})


@pytest.fixture
def judge(tokenizer):
    """The answer for logits that the test chooses."""

    def answer(logits, names=None, labels=None, **params):
        values = np.array(logits, np.float32)
        labels = labels or tuple(f"label {i}" for i in range(len(values)))
        runner = runner_of(MODE, tokenizer, info=info(names))
        asked = LabelledText("a text", labels, Parameters(labels, **params))
        (encoding,) = runner.encode(items_of([asked]))
        (found,) = runner.predict([encoding], Outputs(values, np.ones(len(values), int)))
        return found

    return answer


@pytest.fixture
def make(tokenizer):
    def build(bounds=None, **settings):
        engine = FakeEngine(MODE)
        return pipeline_of(tokenizer, engine, MODE, info(), bounds=bounds, **settings), engine

    return build


def ask(pipeline, *bodies):
    replies, _ = pipeline.run([Incoming(body) for body in bodies])
    return [(r.status, json.loads(r.body)) for r in replies]


# -- scores and order ----------------------------------------------------------------------------

LOGITS = [[0.5, 0.0, 1.0], [2.0, 0.0, 3.0], [-4.0, 0.0, 2.0]]


def test_scores_of_all_labels_sum_to_one(judge):
    scores = softmax(np.array([1.0, 3.0, 2.0], np.float32))
    assert judge(LOGITS) == {
        "sequence": "a text",
        "labels": ["label 1", "label 2", "label 0"],
        "scores": [float(scores[i]) for i in (1, 2, 0)],
    }


def test_with_multi_label_each_is_judged_against_contradiction(judge):
    found = judge(LOGITS, multi_label=True)
    assert found["labels"] == ["label 2", "label 1", "label 0"]
    assert found["scores"] == sigmoid(np.array([6.0, 1.0, 0.5], np.float32)).tolist()


def test_a_label_alone_is_judged_against_contradiction(judge):
    found = judge(LOGITS[:1])
    assert found["scores"] == pytest.approx([1 / (1 + np.exp(-0.5))])


@pytest.mark.parametrize(
    ("names", "entailment", "contradiction"),
    [
        (NLI, 2, 0),
        ({0: "ENTAILMENT", 1: "NEUTRAL", 2: "CONTRADICTION"}, 0, 2),
        ({0: "contradiction", 1: "Entails", 2: "neutral"}, 1, 0),
        ({0: "entailment", 1: "not_entailment"}, 0, 1),
        ({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, 2, 0),
    ],
)
def test_entailment_is_found_by_its_name_and_contradiction_at_the_other_end(
    judge, names, entailment, contradiction
):
    logits = np.zeros((2, len(names)), np.float32)
    logits[1, entailment] = 3
    logits[1, contradiction] = 1
    assert judge(logits, names)["scores"] == pytest.approx(softmax(np.array([3.0, 0.0])).tolist())
    found = judge(logits, names, multi_label=True)
    assert found["scores"] == pytest.approx(sigmoid(np.array([2.0, 0.0])).tolist())


def test_a_model_that_names_no_entailment_is_served_with_a_warning(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        runner_of(MODE, tokenizer, info=info())
        assert not caplog.records
        runner_of(MODE, tokenizer, info=info({0: "negative", 1: "positive"}))
    assert "'entail'" in caplog.text


@pytest.mark.parametrize("multi_label", [False, True])
def test_equal_labels_keep_the_order_of_the_request(judge, multi_label):
    logits = [[0, 0, 1], [0, 0, 2], [0, 0, 1], [0, 0, 2]]
    found = judge(logits, labels=("a", "b", "c", "b"), multi_label=multi_label)
    assert found["labels"] == ["b", "b", "a", "c"]


def test_the_order_is_that_of_the_logits_where_scores_are_equal(judge):
    found = judge([[0, 0, 40], [0, 0, 60], [0, 0, 50]], multi_label=True)
    assert found["scores"] == [1.0, 1.0, 1.0]
    assert found["labels"] == ["label 1", "label 2", "label 0"]


# -- templates and cuts --------------------------------------------------------------------------


@given(st.text(max_size=12), st.text(max_size=12), st.text(min_size=1, max_size=6))
def test_templates_are_filled_as_python_fills_them(before, behind, label):
    escaped = [part.replace("{", "{{").replace("}", "}}") for part in (before, behind)]
    for place in ("{}", "{0}"):
        template = place.join(escaped)
        params = Parameters((label,), hypothesis_template=template)
        asked = LabelledText("a text", (label,), params)
        assert asked.texts == ("a text", template.format(label))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("about travel", "hold '{}' once"),
        ("{{}}", "hold '{}' once"),
        ("", "hold '{}' once"),
        ("{} or {}", "hold '{}' once"),
        ("{0}{0}", "hold '{}' once"),
        ("{", "double every brace"),
        ("} {}", "double every brace"),
        ("{1}", "nothing in its braces"),
        ("{label}", "nothing in its braces"),
        ("{.__class__}", "nothing in its braces"),
        ("{0[0]}", "nothing in its braces"),
        ("{:>1000000000}", "nothing in its braces"),
        ("{!r}", "nothing in its braces"),
    ],
)
def test_templates_that_fill_nothing_or_too_much_are_refused(template, said):
    with pytest.raises(ValidationError, match=re.escape(said)):
        Parameters(hypothesis_template=template)


def encoded(tokenizer, text, labels, max_length, **params):
    runner = runner_of(MODE, tokenizer, max_length, info())
    items = items_of([LabelledText(text, tuple(labels), Parameters(tuple(labels), **params))])
    return items[0], runner.encode(items)


@pytest.mark.parametrize("text", [TEXT, TEXT * 20, "a"])
def test_texts_are_cut_as_the_pipeline_cuts_them(tokenizer, tiny_tokenizer, text):
    """The text alone, and for each label as far as its own sentence needs."""
    labels = ["music", "a film of the old river"]
    _, (encoding,) = encoded(tokenizer, text, labels, 24)
    reference = load_tokenizer(tiny_tokenizer)
    whole = [len(reference.encode(text, f"This example is {label}.")) for label in labels]
    reference.enable_truncation(24, strategy="only_first")
    for place, label in enumerate(labels):
        pair = reference.encode(text, f"This example is {label}.")
        assert encoding.sequences[place].tolist() == pair.ids
        assert encoding.splits[place] == pair.type_ids.count(0)
    assert encoding.truncated == (max(whole) > 24)


def test_a_label_that_leaves_the_text_no_room_is_refused(make):
    pipeline, _ = make(max_length=24)
    long = "old " * 30
    body = {"text": TEXT, "candidate_labels": ["music", long]}
    ((status, answer),) = ask(pipeline, body)
    assert status == 422
    assert answer["message"].startswith("label 1 makes a sentence of ")
    assert "old" not in answer["message"]


def test_truncation_may_be_off(make):
    pipeline, _ = make(max_length=24)
    body = {"text": TEXT * 9, "candidate_labels": LABELS}
    (cut, refused) = ask(pipeline, body, {**body, "truncation": False})
    assert cut[1]["truncated"] is True
    assert refused[0] == 422
    assert "truncation is off" in refused[1]["message"]


def test_the_text_is_read_once(tokenizer, monkeypatch):
    runner = runner_of(MODE, tokenizer, info=info())
    read: list[str] = []
    ids = runner._reader.ids
    monkeypatch.setattr(runner._reader, "ids", lambda texts: read.extend(texts) or ids(texts))
    runner.encode(items_of([LabelledText("a text", ("b", "c"), Parameters())]))
    assert read == ["a text", "This example is b.", "This example is c."]


# -- bodies --------------------------------------------------------------------------------------


def test_every_form_of_asking(make):
    pipeline, engine = make()
    one = {"text": TEXT, "candidate_labels": LABELS}
    ((_, own),) = ask(pipeline, one)
    assert engine.batches[-1].batch == 3
    assert own["sequence"] == TEXT
    assert sorted(own["labels"]) == sorted(LABELS)
    assert sum(own["scores"]) == pytest.approx(1)
    labels = {"candidate_labels": LABELS}
    tensors = [
        {"name": "text", "shape": [2], "datatype": "BYTES", "data": [TEXT, TEXT]},
        {"name": "candidate_labels", "shape": [3], "datatype": "BYTES", "data": LABELS},
    ]
    rows = [{"label": a, "score": s} for a, s in zip(own["labels"], own["scores"], strict=True)]
    many = [own, own]
    for body, wanted in (
        ({"text": TEXT, "candidate_labels": " travel, a film,,music , "}, own),
        ({"text": TEXT, "parameters": labels}, own),
        ([one, one], many),
        ({"text": [TEXT, TEXT], **labels}, many),
        ({"inputs": [TEXT, one], "parameters": labels}, many),
        ({"inputs": {"text": TEXT}, "parameters": labels}, own),
        ({"instances": [TEXT, {"data": one}], "parameters": labels}, {"predictions": many}),
        # One text in `inputs` is how Hugging Face's clients ask.
        ({"inputs": TEXT, "parameters": {**labels, "multi_label": False}}, rows),
        ({"inputs": TEXT, **labels, "options": {"wait_for_model": True}}, rows),
    ):
        assert ask(pipeline, body) == [(200, wanted)], body
    for body in ({"inputs": tensors}, {"inputs": tensors[:1], "parameters": labels}):
        ((_, found),) = ask(pipeline, body)
        names, scores = found["outputs"]
        assert (names["name"], names["datatype"], names["shape"]) == ("labels", "BYTES", [2, 3])
        assert (scores["name"], scores["datatype"], scores["shape"]) == ("scores", "FP32", [2, 3])
        assert names["data"] == own["labels"] * 2
        assert scores["data"] == own["scores"] * 2
    fields = {"text": TEXT.encode(), "candidate_labels": b"travel,a film,music"}
    (reply,) = pipeline.run([Incoming(None, fields)])[0]
    assert json.loads(reply.body) == own
    (reply,) = pipeline.run([Incoming(TEXT, labels)])[0]
    assert json.loads(reply.body) == own


def test_labels_that_look_like_numbers_stay_texts(make):
    pipeline, _ = make()
    (reply,) = pipeline.run([Incoming(None, {"text": b"a", "candidate_labels": b"1"})])[0]
    assert json.loads(reply.body)["labels"] == ["1"]


def test_a_cut_text_says_so_in_every_form(make):
    pipeline, _ = make(max_length=24)
    labels = {"candidate_labels": LABELS}
    (_, plain), (_, hub) = ask(
        pipeline, {"text": TEXT * 9, **labels}, {"inputs": TEXT * 9, "parameters": labels}
    )
    assert plain["truncated"] is True
    assert all(row["truncated"] is True for row in hub)


def test_settings_are_the_defaults(make):
    pipeline, _ = make(
        candidate_labels="travel, music", hypothesis_template="It is {}.", multi_label=True
    )
    plain, own, other = ask(
        pipeline,
        TEXT,
        {"text": TEXT, "candidate_labels": ["music", "travel"]},
        {"text": TEXT, "candidate_labels": ["music"], "hypothesis_template": "{}"},
    )
    assert plain[1] == own[1]
    assert other[1]["labels"] == ["music"]
    assert sum(plain[1]["scores"]) != pytest.approx(1)
    asked = {"candidate_labels": ["travel", "music"], "multi_label": True,
             "hypothesis_template": "It is {}."}  # fmt: skip
    ((_, without),) = ask(make()[0], {"text": TEXT, **asked})
    assert without == plain[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"candidate_labels": []},
        {"candidate_labels": ["a", " "]},
        {"candidate_labels": "a,,b"},
        {"candidate_labels": [1]},
        {"hypothesis_template": "about"},
        {"max_labels": 0},
    ],
)
def test_settings_that_cannot_be_are_refused(make, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        make(**settings)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (TEXT, 400, "no 'candidate_labels'"),
        ({"text": TEXT}, 400, "no 'candidate_labels'"),
        ({"inputs": TEXT}, 400, "no 'candidate_labels'"),
        ({"candidate_labels": ["a"]}, 400, "no 'text'"),
        ({"text": TEXT, "candidate_labels": []}, 422, "'candidate_labels' is empty"),
        ({"text": TEXT, "candidate_labels": " , ,"}, 422, "'candidate_labels' is empty"),
        ({"text": TEXT, "candidate_labels": ["a", ""]}, 422, r"'candidate_labels'\[1\] is empty"),
        ({"text": TEXT, "candidate_labels": ["a", 1]}, 422, r"\[1\] must be a string"),
        ({"text": TEXT, "candidate_labels": 1}, 422, "must be a list"),
        ({"text": TEXT, "candidate_labels": ["\ud800"]}, 400, "lone surrogate"),
        ({"text": TEXT, "candidate_labels": ["a" * 250_001]}, 413, "the limit is 250000"),
        ({"text": TEXT, "candidate_labels": ["a"] * 101}, 413, "has 101 texts, the limit is 100"),
        ({"inputs": TEXT, "parameters": {"candidate_labels": ["a", ""]}}, 422, r"\[1\] is empty"),
        ({"inputs": "", "parameters": {"candidate_labels": ["a"]}}, 422, "^'text' is empty"),
        ({"text": "", "candidate_labels": ["a"]}, 422, "'text' is empty"),
        ({"text": [], "candidate_labels": ["a"]}, 422, "the list of inputs is empty"),
        ({"text": ["a", 1], "candidate_labels": ["a"]}, 422, r"inputs\[1\]"),
        ({"text": TEXT, "candidate_labels": ["a"], "hypothesis_template": "x"}, 422, "once"),
        ({"text": TEXT, "candidate_labels": ["a"], "hypothesis_template": "\ud800{}"}, 400,
         "lone surrogate"),
        ({"text": TEXT, "candidate_labels": ["a"], "hypothesis_template": 1}, 422, "a string"),
        ({"text": TEXT, "candidate_labels": ["a"], "multi_label": 1}, 422, "true or false"),
        ({"text": TEXT, "candidate_labels": ["a"], "top_k": 1}, 400, "unknown key 'top_k'"),
        ([["a", "b"]], 422, "an object with 'text'"),
        ({"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]},
                     {"name": "labels", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}, 422,
         "'text' and 'candidate_labels'"),
    ],
)  # fmt: skip
def test_odd_requests_are_refused_alone_and_in_words(make, body, status, said):
    pipeline, _ = make()
    good = {"text": TEXT, "candidate_labels": LABELS}
    (_, alone), = ask(pipeline, good)  # fmt: skip
    (_, before), (found, answer), (_, behind) = ask(pipeline, good, body, good)
    assert (before, behind) == (alone, alone)
    assert found == status
    assert re.search(said, answer["message"]), answer["message"]
    assert TEXT not in answer["message"]


def test_too_many_tokens_are_refused_alone(make):
    pipeline, _ = make(Bounds(request=500, batch=5000))
    good = {"text": TEXT, "candidate_labels": LABELS}
    first, refused, last = ask(
        pipeline, good, {"text": TEXT * 20, "candidate_labels": ["a"] * 100}, good
    )
    assert (first[0], refused[0], last[0]) == (200, 413, 200)


# -- models --------------------------------------------------------------------------------------


def test_a_head_with_one_output_is_refused(
    tokenizer, make_tiny_bert: Callable[..., Path], tmp_path: Path
):
    with pytest.raises(ConfigError, match="the traced file has one"):
        runner_of(MODE, tokenizer, info=info({0: "score"}))
    source = make_tiny_bert(num_labels=1, id2label={0: "score"}, label2id={"score": 0})
    options = TraceOptions(mode=MODE, model_name_or_path=str(source), output=tmp_path / "out")
    with pytest.raises(ModelError, match="this checkpoint has one"):
        trace(options)


@pytest.fixture(scope="module")
def checkpoint(make_tiny_bert: Callable[..., Path]) -> Path:
    return make_tiny_bert(id2label=NLI, label2id={name: i for i, name in NLI.items()})


def by_transformers(checkpoint: Path, text: str, hypothesis: str) -> list[float]:
    """The logits of one pair, from transformers' own model."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForSequenceClassification

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.enable_truncation(128, strategy="only_first")
    pair = tokenizer.encode(text, hypothesis)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    with torch.inference_mode():
        ids, types = torch.tensor([pair.ids]), torch.tensor([pair.type_ids])
        logits: list[float] = model(ids, token_type_ids=types).logits[0].tolist()
    return logits


@pytest.mark.parametrize("mode", [MODE, "sequence_classification"])
def test_scores_are_those_of_transformers_pair_by_pair(
    checkpoint: Path, tmp_path: Path, mode: str
) -> None:
    """Of a file traced for the task, and of one for the task whose head it shares."""
    output = tmp_path / "traced"
    trace(TraceOptions(mode=mode, model_name_or_path=str(checkpoint), output=output))
    predictor = Predictor.load(output, settings={"mode": MODE})
    for text in (TEXT, TEXT * 12):
        logits = np.array(
            [by_transformers(checkpoint, text, f"This example is {label}.") for label in LABELS]
        )
        for multi_label, wanted in (
            (False, softmax(logits[:, 2])),
            (True, softmax(logits[:, [0, 2]])[:, 1]),
        ):
            found: Any = predictor.predict(text, candidate_labels=LABELS, multi_label=multi_label)
            scores = dict(zip(found["labels"], found["scores"], strict=True))
            assert [scores[label] for label in LABELS] == pytest.approx(wanted, abs=1e-4)
            assert found["scores"] == sorted(found["scores"], reverse=True)
    if mode == MODE:
        for name in ("sample_request.json", "sample_text.txt"):
            sample = json.loads((output / name).read_text())
            assert predictor.predict(sample)
