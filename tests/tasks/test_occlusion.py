"""Explanations: which sequences are computed, and what becomes of their outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeEngine, model_info, pipeline_of, sequence_logits, token_logits
from tokenizers import Tokenizer

from ft_handler import tasks
from ft_handler.errors import ConfigError, RequestTooLarge, UnusableRequest
from ft_handler.predictor import Predictor
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace
from ft_handler.request.work import Bounds
from ft_handler.tasks.base import Loaded
from ft_handler.tasks.occlusion import Part, occluded, words_of
from ft_handler.text.chunks import reader_of
from ft_handler.text.pieces import Pieces
from ft_handler.text.template import Template, mask_of
from ft_handler.text.tokenizer import load_tokenizer
from ft_handler.types import Incoming

QA = "question_answering"
TEXT = "The FILM's plot, unbelievably, was good."
LABELS = ("negative", "neutral", "positive")


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer)


def explainer(tokenizer: Tokenizer, mode: str = "sequence_classification", **more: Any) -> Any:
    return pipeline_of(tokenizer, FakeEngine(mode), mode, explains=True, **more)


def masked(tokenizer: Tokenizer, encoding: Any, words: set[tuple[int, int]]) -> np.ndarray:
    """The tokens of a library's encoding with the tokens of some (text, word) masked."""
    keys = zip(encoding.ids, encoding.sequence_ids, encoding.word_ids, strict=True)
    mask = tokenizer.token_to_id("[MASK]")
    return np.array([mask if (text, word) in words else i for i, text, word in keys])


def words_in(encoding: Any) -> list[tuple[int, int]]:
    """(text, word) of every word, in order."""
    pairs = zip(encoding.sequence_ids, encoding.word_ids, strict=True)
    return list(dict.fromkeys(p for p in pairs if p[1] is not None))


# -- parts ---------------------------------------------------------------------------------------


def test_a_sequence_is_whole_then_without_each_word_then_without_all() -> None:
    whole = np.arange(10, 17)
    found = occluded(whole, np.array([[0, 1, 3], [1, 3, 4], [2, 5, 6]]), 0)
    assert [s.tolist() for s in found] == [
        [10, 11, 12, 13, 14, 15, 16],
        [10, 0, 0, 13, 14, 15, 16],
        [10, 11, 12, 0, 14, 15, 16],
        [10, 11, 12, 13, 14, 0, 16],
        [10, 0, 0, 0, 14, 0, 16],
    ]
    assert whole.tolist() == list(range(10, 17))


def test_words_of_windows_are_numbered_once_and_found_wherever_they_stand() -> None:
    question = np.array([[0, 3, 0, 3]], np.int32)
    context = np.array([[0, 2, 0, 4], [2, 4, 0, 4], [5, 8, 5, 8], [9, 10, 9, 10]], np.int32)
    windows = [[Part(0, 0, 1, 1), Part(1, 0, 1, 3)], [Part(0, 0, 1, 1), Part(1, 1, 3, 3)]]
    places, runs = words_of(windows, [question, context])
    assert places.tolist() == [[0, 0, 3], [1, 0, 4], [1, 5, 8], [1, 9, 10]]
    # The word that the windows cut in two has one of its tokens in each.
    assert runs[0].tolist() == [[0, 1, 2], [1, 3, 4]]
    assert runs[1].tolist() == [[0, 1, 2], [1, 3, 4], [2, 4, 5], [3, 5, 6]]


def test_nothing_to_read_has_no_words() -> None:
    places, runs = words_of([[Part(0, 0, 0, 1)]], [np.zeros((0, 4), np.int32)])
    assert places.shape == (0, 3)
    assert [len(r) for r in runs] == [0]


@pytest.mark.parametrize(
    ("vocabulary", "unknown", "found"),
    [
        ({"[UNK]": 0, "a": 1, "[MASK]": 2}, "[UNK]", 2),
        ({"<unk>": 0, "a": 1, "<mask>": 5}, "<unk>", 5),
        ({"[UNK]": 3, "a": 1}, "[UNK]", 3),
        ({"a": 1}, "[UNK]", None),
    ],
)
def test_the_mask_is_found_by_its_spelling(
    vocabulary: dict[str, int], unknown: str, found: int | None
) -> None:
    from tokenizers import models

    assert mask_of(Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))) == found


def test_the_unknown_token_of_a_unigram_model() -> None:
    from tokenizers import models

    pieces = [("a", -1.0), ("<unk>", -2.0)]
    assert mask_of(Tokenizer(models.Unigram(pieces, unk_id=1))) == 1


def test_without_a_mask_nothing_can_be_explained(tokenizer: Tokenizer) -> None:
    explanation: Any = tasks.get("sequence_classification").explanation()
    info = model_info()
    loaded = Loaded(
        info,
        info.labels,
        reader_of(tokenizer),
        Template(tokenizer, 2),
        128,
        Pieces(tokenizer),
        None,
    )
    with pytest.raises(ConfigError, match="neither a mask nor an unknown token"):
        explanation.runner(explanation.settings(), loaded)


# -- classification ------------------------------------------------------------------------------


def by_hand(tokenizer: Tokenizer, label: int, *texts: str) -> tuple[list[float], float]:
    """Importances and delta of a label, one sequence after the other."""
    encoding = tokenizer.encode(*texts)
    types = np.array(encoding.type_ids)

    def logit(words: set[tuple[int, int]]) -> float:
        return float(sequence_logits(masked(tokenizer, encoding, words), types, 3)[label])

    words = words_in(encoding)
    whole = logit(set())
    importances = [whole - logit({word}) for word in words]
    return importances, sum(importances) - (whole - logit(set(words)))


@pytest.mark.parametrize("texts", [(TEXT,), ("a", "the film was good"), (TEXT, TEXT)])
def test_words_with_their_importances(tokenizer: Tokenizer, texts: tuple[str, ...]) -> None:
    asked = dict(zip(("text", "text_pair"), texts, strict=False))
    answer = explainer(tokenizer).predict(Incoming(asked))
    predicted = pipeline_of(tokenizer, FakeEngine()).predict(Incoming(asked))
    assert {k: answer[k] for k in ("label", "score")} == predicted
    importances, delta = by_hand(tokenizer, LABELS.index(predicted["label"]), *texts)
    assert answer["importances"] == pytest.approx(importances, abs=1e-5)
    assert answer["delta"] == pytest.approx(delta, abs=1e-5)
    assert len(answer["words"]) == len(importances)
    for word, (begin, end), field in zip(
        answer["words"], answer["offsets"], answer["fields"], strict=True
    ):
        assert asked[field][begin:end] == word
    assert set(answer["fields"]) == set(asked)


def test_words_are_those_of_the_clients_text(tokenizer: Tokenizer) -> None:
    answer = explainer(tokenizer).predict(Incoming("CAFE\u0301S  FILM's  \U0001f469 good"))
    assert answer["words"] == ["CAFE\u0301S", "FILM", "'", "s", "\U0001f469", "good"]
    assert answer["offsets"][0] == [0, 6]


@pytest.mark.parametrize("target", [0, 1, 2, "neutral"])
def test_a_request_names_the_label_that_is_explained(tokenizer: Tokenizer, target: Any) -> None:
    label = target if isinstance(target, int) else LABELS.index(target)
    importances, delta = by_hand(tokenizer, label, TEXT)
    pipeline = explainer(tokenizer)
    wanted = pipeline.predict(Incoming({"text": TEXT, "target": target}))
    assert wanted["label"] == LABELS[label]
    assert wanted["importances"] == pytest.approx(importances, abs=1e-5)
    assert wanted["delta"] == pytest.approx(delta, abs=1e-5)
    everything = pipeline_of(tokenizer, FakeEngine()).predict(
        Incoming({"text": TEXT, "top_k": None})
    )
    assert wanted["score"] == {a["label"]: a["score"] for a in everything}[LABELS[label]]
    # The forms of TorchServe's published samples, KServe's among them.
    assert pipeline.predict(Incoming({"data": TEXT, "target": target})) == wanted
    assert pipeline.predict(Incoming(None, {"text": TEXT, "target": str(target)})) == wanted
    assert pipeline.predict(
        Incoming({"instances": [{"data": {"text": TEXT, "target": target}}]})
    ) == {"explanations": [wanted]}


@pytest.mark.parametrize("target", [-1, 3, "great", True, 1.5, ["neutral"]])
def test_a_target_that_is_no_label_is_refused(tokenizer: Tokenizer, target: Any) -> None:
    pipeline = explainer(tokenizer)
    with pytest.raises(UnusableRequest, match="'target'") as refused:
        pipeline.predict(Incoming({"text": "a film", "target": target}))
    assert "great" not in str(refused.value)
    # A neighbour in the batch is answered.
    replies, _ = pipeline.run([Incoming({"text": "film", "target": target}), Incoming("film")])
    assert [r.status for r in replies] == [422, 200]


def test_parameters_of_predictions_are_understood(tokenizer: Tokenizer) -> None:
    pipeline = explainer(tokenizer, top_k=3)
    plain = pipeline.predict(Incoming(TEXT))
    assert pipeline.predict(Incoming({"text": TEXT, "top_k": 2})) == plain
    raw = pipeline.predict(Incoming({"text": TEXT, "function_to_apply": "none"}))
    assert raw["importances"] == plain["importances"]
    assert raw["score"] != plain["score"]
    cut = pipeline.predict(Incoming({"text": "film " * 50, "max_length": 12}))
    assert cut["truncated"] is True
    assert cut["words"] == ["film"] * 10


def test_too_many_words_are_refused_alone(tokenizer: Tokenizer) -> None:
    engine = FakeEngine()
    pipeline = pipeline_of(tokenizer, engine, explains=True, max_explained_words=5)
    replies, _ = pipeline.run([Incoming("a film " * 3), Incoming("a " * 5), Incoming("film")])
    assert [r.status for r in replies] == [413, 200, 200]
    assert "reads 6 words of this input, at most 5" in json.loads(replies[0].body)["message"]
    # What a word costs: the sequences of the others, n + 2 each.
    assert sum(batch.batch for batch in engine.batches) == 7 + 3
    with pytest.raises(RequestTooLarge, match=r"inputs\[1\]"):
        pipeline.predict(Incoming(["a", "a film " * 3]))


def test_the_bounds_on_work_hold(tokenizer: Tokenizer) -> None:
    pipeline = explainer(tokenizer, bounds=Bounds(request=50, batch=70))
    asked = [Incoming("a film was good warm"), Incoming("a film was"), Incoming("a good film")]
    replies, stats = pipeline.run(asked)
    # Together they ask for 49 + 25 + 25 tokens.
    assert [r.status for r in replies] == [503, 200, 200]
    assert stats.tokens == 50
    (refused,), _ = pipeline.run([Incoming("a film was good warm and bright")])
    assert refused.status == 413


def test_packed_with_nothing_padded(tokenizer: Tokenizer) -> None:
    engine = FakeEngine()
    pipeline = pipeline_of(tokenizer, engine, explains=True)
    pipeline.run([Incoming("a good film"), Incoming("warm")])
    (batch,) = engine.batches
    assert np.diff(batch.cu_seqlens).tolist() == [5] * 5 + [3] * 3
    assert batch.total == 34


def test_tensors_are_no_form_for_explanations(tokenizer: Tokenizer) -> None:
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a film"]}
    with pytest.raises(UnusableRequest, match="explanations are not answered as tensors"):
        explainer(tokenizer).predict(Incoming({"inputs": [tensor]}))


# -- question answering --------------------------------------------------------------------------

CONTEXT = "the old bridge was built in the harbour and opened that year " * 3


def answer_tokens(encoding: Any, answer: Any) -> list[tuple[int, int]]:
    """Tokens of the context at which a word-aligned answer may start and end."""
    spans: dict[int, list[int]] = {}
    for (begin, end), text, word in zip(
        encoding.offsets, encoding.sequence_ids, encoding.word_ids, strict=True
    ):
        if text == 1:
            known = spans.setdefault(word, [begin, end])
            known[1] = max(known[1], end)
    out = [
        (s, e)
        for s, (ts, ws) in enumerate(zip(encoding.sequence_ids, encoding.word_ids, strict=True))
        for e, (te, we) in enumerate(zip(encoding.sequence_ids, encoding.word_ids, strict=True))
        if ts == te == 1
        and s <= e
        and spans[ws][0] == answer["start"]
        and spans[we][1] == answer["end"]
    ]
    assert out
    return out


def test_start_and_end_of_an_answer_are_explained(tokenizer: Tokenizer) -> None:
    asked = {"question": "who built it", "context": "unbelievably " + CONTEXT, "target": 0}
    answer = explainer(tokenizer, QA).predict(Incoming(asked))
    predicted = pipeline_of(tokenizer, FakeEngine(QA), QA).predict(Incoming(asked))
    assert {k: answer[k] for k in ("answer", "score", "start", "end")} == predicted
    encoding = tokenizer.encode(asked["question"], asked["context"])
    types = np.array(encoding.type_ids)
    whole = token_logits(np.array(encoding.ids), types)
    start, end = max(answer_tokens(encoding, answer), key=lambda p: whole[0][p[0]] + whole[1][p[1]])
    words = words_in(encoding)
    for place, column, name in ((start, 0, "start"), (end, 1, "end")):

        def logit(words: set[tuple[int, int]], place: int = place, column: int = column) -> float:
            return float(token_logits(masked(tokenizer, encoding, words), types)[column][place])

        importances = [logit(set()) - logit({word}) for word in words]
        assert answer[f"importances_answer_{name}"] == pytest.approx(importances, abs=1e-5)
        delta = sum(importances) - (logit(set()) - logit(set(words)))
        assert answer[f"delta_{name}"] == pytest.approx(delta, abs=1e-4)
    assert answer["fields"] == ["question"] * 3 + ["context"] * (len(words) - 3)
    for word, (begin, stop), field in zip(
        answer["words"], answer["offsets"], answer["fields"], strict=True
    ):
        assert asked[field][begin:stop] == word


