"""Tokens and entities: transformers' pipeline, windows, tokenizers of all kinds."""

from __future__ import annotations

import random
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeEngine, items_of, loaded, model_info, pipeline_of, runner_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TOKEN_LABELS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ft_handler import tasks
from ft_handler.errors import ConfigError, UnusableRequest
from ft_handler.predictor import Predictor
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace
from ft_handler.tasks.token_classification import Parameters, TokenInput, hand_over
from ft_handler.text.tokenizer import load_tokenizer
from ft_handler.types import Incoming, Outputs

STRATEGIES = ("none", "simple", "first", "average", "max")
TEXTS = (
    "The old captain of the bridge sailed fast; who built it?",
    "an engineer unbuilding stations, slowly. The painters' museum",
    "warm",
    "caf\u00e9 na\u00efve \u6771\u4eac film [SEP] and [UNK] \U0001f469\u200d\U0001f4bb story",
    "a\tb\r\nc  d\u00a0e",
)
LABELS = dict(enumerate(TOKEN_LABELS))
INFO = model_info("token_classification", labels=LABELS, num_labels=len(LABELS))


def agree(ours: Any, theirs: Any) -> None:
    """The same answers, field by field and in the same order."""
    assert [list(a) for a in ours] == [list(a) for a in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a == {**b, "score": pytest.approx(float(b["score"]), abs=1e-5)}


# -- a traced model against transformers' pipeline -----------------------------------------------


@pytest.fixture(scope="module")
def traced(tiny_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("traced") / "tokens"
    mode = "token_classification"
    return trace(TraceOptions(mode=mode, model_name_or_path=str(tiny_tokens), output=output))


@pytest.fixture(scope="module")
def predictor(traced: Path) -> Predictor:
    return Predictor.load(traced)


@pytest.fixture(scope="module")
def theirs(tiny_tokens: Path) -> Any:
    from transformers import pipeline

    return pipeline("token-classification", model=str(tiny_tokens))


@pytest.mark.parametrize("ignored", [None, [], ["O", "PER"], ["B-PER", "MISC", "nothing"]])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_answers_are_those_of_transformers(predictor, theirs, strategy, ignored) -> None:
    answers = predictor.predict(list(TEXTS), aggregation_strategy=strategy, ignore_labels=ignored)
    for text, answer in zip(TEXTS, answers, strict=True):
        agree(answer, theirs(text, aggregation_strategy=strategy, ignore_labels=ignored))


def test_requests_of_different_parameters_do_not_disturb_each_other(predictor) -> None:
    asked = [{"text": t, "aggregation_strategy": s} for t in TEXTS for s in STRATEGIES]
    together = predictor.predict({"inputs": asked})
    for one, answer in zip(asked, together, strict=True):
        agree(answer, predictor.predict(one))


def test_older_switches_mean_what_they_meant(predictor) -> None:
    def ask(**given: bool) -> Any:
        return predictor.predict(TEXTS[1], **given)

    simple, first = (predictor.predict(TEXTS[1], aggregation_strategy=s) for s in STRATEGIES[1:3])
    assert simple != first
    assert ask(grouped_entities=True) == simple
    assert ask(grouped_entities=True, ignore_subwords=True) == first
    assert ask(grouped_entities=False) == ask(ignore_subwords=True) == ask()


def test_settings_are_the_defaults(traced: Path, predictor) -> None:
    chosen = {"aggregation_strategy": "Average", "ignore_labels": ["PER"]}
    set_so = Predictor.load(traced, settings=chosen)
    asked = predictor.predict(TEXTS[0], **chosen)
    assert set_so.predict(TEXTS[0]) == asked != predictor.predict(TEXTS[0])
    assert set_so.predict(TEXTS[0], aggregation_strategy="none", ignore_labels="O") == (
        predictor.predict(TEXTS[0])
    )


# -- the forms of an answer ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture
def ask(tokenizer: Tokenizer) -> Any:
    engine = FakeEngine("token_classification", width=len(LABELS))
    pipeline = pipeline_of(tokenizer, engine, "token_classification", INFO)
    return lambda document: pipeline.predict(Incoming(document))


NOTHING = "\u200b"  # cleaned away: no token is left


def test_an_answer_may_be_an_empty_list(ask) -> None:
    everything = [*LABELS.values(), "PER", "LOC"]
    assert ask(NOTHING) == []
    assert ask({"inputs": NOTHING}) == []
    assert ask({"text": "a film", "ignore_labels": everything}) == []
    first, second = ask([NOTHING, "a film"])
    assert (first, second) == ([], ask("a film"))
    assert second
    assert ask({"instances": [NOTHING]}) == {"predictions": [[]]}


def test_one_text_in_inputs_gets_the_plain_list_that_the_hubs_clients_want(ask) -> None:
    assert ask({"inputs": "a film"}) == ask("a film")
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    element = hub.TokenClassificationOutputElement
    for parameters in ({}, {"aggregation_strategy": "simple", "stride": 4}):
        answer = ask({"inputs": "a film", "parameters": parameters})
        assert [e.word for e in element.parse_obj_as_list(answer)] == [a["word"] for a in answer]


def tensors(ask: Any, texts: list[str], **more: object) -> dict[str, dict[str, Any]]:
    tensor = {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": texts}
    return {o["name"]: o for o in ask({"inputs": [tensor], **more})["outputs"]}


def test_tensors_have_a_column_a_token_and_only_the_fields_there_are(ask) -> None:
    none = tensors(ask, ["a film", "warm"])
    assert list(none) == ["entity", "score", "index", "word", "start", "end"]
    width = max(len(ask("a film")), len(ask("warm")))
    assert none["word"]["shape"] == [2, width]
    assert none["word"]["data"][: len(ask("a film"))] == [a["word"] for a in ask("a film")]
    simple = tensors(ask, ["a film"], parameters={"aggregation_strategy": "simple"})
    assert list(simple) == ["entity_group", "score", "word", "start", "end"]
    wanted = tensors(ask, ["a film"], outputs=[{"name": "entity_group"}, {"name": "end"}])
    assert list(wanted) == ["entity_group", "end"]
    assert set(wanted["entity_group"]["data"]) == {""}


def test_tensors_of_no_answer_have_no_columns(ask) -> None:
    empty = tensors(ask, [NOTHING])
    assert list(empty) == ["score", "word", "start", "end"]
    assert [(o["shape"], o["data"]) for o in empty.values()] == [([1, 0], [])] * 4


# -- windows -------------------------------------------------------------------------------------


def encoded(tokenizer: Tokenizer, text: str, max_length: int = 16, **given: Any) -> Any:
    runner = runner_of("token_classification", tokenizer, max_length, INFO)
    (item,) = items_of([TokenInput(text, Parameters(**given))])
    found = runner.encode([item])
    return (*found, item.result)


WORDS = ("river", "unbuilt", "sailed", "the", "a", "painters", "good", "stations")
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=60).map(" ".join)


@settings(max_examples=60)
@given(text=sentences, max_length=st.integers(3, 24), data=st.data())
def test_every_token_is_read_where_edges_are_farthest(tokenizer, text, max_length, data) -> None:
    room = max_length - 2
    stride = data.draw(st.none() | st.integers(0, room - 1))
    encoding, error = encoded(tokenizer, text, max_length, stride=stride)
    assert error is None
    count = len(encoding.ids)
    assert encoding.sequences[0][0] == tokenizer.token_to_id("[CLS]")
    assert not encoding.truncated
    flat = np.concatenate(encoding.sequences)
    assert flat[encoding.places].tolist() == encoding.ids.tolist()
    if count <= room:
        assert len(encoding.sequences) == 1
        return
    assert {len(s) for s in encoding.sequences} == {max_length}
    windows, places = np.divmod(encoding.places, max_length)
    assert (np.diff(windows) >= 0).all()
    # Where each token stands in the text tells where its window begins.
    begins = {int(w): int(t - p + 1) for t, (w, p) in enumerate(zip(windows, places, strict=True))}

    def context(token: int, window: int) -> int:
        """Tokens to the nearer edge that is not the text's own."""
        begin, end = begins[window], begins[window] + room
        sides = [token - begin] * (begin > 0) + [end - 1 - token] * (end < count)
        return min(sides, default=count)

    for before, after in pairwise(sorted(begins)):
        begin, end = begins[after], begins[before] + room
        for token in range(begin, end):
            best = max(context(token, before), context(token, after))
            # Words are kept together where that costs less than half of the best context.
            assert context(token, int(windows[token])) >= best - 1 - (end - begin) // 2


def test_where_windows_hand_over() -> None:
    begins = np.zeros(40, np.bool_)
    begins[[0, 9, 13, 14, 25]] = True
    assert hand_over([(0, 20), (4, 24)], begins) == [13]  # the middle is 12, the half 8 to 16
    assert hand_over([(0, 20), (12, 32)], begins) == [14]
    assert hand_over([(0, 28), (14, 40)], begins) == [21]  # no word begins in the middle half
    assert hand_over([(0, 20), (20, 40)], begins) == [20]
    assert hand_over([(0, 20), (2, 22), (9, 29)], begins) == [9, 14]
    assert hand_over([(0, 40)], begins) == []


def near_an_edge(sequence: np.ndarray, margin: int) -> np.ndarray:
    """Logits that depend on the token, and are wrong for tokens near the window's edges."""
    place = np.arange(len(sequence))
    right = 3 * np.sin(sequence * np.arange(1, len(LABELS) + 1)[:, None]).astype(np.float32)
    wrong = (place <= margin) | (place >= len(sequence) - 1 - margin)
    right[:, wrong] = 0
    right[0, wrong] = 9
    return right


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=20)
@given(text=sentences)
def test_no_entity_is_cut_by_an_edge(tokenizer, strategy, text) -> None:
    """A model that is blind near edges answers as it would if there were none within the text."""
    margin, answers = 3, []
    for max_length in (26, 1000):
        runner = runner_of("token_classification", tokenizer, max_length, INFO)
        params = Parameters(aggregation_strategy=strategy, stride=2 * margin + 8)
        (encoding,) = runner.encode(items_of([TokenInput(text, params)]))
        pieces = [near_an_edge(s, margin) for s in encoding.sequences]
        lengths = np.array([len(s) for s in encoding.sequences])
        answers += runner.predict([encoding], Outputs(np.concatenate(pieces, axis=1), lengths))
    cut, whole = answers
    agree(cut, whole)


def test_a_stride_that_stands_still_is_refused(tokenizer) -> None:
    refused = encoded(tokenizer, "the river " * 20, 16, stride=14)
    assert isinstance(refused[-1], UnusableRequest)
    assert "14" in str(refused[-1])
    assert encoded(tokenizer, "the river", 16, stride=99)[-1] is None  # one window needs none
    with pytest.raises(ConfigError, match="'stride'"):
        runner_of("token_classification", tokenizer, 16, INFO, stride=14)
    with pytest.raises(ConfigError, match="leaves no room"):
        runner_of("token_classification", tokenizer, 2, INFO)


# -- tokenizers of other kinds -------------------------------------------------------------------

CORPUS = (
    "the old bridge of the city was built by an engineer and the painter wrote of it",
    "Ada Lindqvist visited Gothenburg, Z\u00fcrich and S\u00e3o Paulo in 1889.",
    "\u6771\u4eac\u30bf\u30ef\u30fc\u306f\u65e5\u672c\u306e\u6771\u4eac\u306b\u3042\u308a\u307e\u3059\u3002",
    "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e\u0e21\u0e2b\u0e32\u0e19\u0e04\u0e23",
    "\uc11c\uc6b8\uc740 \ud55c\uad6d\uc758 \uc218\ub3c4",
)
SPACED = (
    "Ada Lindqvist visited the bridge. S\u00e3o Paulo, built in 1889; (the old city)!",
    " two  blanks and\na line \uc11c\uc6b8\uc740 \uc218\ub3c4 caf\u00e9 \U0001f469\u200d\U0001f4bb",
    "e\u0301tude",
)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<unk>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 1), ("<s>", 0), add_prefix_space=False
    )
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<s>", "</s>", "<unk>", "<pad>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )  # fmt: skip
    return tokenizer


