"""`ft-handler trace --data_type int8`: what is quantised, what is kept, and what it costs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import KINDS, batch, fused, logits_of, random_model
from quantized_support import apart, rounding, simulation_of
from tiny import SEQUENCE_CLASSIFICATION

from ft_handler import Predictor, load_model, precisions
from ft_handler.cli.main import main
from ft_handler.errors import LibraryError, ModelError
from ft_handler.model.bundle import read_info
from ft_handler.native import library
from ft_handler.prepare import quantize
from ft_handler.prepare.checkpoint import load_checkpoint
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.quantize import (
    Choice,
    Drawn,
    Measured,
    batches_of,
    choose,
    of_texts,
    wished,
)
from ft_handler.prepare.trace import trace

pytest.importorskip("transformers")

FILE = "traced_model.pt"
Scaled = Callable[..., Path]


def traced(source: Path, output: Path, **options: Any) -> list[str]:
    """Trace a local checkpoint in int8; returns what was said."""
    said: list[str] = []
    values: dict[str, Any] = {"mode": SEQUENCE_CLASSIFICATION, "data_type": "int8", **options}
    trace(TraceOptions(model_name_or_path=str(source), output=output, **values), said.append)
    return said


@pytest.fixture(scope="module")
def classifier(tiny_classification: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A traced int8 classifier's folder."""
    folder = tmp_path_factory.mktemp("int8")
    traced(tiny_classification, folder)
    return folder


