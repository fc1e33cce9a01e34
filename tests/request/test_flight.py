"""What is launched is waited for, whatever fails; overlap in parts; errors of buckets."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from fakes import AsyncEngine, FakeEngine, items_of, pipeline_of
from hypothesis import example, given
from hypothesis import strategies as st

from ft_handler.errors import EngineLost, OutOfDeviceMemory
from ft_handler.request import overlap
from ft_handler.request.overlap import overlapped, parts_of, text_bytes
from ft_handler.tasks.sequence_classification import Parameters, TextInput
from ft_handler.text.tokenizer import load_tokenizer
from ft_handler.types import Incoming

LONG = "the old bridge of the city was built by an engineer " * 40


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


class Counting(AsyncEngine):
    """Knows how many batches are launched and not waited for; `lose` raises where it says."""

    def __init__(self, lose=None, **options):
        super().__init__(**options)
        self.open = 0
        self.waits = 0
        self.launches = 0
        self.lose = lose or (lambda stage, number: None)

    def launch(self, batch):
        self.launches += 1
        self.lose("launch", self.launches)
        later = super().launch(batch)
        self.open += 1
        return _Counted(self, later)


class _Counted:
    def __init__(self, engine, later):
        self._engine, self._later = engine, later

    def result(self):
        self._engine.open -= 1
        self._engine.waits += 1
        self._engine.lose("wait", self._engine.waits)
        return self._later.result()


def raising(stage, number, error):
    def lose(at, count):
        if (at, count) == (stage, number):
            raise error

    return lose


REQUESTS = [Incoming(LONG) for _ in range(30)]


@pytest.mark.parametrize("stage", ["launch", "wait"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_lost_device_leaves_nothing_under_way(tokenizer, stage, number):
    engine = Counting(raising(stage, number, EngineLost("gone")))
    pipeline = pipeline_of(tokenizer, engine)
    with pytest.raises(EngineLost):
        pipeline.run(REQUESTS)
    assert engine.open == 0
    assert engine.launches >= number if stage == "launch" else engine.waits >= number


@pytest.mark.parametrize("stage", ["launch", "wait"])
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("error", [RuntimeError("broken"), ValueError("odd")])
def test_a_failed_batch_takes_out_its_own_items(tokenizer, stage, number, error):
    wanted, _ = pipeline_of(tokenizer, FakeEngine()).run(REQUESTS)
    engine = Counting(raising(stage, number, error))
    replies, stats = pipeline_of(tokenizer, engine).run(REQUESTS)
    assert engine.open == 0
    lost = [i for i, reply in enumerate(replies) if reply.status == 500]
    assert lost == list(range(10 * (number - 1), 10 * number))
    assert stats.failed == 10
    assert all(replies[i] == wanted[i] for i in range(30) if i not in lost)


def test_every_sequence_keeps_the_error_of_its_own(tokenizer):
    """One batch runs out of memory for ever, another breaks: 503 and 500, never the reverse."""

    def fail(batch):
        if batch.max_seqlen > 20:
            raise OutOfDeviceMemory("no room")
        raise RuntimeError("broken")

    engine = Counting(fail=fail)
    pipeline = pipeline_of(tokenizer, engine, length_buckets=[20, 128])
    replies, _ = pipeline.run([Incoming(LONG), Incoming("warm"), Incoming(LONG), Incoming("a")])
    assert [reply.status for reply in replies] == [503, 500, 503, 500]
    assert engine.open == 0


FATES = {"fine": 200, "memory": 503, "broken": 500}


@given(st.lists(st.sampled_from([*FATES]), min_size=1, max_size=12), st.booleans())
def test_each_request_gets_the_status_of_its_own_sequence(tokenizer, fates, later):
    """Every sequence has a length and so a bucket of its own; all of them may fail."""
    by_length = {3 + at: fate for at, fate in enumerate(fates)}

    def fail(batch):
        (fate,) = {by_length[n] for n in np.diff(batch.cu_seqlens).tolist()}
        if fate == "memory":
            raise OutOfDeviceMemory("no room")
        if fate == "broken":
            raise RuntimeError("broken")

    engine = (AsyncEngine if later else FakeEngine)(fail=fail)
    pipeline = pipeline_of(tokenizer, engine, length_buckets=[*by_length])
    replies, _ = pipeline.run([Incoming("film " * (n - 2)) for n in by_length])
    assert [reply.status for reply in replies] == [FATES[fate] for fate in fates]


@pytest.mark.parametrize("where", ["flatten", "plan_buckets"])
def test_a_failure_before_the_launch_stays_in_its_part(tokenizer, monkeypatch, where):
    from ft_handler.request import pipeline as module

    real, calls = getattr(module, where), []

    def fragile(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return real(*arguments)

    engine = Counting()
    pipeline = pipeline_of(tokenizer, engine)
    monkeypatch.setattr(module, where, fragile)
    replies, _ = pipeline.run(REQUESTS)
    assert [r.status for r in replies] == [200] * 10 + [500] * 10 + [200] * 10
    assert engine.open == 0


def test_a_failure_after_the_wait_stays_in_its_part(tokenizer, monkeypatch):
    engine = Counting()
    pipeline = pipeline_of(tokenizer, engine)
    predict, calls = pipeline._runner.predict, []

    def fragile(encodings, outputs):
        calls.append(1)
        if len(calls) == 1:
            raise IndexError("secret")
        return predict(encodings, outputs)

    monkeypatch.setattr(pipeline._runner, "predict", fragile)
    replies, _ = pipeline.run(REQUESTS)
    assert [r.status for r in replies] == [500] * 10 + [200] * 20
    assert engine.open == 0


def test_what_fails_between_start_and_finish_is_abandoned():
    class Flying:
        def __init__(self, name):
            self.name, self.abandoned = name, False

        def abandon(self):
            self.abandoned = True

    started = []

    def start(name):
        if name == "bad":
            raise RuntimeError(name)
        started.append(Flying(name))
        return started[-1]

    finished = []
    with pytest.raises(RuntimeError, match="bad"):
        overlapped(["a", "b", "bad", "c"], start, finished.append)
    assert [f.abandoned for f in started] == [True, True]
    assert finished == []


def texts(*values):
    return items_of([TextInput(value, None, Parameters()) for value in values])


def test_work_is_measured_in_bytes():
    ascii_, accents, chinese = texts("abc", "äöü", "河流")
    assert [text_bytes(item) for item in (ascii_, accents, chinese)] == [3, 6, 6]
    (pair,) = items_of([TextInput("ab", "cde", Parameters())])
    assert text_bytes(pair) == 5


@given(st.lists(st.integers(0, 9000), max_size=40))
@example([6000, 9000, 9000, 0])
def test_parts_are_whole_in_order_and_of_similar_size(sizes):
    items = texts(*("x" * size for size in sizes))
    parts = parts_of(items)
    assert [item for part in parts for item in part] == items
    assert len(parts) <= overlap.MOST_PARTS
    if len(parts) > 1:
        work = [sum(map(text_bytes, part)) for part in parts]
        largest = max(sizes)
        assert max(work) <= sum(work) / (sum(work) // overlap.LEAST_PART_BYTES) + largest or (
            max(work) <= sum(work) / overlap.MOST_PARTS + largest
        )


@pytest.mark.parametrize("mode", ["sequence_classification", "question_answering"])
@pytest.mark.parametrize("kind", [FakeEngine, AsyncEngine])
def test_threads_share_one_pipeline(tokenizer, mode, kind):
    """Eight threads, texts of their own: every answer is the one that the text has alone."""
    pipeline = pipeline_of(tokenizer, kind(mode), mode)
    alone = pipeline_of(tokenizer, FakeEngine(mode), mode)
    rng = np.random.default_rng(5)
    words = ["film", "Bridge", "river.", "unbuilt", "é", "sailed", "a" * 20, "the"]

    def request():
        text = " ".join(rng.choice(words, int(rng.integers(1, 60))))
        return Incoming({"question": "who", "context": text} if "question" in mode else text)

    batches = [[request() for _ in range(6)] for _ in range(24)]
    wanted = [alone.run(batch)[0] for batch in batches]
    found = [None] * len(batches)

    def work(offset):
        for at in range(offset, len(batches), 8):
            found[at] = pipeline.run(batches[at])[0]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted
