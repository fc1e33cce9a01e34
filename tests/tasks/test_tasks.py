"""Postprocessing against small, slow definitions of the same thing."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import items_of, model_info, runner_of, token_logits
from hypothesis import given
from hypothesis import strategies as st

from ft_handler.errors import ConfigError, UnusableRequest
from ft_handler.tasks import question_answering as qa
from ft_handler.tasks.question_answering import QuestionInput
from ft_handler.tasks.scores import sigmoid, softmax
from ft_handler.tasks.sequence_classification import (
    ALL_LABELS,
    Parameters,
    TextInput,
    default_function,
)
from ft_handler.tasks.spans import best_spans
from ft_handler.text.tokenizer import load_tokenizer
from ft_handler.types import Encoding, Outputs

LABELS = {0: "negative", 1: "neutral", 2: "positive"}
LOGITS = np.array([[0.0, 1.0, 2.0], [3.0, -1.0, 0.5]], np.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture
def classify(tokenizer):
    def answers(params, logits=LOGITS, labels=LABELS, problem_type=None, **more):
        info = model_info(labels=labels, num_labels=len(labels), problem_type=problem_type, **more)
        runner = runner_of("sequence_classification", tokenizer, info=info)
        items = items_of([TextInput("a", None, p) for p in params])
        encodings = [Encoding(item, [np.array([1])], [1], False) for item in items]
        return runner.predict(encodings, Outputs(logits, np.ones(len(logits), np.int64)))

    return answers


@pytest.mark.parametrize("configured", ["none", "sigmoid", None])
def test_a_configured_activation_wins_over_the_tasks_own(classify, configured):
    logits = np.array([[4.0], [-2.0]], np.float32)
    one = {"logits": logits, "labels": {0: "score"}, "function_to_apply": configured}
    found = [a["score"] for a in classify([Parameters()] * 2, **one)]
    wanted = logits if configured == "none" else sigmoid(logits)
    assert found == pytest.approx(wanted[:, 0].tolist())
    # A request still has the last word.
    (raw, _) = classify([Parameters(function_to_apply="none")] * 2, **one)
    assert raw["score"] == 4.0


def test_the_best_label_as_an_object(classify):
    first, second = classify([Parameters()] * 2)
    e = np.exp([0.0, 1.0, 2.0])
    assert first == {"label": "positive", "score": pytest.approx(e[2] / e.sum())}
    assert second["label"] == "negative"
    assert type(first["score"]) is float


def test_top_k_is_a_sorted_list_and_each_request_keeps_its_own(classify):
    params = [Parameters(top_k=2), Parameters(top_k=ALL_LABELS, function_to_apply="none")]
    first, second = classify(params)
    assert [a["label"] for a in first] == ["positive", "neutral"]
    assert second == [
        {"label": "negative", "score": 3.0},
        {"label": "positive", "score": 0.5},
        {"label": "neutral", "score": -1.0},
    ]
    (many, _) = classify([Parameters(top_k=99)] * 2)
    assert len(many) == 3


@pytest.mark.parametrize(
    ("problem_type", "labels", "function"),
    [
        (None, 1, "sigmoid"),
        (None, 2, "softmax"),
        ("regression", 1, "none"),
        ("regression", 3, "none"),
        ("multi_label_classification", 3, "sigmoid"),
        ("single_label_classification", 3, "softmax"),
    ],
)
def test_the_default_function_is_the_models(problem_type, labels, function):
    assert default_function(problem_type, labels) == function


def test_regression_and_multi_label_scores(classify):
    params = [Parameters()] * 2
    (first, _) = classify(params, LOGITS[:, :1] - 0.5, {0: "stars"}, "regression")
    assert first == {"label": "stars", "score": -0.5}
    (first, _) = classify(params, LOGITS, LABELS, "multi_label_classification")
    assert first == {"label": "positive", "score": pytest.approx(1 / (1 + np.exp(-2.0)))}


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=5))
def test_functions_survive_extreme_logits(row):
    logits = np.array([row], np.float32)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        assert softmax(logits).sum() == pytest.approx(1, abs=1e-5)
        scores = sigmoid(logits)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert scores == pytest.approx(1 / (1 + np.exp(-np.clip(logits.astype(float), -99, 99))))


# -- long texts ----------------------------------------------------------------------------------


LONG = "the old bridge of the city was built for an engineer and a captain sailed on the river"


def read(tokenizer, text, pair=None, limit=12, **given):
    """The windows of one input, as lists of tokens, and why it was refused."""
    runner = runner_of("sequence_classification", tokenizer, limit)
    (item,) = items_of([TextInput(text, pair, Parameters(**given))])
    found = runner.encode([item])
    if not found:
        return [], item.result
    assert not found[0].truncated or given["long_texts"] == "truncate"
    name = tokenizer.id_to_token
    return [[name(i) for i in s.tolist()] for s in found[0].sequences], found[0].splits


@pytest.mark.parametrize("rule", ["mean", "max"])
def test_long_texts_are_read_in_windows_that_overlap(tokenizer, rule):
    words = LONG.split()
    windows, splits = read(tokenizer, LONG, long_texts=rule, stride=3)
    assert [w[0] for w in windows] == ["[CLS]"] * len(windows)
    assert [w[-1] for w in windows] == ["[SEP]"] * len(windows)
    assert [len(w) for w in windows] == splits == [12] * len(windows)
    parts = [w[1:-1] for w in windows]
    assert parts[0] == words[:10]
    assert parts[-1] == words[-10:]
    (whole,), _ = read(tokenizer, " ".join(words[:10]), long_texts=rule)
    assert whole[1:-1] == words[:10]


@pytest.mark.parametrize("longer", [0, 1])
def test_the_longer_text_of_a_pair_is_read_beside_the_shorter(tokenizer, longer):
    pair = ["a bright scene", LONG] if longer else [LONG, "a bright scene"]
    windows, splits = read(tokenizer, *pair, limit=16, long_texts="max", stride=2)
    assert len(windows) > 1
    for window, split in zip(windows, splits, strict=True):
        assert (len(window), window[split - 1]) == (16, "[SEP]")
        first, second = window[1 : split - 1], window[split:-1]
        assert (first if longer else second) == ["a", "bright", "scene"]
        assert " ".join(second if longer else first) in LONG
    assert windows[0][1] == pair[0].split()[0]
    assert windows[-1][-2] == pair[1].split()[-1]


def test_what_windows_cannot_read_is_refused(tokenizer):
    def why(*texts, **given):
        windows, error = read(tokenizer, *texts, **{"long_texts": "mean", **given})
        assert not windows
        assert isinstance(error, UnusableRequest)
        return str(error)

    assert "half of one" in why(LONG, LONG)
    assert "'stride'" in why(LONG, stride=10)
    assert "no room" in why(LONG, max_length=2)
    # Where one window is enough, nothing has to overlap.
    assert len(read(tokenizer, "a film", long_texts="mean", stride=10)[0]) == 1
    with pytest.raises(ConfigError, match="'stride'"):
        runner_of("sequence_classification", tokenizer, 12, stride=10)


def test_windows_are_one_answer_by_the_mean_or_the_largest_logit(tokenizer):
    """Beside inputs of one window, whose answers stay what they are."""
    rules = ["mean", "truncate", "max", "mean"]
    texts = [LONG, "a film", LONG, "a film"]
    inputs = [
        TextInput(t, None, Parameters(top_k=3, function_to_apply="none", long_texts=r, stride=3))
        for t, r in zip(texts, rules, strict=True)
    ]
    runner = runner_of("sequence_classification", tokenizer, 12)
    encodings = runner.encode(items_of(inputs))
    counts = [len(e.sequences) for e in encodings]
    assert counts == [3, 1, 3, 1]
    logits = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    found = runner.predict(encodings, Outputs(logits, np.full(8, 12)))
    parts = np.split(logits, np.cumsum(counts)[:-1])
    wanted = [parts[0].mean(0), parts[1][0], parts[2].max(0), parts[3][0]]
    for answer, row in zip(found, wanted, strict=True):
        order = np.argsort(-row)
        assert [a["label"] for a in answer] == [LABELS[i] for i in order]
        assert [a["score"] for a in answer] == pytest.approx(row[order].tolist())


# -- question answering --------------------------------------------------------------------------


def all_spans(start, end, max_answer_len):
    """Every span of one window: start, end [1 + n] with `[CLS]` first; {(first, last): score}."""
    p, q = (np.exp(x.astype(float) - x.max()) for x in (start, end))
    p, q = p / p.sum(), q / q.sum()
    n = len(start) - 1
    spans = {
        (i, j): p[1 + i] * q[1 + j] for i in range(n) for j in range(i, min(n, i + max_answer_len))
    }
    return spans, p[0] * q[0]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.integers(1, 20),
    st.integers(1, 30),
    st.integers(0, 2**32 - 1),
)
def test_best_spans_are_the_best_of_all_spans(counts, max_answer_len, wanted, seed):
    rng = np.random.default_rng(seed)
    pieces, cls, begins, at = [], [], [], 0
    for n in counts:
        question = int(rng.integers(0, 4))
        cls.append(at)
        begins.append(at + 1 + question)
        size = 1 + question + n + 1
        pieces.append((3 * rng.standard_normal((2, size))).astype(np.float32))
        at += size
    start, end = logits = np.concatenate(pieces, axis=1)
    null, scores, firsts, lasts = best_spans(
        logits, np.array(cls), np.array(begins), np.array(counts), max_answer_len, wanted
    )
    for w, n in enumerate(counts):
        keep = [cls[w], *range(begins[w], begins[w] + n)]
        spans, at_cls = all_spans(start[keep], end[keep], max_answer_len)
        assert null[w] == pytest.approx(at_cls, rel=1e-4)
        found = [
            (s, (i, j)) for s, i, j in zip(scores[w], firsts[w], lasts[w], strict=True) if s >= 0
        ]
        best = sorted(spans.values(), reverse=True)[:wanted]
        assert [s for s, _ in found] == pytest.approx(best, rel=1e-4)
        for score, span in found:
            assert spans[span] == pytest.approx(score, rel=1e-4)
        assert len({span for _, span in found}) == len(found)


def test_underflowing_logits_still_give_a_span():
    logits = np.array([[0, -1000, -1000, -1000]] * 2, np.float32)
    null, scores, firsts, _ = best_spans(
        logits, np.array([0]), np.array([1]), np.array([2]), 15, 12
    )
    assert null[0] == 1
    assert [s for s in scores[0] if s >= 0] == [0, 0, 0]
    assert set(firsts[0][:3]) <= {0, 1}


CONTEXT = (
    "The old bridge was built by an engineer. The captain sailed on the river; the Old Bridge "
    "of the city was opened last year, and a painter wrote of it."
)


def params(**changes):
    return qa.Parameters(**{"doc_stride": 4, "max_seq_len": 24, **changes})


def encoded(tokenizer, inputs):
    return runner_of("question_answering", tokenizer).encode(items_of(inputs))


def predicted(tokenizer, encodings, start, end):
    lengths = np.array([len(s) for e in encodings for s in e.sequences])
    runner = runner_of("question_answering", tokenizer)
    return runner.predict(encodings, Outputs(np.stack([start, end]), lengths))


def answer(tokenizer, items):
    encodings = encoded(tokenizer, items)
    pieces = [
        token_logits(np.array(ids), np.arange(len(ids)) >= split)
        for e in encodings
        for ids, split in zip(e.sequences, e.splits, strict=True)
    ]
    start, end = (np.concatenate(side) for side in zip(*pieces, strict=True))
    return predicted(tokenizer, encodings, start, end)


def answers_of(item, encoding, pieces, wanted):
    """All answers of one question from the definition, span by span; pieces are its windows."""
    p, windows = item.params, encoding
    found: dict[str, list] = {}
    null = 1e6
    for (start, end), (begin, stop) in zip(pieces, windows.spans, strict=True):
        keep = [0, *range(windows.first, windows.first + stop - begin)]
        spans, at_cls = all_spans(start[keep], end[keep], p.max_answer_len)
        null = min(null, at_cls)
        column = 2 if p.align_to_words else 0
        for (i, j), score in sorted(spans.items(), key=lambda s: -s[1])[:wanted]:
            a = int(windows.origins[begin + i, column])
            b = int(windows.origins[begin + j, column + 1])
            text = item.context[a:b]
            found.setdefault(text.lower(), [0.0, a, b, text])[0] += score
    if p.handle_impossible_answer:
        found.setdefault("", [0.0, 0, 0, ""])[0] += null
    return found


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("align", [False, True])
@given(
    seed=st.integers(0, 2**32 - 1),
    top_k=st.sampled_from([1, 3, 100]),
    words=st.lists(st.integers(1, 14), min_size=1, max_size=6),
    impossible=st.booleans(),
    longest=st.sampled_from([1, 4, 15]),
)
def test_random_logits_give_the_answers_of_the_definition(
    tokenizer, ties, align, seed, top_k, words, impossible, longest
):
    """Several questions at once, one-word contexts, windows that overlap, equal logits."""
    rng = np.random.default_rng(seed)
    vocabulary = ["river", "Bridge", "bridge", "unbuilt", "sailed.", "the"]
    given_params = params(
        top_k=top_k, handle_impossible_answer=impossible, max_answer_len=longest,
        max_seq_len=14, doc_stride=3, align_to_words=align,
    )  # fmt: skip
    items = [
        QuestionInput("who", " ".join(rng.choice(vocabulary, count)), given_params)
        for count in words
    ]
    encodings = encoded(tokenizer, items)
    pieces = [
        [(3 * rng.standard_normal((2, len(s)))).astype(np.float32) for s in e.sequences]
        for e in encodings
    ]
    if ties:
        pieces = [[np.round(p / 2) for p in windows] for windows in pieces]
    start, end = np.concatenate([p for windows in pieces for p in windows], axis=1)
    predictions = predicted(tokenizer, encodings, start, end)
    wanted = 2 * top_k + 10 if align else top_k
    for item, encoding, mine, got in zip(items, encodings, pieces, predictions, strict=True):
        answers = got if isinstance(got, list) else [got]
        want = answers_of(item, encoding, mine, wanted)
        best = sorted((w[0] for w in want.values()), reverse=True)[:top_k]
        every_span = wanted >= 14 * longest
        if every_span or not ties:  # among equal spans, which ones are left out is open
            assert [a["score"] for a in answers] == pytest.approx(best, rel=1e-4)
            for a in answers:
                assert a["score"] == pytest.approx(want[a["answer"].lower()][0], rel=1e-4)
        assert [a["score"] for a in answers] == sorted((a["score"] for a in answers), reverse=True)
        for a in answers:
            assert item.context[a["start"] : a["end"]] == a["answer"]


def by_definition(tokenizer, item):
    """The answers of one question, from the definition, span by span."""
    p = item.params
    (encoding,) = encoded(tokenizer, [item])
    windows = encoding
    wanted = 2 * p.top_k + 10 if p.align_to_words else p.top_k
    found: list[list] = []
    null = 1e6
    for ids, split, (begin, stop) in zip(
        encoding.sequences, encoding.splits, windows.spans, strict=True
    ):
        start, end = token_logits(np.array(ids), np.arange(len(ids)) >= split)
        keep = [0, *range(windows.first, windows.first + stop - begin)]
        spans, at_cls = all_spans(start[keep], end[keep], p.max_answer_len)
        null = min(null, at_cls)
        for (i, j), score in sorted(spans.items(), key=lambda s: -s[1])[:wanted]:
            a = int(windows.origins[begin + i, 0])
            b = int(windows.origins[begin + j, 1])
            if p.align_to_words:
                while a > 0 and item.context[a - 1].isalnum() and item.context[a].isalnum():
                    a -= 1
                while (
                    b < len(item.context)
                    and item.context[b].isalnum()
                    and item.context[b - 1].isalnum()
                ):
                    b += 1
            text = item.context[a:b]
            same = [f for f in found if f[3].lower() == text.lower()]
            if same:
                same[0][0] += score
            else:
                found.append([score, a, b, text])
    if p.handle_impossible_answer:
        found.append([null, 0, 0, ""])
    found.sort(key=lambda f: -f[0])
    return found[: p.top_k]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_k": 5},
        {"top_k": 5, "align_to_words": False},
        {"top_k": 3, "max_answer_len": 2},
        {"top_k": 40, "handle_impossible_answer": True},
        {"max_seq_len": 128, "doc_stride": None, "top_k": 4},
    ],
)
def test_answers_follow_the_definition(tokenizer, changes):
    items = [
        QuestionInput(q, c, params(**changes))
        for q, c in (("who built it", CONTEXT), ("when", CONTEXT[:40]), ("what", "a bridge"))
    ]
    for item, got in zip(items, answer(tokenizer, items), strict=True):
        answers = got if isinstance(got, list) else [got]
        assert isinstance(got, list) == (item.params.top_k > 1)
        want = by_definition(tokenizer, item)
        assert [a["score"] for a in answers] == pytest.approx([w[0] for w in want], rel=1e-4)
        for a, (_, begin, stop, text) in zip(answers, want, strict=True):
            assert (a["start"], a["end"], a["answer"]) == (begin, stop, text)
            if text:
                assert item.context[a["start"] : a["end"]] == a["answer"]


def test_requests_of_different_parameters_do_not_disturb_each_other(tokenizer):
    items = [
        QuestionInput("who", CONTEXT, params()),
        QuestionInput("who", CONTEXT, params(top_k=3)),
        QuestionInput("who", CONTEXT, params(handle_impossible_answer=True, max_seq_len=40)),
        QuestionInput("who", CONTEXT, params()),
    ]
    together = answer(tokenizer, items)
    for item, got in zip(items, together, strict=True):
        assert answer(tokenizer, [item]) == [got]


def test_equal_answers_of_overlapping_windows_are_one(tokenizer):
    item = QuestionInput("who", CONTEXT, params(top_k=50, max_answer_len=1))
    (answers,) = answer(tokenizer, [item])
    texts = [a["answer"].lower() for a in answers]
    assert len(texts) == len(set(texts))
    assert "bridge" in texts


def test_a_cut_question_is_flagged(tokenizer):
    item = QuestionInput("who " * 30, CONTEXT, params(max_question_len=3))
    (encoding,) = encoded(tokenizer, [item])
    assert encoding.truncated
