"""A toy architecture, all of it in this file: traced, checked against transformers, loaded.

It is unlike BERT wherever an architecture may be: other names for sizes and weights, positions that
start at 2, no token types, a head under other names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny import tiny_vocabulary, write_tokenizer
from torch import Tensor, nn

from ft_handler import TraceOptions, architectures, load_model, tasks
from ft_handler.architectures.base import Architecture, summary_head, weight_and_bias
from ft_handler.errors import ModelError
from ft_handler.model.heads import PooledHead
from ft_handler.model.spec import EncoderSpec
from ft_handler.prepare.trace import trace
from ft_handler.tasks.base import Head

transformers = pytest.importorskip("transformers")

FIRST_POSITION = 2
SERVED_POSITIONS = 128
CLASSES = ["no", "perhaps", "yes", "never"]


# -- the family, as its authors would have written it for transformers ----------------------------


class ToyConfig(transformers.PretrainedConfig):
    """Sizes under names of its own."""

    model_type = "toy"

    def __init__(
        self,
        vocab_size: int = 100,
        width: int = 48,
        depth: int = 3,
        head_count: int = 4,
        inner_width: int = 80,
        places: int = FIRST_POSITION + SERVED_POSITIONS,
        curve: str = "gelu",
        epsilon: float = 1e-5,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.width, self.depth, self.head_count = width, depth, head_count
        self.inner_width, self.places, self.curve = inner_width, places, curve
        self.epsilon = epsilon
        super().__init__(**others)


class ToyBlock(nn.Module):
    """One layer, its norms after its sums."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.head_count = config.head_count
        for name in ("ask", "offer", "content", "mix"):
            setattr(self, name, nn.Linear(config.width, config.width))
        self.widen = nn.Linear(config.width, config.inner_width)
        self.narrow = nn.Linear(config.inner_width, config.width)
        self.after_mix = nn.LayerNorm(config.width, eps=config.epsilon)
        self.after_narrow = nn.LayerNorm(config.width, eps=config.epsilon)

    def forward(self, x: Tensor, hidden_places: Tensor) -> Tensor:
        batch, length, width = x.shape

        def heads(part: Tensor) -> Tensor:
            return part.view(batch, length, self.head_count, -1).transpose(1, 2)

        q, k, v = heads(self.ask(x)), heads(self.offer(x)), heads(self.content(x))
        scores = q @ k.transpose(2, 3) / math.sqrt(width // self.head_count)
        scores = scores.masked_fill(hidden_places[:, None, None, :], float("-inf"))
        seen = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        x = self.after_mix(x + self.mix(seen))
        return self.after_narrow(x + self.narrow(nn.functional.gelu(self.widen(x))))


class ToyModel(nn.Module):
    """Embeddings and layers, and a summary of the first token."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.places = nn.Embedding(config.places, config.width)
        self.scale = nn.LayerNorm(config.width, eps=config.epsilon)
        self.blocks = nn.ModuleList(ToyBlock(config) for _ in range(config.depth))
        self.summary = nn.Linear(config.width, config.width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device) + FIRST_POSITION
        x = self.scale(self.words(input_ids) + self.places(places))
        for block in self.blocks:
            x = block(x, attention_mask == 0)
        return torch.tanh(self.summary(x[:, 0]))


class ToyForSequenceClassification(transformers.PreTrainedModel):
    """The model with a head; it takes no token types."""

    config_class = ToyConfig
    base_model_prefix = "toy"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.toy = ToyModel(config)
        self.verdict = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: modules are born random."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        return (self.verdict(self.toy(input_ids, attention_mask)),)


# -- the family, as this package is told of it ----------------------------------------------------


class Toy(Architecture):
    """The whole of what it takes."""

    model_type = "toy"
    title = "Toy"
    base = "toy"
    table: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "embeddings.word": ("{base}.words.weight",),
        "embeddings.position": ("{base}.places.weight",),
        **weight_and_bias(
            {
                "embeddings.norm": ("{base}.scale",),
                "layers.qkv": tuple(
                    f"{{base}}.blocks.{{layer}}.{n}" for n in ("ask", "offer", "content")
                ),
                "layers.out": ("{base}.blocks.{layer}.mix",),
                "layers.norm1": ("{base}.blocks.{layer}.after_mix",),
                "layers.up": ("{base}.blocks.{layer}.widen",),
                "layers.down": ("{base}.blocks.{layer}.narrow",),
                "layers.norm2": ("{base}.blocks.{layer}.after_narrow",),
            }
        ),
    }
    accepted: ClassVar[Mapping[str, tuple[object, ...]]] = {"curve": ("gelu",)}
    heads: ClassVar[Mapping[str, Head]] = {
        tasks.get("sequence_classification").auto_class: summary_head(
            PooledHead, "{base}.summary", "verdict"
        )
    }
    unserved: ClassVar[Mapping[str, str]] = {
        tasks.get("question_answering").auto_class: "it has no span head"
    }

    def spec(self, config: Any) -> EncoderSpec:
        return EncoderSpec(
            hidden_size=config.width,
            embedding_size=config.width,
            num_layers=config.depth,
            num_heads=config.head_count,
            intermediate_size=config.inner_width,
            activation=config.curve,
            layer_norm_eps=config.epsilon,
        )

    def first_position(self, config: Any) -> int:
        return FIRST_POSITION

    def positions(self, config: Any) -> int:
        return int(config.places) - FIRST_POSITION


# -- from checkpoint to answers -------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """Known to transformers and to this package while these tests run."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    transformers.AutoConfig.register("toy", ToyConfig)
    transformers.AutoModelForSequenceClassification.register(
        ToyConfig, ToyForSequenceClassification
    )
    architectures.register(Toy())
    yield
    architectures.unregister("toy")
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING._extra_content.pop(ToyConfig)
    CONFIG_MAPPING._extra_content.pop("toy")


def write_toy(folder: Path, **settings: Any) -> ToyForSequenceClassification:
    """A random checkpoint in `folder`; returns the model."""
    torch.manual_seed(11)
    config = ToyConfig(
        vocab_size=len(tiny_vocabulary()),
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
        **settings,
    )
    model = ToyForSequenceClassification(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def options(source: Path, output: Path, **changes: Any) -> TraceOptions:
    values: dict[str, Any] = {"mode": "sequence_classification", **changes}
    return TraceOptions(model_name_or_path=str(source), output=output, **values)


@pytest.mark.parametrize("data_type", ["fp32", "bf16"])
def test_a_toy_is_traced_and_answers_like_transformers(data_type: str, tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy")
    said: list[str] = []
    folder = trace(options(tmp_path / "toy", tmp_path / "out", data_type=data_type), said.append)
    assert f"tracing toy 3 x 48 (4 heads), 4 labels, {data_type}, thsext" in said
    loaded = load_model(folder / "traced_model.pt")
    assert loaded.info.architecture == "toy"
    assert loaded.info.labels == dict(enumerate(CLASSES))
    assert (loaded.info.max_positions, loaded.info.type_vocab_size) == (SERVED_POSITIONS, 1)
    lengths = (1, 7, 113, SERVED_POSITIONS)
    apart = []
    for length in lengths:
        ids = torch.randint(5, 100, (1, length))
        ones, zeros = torch.ones_like(ids), torch.zeros_like(ids)
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
        with torch.no_grad():
            wanted = toy(ids, ones)[0]
        for found in (
            loaded.module(ids, ones, zeros)[0],
            loaded.fused.packed(ids[0], zeros[0], cu_seqlens, length),
        ):
            assert found.shape == (1, len(CLASSES))
            apart.append(float((found - wanted).abs().max()))
    assert max(apart) < (1e-4 if data_type == "fp32" else 0.1)
    ids = torch.ones(1, SERVED_POSITIONS + 1, dtype=torch.int64)
    with pytest.raises((RuntimeError, torch.jit.Error), match="over the model's 128 positions"):
        loaded.module(ids, ids, ids * 0)


def test_the_toy_as_plain_torchscript(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy")
    folder = trace(options(tmp_path / "toy", tmp_path / "out", model_type="ths"))
    ids = torch.randint(5, 100, (2, 31))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.no_grad():
        wanted = toy(ids, mask)[0]
    found = load_model(folder / "traced_model.pt").module(ids, mask, torch.zeros_like(ids))[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_its_own_refusals(tmp_path: Path) -> None:
    write_toy(tmp_path / "toy")
    with pytest.raises(ModelError, match="toy is not served for question_answering: it has no"):
        trace(options(tmp_path / "toy", tmp_path / "out", mode="question_answering"))
    write_toy(tmp_path / "bent", curve="relu")
    with pytest.raises(ModelError, match="bent: curve='relu' is not served; it must be 'gelu'"):
        trace(options(tmp_path / "bent", tmp_path / "out"))
    write_toy(tmp_path / "odd", head_count=16)
    with pytest.raises(ModelError, match="odd: head size 3 is not served"):
        trace(options(tmp_path / "odd", tmp_path / "out"))


def test_layers_that_share_their_weights_are_stored_once() -> None:
    class Shared(Toy):
        table: ClassVar[Mapping[str, tuple[str, ...]]] = {
            name: tuple(part.replace("{layer}", "0") for part in parts)
            for name, parts in Toy.table.items()
        }

    toy = ToyForSequenceClassification(ToyConfig(depth=1))
    config = ToyConfig(depth=7)
    task = tasks.get("sequence_classification")
    weights = Shared().weights(task, config, toy.state_dict())
    assert Shared().spec(config).num_layers == 7
    assert weights.encoder["layers.qkv.weight"].shape == (1, 3 * 48, 48)
    assert weights.encoder["layers.norm2.bias"].shape == (1, 48)
    assert weights.encoder["embeddings.position"].shape == (SERVED_POSITIONS, 48)
    torch.testing.assert_close(
        weights.encoder["embeddings.position"][0], toy.toy.places.weight[FIRST_POSITION]
    )


def test_names_of_what_is_served() -> None:
    assert "toy" in architectures.names()
    architectures.unregister("toy")
    assert "toy" not in architectures.names()
    with pytest.raises(ModelError, match=r"architecture 'toy' is not served; served: .*\bbert\b"):
        architectures.get("toy")
    architectures.register(Toy())


def test_preparing_names_no_task() -> None:
    package = Path(architectures.__file__).parents[1]
    files = [*package.glob("prepare/*.py"), *package.glob("architectures/*.py")]
    assert len(files) > 10
    for path in files:
        for name in tasks.names():
            assert f'"{name}"' not in path.read_text(encoding="utf-8"), f"{path.name}: {name}"