@pytest.fixture(scope="module", params=[byte_level, unigram])
def unmarked(request: pytest.FixtureRequest) -> Tokenizer:
    """A tokenizer that does not mark what continues a word."""
    made: Tokenizer = request.param()
    return made


def both(tokenizer: Tokenizer, text: str, strategy: str) -> tuple[Any, Any]:
    """Our answers and transformers' pipeline's, over one random model."""
    from transformers import (
        BertConfig,
        BertForTokenClassification,
        PreTrainedTokenizerFast,
        TokenClassificationPipeline,
    )

    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=200,
        initializer_range=0.5, num_labels=len(LABELS), id2label=LABELS,
        label2id={name: i for i, name in LABELS.items()},
    )  # fmt: skip
    model = BertForTokenClassification(config).eval()
    copy = Tokenizer.from_str(tokenizer.to_str())
    fast = PreTrainedTokenizerFast(tokenizer_object=copy, unk_token="<unk>", pad_token="<pad>")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "does not support real words", which is the point here
        pipeline = TokenClassificationPipeline(model=model, tokenizer=fast)
        wanted = pipeline(text, aggregation_strategy=strategy, ignore_labels=[])
    info = model_info("token_classification", labels=LABELS, num_labels=len(LABELS))
    task = tasks.get("token_classification")
    runner = task.runner(task.settings(), loaded(tokenizer, info))
    params = Parameters(aggregation_strategy=strategy, ignore_labels=())
    (encoding,) = runner.encode(items_of([TokenInput(text, params)]))
    (sequence,) = encoding.sequences
    with torch.inference_mode():
        logits = model(torch.from_numpy(sequence)[None]).logits[0].T.numpy()
    (answer,) = runner.predict([encoding], Outputs(logits, np.array([len(sequence)])))
    return answer, wanted


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_words_between_blanks_are_those_of_transformers(unmarked, strategy) -> None:
    rng = random.Random(3)
    shuffled = SPACED[0].split()
    rng.shuffle(shuffled)
    for text in (*SPACED, CORPUS[1], " ".join(shuffled)):
        agree(*both(unmarked, text, strategy))


