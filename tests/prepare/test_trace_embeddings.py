"""Tracing for embeddings: transformers' model and the pooling that the checkpoint's files name."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sentences import write_json, write_modules
from tiny import EMBEDDINGS

from ft_handler.cli.main import main
from ft_handler.errors import ModelError
from ft_handler.model.bundle import load_model, read_info
from ft_handler.predictor import Predictor
from ft_handler.prepare import compare
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace

pytest.importorskip("transformers")

TEXTS = ["a good film", "The OLD bridge of the city was built by an engineer", "warm"]


@pytest.fixture(scope="module")
def tiny_encoder(make_tiny_bert: Callable[..., Path]) -> Path:
    """A random BERT without a head."""
    return make_tiny_bert(EMBEDDINGS)


@pytest.fixture
def checkpoint(tiny_encoder: Path, tmp_path: Path) -> Path:
    """A copy to put files into."""
    return Path(shutil.copytree(tiny_encoder, tmp_path / "checkpoint"))


def traced(source: Path, tmp_path: Path, said: list[str] | None = None, **options: Any) -> Path:
    chosen = TraceOptions(
        mode=EMBEDDINGS, model_name_or_path=str(source), output=tmp_path / "traced", **options
    )
    return trace(chosen, (said if said is not None else []).append)


def by_transformers(checkpoint: Path, text: str, pooling: str) -> np.ndarray[Any, Any]:
    """transformers' last hidden states, pooled by numpy; then the dense layer, if there is one."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import AutoModel

    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids
    model = AutoModel.from_pretrained(checkpoint).eval()
    with torch.inference_mode():
        hidden = model(torch.tensor([ids])).last_hidden_state[0].numpy()
    pooled = {
        "cls": hidden[0], "last": hidden[-1], "mean": hidden.mean(0), "max": hidden.max(0)
    }[pooling]  # fmt: skip
    if not (checkpoint / "2_Dense").is_dir():
        return pooled
    weights = load_file(checkpoint / "2_Dense" / "model.safetensors")
    said = json.loads((checkpoint / "2_Dense" / "config.json").read_text())
    out = weights["linear.weight"].numpy() @ pooled + weights["linear.bias"].numpy()
    return np.tanh(out) if said["activation_function"].endswith("Tanh") else out


@pytest.mark.parametrize(
    ("pooling", "dense", "normalize", "interface"),
    [
        ("cls", None, True, 2),
        ("mean", None, False, 3),
        ("max", "Identity", False, 3),
        ("last", "Tanh", True, 2),
    ],
)
def test_vectors_are_transformers_pooled(
    checkpoint: Path,
    tmp_path: Path,
    pooling: str,
    dense: str | None,
    normalize: bool,
    interface: int,
) -> None:
    write_modules(checkpoint, pooling, dense=dense, normalize=normalize)
    said: list[str] = []
    folder = traced(checkpoint, tmp_path, said)
    info = read_info(folder / "traced_model.pt")
    assert info.chosen == {"pooling": pooling, "normalize": normalize}
    assert (info.op_interface, info.num_labels) == (interface, 24 if dense else 64)
    assert any(f"embeddings: pooling {pooling}" in line for line in said)
    answers: Any = Predictor.load(folder).predict({"inputs": TEXTS})
    for text, answer in zip(TEXTS, answers, strict=True):
        wanted = by_transformers(checkpoint, text, pooling)
        wanted = wanted / np.linalg.norm(wanted) if normalize else wanted
        assert answer == pytest.approx(wanted, abs=1e-5)


def test_one_text_and_many_have_the_same_vectors(checkpoint: Path, tmp_path: Path) -> None:
    write_modules(checkpoint, "mean", normalize=True)
    predictor = Predictor.load(traced(checkpoint, tmp_path))
    together: Any = predictor.predict({"inputs": TEXTS * 9})
    for text, vector in zip(TEXTS * 9, together, strict=True):
        assert predictor.predict({"inputs": text}) == [vector]


@pytest.mark.parametrize("data_type", ["bf16", "fp16"])
def test_half_precision_and_the_padded_comparison_file(
    checkpoint: Path, tmp_path: Path, data_type: str
) -> None:
    write_modules(checkpoint, "mean", dense="Tanh")
    full = load_model(traced(checkpoint, tmp_path / "full") / "traced_model.pt").module
    half = load_model(
        traced(checkpoint, tmp_path / data_type, data_type=data_type) / "traced_model.pt"
    )
    plain = traced(checkpoint, tmp_path / "ths", model_type="ths")
    ids = torch.randint(5, 100, (3, 20))
    mask = (torch.arange(20) < torch.tensor([20, 3, 1])[:, None]).long()
    (wanted,) = full(ids * mask, mask, ids * 0)
    (found,) = half.module(ids * mask, mask, ids * 0)
    assert wanted.shape == (3, 24)
    assert 0 < float((found - wanted).abs().max()) < 0.05
    (padded,) = load_model(plain / "traced_model.pt").module(ids * mask, mask, ids * 0)
    assert torch.allclose(padded, wanted, atol=1e-5)