@pytest.fixture(scope="module")
def outliers(make_tiny_bert: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which one input of layer 0's `down` is thousands of times the others.

    ReLU lets the factor pass through, and the weights behind it take it back: in fp32 nothing
    changes.
    """
    from safetensors.torch import load_file, save_file

    folder = make_tiny_bert(SEQUENCE_CLASSIFICATION, hidden_act="relu")
    path, layer = folder / "model.safetensors", "bert.encoder.layer.0"
    state = load_file(str(path))
    for name in ("weight", "bias"):
        state[f"{layer}.intermediate.dense.{name}"][5] *= 2.0**12
    state[f"{layer}.output.dense.weight"][:, 5] /= 2.0**12
    save_file(state, str(path), metadata={"format": "pt"})
    return folder


def test_the_file_says_what_it_is(classifier: Path) -> None:
    info = read_info(classifier / FILE)
    assert (info.data_type, info.op_interface) == ("int8", 4)
    assert info.quantized is not None
    assert (info.quantized.kept, info.quantized.chosen, info.quantized.half) == (
        [], "random tokens", True,
    )  # fmt: skip
    assert 0 < info.quantized.error < 0.3
    module: Any = load_model(classifier / FILE).module
    types = {name: tensor.dtype for name, tensor in module.named_buffers()}
    assert types["encoder.layers.down.weight"] == torch.int8
    assert types["encoder.layers.down.scale"] == torch.float32
    assert types["encoder.embeddings.word"] == types["encoder.layers.norm1.bias"] == torch.float16
    assert types["head.classifier_weight"] == torch.float32


def test_a_file_without_quantised_products_says_nothing_of_them(
    tiny_classification: Path, tmp_path: Path
) -> None:
    traced(tiny_classification, tmp_path, data_type="fp16")
    info = read_info(tmp_path / FILE)
    assert (info.quantized, info.op_interface) == (None, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["bert", "roberta", "albert", "mpnet"])
def test_a_file_computes_what_the_simulation_does(model_type: str, kind: str) -> None:
    task = KINDS[kind]
    model = random_model(model_type, task, 64)
    module, simulated = fused(model, task, "int8"), simulation_of(model, task).padded(())
    exact = simulation_of(model, task).padded(None)
    inputs = batch(model, [33, 1, 128, 7, 64])
    found, near, wanted = module(*inputs), simulated(*inputs), logits_of(model, *inputs)
    kept = inputs[1].bool() if task.per_token else slice(None)
    for a, b, c, d in zip(found, near, wanted, exact(*inputs), strict=True):
        assert apart(d[kept], c[kept]) < 1e-4
        cost = apart(b[kept], c[kept])
        assert apart(a[kept], b[kept]) < rounding() * cost
        assert 0 < cost < 0.1 * max(1.0, apart(c[kept], torch.zeros_like(c[kept])))


# -- products that are kept ------------------------------------------------------------------------


def test_outliers_keep_their_product(
    outliers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "\n".join(traced(outliers, tmp_path))
    assert "kept in bf16: layers.0.down; on random tokens outputs change by" in said
    info = read_info(tmp_path / FILE)
    assert info.quantized is not None
    assert (info.quantized.kept, info.quantized.chosen) == (["layers.0.down"], "random tokens")
    module: Any = load_model(tmp_path / FILE).module
    assert module.encoder.layers.down.kept_layers == [0]
    assert module.encoder.layers.down.kept.dtype == torch.bfloat16
    assert module.encoder.layers.up.kept_layers == []
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / FILE), "--json"])
    metadata = json.loads(capsys.readouterr().out)["traced_file"]["metadata"]
    assert metadata["quantized"]["kept"] == ["layers.0.down"]


def test_a_wish_beats_the_measurement(outliers: Path, tmp_path: Path) -> None:
    said = "\n".join(traced(outliers, tmp_path / "none", keep_products=["none"]))
    assert "kept in bf16: no product (--keep_products)" in said
    info = read_info(tmp_path / "none" / FILE)
    assert info.quantized is not None
    assert (info.quantized.kept, info.quantized.chosen) == ([], "wish")
    assert info.quantized.error > precisions.get("int8").quantized.random  # type: ignore[union-attr]
    traced(outliers, tmp_path / "some", keep_products=["layers.*.down", "layers.1.qkv"])
    info = read_info(tmp_path / "some" / FILE)
    assert info.quantized is not None
    assert info.quantized.kept == ["layers.0.down", "layers.1.qkv", "layers.1.down"]
    assert info.quantized.error < 0.3


def test_wishes_are_names_or_patterns() -> None:
    names = ("embeddings.projection", "layers.0.qkv", "layers.0.down", "layers.1.down")
    assert wished(["none"], names) == ()
    assert wished(["layers.*.down", "embeddings.projection"], names) == (names[0], *names[2:])
    with pytest.raises(ModelError, match=r"'layers\.2\.down' is none of this model's products"):
        wished(["layers.1.down", "layers.2.down"], names)


class Costs(Measured):
    """Errors that add up, product by product."""

    def __init__(self, **costs: float) -> None:
        self.costs = costs
        self.asked = 0

    def quantized(self, kept: Any) -> float:
        self.asked += 1
        return sum(cost for name, cost in self.costs.items() if name not in kept)

    def alone(self, product: str) -> float:
        return self.costs[product]


def test_as_few_as_it_takes_are_kept_the_worst_first() -> None:
    costs = Costs(a=0.02, b=0.5, c=0.01, d=0.3, e=0.02)
    names, row, said = dict.fromkeys(costs.costs, 10), precisions.get("int8"), []
    assert choose(costs, names, row, 0.06, said.append) == Choice(("b", "d"), pytest.approx(0.05))
    assert len(said) == 1
    assert choose(costs, names, row, 0.9, said.append) == Choice((), pytest.approx(0.85))
    assert len(said) == 1  # nothing was measured one by one
    assert choose(costs, names, row, 0.36, said.append).kept == ("b",)
    with pytest.raises(ModelError, match=r"every product is kept .*--data_type bf16"):
        choose(costs, names, row, 0.005, said.append)
    # What is four times as large has to save twice as much, since errors add up by their squares.
    for larger, kept in ((0.59, ("d",)), (0.61, ("b",))):
        costs.costs["b"] = larger
        assert choose(costs, {**names, "b": 40}, row, 0.65, said.append).kept == kept


# -- calibration -----------------------------------------------------------------------------------


def test_texts_of_a_file_are_measured(
    tiny_classification: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.tsv"
    texts.write_text("sentence\tlabel\n" + "the film was good and not bad\t1\n" * 40)
    arguments = ["--mode", SEQUENCE_CLASSIFICATION, "--data_type", "int8"]
    arguments += ["--model_name_or_path", str(tiny_classification), "--calibrate", str(texts)]
    arguments += ["--output", str(tmp_path / "out"), "--keep-products", "layers.1.up"]
    with pytest.raises(SystemExit) as end:
        main(["trace", *arguments])
    assert not end.value.code
    assert "kept in bf16: layers.1.up (--keep_products); on texts" in capsys.readouterr().out
    info = read_info(tmp_path / "out" / FILE)
    assert info.quantized is not None
    assert info.quantized.kept == ["layers.1.up"]


def test_texts_become_sequences(classifier: Path) -> None:
    tokenizer = (classifier / "tokenizer.json").read_text()
    texts = [
        {"text": "good film"},
        {"text": "good", "text_pair": "bad film"},
        {"question": "who", "context": "the captain " * 90},
    ]
    (found,) = batches_of(of_texts(texts, tokenizer, 2, 60, seed=1))
    lengths = sorted(found.cu_seqlens.diff().tolist())
    assert lengths == [4, 6, 60]
    assert found.longest == 60
    assert len(found.input_ids) == len(found.token_type_ids) == 70
    assert 50 < int(found.token_type_ids.sum()) < 66
    (typeless,) = batches_of(of_texts(texts, tokenizer, 0, 60, seed=1))
    assert int(typeless.token_type_ids.sum()) == 0


def test_what_is_measured_is_not_what_weights_are_rounded_for() -> None:
    drawn = Drawn.of((list(range(100 * i, 100 * i + 100)), [0] * 100) for i in range(1000))
    assert drawn.rounded_for is not None
    sets = [set(b.input_ids.tolist()) for b in (*drawn.measured, drawn.rounded_for)]
    assert [len(part) for part in sets] == [1000, 1000, 1000, 1000, 4000]
    assert len(set.union(*sets)) == 8000
    assert Drawn.of([([1, 2], [0, 0])]).rounded_for is None
    assert Drawn.of([]).measured == []


def test_no_more_is_measured_than_it_takes() -> None:
    made = batches_of((list(range(100)), [0] * 100) for _ in range(1000))
    assert [len(b.input_ids) for b in made] == [1000, 1000, 1000, 1000]
    assert batches_of([]) == []
    (longer,) = batches_of([(list(range(9000)), [0] * 9000)])
    assert longer.longest == 9000


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "ths"}, "int8 needs --model_type thsext, not ths"),
        ({"data_type": "bf16", "keep_products": ["none"]}, "are for .* int8 and fp8, not bf16"),
        ({"data_type": "fp32", "calibration": []}, "are for .* int8 and fp8, not fp32"),
        ({"keep_products": ["layers.7.up"]}, r"'layers\.7\.up' is none of this model's products"),
        ({"calibration": []}, "no text to measure on"),
        ({"data_type": "fp16", "tolerable_change": 0.02}, "are for .* int8 and fp8, not fp16"),
        ({"tolerable_change": 0.0}, "tolerable_change must be more than 0"),
        ({"tolerable_change": 0.02, "keep_products": ["none"]}, "tolerable_change .*: give one"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], words: str, tiny_classification: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        traced(tiny_classification, tmp_path, **options)
    assert not list(tmp_path.rglob("traced_model*"))


def test_a_wrong_file_is_not_written(
    tiny_classification: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = quantize.stored

    def swapped(*arguments: Any) -> Any:
        tensors, layers = stored(*arguments)
        tensors["layers.down.weight"] = tensors["layers.down.weight"].flip(0)
        return tensors, layers

    monkeypatch.setattr(quantize, "stored", swapped)
    with pytest.raises(ModelError, match="differ from transformers' by"):
        traced(tiny_classification, tmp_path)
    assert not list(tmp_path.rglob("traced_model*"))


def test_a_simulation_of_another_model_is_refused(
    tiny_classification: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turned(*arguments: Any, **options: Any) -> Any:
        found = load_checkpoint(*arguments, **options)
        encoder = dict(found.weights.encoder)
        encoder["layers.qkv.weight"] = encoder["layers.qkv.weight"].roll(64, 1)
        return dataclasses.replace(
            found, weights=dataclasses.replace(found.weights, encoder=encoder)
        )

    monkeypatch.setattr("ft_handler.prepare.trace.load_checkpoint", turned)
    with pytest.raises(ModelError, match="in fp32, more than"):
        traced(tiny_classification, tmp_path)


def multiplied(source: Path, target: Path, name: str, factor: float) -> Path:
    """A copy of a checkpoint in which one tensor is multiplied."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    state = load_file(str(target / "model.safetensors"))
    state[name] = state[name] * factor
    save_file(state, str(target / "model.safetensors"), metadata={"format": "pt"})
    return target


def test_what_overflows_on_a_gpu_is_for_cpus_alone(
    tiny_classification: Path, tmp_path: Path
) -> None:
    name = "bert.encoder.layer.0.output.dense.weight"
    source = multiplied(tiny_classification, tmp_path / "source", name, 2e4)
    said = "\n".join(traced(source, tmp_path / "out"))
    assert "overflows in fp16, in which GPUs compute int8: for CPUs alone" in said
    assert load_model(tmp_path / "out" / FILE).info.quantized.half is False  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="a GPU computes int8 in fp16, in which this model over"):
        load_model(tmp_path / "out" / FILE, "cuda")


