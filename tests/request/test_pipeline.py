"""The chained stages on a deterministic engine: answers, refusals alone, failures isolated."""

from __future__ import annotations

import json
import logging
import random

import numpy as np
import pytest
from fakes import AsyncEngine, FakeEngine, pipeline_of, sequence_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import CASES, as_request
from odd_requests import odd_requests

from ft_handler.engine.base import Done
from ft_handler.errors import EngineLost, OutOfDeviceMemory
from ft_handler.servers.torchserve.adapter import incoming
from ft_handler.stats import STAGES
from ft_handler.tasks.scores import softmax
from ft_handler.text.tokenizer import load_tokenizer

LABELS = ("negative", "neutral", "positive")
SENTENCES = [
    "a good film", "an awful plot and a dull actor", "the music was bright", "warm",
    "the river and the old bridge of the city", "who wrote this story", "slow slow slow scene",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture
def make(tokenizer):
    def build(mode="sequence_classification", fail=None, engine=None, info=None, **settings):
        engine = engine or FakeEngine(mode, fail=fail)
        return pipeline_of(tokenizer, engine, mode, info, **settings), engine

    return build


def run(pipeline, items):
    """The replies to what TorchServe hands over."""
    return pipeline.run(requests_of(items))[0]


def requests_of(items):
    """What the adapter makes of what TorchServe hands over; requests stay what they are."""
    return [incoming(item) if isinstance(item, dict) else item for item in items]


def expected(tokenizer, text, pair=None):
    encoding = tokenizer.encode(text) if pair is None else tokenizer.encode(text, pair)
    logits = sequence_logits(np.array(encoding.ids), np.array(encoding.type_ids), 3)
    scores = softmax(logits[None])[0]
    return {"label": LABELS[int(scores.argmax())], "score": pytest.approx(float(scores.max()))}


def body(reply):
    assert reply.content_type == "application/json"
    return json.loads(reply.body)


def test_every_answer_is_the_one_of_its_own_text_in_arrival_order(make, tokenizer):
    pipeline, engine = make(length_buckets=(4, 8), max_batch_tokens=20)
    replies = run(pipeline, [{"body": s} for s in SENTENCES])
    assert [body(r) for r in replies] == [expected(tokenizer, s) for s in SENTENCES]
    assert len(engine.batches) > 2


def test_pairs_carry_token_types(make, tokenizer):
    pipeline, engine = make()
    (reply,) = run(pipeline, [{"body": {"text": "the film", "text_pair": "a good story"}}])
    assert body(reply) == expected(tokenizer, "the film", "a good story")
    assert engine.batches[0].token_type_ids.tolist() == [0] * 4 + [1] * 4


def test_a_list_gets_a_list_and_a_text_alone_agrees_with_it(make):
    pipeline, _ = make()
    (together,) = run(pipeline, [{"body": SENTENCES}])
    alone = [body(run(pipeline, [{"body": s}])[0]) for s in SENTENCES]
    for a, b in zip(body(together), alone, strict=True):
        assert a["label"] == b["label"]
        assert a["score"] == pytest.approx(b["score"])


def nearly(answer):
    """What an answer must be equal to when others shared its batch."""
    if isinstance(answer, list):
        return [nearly(one) for one in answer]
    return {**answer, "score": pytest.approx(answer["score"])}


@pytest.mark.parametrize("mode", CASES)
def test_malformed_requests_are_refused_alone(make, mode):
    """Every case of the corpus mixed into good traffic, in batches of 16."""
    cases = CASES[mode]
    assert len(cases) >= 200
    pipeline, _ = make(mode)
    if mode != "question_answering":
        good = [{"body": s} for s in SENTENCES]
    else:
        good = [
            {"body": {"question": "who built it", "context": f"{s}. {SENTENCES[0]}"}}
            for s in SENTENCES
        ]
    answers = [body(run(pipeline, [g])[0]) for g in good]
    rng = random.Random(1)
    traffic = [(as_request(c.content_type, c.body), c.status, c.name) for c in cases]
    for i in range(len(cases)):
        traffic.append((good[i % len(good)], 200, str(i % len(good))))
    rng.shuffle(traffic)
    for at in range(0, len(traffic), 16):
        batch = traffic[at : at + 16]
        replies = run(pipeline, [item for item, _, _ in batch])
        assert len(replies) == len(batch)
        for reply, (_, status, name) in zip(replies, batch, strict=True):
            got = body(reply)
            assert reply.status == status, (name, got)
            if status == 200:
                assert got == nearly(answers[int(name)])
            else:
                assert set(got) == {"code", "type", "message", "error"}
                assert got["code"] == status
                assert got["message"]
                assert "CUDA" not in got["message"]


@pytest.mark.parametrize("mode", ["sequence_classification", "question_answering"])
def test_whatever_is_asked_harms_no_neighbour(make, mode, caplog):
    """Good requests between odd ones: no 5xx, nothing logged, and answers as they are alone."""
    pipeline, _ = make(mode)
    good = [
        {"body": s if mode == "sequence_classification" else {"question": "who", "context": s}}
        for s in SENTENCES
    ]
    alone = [run(pipeline, [g])[0] for g in good]

    @given(st.lists(odd_requests(mode), min_size=1, max_size=len(good)))
    def mixed(odd):
        batch = []
        for one, neighbour in zip(odd, good, strict=False):
            batch += [as_request(one.headers.get("Content-Type"), one.body, one.headers), neighbour]
        replies = run(pipeline, batch)
        for reply in replies[::2]:
            assert reply.status < 500
            assert json.loads(reply.body)
        for reply, own in zip(replies[1::2], alone, strict=False):
            found, wanted = body(reply), body(own)
            assert found == {**wanted, "score": pytest.approx(wanted["score"])}

    mixed()
    assert caplog.text == ""


def test_a_bad_element_refuses_its_request_and_names_the_index(make, tokenizer):
    pipeline, _ = make()
    items = [{"body": ["good", 5]}, {"body": "a good film"}, {"body": ["good", ""]}]
    first, second, third = run(pipeline, items)
    assert (first.status, third.status) == (422, 422)
    assert "inputs[1]" in body(first)["message"]
    assert "inputs[1]" in body(third)["message"]
    assert body(second) == expected(tokenizer, "a good film")


def test_too_long_without_truncation_is_422_and_with_it_is_flagged(make):
    text = "film " * 200
    pipeline, engine = make()
    cut, refused, in_list = run(
        pipeline,
        [
            {"body": text},
            {"body": {"text": text, "truncation": False}},
            {"body": {"inputs": ["good", text], "parameters": {"truncation": False}}},
        ],
    )
    assert body(cut)["truncated"] is True
    assert (refused.status, in_list.status) == (422, 422)
    assert "128" in body(refused)["message"]
    assert "inputs[1]" in body(in_list)["message"]
    assert [b.total for b in engine.batches] == [128]


def test_truncation_is_flagged_in_every_form(make):
    long, pipeline = "film " * 200, make()[0]
    one, many, fine = run(
        pipeline,
        [{"body": long}, {"body": {"text": long, "top_k": 2}}, {"body": {"text": "a", "top_k": 2}}],
    )
    assert body(one)["truncated"] is True
    assert [answer["truncated"] for answer in body(many)] == [True, True]
    assert all("truncated" not in answer for answer in body(fine))


def test_out_of_memory_halves_the_bucket_until_it_fits(make, tokenizer):
    def fail(batch):
        if batch.batch > 2:
            raise OutOfDeviceMemory("no room")

    pipeline, engine = make(fail=fail)
    replies = run(pipeline, [{"body": s} for s in SENTENCES])
    assert [body(r) for r in replies] == [expected(tokenizer, s) for s in SENTENCES]
    assert max(b.batch for b in engine.batches) <= 2


def test_one_input_that_never_fits_answers_503_alone(make, tokenizer):
    longest = max(SENTENCES, key=lambda s: len(tokenizer.encode(s)))
    limit = len(tokenizer.encode(longest))

    def fail(batch):
        if batch.max_seqlen >= limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: tried")

    pipeline, _ = make(fail=fail)
    replies = run(pipeline, [{"body": s} for s in SENTENCES])
    for reply, sentence in zip(replies, SENTENCES, strict=True):
        if sentence == longest:
            assert reply.status == 503
        else:
            assert body(reply) == expected(tokenizer, sentence)


def test_a_failing_bucket_answers_500_and_the_other_buckets_go_on(make, tokenizer, caplog):
    def fail(batch):
        if batch.max_seqlen > 6:
            raise RuntimeError("CUDA error: something")

    pipeline, _ = make(fail=fail, length_buckets=(6, 128))
    with caplog.at_level(logging.DEBUG):
        replies = run(pipeline, [{"body": s} for s in SENTENCES])
    for reply, sentence in zip(replies, SENTENCES, strict=True):
        if len(tokenizer.encode(sentence)) > 6:
            assert reply.status == 500
            assert body(reply) == {
                "code": 500, "type": "InternalError", "message": "internal error",
                "error": "internal error",
            }  # fmt: skip
        else:
            assert body(reply) == expected(tokenizer, sentence)
    assert "compute failed" in caplog.text
    assert not any(s in caplog.text for s in SENTENCES)


@pytest.mark.parametrize("mode", ["sequence_classification", "question_answering"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("spread", ["one", "row"])
@settings(max_examples=15)
@given(sick=st.sets(st.integers(0, 6)), at=st.integers(0, 2**16))
def test_logits_that_are_not_finite_are_our_failure_for_that_input_alone(
    tokenizer, mode, value, spread, sick, at
):
    """One number of a sequence, or all of them, whichever of its neighbours have them too."""
    asks = mode == "question_answering"

    class Broken(FakeEngine):
        def launch(self, batch):
            values = super().launch(batch).result()
            for sequence in sick:
                begin, end = batch.cu_seqlens[sequence : sequence + 2]
                own = values[:, begin:end] if asks else values[sequence : sequence + 1]
                if spread == "row":
                    own[:] = value
                else:
                    own[at % own.shape[0], at % own.shape[1]] = value
            return Done(values)

    bodies = [{"question": "who", "context": s} if asks else s for s in SENTENCES]
    wanted = run(pipeline_of(tokenizer, FakeEngine(mode), mode), [{"body": b} for b in bodies])
    replies = run(pipeline_of(tokenizer, Broken(mode), mode), [{"body": b} for b in bodies])
    for number, (reply, want) in enumerate(zip(replies, wanted, strict=True)):
        if number in sick:
            assert reply.status == 500
        else:
            assert body(reply).keys() == body(want).keys()
            assert body(reply)["score"] == pytest.approx(body(want)["score"])


def test_a_lost_device_reaches_the_caller(make):
    def fail(batch):
        raise EngineLost("gone")

    pipeline, _ = make(fail=fail)
    with pytest.raises(EngineLost):
        run(pipeline, [{"body": "a good film"}])


def test_a_tokenizer_failure_takes_out_only_its_request(make, tokenizer, monkeypatch, caplog):
    pipeline, _ = make()
    encode = pipeline._runner.encode

    def fragile(items):
        for item in items:
            if item.input.text.startswith("awful"):
                raise TypeError(f"cannot read {item.input.text}")
        return encode(items)

    monkeypatch.setattr(pipeline._runner, "encode", fragile)
    with caplog.at_level(logging.DEBUG):
        good, bad = run(pipeline, [{"body": "a good film"}, {"body": "awful secretword"}])
    assert body(good) == expected(tokenizer, "a good film")
    assert bad.status == 500
    assert "tokenize failed" in caplog.text
    assert "secretword" not in caplog.text
    assert "secretword" not in bad.body.decode()


def test_an_empty_batch_and_a_batch_of_refusals_compute_nothing(make):
    pipeline, engine = make()
    assert run(pipeline, []) == []
    assert [r.status for r in run(pipeline, [{}, {"body": bytearray(b"")}])] == [400, 400]
    assert engine.batches == []


def test_client_text_never_reaches_the_log(make, caplog, monkeypatch):
    """Whatever stage refuses or fails: decoding, tokenizing, computing, answering."""

    def fail(batch):
        raise RuntimeError("broken")

    good, bad = "a secretword", [{"body": "a \ud800 secretword"}, {"body": {"secretword": 1}}]
    with caplog.at_level(logging.DEBUG):
        replies = run(
            make()[0], [*bad, {"body": {"text": "secretword " * 99, "truncation": False}}]
        )
        replies += run(make(fail=fail)[0], [{"body": good}])
        pipeline, _ = make()

        def predict(encodings, outputs):
            raise KeyError(encodings[0].item.input.text)

        monkeypatch.setattr(pipeline._runner, "predict", predict)
        replies += run(pipeline, [{"body": good}])
    assert [reply.status for reply in replies] == [400, 400, 422, 500, 500]
    assert "compute failed" in caplog.text
    assert "postprocess failed" in caplog.text
    assert "secretword" not in caplog.text
    assert not any(b"secretword" in reply.body for reply in replies)


def large_batch(mode):
    """Texts of different sizes for several parts; the bad ones sit between good neighbours."""
    rng = random.Random(2)
    items = []
    for i in range(40):
        text = " ".join(rng.choices(SENTENCES, k=rng.randint(1, 150)))
        if mode == "question_answering":
            items.append({"body": {"question": f"who {SENTENCES[i % 7]}", "context": text}})
        else:
            items.append({"body": [text, SENTENCES[i % 7]] if i % 3 else text})
    for at in (0, 13, 14, 30):
        items[at] = {"body": {"text": 5}}
    return items


@pytest.mark.parametrize("mode", ["sequence_classification", "question_answering"])
@pytest.mark.parametrize("settings", [{}, {"max_batch_tokens": 300, "length_buckets": (40,)}])
def test_parts_beside_the_engine_give_the_same_answers(tokenizer, mode, settings):
    def replies_of(engine):
        pipeline = pipeline_of(tokenizer, engine, mode, **settings)
        return pipeline.run([incoming(item) for item in large_batch(mode)])

    engine = AsyncEngine(mode)
    expected_replies, whole = replies_of(FakeEngine(mode))
    replies, parted = replies_of(engine)
    assert replies == expected_replies
    assert sum(r.status != 200 for r in replies) == 4
    launches = engine.events.count("launch")
    assert engine.events == ["launch"] * launches + ["wait"] * launches
    assert launches == parted.buckets
    if settings:
        assert max(b.total for b in engine.batches) <= 300
    else:
        sizes = [b.total for b in engine.batches]
        assert len(sizes) > 1
        assert max(sizes) < 2 * min(sizes)
    for name in ("requests", "sequences", "tokens", "padded", "padded_fixed", "refused"):
        assert getattr(parted, name) == getattr(whole, name)


def test_a_small_batch_stays_whole_beside_the_engine(make):
    engine = AsyncEngine()
    pipeline, _ = make(engine=engine)
    run(pipeline, [{"body": s} for s in SENTENCES])
    assert engine.events == ["launch", "wait"]


def test_failures_of_a_part_stay_in_it(tokenizer):
    """Out of memory halves it, another failure ends in 500; the other parts answer."""
    waits = []

    def fail(batch):
        waits.append(batch.batch)
        if len(waits) == 1:
            raise OutOfDeviceMemory("no room")
        if len(waits) == 4:  # the second part, after both halves of the first
            raise RuntimeError("broken")

    mode = "question_answering"
    good = pipeline_of(tokenizer, FakeEngine(mode), mode)
    pipeline = pipeline_of(tokenizer, AsyncEngine(mode, fail=fail), mode)
    wanted = run(good, large_batch(mode))
    replies = run(pipeline, large_batch(mode))
    lost = [i for i, reply in enumerate(replies) if reply.status == 500]
    assert lost == [i for i in range(lost[0], lost[-1] + 1) if wanted[i].status == 200]
    assert 0 < len(lost) < len(replies) / 2
    for i, (reply, want) in enumerate(zip(replies, wanted, strict=True)):
        assert i in lost or reply == want


def test_batch_figures(make, tokenizer):
    ticks = iter(range(100))
    pipeline = pipeline_of(tokenizer, FakeEngine(), clock=lambda: float(next(ticks)))
    items = [{"body": "a good film"}, {"body": "warm"}, {"body": bytearray(b"")}]
    _, stats = pipeline.run([incoming(item) for item in items])
    assert (stats.requests, stats.sequences, stats.refused, stats.failed) == (3, 2, 1, 0)
    assert stats.tokens == 5 + 3
    assert stats.padded == 2
    assert stats.padded_fixed == 2 * 128 - 8
    assert tuple(stats.seconds) == STAGES
    # Launching and waiting are two intervals of the same stage.
    assert all(s == (2 if stage == "compute" else 1) for stage, s in stats.seconds.items())
