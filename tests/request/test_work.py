"""What cannot be done in time is refused, and its neighbours are served."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import AsyncEngine, FakeContext, FakeEngine, pipeline_of
from hypothesis import given
from hypothesis import strategies as st
from tiny import MODES, QUESTION_ANSWERING
from tokenizers import Tokenizer

from ft_handler.config import CoreSettings
from ft_handler.engine.base import Done
from ft_handler.errors import ConfigError
from ft_handler.request import work
from ft_handler.request.work import NO_BOUNDS, Bounds, bounds_of, tokens_in
from ft_handler.stats import BatchStats
from ft_handler.text.tokenizer import load_tokenizer
from ft_handler.types import Incoming, PackedBatch

SPECIALS = 2


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer)


def classified(*counts: int) -> Incoming:
    """A list of texts of so many tokens, specials included."""
    return Incoming(["film " * (count - SPECIALS) for count in counts])


def served(asked: list[int], request: int, batch: int) -> list[int]:
    """The statuses that requests of so many tokens get: the least of them are served."""
    statuses = [413 if tokens > request else 200 for tokens in asked]
    while sum(t for t, s in zip(asked, statuses, strict=True) if s == 200) > batch:
        left = [(t, at) for at, (t, s) in enumerate(zip(asked, statuses, strict=True)) if s == 200]
        statuses[max(left)[1]] = 503
    return statuses


@given(
    st.lists(st.lists(st.integers(3, 128), min_size=1, max_size=5), min_size=1, max_size=8),
    st.integers(20, 300),
    st.integers(100, 900),
)
def test_the_least_of_what_comes_together_is_served(
    tokenizer: Tokenizer, lists: list[list[int]], request: int, batch: int
) -> None:
    engine = FakeEngine()
    pipeline = pipeline_of(tokenizer, engine, bounds=Bounds(request, batch))
    requests = [classified(*counts) for counts in lists]
    replies, stats = pipeline.run(requests)
    assert [r.status for r in replies] == served([*map(sum, lists)], request, batch)
    assert sum(b.total for b in engine.batches) == stats.tokens <= batch
    alone = pipeline_of(tokenizer, FakeEngine())
    for reply, one in zip(replies, requests, strict=True):
        if reply.status == 200:
            assert reply == alone.run([one])[0][0]
        else:
            error = json.loads(reply.body)
            assert error["type"] == {413: "RequestTooLarge", 503: "Overloaded"}[reply.status]
            assert not error["message"].startswith("inputs[")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [FakeEngine, AsyncEngine])
@pytest.mark.parametrize("slice_chars", [1, 500, 1 << 16])
def test_long_requests_leave_their_neighbours_alone(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, mode: str, kind: Any, slice_chars: int
) -> None:
    """In slices or in one, in parts or whole; windows count."""
    monkeypatch.setattr(work, "SLICE_CHARS", slice_chars)
    asks = mode == QUESTION_ANSWERING

    def inputs(words: int, count: int) -> Incoming:
        text = "the old film " * words
        return Incoming([{"question": "who", "context": text} if asks else text] * count)

    engine = kind(mode)
    pipeline = pipeline_of(tokenizer, engine, mode, bounds=Bounds(4000, 5000))
    small, middle, large = inputs(10, 2), inputs(20, 40), inputs(2000, 64)
    requests = [small, large, middle, small, middle, small]
    replies, stats = pipeline.run(requests)
    statuses = [r.status for r in replies]
    assert [statuses[at] for at in (0, 1, 3, 5)] == [200, 413, 200, 200]
    # One of the two has to wait, and both where a part of the large one was already under way.
    assert sorted((statuses[2], statuses[4])) in ([200, 503], [503, 503])
    assert kind is AsyncEngine or 200 in (statuses[2], statuses[4])
    assert sum(b.total for b in engine.batches) == stats.tokens <= 5000
    alone = pipeline_of(tokenizer, FakeEngine(mode), mode)
    wanted = {id(one): json.loads(alone.run([one])[0][0].body) for one in (small, middle)}
    for reply, one in zip(replies, requests, strict=True):
        if reply.status == 200:
            for found, want in zip(json.loads(reply.body), wanted[id(one)], strict=True):
                assert found == {**want, "score": pytest.approx(want["score"])}


def test_no_more_windows_are_made_than_one_slice_asks_for(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request of many contexts in many windows is refused before all of them are cut."""
    pipeline = pipeline_of(
        tokenizer, FakeEngine(QUESTION_ANSWERING), QUESTION_ANSWERING, bounds=Bounds(5000, 5000)
    )
    read: list[int] = []
    encode = pipeline._runner.encode

    def counted(items: Any) -> Any:
        read.append(len(items))
        return encode(items)

    monkeypatch.setattr(pipeline._runner, "encode", counted)
    context = "the old film " * 5000
    one = {"question": "who", "context": context, "doc_stride": 100}
    replies, _ = pipeline.run([Incoming([one] * 50), Incoming({**one, "context": "a film"})])
    assert [r.status for r in replies] == [413, 200]
    assert read == [1, 1]


