"""`ft-handler trace --data_type fp8`: what the file is, what it computes, and what it costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, KINDS, batch, fused, logits_of, random_model
from quantized_support import apart, simulation_of
from tiny import SEQUENCE_CLASSIFICATION

from ft_handler import Predictor, load_model, precisions
from ft_handler.cli.main import main
from ft_handler.errors import LibraryError, ModelError
from ft_handler.model.bundle import read_info, save_model
from ft_handler.native import library
from ft_handler.prepare import quantize
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace

pytest.importorskip("transformers")

FILE = "traced_model.pt"


def traced(source: Path, output: Path, **options: Any) -> list[str]:
    """Trace a local checkpoint in fp8; returns what was said."""
    said: list[str] = []
    values: dict[str, Any] = {"mode": SEQUENCE_CLASSIFICATION, "data_type": "fp8", **options}
    trace(TraceOptions(model_name_or_path=str(source), output=output, **values), said.append)
    return said


@pytest.fixture(scope="module")
def classifier(tiny_classification: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A traced fp8 classifier's folder."""
    folder = tmp_path_factory.mktemp("fp8")
    said = "\n".join(traced(tiny_classification, folder))
    assert "kept in fp16: no product; on random tokens outputs change by" in said
    return folder


def test_the_file_says_what_it_is(classifier: Path) -> None:
    info = read_info(classifier / FILE)
    assert (info.data_type, info.op_interface) == ("fp8", 5)
    assert info.quantized is not None
    assert (info.quantized.kept, info.quantized.chosen, info.quantized.half) == (
        [], "random tokens", True,
    )  # fmt: skip
    assert 0 < info.quantized.error < 0.3
    module: Any = load_model(classifier / FILE).module
    types = {name: tensor.dtype for name, tensor in module.named_buffers()}
    assert types["encoder.layers.down.weight"] == torch.float8_e4m3fn
    assert types["encoder.layers.down.scale"] == torch.float32
    assert types["encoder.layers.down.input_scale"] == torch.float32
    assert types["encoder.embeddings.word"] == types["encoder.layers.norm1.bias"] == torch.float16
    assert types["head.classifier_weight"] == torch.float32


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_file_computes_what_the_simulation_does_on_a_cpu(model_type: str) -> None:
    task = KINDS["AutoModelForSequenceClassification"]
    model = random_model(model_type, task)
    inputs = batch(model, [33, 1, 128, 7, 64])
    simulation = simulation_of(model, task, "fp8")
    (found,), (near,) = fused(model, task, "fp8")(*inputs), simulation.padded(())(*inputs)
    (exact,), (wanted,) = simulation.padded(None)(*inputs), logits_of(model, *inputs)
    cost = apart(near, wanted)
    assert apart(exact, wanted) < 1e-4
    assert apart(found, near) < 0.2 * cost
    assert 0 < cost < 0.2 * max(1.0, apart(wanted, torch.zeros_like(wanted)))


