"""Every architecture's checkpoints: what they may carry, encoders alone, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, random_model

from ft_handler import architectures, tasks
from ft_handler.errors import ModelError
from ft_handler.model.heads import HeadModule
from ft_handler.prepare.checkpoint import load_checkpoint
from ft_handler.prepare.hf import quiet_transformers
from ft_handler.tasks.base import AnyTask, Head
from ft_handler.tasks.sequence_classification import SequenceClassification

transformers = pytest.importorskip("transformers")

CLASSES = "sequence_classification"


class Alone(SequenceClassification):
    """A task that asks for the encoder alone."""

    name = "alone"
    auto_class = "AutoModel"
    labelled = False

    def head(self) -> Head:
        return Head(HeadModule, {})


@pytest.fixture(scope="module")
def alone() -> Iterator[AnyTask]:
    """The task, known while these tests run."""
    tasks.register(Alone())
    yield tasks.get("alone")
    tasks.unregister("alone")


def test_all_are_tested() -> None:
    assert tuple(sorted(FAMILIES)) == architectures.names()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_encoder_alone_goes_without_a_prefix(model_type: str, alone: AnyTask) -> None:
    task, architecture = tasks.get(CLASSES), architectures.get(model_type)
    model = random_model(model_type, task)
    whole = architecture.weights(task, model.config, model.state_dict()).encoder
    bare = architecture.weights(alone, model.config, model.base_model.state_dict())
    assert not bare.head
    assert bare.encoder.keys() == whole.keys()
    assert all(torch.equal(bare.encoder[name], whole[name]) for name in whole)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_encoder_of_a_pretrained_checkpoint(
    model_type: str, alone: AnyTask, tmp_path: Path
) -> None:
    """Its pretraining head is left behind, and a pooler that it lacks is nobody's loss."""
    config = random_model(model_type, alone).config
    pretrained = transformers.AutoModelForMaskedLM.from_config(config)
    pretrained.save_pretrained(tmp_path)
    found = load_checkpoint("alone", str(tmp_path))
    assert found.architecture.model_type == model_type
    assert not found.doubts
    table = pretrained.base_model.embeddings.word_embeddings.weight
    assert torch.equal(found.weights.encoder["embeddings.word"], table)
    with pytest.raises(ModelError, match=f"no trained head for {CLASSES}"):
        load_checkpoint(CLASSES, str(tmp_path))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_pretraining_leaves_in_a_checkpoint(model_type: str) -> None:
    architecture = architectures.get(model_type)
    config = random_model(model_type, tasks.get(CLASSES)).config
    for auto_class in ("AutoModelForPreTraining", "AutoModelForMaskedLM", "AutoModel"):
        with quiet_transformers():
            model = getattr(transformers, auto_class).from_config(config)
        names = model.state_dict().keys()
        encoder = architecture.base + "." if auto_class != "AutoModel" else ""
        heads = [n for n in names if not n.startswith((f"{encoder}e", f"{encoder}t"))]
        assert heads or auto_class == "AutoModel"  # where some have a pooler
        assert [n for n in heads if not architecture.ignores(n)] == []
    for prefix in ("", f"{architecture.base}."):
        assert architecture.ignores(f"{prefix}embeddings.position_ids")
        assert not architecture.ignores(f"{prefix}embeddings.word_embeddings.weight")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_classifier_without_its_head_is_refused(model_type: str, tmp_path: Path) -> None:
    model = random_model(model_type, tasks.get(CLASSES))
    with_head = tmp_path / "head"
    model.save_pretrained(with_head)
    assert load_checkpoint(CLASSES, str(with_head)).labels == {
        i: f"LABEL_{i}" for i in range(model.config.num_labels)
    }
    model.base_model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match=f"no trained head for {CLASSES} .lacks "):
        load_checkpoint(CLASSES, str(tmp_path / "bare"))


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("bert", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu' is not served; served: ge"),
        ("distilbert", {"activation": "gelu_10"}, "activation='gelu_10' is not served"),
        ("roberta", {"pad_token_id": None}, "pad_token_id=None is not served"),
        ("roberta", {"is_decoder": True}, "is_decoder=True"),
        ("electra", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("albert", {"num_hidden_groups": 2}, "num_hidden_groups=2 is not served; it must be 1"),
        ("albert", {"inner_group_num": 2}, "inner_group_num=2 is not served; it must be 1"),
        ("mpnet", {"relative_attention_num_buckets": 64}, "num_buckets=64 is not served; it must"),
    ],
)
def test_what_is_refused_by_name(model_type: str, changes: dict[str, Any], words: str) -> None:
    config = transformers.AutoConfig.for_model(model_type, **changes)
    with pytest.raises(ModelError, match=words):
        architectures.get(model_type).check(config)


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("deberta", "its attention is disentangled"),
        ("deberta-v2", "its attention is disentangled"),
        ("modernbert", "its positions are rotary"),
        ("gpt2", "it generates text"),
        ("t5", "it generates text"),
    ],
)
def test_families_that_are_asked_for_and_not_served(model_type: str, why: str) -> None:
    with pytest.raises(ModelError, match=f"'{model_type}' is not served: {why}; served: .*bert"):
        architectures.get(model_type)
    with pytest.raises(ModelError, match="'perceiver' is not served; served: "):
        architectures.get("perceiver")


def test_what_is_not_served_exists() -> None:
    known = set(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    open_ = {model_type for types in architectures._OPEN.values() for model_type in types}
    assert not open_ & set(architectures.names())
    if transformers.__version__.startswith("5."):  # 4.57 knows fewer
        assert open_ <= known