def test_texts_that_are_read_too_slowly_are_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "SLICE_CHARS", 30)
    now = [0.0]
    pipeline = pipeline_of(
        tokenizer, FakeEngine(), clock=lambda: now[0], bounds=Bounds(None, None, 2.5)
    )
    encode = pipeline._runner.encode

    def slow(items: Any) -> Any:
        now[0] += 1
        return encode(items)

    monkeypatch.setattr(pipeline._runner, "encode", slow)
    replies, stats = pipeline.run([Incoming("a film of the old city")] * 6)
    assert [r.status for r in replies] == [200] * 3 + [503] * 3
    assert stats.failed == 3
    # The next batch has time of its own.
    assert pipeline.run([Incoming("a film")])[0][0].status == 200


class Slow(FakeEngine):
    """An engine that computes so many tokens a second by a clock of its own."""

    def __init__(self, speed: float) -> None:
        super().__init__()
        self.speed, self.now = speed, 0.0

    def launch(self, batch: PackedBatch) -> Any:
        self.now += batch.total / self.speed
        return Done(np.zeros((batch.batch, 3), np.float32))


@given(st.floats(10, 1e6), st.floats(1, 1000), st.integers(1, 512))
def test_what_is_admitted_by_default_is_done_in_time(
    speed: float, answer_within: float, longest: int
) -> None:
    engine = Slow(speed)

    def measure(seconds: float) -> int:
        return tokens_in(seconds, engine, longest, 100, lambda: engine.now)

    bounds = bounds_of(CoreSettings(), answer_within, measure)
    assert bounds.request == bounds.batch
    assert bounds.batch is not None
    assert bounds.seconds is not None
    # One sequence is always admitted, whatever it takes.
    if bounds.batch > longest:
        assert bounds.batch / speed + bounds.seconds <= answer_within
    assert bounds.batch >= int(min(speed, longest * 1e6) * answer_within * 0.49)


@pytest.mark.parametrize(
    ("settings", "within", "wanted"),
    [
        ({}, None, Bounds()),
        ({"max_request_tokens": 7}, None, Bounds(7)),
        ({"max_work_tokens": 9}, None, Bounds(None, 9)),
        ({}, 100, Bounds(50, 50, 25)),
        ({"max_request_tokens": 7}, 100, Bounds(7, 50, 25)),
        ({"max_request_tokens": 70}, 100, Bounds(70, 70, 25)),
        ({"max_work_tokens": 9}, 100, Bounds(9, 9, 25)),
        ({"max_work_tokens": 9, "max_request_tokens": 70}, 100, Bounds(9, 9, 25)),
        ({"warmup": False}, 100, Bounds(None, None, 25)),
        ({"warmup": False, "max_request_tokens": 7}, 100, Bounds(7, None, 25)),
    ],
)
def test_settings_win_over_what_is_measured(
    settings: dict[str, Any], within: float | None, wanted: Bounds
) -> None:
    assert bounds_of(CoreSettings(**settings), within, int) == wanted


@pytest.mark.parametrize(
    ("yaml", "seconds"),
    [({}, 120), ({"responseTimeout": 7}, 7), ({"responseTimeout": "x"}, 120)],
)
def test_the_archive_says_how_long_the_server_waits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, yaml: dict[str, Any], seconds: float
) -> None:
    pytest.importorskip("ts", reason="TorchServe is not installed")
    from ft_handler.servers.torchserve import handler

    given_to: dict[str, Any] = {}

    def refuse(*_: object, **options: Any) -> None:
        given_to.update(options)
        raise ConfigError("enough")

    monkeypatch.setattr(handler, "open_model", refuse)
    handler_section = {"handler": {"fast_receive": False}}
    with pytest.raises(ConfigError):
        handler.load(FakeContext(str(tmp_path), {**handler_section, **yaml}))
    assert given_to["answer_within"] == seconds


def test_an_opened_model_refuses_what_its_settings_say(
    make_tiny_bert: Callable[..., Path], tmp_path: Path
) -> None:
    from ft_handler.config import RawSettings
    from ft_handler.prepare.options import TraceOptions
    from ft_handler.prepare.trace import trace
    from ft_handler.runtime import open_model

    trace(TraceOptions(
        mode="sequence_classification", model_name_or_path=str(make_tiny_bert()), output=tmp_path
    ))  # fmt: skip
    raw = RawSettings({"the test": {"max_request_tokens": 10}})
    pipeline = open_model(tmp_path, raw, answer_within=60).pipeline
    replies, _ = pipeline.run([classified(11), classified(5, 5), classified(5, 6)])
    assert [r.status for r in replies] == [413, 200, 413]


def test_what_is_done_of_a_batch_is_taken_from_what_may_be_done() -> None:
    done = BatchStats(tokens=30)
    done.seconds.update(tokenize=2.0, compute=9.0)
    assert Bounds(50, 100, 5.0).after(done) == Bounds(50, 70, 3.0)
    assert Bounds(50, 20).after(done) == Bounds(50, 0)
    assert NO_BOUNDS.after(done) == NO_BOUNDS
