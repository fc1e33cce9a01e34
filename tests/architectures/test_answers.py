"""Every architecture from a checkpoint with its own tokenizer to answers, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, logits_of, write_model
from tiny import QUESTION_ANSWERING, SEQUENCE_CLASSIFICATION
from tokenizers import Tokenizer
from torch import Tensor

from ft_handler import architectures
from ft_handler.model.bundle import load_model
from ft_handler.predictor import Predictor
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace

transformers = pytest.importorskip("transformers")

TEXTS = [
    "A warm, funny film.",
    "the old bridge  of the city",
    "Großer Fluß – naïve café, 3 movies!",
    "an awful plot and a dull actor " * 40,
]
PAIRS = [("Who built it?", "An engineer built the bridge."), ("slow", "story " * 200)]
QUESTION = "Who built the bridge?"
CONTEXT = "The town library opened first.  An engineer built the old bridge near the harbour."
ANSWER_TOKENS = 15

Traced = Callable[..., tuple[Any, Path]]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """`traced(model_type, mode)` is transformers' model and the folder traced of it, made once."""
    made: dict[tuple[str, str], tuple[Any, Path]] = {}

    def make(model_type: str, mode: str) -> tuple[Any, Path]:
        if (model_type, mode) not in made:
            torch.manual_seed(0)
            root = tmp_path_factory.mktemp("traced")
            model = write_model(root / "source", model_type, mode)
            # Whatever gives rise to a doubt fails.
            options = TraceOptions(
                mode=mode,
                model_name_or_path=str(root / "source"),
                output=root / "out",
                batch_size=2,
                strict=True,
            )
            made[model_type, mode] = model, trace(options)
        return made[model_type, mode]

    return make


def tokens(folder: Path, limit: int, *texts: str) -> tuple[Any, Tensor, Tensor]:
    """The checkpoint's own tokens of a text or a pair, cut as transformers cuts; ids and types."""
    tokenizer = Tokenizer.from_file(str(folder.parent / "source" / "tokenizer.json"))
    tokenizer.enable_truncation(limit)
    encoded = tokenizer.encode(*texts)
    return encoded, torch.tensor([encoded.ids]), torch.tensor([encoded.type_ids])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_labels_of_texts_and_pairs(model_type: str, traced: Traced) -> None:
    model, folder = traced(model_type, SEQUENCE_CLASSIFICATION)
    predictor = Predictor.load(folder)
    assert predictor.info.architecture == model_type
    limit = architectures.get(model_type).positions(model.config)
    inputs = [(text,) for text in TEXTS] + PAIRS
    bodies = [
        {"text": texts[0]} if len(texts) == 1 else {"text": texts[0], "text_pair": texts[1]}
        for texts in inputs
    ]
    answers: Any = predictor.predict(bodies, top_k=model.config.num_labels)
    for texts, answer in zip(inputs, answers, strict=True):
        _, ids, types = tokens(folder, limit, *texts)
        assert ids.shape[1] <= limit
        wanted = logits_of(model, ids, torch.ones_like(ids), types)[0].softmax(-1)[0]
        found = {entry["label"]: entry["score"] for entry in answer}
        for number, name in model.config.id2label.items():
            assert found[name] == pytest.approx(float(wanted[number]), abs=1e-4)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_tokenizer_is_transformers(model_type: str, traced: Traced) -> None:
    _, folder = traced(model_type, SEQUENCE_CLASSIFICATION)
    theirs = transformers.AutoTokenizer.from_pretrained(folder.parent / "source")
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for texts in [*((text,) for text in TEXTS), *PAIRS]:
        assert ours.encode(*texts).ids == theirs(*texts).input_ids


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_best_span_of_a_context(model_type: str, traced: Traced) -> None:
    model, folder = traced(model_type, QUESTION_ANSWERING)
    answers: Any = Predictor.load(folder).predict(
        {"question": QUESTION, "context": CONTEXT}, top_k=3, align_to_words=False
    )
    encoded, ids, types = tokens(folder, 10_000, QUESTION, CONTEXT)
    start, end = logits_of(model, ids, torch.ones_like(ids), types)
    of_context = torch.tensor([part == 1 for part in encoded.sequence_ids])
    counts = of_context.clone()
    counts[0] = True  # the first token stands for no answer
    begin, finish = (x[0].masked_fill(~counts, -torch.inf).softmax(0) for x in (start, end))
    table = (begin[:, None] * finish[None, :]).triu().tril(ANSWER_TOKENS - 1)
    table *= of_context[:, None] * of_context[None, :]
    best = int(table.argmax())
    first, last = divmod(best, len(ids[0]))
    span = encoded.offsets[first][0], encoded.offsets[last][1]
    assert (answers[0]["start"], answers[0]["end"]) == span
    assert answers[0]["answer"] == CONTEXT[slice(*span)]
    assert answers[0]["score"] >= float(table.max()) - 1e-4
    single = [a for a in answers if CONTEXT.count(a["answer"]) == 1]
    assert single, "some answer stands in the context once, so that nothing was added to it"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_as_plain_torchscript(model_type: str, tmp_path: Path) -> None:
    """The file for comparisons takes the same calls: token types where a model knows none too."""
    model = write_model(tmp_path / "source", model_type, SEQUENCE_CLASSIFICATION)
    options = TraceOptions(
        mode=SEQUENCE_CLASSIFICATION,
        model_name_or_path=str(tmp_path / "source"),
        output=tmp_path / "out",
        model_type="ths",
        batch_size=2,
    )
    module = load_model(trace(options) / "traced_model.pt").module
    ids = torch.randint(10, 90, (3, 21))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    ids[1, 9:] = architectures.get(model_type).pad(model.config) or 0
    types = torch.zeros_like(ids)
    found = module(ids, mask, types)[0]
    torch.testing.assert_close(found, logits_of(model, ids, mask, types)[0], rtol=0, atol=1e-4)