def test_the_check_covers_the_pooling(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that pools otherwise than the definition is not written."""
    own = compare.Reference.forward

    def forward(self: Any, *batch: Any) -> Any:
        return tuple(part + 0.01 for part in own(self, *batch))

    monkeypatch.setattr(compare.Reference, "forward", forward)
    with pytest.raises(ModelError, match=r"no traced_model\.pt was written"):
        traced(checkpoint, tmp_path)
    assert not (tmp_path / "traced" / "traced_model.pt").exists()


def test_lengths_prompts_and_case_travel(checkpoint: Path, tmp_path: Path) -> None:
    write_modules(checkpoint, "mean")
    write_json(checkpoint, "sentence_bert_config.json", {"max_seq_length": 32})
    prompts = {"query": "what film ", "passage": ""}
    write_json(
        checkpoint, "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": "query"},
    )  # fmt: skip
    folder = traced(checkpoint, tmp_path)
    info = read_info(folder / "traced_model.pt")
    assert info.chosen["prompts"] == prompts
    assert info.chosen["default_prompt_name"] == "query"
    settings = yaml.safe_load((folder / "model-config.yaml").read_text())
    assert settings["handler"] == {"mode": EMBEDDINGS, "max_length": 32}
    predictor = Predictor.load(folder)
    asked: Any = predictor.predict({"text": "warm"})
    assert asked == predictor.predict({"text": "what film warm", "prompt_name": "passage"})
    assert asked != predictor.predict({"text": "warm", "prompt": None})


def test_texts_are_lowered_before_a_cased_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(tokenizer))
    settings = checkpoint / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "do_lower_case": False}))
    cased = Predictor.load(traced(checkpoint, tmp_path / "cased"))
    assert cased.predict("WARM") != cased.predict("warm")
    write_json(checkpoint, "sentence_bert_config.json", {"do_lower_case": True})
    lowered = Predictor.load(traced(checkpoint, tmp_path / "lowered"))
    assert lowered.predict("WARM") == lowered.predict("warm") == cased.predict("warm")


def test_options_win_and_belong_to_this_mode(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "traced"
    command = ["trace", "--mode", EMBEDDINGS, "--model_name_or_path", str(checkpoint)]
    command += ["--output", str(output), "--pooling", "cls", "--normalize"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "embeddings: pooling cls, normalised (there is no modules.json)" in said
    assert read_info(output / "traced_model.pt").chosen == {"pooling": "cls", "normalize": True}
    with pytest.raises(ModelError, match="--pooling is one of cls, mean, max, last"):
        traced(checkpoint, tmp_path, pooling="median")


def test_options_of_embeddings_are_refused_elsewhere(
    tiny_classification: Path, tmp_path: Path
) -> None:
    options = TraceOptions(
        mode="sequence_classification", model_name_or_path=str(tiny_classification),
        output=tmp_path, pooling="cls",
    )  # fmt: skip
    with pytest.raises(ModelError, match="--pooling is not for sequence_classification"):
        trace(options)


def test_what_the_files_ask_for_in_vain_is_said_of_the_checkpoint(
    checkpoint: Path, tmp_path: Path
) -> None:
    write_modules(checkpoint, "cls", "max")
    with pytest.raises(ModelError, match=f"{checkpoint}: its pooling is cls and max"):
        traced(checkpoint, tmp_path)
    write_modules(checkpoint, "cls", dense="Tanh", width=32)
    with pytest.raises(ModelError, match="its Dense takes 32 inputs"):
        traced(checkpoint, tmp_path)


def test_an_adapter_is_merged(checkpoint: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModel

    write_modules(checkpoint, "mean")
    settings = peft.LoraConfig(r=4, target_modules=["query", "dense"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an old name
        adapted = peft.get_peft_model(AutoModel.from_pretrained(checkpoint), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = Path(shutil.copytree(checkpoint, tmp_path / "merged"))
    adapted.merge_and_unload().save_pretrained(merged)
    plain = Predictor.load(traced(checkpoint, tmp_path / "plain"))
    folder = traced(checkpoint, tmp_path / "adapted", adapter=tmp_path / "adapter")
    (found,) = Predictor.load(folder).predict({"inputs": TEXTS[0]})  # type: ignore[misc]
    assert found == pytest.approx(by_transformers(merged, TEXTS[0], "mean"), abs=1e-5)
    assert found != pytest.approx(plain.predict({"inputs": TEXTS[0]})[0], abs=1e-2)  # type: ignore[index]


def test_checkpoints_of_language_models_are_encoders_too(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    """all-mpnet-base-v2 calls itself one; a pooler that is missing is not needed."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(5)
    model = BertForMaskedLM(BertConfig.from_pretrained(tiny_encoder)).eval()
    folder = Path(shutil.copytree(tiny_encoder, tmp_path / "masked"))
    model.save_pretrained(folder)
    (found,) = Predictor.load(traced(folder, tmp_path)).predict({"inputs": TEXTS[0]})  # type: ignore[misc]
    assert found == pytest.approx(by_transformers(folder, TEXTS[0], "mean"), abs=1e-5)