@pytest.mark.parametrize("strategy", ["none", "simple"])
def test_tokens_are_those_of_transformers_in_every_script(unmarked, strategy) -> None:
    for text in CORPUS:
        agree(*both(unmarked, text, strategy))


def begins_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words of a text: what stands between the begins of words."""
    have = loaded(tokenizer, model_info())
    (ids,), (origins,) = have.reader.located([text])
    begins = have.pieces.begin_words(ids, origins, text)
    firsts = origins[begins, 0].tolist()
    return [text[a:b] for a, b in pairwise([*firsts, len(text)]) if a < b]


def test_scripts_without_blanks_have_words_too(unmarked) -> None:
    """transformers' rule makes one word of a whole sentence here."""
    japanese, thai = "\u306f\u65e5\u30bf\u6771\u4eac\u306b", "\u0e19\u0e38\u0e01\u0e23\u0e38\u0e2b"
    for text in (japanese, thai, "Ada\u306f\u65e5\u306bAda"):
        words = begins_of(unmarked, text)
        assert "".join(words) == text
        assert len(words) > 2
        # A sign above or below a letter begins none.
        assert not any(word[0] in "\u0e38\u0e31\u0e34\u0e35" for word in words)
    # A character of several tokens is one word: U+9F98 is in nobody's vocabulary.
    assert begins_of(unmarked, "\u6771\u9f98\u4eac") == ["\u6771", "\u9f98", "\u4eac"]


def test_words_of_wordpiece_are_its_own(tokenizer) -> None:
    """Also where cleaning changes their length, which transformers takes for a continuation."""
    assert begins_of(tokenizer, "unbuilt cafe\u0301 stations\u6771\u4eac") == [
        "unbuilt ", "cafe\u0301 ", "stations", "\u6771", "\u4eac",
    ]  # fmt: skip