def test_a_wish_and_texts(
    tiny_classification: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.tsv"
    texts.write_text("sentence\tlabel\n" + "the film was good and not bad\t1\n" * 40)
    arguments = ["--mode", SEQUENCE_CLASSIFICATION, "--data_type", "fp8"]
    arguments += ["--model_name_or_path", str(tiny_classification), "--calibrate", str(texts)]
    arguments += ["--output", str(tmp_path / "out"), "--keep-products", "layers.*.up"]
    with pytest.raises(SystemExit) as end:
        main(["trace", *arguments])
    assert not end.value.code
    said = capsys.readouterr().out
    assert "weights rounded for texts: fp8 changes outputs by" in said
    assert "kept in fp16: layers.0.up, layers.1.up (--keep_products); on texts" in said
    module: Any = load_model(tmp_path / "out" / FILE).module
    assert module.encoder.layers.up.kept_layers == [0, 1]
    assert module.encoder.layers.up.kept.dtype == torch.float16
    assert len(module.encoder.layers.up.weight) == 0


def test_less_is_tolerated_where_it_is_wished(
    classifier: Path, tiny_classification: Path, tmp_path: Path
) -> None:
    before = read_info(classifier / FILE).quantized
    assert before is not None
    bound = round(0.7 * before.error, 4)
    said = traced(tiny_classification, tmp_path, tolerable_change=bound)
    after = read_info(tmp_path / FILE).quantized
    assert after is not None
    assert 0 < len(after.kept) < 8
    assert 0 < after.error <= bound
    assert f"(products are kept from {100 * bound:g}% on)" in "".join(said)


def test_a_projection_is_never_a_product_in_8_bits() -> None:
    task = KINDS["AutoModelForSequenceClassification"]
    simulation = simulation_of(random_model("albert", task), task, "fp8")
    assert simulation.names == tuple(f"layers.0.{name}" for name in ("qkv", "out", "up", "down"))
    with pytest.raises(ModelError, match=r"'embeddings\.projection' is none of this model's"):
        quantize.wished(["embeddings.projection"], simulation.names)


def test_what_costs_most_is_kept() -> None:
    """Weights behind a column that others make 2^16 times as large as it ever is."""
    task = KINDS["AutoModelForSequenceClassification"]
    model = random_model("bert", task, hidden_act="relu")
    layer = model.bert.encoder.layer[1]
    with torch.no_grad():
        layer.intermediate.dense.weight[5] *= 2.0**16
        layer.intermediate.dense.bias[5] *= 2.0**16
        layer.output.dense.weight[:, 5] /= 2.0**16
    simulation = simulation_of(model, task, "fp8")
    measured = quantize.Measured(
        simulation, quantize.batches_of(quantize.of_padded(*batch(model, [33, 1, 128, 7, 64]))), 1.0
    )
    bound = 1.05 * measured.quantized(["layers.1.down"])
    row, said = precisions.get("fp8"), []
    choice = quantize.choose(measured, simulation.sizes, row, bound, said.append)
    assert choice.kept == ("layers.1.down",)
    assert choice.error < bound < 0.5 * measured.quantized(())
    assert said[0].startswith("fp8 changes the outputs by")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "ths"}, "fp8 needs --model_type thsext, not ths"),
        ({"keep_products": ["layers.7.up"]}, r"'layers\.7\.up' is none of this model's products"),
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
        tensors["layers.down.scale"] = tensors["layers.down.scale"].flip(0) * 2
        return tensors, layers

    monkeypatch.setattr(quantize, "stored", swapped)
    with pytest.raises(ModelError, match="differ from transformers' by"):
        traced(tiny_classification, tmp_path)
    assert not list(tmp_path.rglob("traced_model*"))


def test_metadata_and_weights_must_agree(classifier: Path, tmp_path: Path) -> None:
    module: Any = load_model(classifier / FILE).module
    info = dataclasses.replace(read_info(classifier / FILE), data_type="int8")
    save_model(module, info, tmp_path / FILE)
    with pytest.raises(ModelError, match="says data_type int8, the weights say float8_e4m3fn"):
        load_model(tmp_path / FILE)


def test_an_older_library_is_refused_in_words(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_marker_of", lambda _: library.Marker(1, 4, ()))
    with pytest.raises(LibraryError, match="interface 1 to 4 of the ops, interface 5 is needed"):
        load_model(classifier / FILE)


def test_an_older_reader_refuses_it_in_words(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has no such precision."""
    rows = {name: row for name, row in precisions._rows.items() if name != "fp8"}
    monkeypatch.setattr(precisions, "_rows", rows)
    with pytest.raises(ModelError, match="data_type 'fp8' is not one of fp32, fp16, bf16, int8"):
        load_model(classifier / FILE)


def test_it_is_served_and_verified_with_no_further_setting(
    classifier: Path,
    tiny_classification: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = ["the film was good", "a bad story and a dull plot", "who built the bridge"]
    traced(tiny_classification, tmp_path, data_type="fp32")
    ours, exact = Predictor.load(classifier), Predictor.load(tmp_path)
    assert ours.info.data_type == "fp8"
    found: Any = ours.predict(texts)
    wanted: Any = exact.predict(texts)
    for a, b in zip(found, wanted, strict=True):
        assert a["label"] == b["label"]
        assert abs(a["score"] - b["score"]) < 0.1
    data = tmp_path / "data.tsv"
    data.write_text("sentence\n" + "\n".join(texts) + "\n")
    with pytest.raises(SystemExit) as end:
        main(
            [
                "verify",
                str(classifier),
                "--data",
                str(data),
                "--checkpoint",
                str(tiny_classification),
                "--most-different",
                "3",
            ]
        )
    assert "fp8" in capsys.readouterr().out
    assert not end.value.code
