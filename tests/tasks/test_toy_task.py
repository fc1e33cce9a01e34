"""A task defined in this file alone runs from trace through the pipeline and the server's handler.

The toy names the token whose hidden state is largest in a direction that the checkpoint brings: it
has outputs for each token, parameters, settings and an Open Inference form of its own.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
from fakes import FakeContext
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from ft_handler import tasks
from ft_handler.config import Settings, Whole, setting
from ft_handler.errors import ConfigError, NotOffered, UnusableRequest
from ft_handler.model.heads import HeadModule
from ft_handler.predictor import Predictor
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace
from ft_handler.servers.torchserve.handler import load
from ft_handler.tasks.base import Column, Head, Loaded, Runner, Task
from ft_handler.types import Encoding, Item, Outputs, Prediction


@dataclass(frozen=True, slots=True, config=ConfigDict(strict=True))
class Parameters:
    """How many words are named."""

    most: Annotated[int, Field(ge=1, le=5)] = 1


class ToySettings(Settings):
    """The default of the parameter."""

    most: Whole = setting(1, "How many words are named.", 1, 5)


@plain_dataclass(slots=True)
class Passage:
    """One text."""

    passage: str
    params: Parameters

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.passage,)


class TokenScores(HeadModule):
    """One linear layer with as many columns as the checkpoint has labels."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        return torch.addmm(self.bias[:, None], self.weight, hidden.float().t())

    @torch.jit.export
    def padded(
        self, logits: Tensor, token_indices: Tensor, batch: int, seqlen: int
    ) -> tuple[Tensor]:
        rows = torch.ops.fastertransformer.restore_padding(
            logits.t().contiguous(), token_indices, batch, seqlen, 0.0
        )
        return (rows,)


class ToyRunner(Runner[Passage, Parameters, Encoding[Passage]]):
    """Every text is one sequence."""

    def __init__(self, settings: ToySettings, loaded: Loaded) -> None:
        self.defaults = Parameters(settings.most)
        self.longest = loaded.max_length
        self._loaded = loaded

    def encode(self, items: Sequence[Item[Passage]]) -> list[Encoding[Passage]]:
        template = self._loaded.template
        out = []
        for item, ids in zip(
            items, self._loaded.reader.ids([i.input.passage for i in items]), strict=True
        ):
            if len(ids) > self.longest - 2:
                item.result = UnusableRequest("too many words")
                continue
            sequence = np.concatenate((template.single_before, ids, template.single_after))
            out.append(Encoding(item, [sequence], [len(sequence)], False))
        return out

    def predict(self, encodings: Sequence[Encoding[Passage]], outputs: Outputs) -> list[Prediction]:
        ends = np.cumsum(outputs.lengths)
        predictions: list[Prediction] = []
        for encoding, end, length in zip(encodings, ends, outputs.lengths, strict=True):
            scores = outputs.values[0, end - length : end]
            best = np.argsort(-scores, kind="stable")[: encoding.item.input.params.most]
            predictions.append([{"place": int(i), "score": float(scores[i])} for i in best])
        return predictions


class Toy(Task[Passage, Parameters, Encoding[Passage], ToySettings]):
    """Names tokens."""

    name = "toy"
    auto_class = "AutoModelForTokenClassification"
    per_token = True
    labelled = True
    required = ("passage",)
    bare = "passage"
    parameters = Parameters
    settings = ToySettings
    columns_of: ClassVar[Mapping[str, Column]] = {
        "place": Column("INT64", -1),
        "score": Column("FP32", 0.0),
    }
    sample: ClassVar[Mapping[str, object]] = {"passage": "a good film"}

    def head(self) -> Head:
        return Head(
            TokenScores, {"weight": "classifier.weight", "bias": "classifier.bias"}, "classifier"
        )

    def read(self, texts: Mapping[str, Any], params: Parameters) -> Passage:
        return Passage(texts["passage"], params)

    def runner(self, settings: ToySettings, loaded: Loaded) -> ToyRunner:
        return ToyRunner(settings, loaded)


@pytest.fixture(scope="module", autouse=True)
def _known() -> Iterator[None]:
    tasks.register(Toy())
    yield
    tasks.unregister("toy")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random token classifier with the tiny vocabulary."""
    from tiny import tiny_vocabulary, write_tokenizer
    from transformers import BertConfig, BertForTokenClassification

    folder = tmp_path_factory.mktemp("toy")
    config = BertConfig(
        vocab_size=len(tiny_vocabulary()), hidden_size=64, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=128, max_position_embeddings=128,
        initializer_range=0.3, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(3)
    BertForTokenClassification(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def traced(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("traced") / "toy"
    return trace(TraceOptions(mode="toy", model_name_or_path=str(checkpoint), output=output))


def by_transformers(checkpoint: Path, text: str) -> list[float]:
    """The scores of every token, from transformers' own model."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForTokenClassification

    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids
    model = AutoModelForTokenClassification.from_pretrained(checkpoint).eval()
    with torch.inference_mode():
        scores: list[float] = model(torch.tensor([ids])).logits[0, :, 0].tolist()
    return scores


TEXTS = ("a good film", "the old bridge of the city was built by an engineer", "warm")


def test_answers_are_those_of_transformers(checkpoint: Path, traced: Path) -> None:
    predictor = Predictor.load(traced)
    answers: Any = predictor.predict(list(TEXTS), most=2)
    for text, answer in zip(TEXTS, answers, strict=True):
        scores = by_transformers(checkpoint, text)
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:2]
        assert [a["place"] for a in answer] == best
        assert [a["score"] for a in answer] == pytest.approx([scores[i] for i in best], rel=1e-3)


def test_the_server_asks_the_task(traced: Path) -> None:
    context = FakeContext(
        str(traced), {"handler": {"fast_receive": False, "metrics": False, "most": 2}}
    )
    worker = load(context)
    tensor = {"name": "passage", "shape": [1], "datatype": "BYTES", "data": [TEXTS[0]]}
    plain, refused, unknown, tensors = (
        json.loads(body)
        for body in worker.handle(
            [
                {"body": TEXTS[0]},
                {"body": {"passage": "film " * 200}},
                {"body": {"passage": "a", "top_k": 1}},
                {"body": {"inputs": [tensor]}},
            ],
            context,
        )
    )
    assert len(plain) == 2
    assert (refused["code"], refused["message"]) == (422, "too many words")
    assert unknown["code"] == 400
    assert "passage, most, parameters" in unknown["message"]
    names = {o["name"]: (o["datatype"], o["shape"]) for o in tensors["outputs"]}
    assert names == {"place": ("INT64", [1, 2]), "score": ("FP32", [1, 2])}


def test_settings_of_the_task_are_its_own(traced: Path) -> None:
    with pytest.raises(ConfigError, match=r"'most'.* at most 5"):
        Predictor.load(traced, settings={"most": 6})
    with pytest.raises(ConfigError, match=r"'doc_stride' .* question_answering"):
        Predictor.load(traced, settings={"doc_stride": 3})


def test_what_a_task_does_not_explain_is_refused(traced: Path) -> None:
    with pytest.raises(NotOffered, match="answers of toy are not explained"):
        Predictor.load(traced).explain("a good film")
    with pytest.raises(ConfigError, match=r"'captum_explanation' .* toy"):
        Predictor.load(traced, settings={"captum_explanation": True})


def test_the_folder_has_what_the_task_says(traced: Path) -> None:
    assert json.loads((traced / "sample_request.json").read_text()) == dict(Toy.sample)
    assert (traced / "sample_text.txt").read_text() == "a good film\n"
    assert "mode: toy" in (traced / "model-config.yaml").read_text()
