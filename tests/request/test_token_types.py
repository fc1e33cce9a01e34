"""Models with fewer token types than the tokenizer writes answer pairs and questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import MODES, QUESTION_ANSWERING

from ft_handler.config import RawSettings
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace
from ft_handler.runtime import open_model
from ft_handler.types import Incoming

FIRST, SECOND = "who built the old bridge", "an engineer of the city built the old bridge"


@pytest.mark.parametrize("mode", MODES)
def test_a_model_of_one_token_type_is_asked_with_zeros(
    make_tiny_bert: Callable[..., Path], tmp_path: Path, mode: str
) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

    source = make_tiny_bert(mode, type_vocab_size=1)
    trace(TraceOptions(mode=mode, model_name_or_path=str(source), output=tmp_path))
    pipeline = open_model(tmp_path, RawSettings({})).pipeline
    asks = mode == QUESTION_ANSWERING
    keys = ("question", "context") if asks else ("text", "text_pair")
    pair = Incoming(dict(zip(keys, (FIRST, SECOND), strict=True)))
    neighbour = pair if asks else Incoming("a good film")
    replies, _ = pipeline.run([neighbour, pair, neighbour])
    assert [reply.status for reply in replies] == [200] * 3
    answer = json.loads(replies[1].body)

    encoded = Tokenizer.from_file(str(source / "tokenizer.json")).encode(FIRST, SECOND)
    assert 1 in encoded.type_ids
    ids = torch.tensor([encoded.ids])
    auto = AutoModelForQuestionAnswering if asks else AutoModelForSequenceClassification
    with torch.inference_mode():
        found = auto.from_pretrained(source).eval()(ids, token_type_ids=torch.zeros_like(ids))
    if not asks:
        scores = found.logits[0].softmax(-1)
        assert answer["score"] == pytest.approx(float(scores.max()), abs=1e-5)
        return
    kept = torch.tensor([at == 0 or owner == 1 for at, owner in enumerate(encoded.sequence_ids)])
    starts = found.start_logits[0][kept].softmax(-1)[1:]
    ends = found.end_logits[0][kept].softmax(-1)[1:]
    spans = (starts[:, None] * ends[None]).triu().tril(14)
    # Spans with one text are one answer, so the best span is a lower bound.
    assert answer["score"] >= float(spans.max()) - 1e-5