def test_words_of_other_windows_have_no_importance(tokenizer: Tokenizer) -> None:
    asked: dict[str, Any] = {
        "question": "who built it", "context": CONTEXT, "max_seq_len": 20, "doc_stride": 4,
        "top_k": 2,
    }  # fmt: skip
    engine = FakeEngine(QA)
    answer = pipeline_of(tokenizer, engine, QA, explains=True).predict(Incoming(asked))
    best = pipeline_of(tokenizer, FakeEngine(QA), QA).predict(Incoming(asked))[0]
    assert answer["answer"] == best["answer"]
    assert len(answer["words"]) == 3 + len(CONTEXT.split())
    moved = [
        begin
        for importance, (begin, _), field in zip(
            answer["importances_answer_start"], answer["offsets"], answer["fields"], strict=True
        )
        if importance and field == "context"
    ]
    # The fake's logit of a token depends on that token alone.
    assert moved == [answer["start"]]
    windows = [length for batch in engine.batches for length in np.diff(batch.cu_seqlens)]
    assert max(windows) == 20


def test_windows_that_share_nearly_everything_are_refused(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(QA)
    pipeline = pipeline_of(tokenizer, engine, QA, explains=True, max_explained_words=40)
    asked: dict[str, Any] = {"question": "who built it", "context": CONTEXT}
    with pytest.raises(RequestTooLarge, match="by 297 sequences, at most 168"):
        pipeline.predict(Incoming({**asked, "max_seq_len": 10, "doc_stride": 3}))
    assert engine.batches == []
    assert pipeline.predict(Incoming({**asked, "max_seq_len": 20, "doc_stride": 3}))


def test_the_empty_answer_is_explained_at_the_first_token(tokenizer: Tokenizer) -> None:
    class Impossible(FakeEngine):
        """Sees no answer, and says so the louder the more of the film is in sight."""

        def launch(self, batch: Any) -> Any:
            done = super().launch(batch)
            film = tokenizer.token_to_id("film")
            for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
                count = (batch.input_ids[begin:end] == film).sum()
                done._outputs[:, begin] = 20 + np.array([1, 2]) * count
            return done

    pipeline = pipeline_of(tokenizer, Impossible(QA), QA, explains=True)
    asked = {
        "question": "who built it", "context": "a film and a film", "handle_impossible_answer": True
    }  # fmt: skip
    answer: Any = pipeline.predict(Incoming(asked))
    assert answer["answer"] == ""
    assert answer["importances_answer_start"] == [0, 0, 0, 0, 1, 0, 0, 1]
    assert answer["importances_answer_end"] == [0, 0, 0, 0, 2, 0, 0, 2]
    assert (answer["delta_start"], answer["delta_end"]) == (0, 0)


# -- the real model ------------------------------------------------------------------------------


def test_importances_are_those_of_transformers_one_sequence_at_a_time(
    tiny_classification: Path, tiny_qa: Path, tmp_path: Path
) -> None:
    import transformers

    library = Tokenizer.from_file(str(tiny_classification / "tokenizer.json"))
    for mode, source, texts in (
        ("sequence_classification", tiny_classification, (TEXT,)),
        ("sequence_classification", tiny_classification, (TEXT, "a slow film")),
        (QA, tiny_qa, ("who built it", CONTEXT)),
    ):
        output = tmp_path / mode
        if not output.exists():
            trace(TraceOptions(mode=mode, model_name_or_path=str(source), output=output))
        task = tasks.get(mode)
        model = getattr(transformers, task.auto_class).from_pretrained(source).eval()
        encoding = library.encode(*texts)

        def outputs(
            words: set[tuple[int, int]], model: Any = model, encoding: Any = encoding
        ) -> list[torch.Tensor]:
            with torch.inference_mode():
                out = model(
                    torch.tensor(masked(library, encoding, words))[None],
                    token_type_ids=torch.tensor([encoding.type_ids]),
                    return_dict=False,
                )
            return [part[0] for part in out]

        keys = (*task.required, *task.optional)
        answer: Any = Predictor.load(output).explain(dict(zip(keys, texts, strict=False)))
        words = words_in(encoding)
        assert len(answer["words"]) == len(words)
        whole = outputs(set())
        if mode == QA:
            start, end = max(
                answer_tokens(encoding, answer), key=lambda p: whole[0][p[0]] + whole[1][p[1]]
            )
            wanted = {
                "importances_answer_start": lambda out, at=start: out[0][at],
                "importances_answer_end": lambda out, at=end: out[1][at],
            }
        else:
            best = int(whole[0].argmax())
            wanted = {"importances": lambda out, at=best: out[0][at]}
        for name, logit in wanted.items():
            importances = [float(logit(whole) - logit(outputs({word}))) for word in words]
            assert answer[name] == pytest.approx(importances, abs=1e-4)
            assert max(importances) > 0.01


def test_an_answer_of_several_sequences_is_their_mean(tokenizer: Tokenizer) -> None:
    """Two windows of one text, whose logits of a label are averaged."""
    from fakes import items_of, runner_of

    from ft_handler.tasks.occlusion import Explained, OcclusionRunner, Reason
    from ft_handler.tasks.sequence_classification import Parameters, TextInput
    from ft_handler.types import Outputs

    base: Any = runner_of("sequence_classification", tokenizer)

    class Windows(type(base)):  # type: ignore[misc]
        """The text in two halves of two words, with one word in common."""

        def encode(self, items: Any) -> Any:
            (encoding,) = super().encode(items)
            whole = encoding.sequences[0]
            encoding.sequences = [whole[:3], whole[2:4]]
            encoding.splits = [3, 2]
            return [encoding]

        def parts(self, encoding: Any) -> list[list[Part]]:
            return [[Part(0, 0, 2, 1)], [Part(0, 1, 2, 0)]]

        def explained(self, encoding: Any, outputs: Outputs) -> Explained:
            assert outputs.values.tolist() == [[10.0], [20.0]]
            return Explained({}, (0, 1), (Reason("importances", "delta", 0),))

    base.__class__ = Windows
    task = tasks.get("sequence_classification")
    info = model_info()
    loaded = Loaded(
        info, info.labels, reader_of(tokenizer), Template(tokenizer, 2), 128, Pieces(tokenizer), 4
    )
    runner = OcclusionRunner(task, base, loaded)
    encodings = runner.encode(items_of([TextInput("a good film", None, Parameters())]))
    logits = np.array([[10], [9], [7], [2], [20], [14], [12], [4]], np.float32)
    lengths = np.array([3] * 4 + [2] * 4)
    (answer,) = runner.predict(encodings, Outputs(logits, lengths))
    assert answer == {
        "words": ["a", "good", "film"],
        "offsets": [[0, 1], [2, 6], [7, 11]],
        "fields": ["text"] * 3,
        "importances": [0.5, 1.5 + 3, 4],
        "delta": 9 - 12,
    }


@pytest.mark.parametrize("pair", [None, "a warm plot"])
@pytest.mark.parametrize("rule", ["mean", "max"])
def test_of_a_text_in_windows_those_that_count_are_explained(
    tokenizer: Tokenizer, rule: Any, pair: str | None
) -> None:
    """Every part stands where it says, and the windows are those that the answer is made of."""
    from fakes import items_of, runner_of

    from ft_handler.tasks.sequence_classification import Parameters, TextInput
    from ft_handler.types import Outputs

    runner: Any = runner_of("sequence_classification", tokenizer, max_length=12)
    texts = [" ".join(["a good film with", "the story"] * 5), *([pair] if pair else [])]
    given = TextInput(texts[0], pair, Parameters(long_texts=rule, stride=2))
    (encoding,) = runner.encode(items_of([given]))
    assert len(encoding.sequences) > 2
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    for sequence, parts in zip(encoding.sequences, runner.parts(encoding), strict=True):
        assert [part.text for part in parts] == [*range(len(texts))]
        for text, begin, tokens, at in parts:
            assert tokens > 0
            assert sequence[at : at + tokens].tolist() == ids[text][begin : begin + tokens]
    count = len(encoding.sequences)
    logits = np.zeros((count, 2), np.float32)
    logits[1] = [3, 1]
    found = runner.explained(encoding, Outputs(logits, np.full(count, 12)))
    assert list(found.sequences) == ([1] if rule == "max" else list(range(count)))
    (reason,) = found.reasons
    assert reason.column == 0
