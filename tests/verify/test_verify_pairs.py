"""Reranking, zero-shot classification and embeddings: both sides hold what transformers answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import WORD_LIST

from ft_handler.errors import DataError
from ft_handler.predictor import Predictor
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace
from ft_handler.verify.run import Report, VerifyOptions, verify

RERANKING, ZERO_SHOT = "reranking", "zero_shot_classification"
EMBEDDINGS = "embeddings"
WORDS = WORD_LIST.split()
TEXTS = [" ".join(WORDS[i : i + 2 + i % 7]) for i in range(30)]
TOPICS = ["film", "city", "music"]
INFERENCE = {0: "contradiction", 1: "neutral", 2: "entailment"}

Traced = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def traced(make_tiny_bert: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """`traced(mode)`: a checkpoint, and a right file of it."""
    made: dict[str, tuple[Path, Path]] = {}

    def build(mode: str) -> tuple[Path, Path]:
        if mode not in made:
            if mode == EMBEDDINGS:
                source = make_tiny_bert(EMBEDDINGS)
            else:
                labels = INFERENCE if mode == ZERO_SHOT else {0: "relevance"}
                ids = {name: i for i, name in labels.items()}
                source = make_tiny_bert(num_labels=len(labels), id2label=labels, label2id=ids)
            output = tmp_path_factory.mktemp(mode)
            # No file of the checkpoint says this pooling; the traced one has to be asked.
            more: dict[str, Any] = {"pooling": "cls"} if mode == EMBEDDINGS else {}
            trace(TraceOptions(mode=mode, model_name_or_path=str(source), output=output, **more))
            made[mode] = source, output
        return made[mode]

    return build


def held(made: tuple[Path, Path], data: Path, **more: Any) -> Report:
    source, output = made
    options = {"source": output, "data": data, "checkpoint": str(source), "device": "cpu", **more}
    report = verify(VerifyOptions(**options))
    assert json.loads(json.dumps(report.document()))["task"] == report.task
    return report


def lines(path: Path, *objects: object) -> Path:
    path.write_text("\n".join(map(json.dumps, objects)))
    return path


def reference(source: Path, kind: str) -> tuple[Any, Any]:
    import transformers

    model = getattr(transformers, kind).from_pretrained(source).eval()
    return model, transformers.AutoTokenizer.from_pretrained(source)


# -- reranking -----------------------------------------------------------------------------------


def relevance(source: Path, query: str, texts: list[str]) -> np.ndarray[Any, Any]:
    """Scores as a cross-encoder's arithmetic has them: the sigmoid of a pair's logit."""
    model, tokenizer = reference(source, "AutoModelForSequenceClassification")
    read = tokenizer([query] * len(texts), texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        scores: np.ndarray[Any, Any] = model(**read).logits[:, 0].sigmoid().numpy()
    return scores


def test_orders_are_those_of_a_cross_encoder(traced: Traced, tmp_path: Path) -> None:
    made = traced(RERANKING)
    queries = {"who built the bridge": TEXTS[:12], "a warm film": TEXTS[12:15], "rain": TEXTS[20:]}
    gains, firsts, asked = [], [], []
    for number, (query, texts) in enumerate(queries.items()):
        labels = [(i + number) % 3 for i in range(len(texts))]
        asked.append({"query": query, "texts": texts, "labels": labels})
        ranked = [labels[i] for i in np.argsort(-relevance(made[0], query, texts))]
        best = sorted(labels, reverse=True)
        # The definition, a rank at a time.
        gain, ideal = (
            sum(g / np.log2(rank + 1) for rank, g in enumerate(order[:10], 1))
            for order in (ranked, best)
        )
        gains.append(gain / ideal)
        firsts.append(1 / (1 + next(i for i, g in enumerate(ranked) if g > 0)))
    report = held(made, lines(tmp_path / "dev.jsonl", *asked))
    assert (report.task, report.examples, report.different) == (RERANKING, 3, 0)
    for side in (report.traced, report.transformers):
        assert side.metrics["ndcg@10"] == pytest.approx(100 * np.mean(gains), abs=1e-6)
        assert side.metrics["mrr@10"] == pytest.approx(100 * np.mean(firsts), abs=1e-6)
        assert 0 < side.metrics["map"] < 100
    assert report.agreement.keys() == {"score_difference", "order_changes"}
    assert report.agreement["score_difference"] < 1e-5
    assert report.failures == []


def test_rows_of_pairs_are_queries(traced: Traced, tmp_path: Path) -> None:
    """A table of pairs, lists with labels, and positive and negative texts say the same."""
    rows = [
        ("who", TEXTS[0], 1),
        ("when", TEXTS[1], 0),
        ("who", TEXTS[2], 0),
        ("when", TEXTS[3], 1),
    ]
    table = tmp_path / "dev.tsv"
    table.write_text("query\tpassage\tlabel\n" + "".join(f"{q}\t{t}\t{n}\n" for q, t, n in rows))
    labelled = lines(
        tmp_path / "a.jsonl",
        {"query": "who", "documents": [TEXTS[0], TEXTS[2]], "labels": [1, 0]},
        {"query": "when", "documents": [TEXTS[1], TEXTS[3]], "labels": [0, 1]},
    )
    sides = lines(
        tmp_path / "b.jsonl",
        {"query": "who", "positive": [TEXTS[0]], "negative": [TEXTS[2]]},
        {"query": "when", "positive": TEXTS[3], "negative": [TEXTS[1]]},
    )
    reports = [held(traced(RERANKING), path) for path in (table, labelled, sides)]
    assert [report.examples for report in reports] == [2, 2, 2]
    first = reports[0].traced.metrics
    assert first["mrr@10"] in (50, 75, 100)
    assert all(report.traced.metrics == first for report in reports)
    bare = lines(tmp_path / "c.jsonl", {"query": "who", "texts": TEXTS[:3]})
    assert held(traced(RERANKING), bare).traced.metrics == {}


def test_many_candidates_are_computed_in_parts(
    traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = lines(tmp_path / "dev.jsonl", {"query": "who", "texts": TEXTS, "labels": [1] * 30})
    whole = held(traced(RERANKING), data)
    monkeypatch.setattr("ft_handler.verify.run.MOST_TOKENS", 40)
    parts = held(traced(RERANKING), data)
    # Fewer pads, where a batch is no longer padded as a whole.
    assert parts.transformers.tokens < whole.transformers.tokens
    assert parts.traced.tokens == whole.traced.tokens
    assert parts.agreement["score_difference"] < 1e-5


# -- zero-shot classification --------------------------------------------------------------------


@pytest.mark.parametrize("multi_label", [False, True])
def test_labels_are_those_of_the_pipeline(
    traced: Traced, tmp_path: Path, multi_label: bool
) -> None:
    from transformers import pipeline

    made = traced(ZERO_SHOT)
    ask = pipeline("zero-shot-classification", model=str(made[0]), device="cpu")
    found = [ask(text, TOPICS, multi_label=multi_label) for text in TEXTS]
    if multi_label:
        chosen = [
            {name for name, s in zip(f["labels"], f["scores"], strict=True) if s >= 0.5}
            for f in found
        ]
        data = lines(
            tmp_path / "dev.jsonl",
            *({"text": t, "labels": sorted(c)} for t, c in zip(TEXTS, chosen, strict=True)),
        )
        wanted = {"exact_match": 100.0, "f1_micro": 100.0, "f1_macro": 100.0}
    else:
        golds = [TOPICS[i % 3] for i in range(30)]
        right = [f["labels"][0] == gold for f, gold in zip(found, golds, strict=True)]
        data = tmp_path / "dev.tsv"
        rows = (f"{t}\t{gold.title()}\n" for t, gold in zip(TEXTS, golds, strict=True))
        data.write_text("text\tlabel\n" + "".join(rows))
        wanted = {"accuracy": pytest.approx(100 * np.mean(right))}
        assert 0 < sum(right) < 30
    report = held(made, data, labels=tuple(TOPICS))
    assert (report.task, report.examples, report.different) == (ZERO_SHOT, 30, 0)
    for side in (report.traced, report.transformers):
        assert {name: side.metrics[name] for name in wanted} == wanted


def test_where_candidates_come_from(traced: Traced, tmp_path: Path) -> None:
    source, output = traced(ZERO_SHOT)
    data = tmp_path / "dev.csv"
    data.write_text("text,label\na film,film\na bridge,city\n")
    assert held((source, output), data).examples == 2  # the file's own
    # A label of another list is none of them.
    with pytest.raises(DataError, match="line 3: its label is none of the model's, film, music"):
        held((source, output), data, labels=("film", "music"))
    for labels in ("0\n", "film\n"):
        data.write_text(f"text,label\na film,{labels}")
        with pytest.raises(DataError, match="--labels"):
            held((source, output), data)
    data = tmp_path / "texts.txt"
    data.write_text("\n".join(TEXTS[:4]))
    assert held((source, output), data, labels=tuple(TOPICS)).traced.metrics == {}


# -- embeddings ----------------------------------------------------------------------------------


def test_cosines_are_those_of_the_reference(traced: Traced, tmp_path: Path) -> None:
    made = traced(EMBEDDINGS)
    model, tokenizer = reference(made[0], "AutoModel")
    with torch.inference_mode():
        read = tokenizer(TEXTS, padding=True, return_tensors="pt")
        vectors = model(**read).last_hidden_state[:, 0]
        cosines = torch.cosine_similarity(vectors[::2], vectors[1::2]).numpy()
    golds = [(7 * i) % 15 / 3 for i in range(15)]
    data = tmp_path / "sts.tsv"
    rows = zip(TEXTS[::2], TEXTS[1::2], golds, strict=True)
    data.write_text(
        "sentence1\tsentence2\tscore\n" + "".join(f"{a}\t{b}\t{g}\n" for a, b, g in rows)
    )
    report = held(made, data, batch_size=4)
    assert (report.task, report.examples, report.different) == (EMBEDDINGS, 15, 0)
    order = np.argsort(np.argsort([golds, cosines]))
    for side in (report.traced, report.transformers):
        assert side.metrics["pearson"] == pytest.approx(
            100 * np.corrcoef([golds, cosines])[0, 1], abs=0.01
        )
        assert side.metrics["spearman"] == pytest.approx(100 * np.corrcoef(order)[0, 1], abs=0.01)
    assert 0.99999 < report.agreement["least_cosine"] <= report.agreement["mean_cosine"]
    assert report.failures == []


def test_texts_without_a_pair_compare_vectors(traced: Traced, tmp_path: Path) -> None:
    data = tmp_path / "texts.txt"
    data.write_text("\n".join(TEXTS))
    report = held(traced(EMBEDDINGS), data)
    assert (report.examples, report.different, report.traced.metrics) == (30, 0, {})
    labelled = lines(tmp_path / "dev.jsonl", {"text": "a film", "label": 1})
    with pytest.raises(DataError, match="line 1: has one text"):
        held(traced(EMBEDDINGS), labelled)


def test_half_of_a_refused_pair_is_left_out(traced: Traced, tmp_path: Path) -> None:
    data = lines(
        tmp_path / "dev.jsonl",
        {"text": "a film", "text_pair": " ", "label": 1},
        {"text": "a film", "text_pair": "a plot", "label": 1},
        {"text": "a bridge", "text_pair": "a tower", "label": 0},
    )
    report = held(traced(EMBEDDINGS), data)
    assert (report.examples, report.refused) == (2, 1)
    assert report.traced.metrics.keys() == {"pearson", "spearman"}


# -- what is wrong is seen -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", [RERANKING, ZERO_SHOT, EMBEDDINGS])
def test_another_models_answers_fail(
    traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    from ft_handler.verify.sides import Traced as Side

    outputs = Side.outputs
    monkeypatch.setattr(Side, "outputs", lambda self, s: np.negative(outputs(self, s)))
    if mode == RERANKING:
        found: Any = Predictor.load(traced(mode)[1]).predict({"query": "who", "texts": TEXTS})
        labels = [0] * 30
        labels[found[0]["index"]] = 1
        data = lines(tmp_path / "dev.jsonl", {"query": "who", "texts": TEXTS, "labels": labels})
    elif mode == ZERO_SHOT:
        data = tmp_path / "dev.tsv"
        data.write_text("text\tlabel\n" + "".join(f"{t}\tfilm\n{t}\tcity\n" for t in TEXTS))
    else:
        data = tmp_path / "texts.txt"
        data.write_text("\n".join(TEXTS))
    report = held(traced(mode), data)
    assert report.different > 0
    assert any("answers differ" in failure for failure in report.failures)
    if mode == RERANKING:
        assert report.transformers.metrics["mrr@10"] == 100
        assert any("points below transformers'" in failure for failure in report.failures)
    if mode == EMBEDDINGS:
        assert report.agreement["least_cosine"] == pytest.approx(-1)
