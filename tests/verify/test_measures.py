"""Metrics against small, slow definitions of the same thing, and against known values."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from fakes import model_info
from hypothesis import given
from hypothesis import strategies as st

from ft_handler import tasks
from ft_handler.errors import DataError, ModelError
from ft_handler.verify.data import Example, Tag
from ft_handler.verify.entities import entities, labels_of
from ft_handler.verify.labels import correlations, ranks
from ft_handler.verify.measures import Measure, Subject, measure_of
from ft_handler.verify.spans import normalized, word_f1

CLASSIFICATION, QA = "sequence_classification", "question_answering"


def measure(mode: str, examples: list[Example] | None = None, **info: Any) -> Measure:
    return measure_of(tasks.get(mode))(Subject(model_info(mode, **info), examples or []))


def example(gold: object) -> Example:
    return Example({"text": "a"}, gold, "line 4")


def ranked(*labels: str) -> list[dict[str, object]]:
    return [{"label": name, "score": 1 / (2 + i)} for i, name in enumerate(labels)]


def test_a_task_without_a_measure_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.get(QA)
    monkeypatch.setattr(type(task), "measured_as", None)
    with pytest.raises(ModelError, match="answers of question_answering cannot be verified"):
        measure_of(task)


# -- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gold", "number"), [("positive", 2), (" NEUTRAL ", 1), ("0", 0), (2, 2)])
def test_labels_are_names_or_numbers(gold: object, number: int) -> None:
    assert measure(CLASSIFICATION).gold(example(gold)) == number


@pytest.mark.parametrize("gold", ["great", "3", "-1", 1.5])
def test_a_label_of_another_model_is_refused(gold: object) -> None:
    with pytest.raises(DataError, match=r"line 4: .* negative, neutral, positive; --labels"):
        measure(CLASSIFICATION).gold(example(gold))


def test_accuracy_and_f1_of_three_labels() -> None:
    given_labels = ["negative", "positive", "positive", "neutral", "negative"]
    found = measure(CLASSIFICATION).metrics(
        [0, 2, 1, 1, 2], [ranked(name) for name in given_labels]
    )
    assert found.keys() == {"accuracy", "f1_macro"}
    assert found["accuracy"] == pytest.approx(60)
    # F1 of each: 2/3, 2/3, 1/2.
    assert found["f1_macro"] == pytest.approx(100 * (2 / 3 + 2 / 3 + 1 / 2) / 3)


def test_two_labels_have_a_positive_one() -> None:
    two = measure(CLASSIFICATION, labels={0: "no", 1: "yes"}, num_labels=2)
    gold, own = [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 0, 1]
    found = two.metrics(gold, [ranked(("no", "yes")[i]) for i in own])
    assert found["f1"] == pytest.approx(75)
    assert found["matthews"] == pytest.approx(100 * np.corrcoef(gold, own)[0, 1])
    assert two.metrics([1, 1], [ranked("yes")] * 2)["matthews"] == 0


def test_several_labels_a_text() -> None:
    several = measure(CLASSIFICATION, problem_type="multi_label_classification")
    golds = [several.gold(example(g)) for g in (["negative", 2], "neutral,positive", [])]
    assert golds == [{0, 2}, {1, 2}, set()]
    predictions: Any = [
        [{"label": "negative", "score": 0.9}, {"label": "positive", "score": 0.5}],
        [{"label": "neutral", "score": 0.9}, {"label": "positive", "score": 0.4}],
        [{"label": "neutral", "score": 0.1}],
    ]
    found = several.metrics(golds, predictions)
    assert found["exact_match"] == pytest.approx(100 * 2 / 3)
    assert found["f1_micro"] == pytest.approx(100 * 6 / 7)
    assert found["f1_macro"] == pytest.approx(100 * (1 + 1 + 2 / 3) / 3)
    assert several.same(predictions[0], predictions[0][::-1])
    assert not several.same(predictions[0], predictions[1])


def test_one_number_is_correlated() -> None:
    one = measure(CLASSIFICATION, labels={0: "score"}, num_labels=1, problem_type="regression")
    assert one.gold(example("4.25")) == 4.25
    with pytest.raises(DataError, match=r"line 4: .*number"):
        one.gold(example("high"))
    predictions: list[Any] = [[{"label": "score", "score": s}] for s in (0.1, 0.7, 0.2)]
    found = one.metrics([1.0, 5.0, 3.0], predictions)
    assert found["spearman"] == pytest.approx(100)
    assert found["pearson"] == pytest.approx(100 * np.corrcoef([1, 5, 3], [0.1, 0.7, 0.2])[0, 1])
    near, far = ([{"label": "score", "score": s}] for s in (0.105, 0.2))
    assert one.same(predictions[0], near)
    assert not one.same(predictions[0], far)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_ranks_of_equals_are_their_mean(values: list[int]) -> None:
    slow = [
        np.mean([sorted_at for sorted_at, other in enumerate(sorted(values)) if other == value])
        for value in values
    ]
    assert ranks(np.array(values, float)).tolist() == pytest.approx(slow)


def test_of_a_constant_there_is_no_correlation() -> None:
    assert correlations([1, 1, 1], [1, 2, 3]) == {"pearson": 0, "spearman": 0}


# -- spans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("The  Denver Broncos!", "denver broncos"),
        ("a.b", "ab"),
        ("An apple a day", "apple day"),
        ("theatre", "theatre"),
        ("the", ""),
    ],
)
def test_answers_are_normalized_as_squad_does(text: str, bare: str) -> None:
    assert normalized(text) == bare


@pytest.mark.parametrize(
    ("gold", "own", "f1"),
    [
        ("the old bridge", "bridge", 2 / 3),
        ("a b c", "c d", 2 * 1 / 4),
        ("", "", 1.0),
        ("", "bridge", 0.0),
        ("bridge", "", 0.0),
        ("x x y", "x x x", 2 * 2 / 6),
    ],
)
def test_f1_of_words(gold: str, own: str, f1: float) -> None:
    assert word_f1(gold, own) == pytest.approx(f1)


def test_the_nearest_of_several_answers_counts() -> None:
    spans = measure(QA)
    golds = [spans.gold(example(g)) for g in (["in 1840", "1840"], [], {"text": ["Ada", "the"]})]
    assert golds == [["in 1840", "1840"], [""], ["Ada"]]
    answers: list[Any] = [{"answer": a, "start": 0, "end": 1} for a in ("1840.", "Ada", "Ada L")]
    found = spans.metrics(golds, answers)
    assert found["exact_match"] == pytest.approx(100 / 3)
    assert found["f1"] == pytest.approx(100 * (1 + 0 + 2 / 3) / 3)
    with pytest.raises(DataError, match="line 4"):
        spans.gold(example(3))


def test_questions_without_answers_let_the_empty_one_compete() -> None:
    assert measure(QA, [example(["a"])]).parameters["handle_impossible_answer"] is False
    assert measure(QA, [example(["a"]), example([])]).parameters["handle_impossible_answer"] is True


def test_answers_at_other_places_are_others() -> None:
    spans = measure(QA)
    one: Any = {"answer": "a", "start": 0, "end": 1, "score": 0.5}
    assert spans.same(one, {**one, "score": 0.6})
    assert not spans.same(one, {**one, "start": 2, "end": 3})


# -- entities ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("I-PER I-PER B-PER I-LOC", [("PER", 0, 2), ("PER", 2, 3), ("LOC", 3, 4)]),  # IOB1
        ("B-PER I-ORG I-ORG", [("PER", 0, 1), ("ORG", 1, 3)]),
        ("S-PER S-PER B-LOC I-LOC E-LOC I-LOC", [
            ("PER", 0, 1), ("PER", 1, 2), ("LOC", 2, 5), ("LOC", 5, 6)]),
        ("NOUN NOUN O", [("NOUN", 0, 1), ("NOUN", 1, 2)]),
        ("O O", []),
    ],
)  # fmt: skip
def test_entities_of_labels(labels: str, found: list[tuple[str, int, int]]) -> None:
    assert entities(labels.split()) == found


WORDS = [Tag(0, 2, "B-ORG"), Tag(3, 10, "O"), Tag(11, 16, "B-PER"), Tag(17, 26, "I-PER")]


def test_a_word_has_the_label_of_its_first_token() -> None:
    tokens = [
        {"entity": "B-ORG", "index": 1, "start": 0, "end": 2},
        {"entity": "I-ORG", "index": 3, "start": 6, "end": 10},  # a later token of a word
        {"entity": "B-PER", "index": 4, "start": 11, "end": 13},
        {"entity": "I-ORG", "index": 5, "start": 13, "end": 16},
        {"entity": "I-PER", "index": 6, "start": 16, "end": 20},  # with the blank before it
    ]
    assert labels_of(WORDS, tokens) == ["B-ORG", "O", "B-PER", "I-PER"]


def test_groups_cover_words() -> None:
    groups = [
        {"entity_group": "ORG", "start": 0, "end": 2},
        {"entity_group": "PER", "start": 13, "end": 26},
    ]
    assert labels_of(WORDS, groups) == ["B-ORG", "O", "B-PER", "I-PER"]


def test_whole_entities_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tasks.get(CLASSIFICATION)), "measured_as", "entities")
    names = {0: "O", 1: "B-ORG", 2: "B-PER", 3: "I-PER"}
    entity = measure(CLASSIFICATION, labels=names, num_labels=4)
    numbered = [Tag(t.begin, t.end, str([*names.values()].index(t.label))) for t in WORDS]
    golds = [entity.gold(example(WORDS)), entity.gold(example(numbered))]
    assert golds == [WORDS, WORDS]
    found: Any = [
        {"entity": "B-ORG", "start": 0, "end": 2},
        {"entity": "B-PER", "start": 11, "end": 16},
    ]
    metrics = entity.metrics(golds, [found, []])
    assert metrics == pytest.approx({"precision": 50, "recall": 25, "f1": 100 / 3})
    assert entity.same(found, [dict(one) for one in found])
    assert not entity.same(found, found[:1])
    for wrong in ("B-PER", None, [Tag(0, 1, "9")]):
        with pytest.raises(DataError, match="line 4"):
            entity.gold(example(wrong))


def test_f1_is_that_of_sets() -> None:
    """Random labels against the plain definition over sets of entities."""
    rng = random.Random(3)
    for _ in range(50):
        labels = [rng.choice(("O", "B-A", "I-A", "B-B", "I-B")) for _ in range(12)]
        spans = entities(labels)
        assert sum(end - begin for _, begin, end in spans) == sum(x != "O" for x in labels)
        for kind, begin, end in spans:
            assert all(labels[i] == f"I-{kind}" for i in range(begin + 1, end))
            assert labels[begin].endswith(kind)


# -- orders and vectors --------------------------------------------------------------------------


def order(*scores: float) -> Any:
    """An answer of texts with these scores."""
    best = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [{"index": i, "score": scores[i]} for i in best]


def queries(*labels: object) -> list[Example]:
    return [
        Example({"query": str(i), "texts": ["a"] * len(of)}, of, f"line {i}")  # type: ignore[arg-type]
        for i, of in enumerate(labels)
    ]


def test_orders_by_hand() -> None:
    """Values from the definitions: gains over log2(rank + 1), 1 / rank, precision at each hit."""
    examples = queries([0, 2, 1], [0, 0, 1], [0, 0])
    orders = measure("reranking", examples, labels={0: "x"}, num_labels=1)
    golds = [orders.gold(one) for one in examples]
    found = orders.metrics(golds, [order(0.9, 0.5, 0.1), order(0.1, 0.2, 0.3), order(0.2, 0.1)])
    ndcg = (2 / np.log2(3) + 1 / 2) / (2 + 1 / np.log2(3))
    assert found["ndcg@10"] == pytest.approx(100 * (ndcg + 1) / 2)
    assert found["mrr@10"] == pytest.approx(75)
    assert found["map"] == pytest.approx(100 * ((1 / 2 + 2 / 3) / 2 + 1) / 2)
    assert orders.metrics(golds[2:], [order(0.2, 0.1)]) == {"ndcg@10": 0, "mrr@10": 0, "map": 0}
    # The first relevant text at rank 11.
    deep = orders.metrics([np.array([0.0] * 10 + [1.0])], [order(*np.arange(11, 0, -1))])
    assert deep == pytest.approx({"ndcg@10": 0, "mrr@10": 0, "map": 100 / 11})


def test_orders_differ_where_scores_do() -> None:
    orders = measure("reranking", labels={0: "x"}, num_labels=1)
    one = order(0.9, 0.5, 0.495)
    assert orders.same(one, order(0.8, 0.495, 0.5))  # too close to say
    assert not orders.same(one, order(0.4, 0.5, 0.495))
    near = orders.agreement([one, one], [order(0.8, 0.495, 0.5), one])
    assert near == {"score_difference": pytest.approx(0.1), "order_changes": 1}


@pytest.mark.parametrize("gold", [None, 1, [1], [1, "good"], [1, -1], [1, float("nan")]])
def test_labels_that_are_no_relevance(gold: object) -> None:
    one = Example({"query": "who", "texts": ["a", "b"]}, gold, "line 4")
    with pytest.raises(DataError, match="line 4"):
        measure("reranking", labels={0: "x"}, num_labels=1).gold(one)


def test_rows_of_a_query_have_labels_or_none() -> None:
    rows = [Example({"query": "who", "text": t}, g, "line 4") for t, g in (("a", 1), ("b", None))]
    with pytest.raises(DataError, match="line 4: some texts of this query have a label"):
        measure("reranking", rows, labels={0: "x"}, num_labels=1)


def test_vectors_are_the_same_where_they_are_parallel() -> None:
    vectors = measure("embeddings", labels={}, num_labels=2)

    def answer(*values: float) -> Any:
        return {"embedding": np.array(values, np.float32), "tokens": 3}

    assert vectors.same(answer(1, 0), answer(5, 0.1))
    assert not vectors.same(answer(1, 0), answer(1, 0.1))
    assert not vectors.same(answer(0, 0), answer(1, 0))
    pairs: Any = [[answer(1, 0), answer(x, 1)] for x in (0.0, 1.0, 9.0)]
    assert vectors.metrics([0.0, 1.0, 2.0], pairs)["spearman"] == pytest.approx(100)
    found = vectors.agreement(pairs, [[answer(1, 0), answer(1, 0)] for _ in range(3)])
    assert found["least_cosine"] == pytest.approx(0, abs=1e-7)
    assert found["mean_cosine"] == pytest.approx((3 + 0.5**0.5 + 9 / 82**0.5) / 6)