def test_weights_beyond_half_precision_are_refused(
    tiny_classification: Path, tmp_path: Path
) -> None:
    name = "bert.encoder.layer.0.output.dense.weight"
    source = multiplied(tiny_classification, tmp_path / "source", name, 1e7)
    with pytest.raises(ModelError, match=r"not finite in int8: layers\.down\.weight"):
        traced(source, tmp_path / "out", keep_products=["none"])


def test_metadata_and_weights_must_agree(classifier: Path, tmp_path: Path) -> None:
    from ft_handler.model.bundle import save_model

    module: Any = load_model(classifier / FILE).module
    info = dataclasses.replace(read_info(classifier / FILE), data_type="fp16", quantized=None)
    save_model(module, info, tmp_path / FILE)
    with pytest.raises(ModelError, match="metadata says data_type fp16, the weights say int8"):
        load_model(tmp_path / FILE)


def test_an_older_library_is_refused_in_words(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_marker_of", lambda _: library.Marker(1, 3, ()))
    with pytest.raises(LibraryError, match="interface 1 to 3 of the ops, interface 4 is needed"):
        load_model(classifier / FILE)


# -- serving ---------------------------------------------------------------------------------------


def test_it_is_served_with_no_further_setting(
    classifier: Path, tiny_classification: Path, tmp_path: Path
) -> None:
    traced(tiny_classification, tmp_path, data_type="fp32")
    texts = ["the film was good", "a bad story and a dull plot", "who built the bridge"]
    ours, exact = Predictor.load(classifier), Predictor.load(tmp_path)
    assert ours.info.data_type == "int8"
    found: Any = ours.predict(texts)
    wanted: Any = exact.predict(texts)
    for a, b in zip(found, wanted, strict=True):
        assert a["label"] == b["label"]
        assert abs(a["score"] - b["score"]) < 0.1
    assert found != wanted
    # Inputs are rounded row by row, so that no text's answer depends on another's.
    for text, answer in zip(texts, found, strict=True):
        alone: Any = ours.predict(text)
        assert alone == {**answer, "score": pytest.approx(answer["score"], abs=1e-6)}
