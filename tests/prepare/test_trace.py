"""`ft-handler trace`: the files it writes, the options it takes, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model_support import hf_logits
from tiny import QUESTION_ANSWERING, SEQUENCE_CLASSIFICATION

from ft_handler import load_model, precisions
from ft_handler.cli.main import main
from ft_handler.cli.trace import trace_command
from ft_handler.config import CoreSettings, RawSettings
from ft_handler.errors import ModelError
from ft_handler.model.bundle import read_info, read_tokenizer
from ft_handler.model.info import FORMAT_VERSION
from ft_handler.prepare import checkpoint
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace

transformers = pytest.importorskip("transformers")

PUBLISHED_FLAGS = (
    "mode", "model_name_or_path", "tokenizer_name", "config_name", "cache_dir", "max_seq_length",
    "do_lower_case", "batch_size", "seed", "data_type", "model_type", "ths_path",
    "remove_padding", "output", "adapter",
)  # fmt: skip


def traced(source: Path, output: Path, **options: Any) -> Path:
    """Trace a local checkpoint."""
    values: dict[str, Any] = {"mode": SEQUENCE_CLASSIFICATION, **options}
    return trace(TraceOptions(model_name_or_path=str(source), output=output, **values))


@pytest.fixture(scope="module")
def classifier(tiny_classification: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A traced classification model's folder."""
    return traced(tiny_classification, tmp_path_factory.mktemp("traced"))


def test_everything_an_archive_needs_is_written(classifier: Path) -> None:
    found = {p.name for p in classifier.iterdir()}
    assert found >= {
        "traced_model.pt",
        "model-config.yaml",
        "index_to_name.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "sample_request.json",
        "sample_text.txt",
    }
    assert not [n for n in found if n.startswith(".")]
    labels = json.loads((classifier / "index_to_name.json").read_text())
    assert labels == {"0": "negative", "1": "neutral", "2": "positive"}
    settings = yaml.safe_load((classifier / "model-config.yaml").read_text())
    assert settings["batchSize"] >= 1
    assert settings["maxBatchDelay"] >= 1
    config = RawSettings.of_model_dir(classifier, settings).read(CoreSettings)
    assert (config.mode, config.max_length) == (SEQUENCE_CLASSIFICATION, 128)
    assert json.loads((classifier / "sample_request.json").read_text())["text"]


def test_the_file_describes_itself(classifier: Path) -> None:
    info = read_info(classifier / "traced_model.pt")
    assert info.architecture == "bert"
    assert (info.hidden_size, info.num_layers, info.num_heads) == (64, 2, 2)
    assert (info.intermediate_size, info.max_positions, info.num_labels) == (128, 128, 3)
    assert info.labels == {0: "negative", 1: "neutral", 2: "positive"}
    assert info.do_lower_case
    assert info.versions["torch"] == torch.__version__
    assert info.versions["transformers"] == transformers.__version__
    assert info.format_version == FORMAT_VERSION


def test_the_file_carries_the_tokenizer(classifier: Path) -> None:
    carried = read_tokenizer(classifier / "traced_model.pt")
    assert carried == (classifier / "tokenizer.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("mode", "data_type", "tolerance"),
    [
        (SEQUENCE_CLASSIFICATION, "fp32", 1e-4),
        (QUESTION_ANSWERING, "fp32", 1e-4),
        (QUESTION_ANSWERING, "bf16", None),
        (SEQUENCE_CLASSIFICATION, "fp16", None),
    ],
)
def test_any_shape_after_tracing(
    mode: str,
    data_type: str,
    tolerance: float | None,
    tiny_classification: Path,
    tiny_qa: Path,
    tmp_path: Path,
) -> None:
    source = tiny_qa if mode == QUESTION_ANSWERING else tiny_classification
    options: dict[str, Any] = {"mode": mode, "data_type": data_type}
    traced(source, tmp_path, batch_size=2, max_seq_length=16, **options)
    module = load_model(tmp_path / "traced_model.pt").module
    bert = checkpoint.load_checkpoint(mode, str(source)).model
    half = checkpoint.load_checkpoint(mode, str(source)).model.to(
        {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[data_type]
    )
    ours = theirs = 0.0
    for batch, length in ((1, 1), (1, 128), (7, 33), (3, 16)):
        ids = torch.randint(5, 100, (batch, length))
        lengths = torch.randint(1, length + 1, (batch, 1))
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()
        types = torch.randint(0, 2, (batch, length))
        kept = mask.bool() if mode == QUESTION_ANSWERING else slice(None)
        wanted = hf_logits(bert, ids, mask, types)
        low = hf_logits(half, ids, mask, types)
        for a, b, c in zip(module(ids, mask, types), wanted, low, strict=True):
            ours = max(ours, float((a - b)[kept].abs().max()))
            theirs = max(theirs, float((c - b)[kept].abs().max()))
    assert ours <= (2 * theirs if tolerance is None else tolerance)


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({"problem_type": "multi_label_classification", "num_labels": 3}, 3),
        ({"problem_type": "regression", "num_labels": 1, "id2label": None, "label2id": None}, 1),
    ],
)
def test_the_kind_of_problem_travels(
    settings: dict[str, Any], labels: int, make_tiny_bert: Callable[..., Path], tmp_path: Path
) -> None:
    traced(make_tiny_bert("sequence_classification", **settings), tmp_path)
    info = read_info(tmp_path / "traced_model.pt")
    assert info.problem_type == settings["problem_type"]
    assert (info.num_labels, len(info.labels)) == (labels, labels)


def test_plain_torchscript(tiny_qa: Path, tmp_path: Path) -> None:
    traced(tiny_qa, tmp_path, mode=QUESTION_ANSWERING, model_type="ths")
    loaded = load_model(tmp_path / "traced_model.pt")
    with pytest.raises(ModelError, match="--model_type thsext"):
        _ = loaded.fused
    assert loaded.info.model_type == "ths"
    assert not loaded.info.remove_padding
    bert = checkpoint.load_checkpoint(QUESTION_ANSWERING, str(tiny_qa)).model
    ids = torch.randint(5, 100, (3, 21))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    types = torch.zeros_like(ids)
    wanted = hf_logits(bert, ids, mask, types)
    for a, b in zip(loaded.module(ids, mask, types), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_eager_checkpoint(tiny_classification: Path, tmp_path: Path) -> None:
    traced(tiny_classification, tmp_path, model_type="ori")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.id2label[2] == "positive"
    assert not (tmp_path / "traced_model.pt").exists()


def test_tokenizers_neither_truncate_nor_pad(tiny_classification: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    source = tmp_path / "source"
    shutil.copytree(tiny_classification, source)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    before = tokenizer.encode("The film was good.").ids
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(source / "tokenizer.json"))
    traced(source, tmp_path / "out", model_type="ori")
    text = (tmp_path / "out" / "tokenizer.json").read_text()
    described = json.loads(text)
    assert described["truncation"] is None
    assert described["padding"] is None
    after = Tokenizer.from_str(text)
    assert after.encode("The film was good.").ids == before
    assert len(after.encode("good " * 50).ids) == 52
    words = (tmp_path / "out" / "vocab.txt").read_text().splitlines()
    assert words == (source / "vocab.txt").read_text().splitlines()


@pytest.mark.parametrize("wish", [True, False])
def test_lower_case_is_a_choice(wish: bool, tiny_classification: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    traced(tiny_classification, tmp_path, do_lower_case=wish)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    same = tokenizer.encode("Film").ids == tokenizer.encode("film").ids
    assert same is wish
    assert read_info(tmp_path / "traced_model.pt").do_lower_case is wish


def test_a_tokenizer_alone_from_vocab(tiny_classification: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    source = tmp_path / "source"
    shutil.copytree(tiny_classification, source)
    (source / "tokenizer.json").unlink()
    traced(source, tmp_path / "out", model_type="ori")
    found = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    wanted = Tokenizer.from_file(str(tiny_classification / "tokenizer.json"))
    for text in ("The film was good.", "Où est-ce 42 café?", "UNAFFABLE"):
        assert found.encode(text).ids == wanted.encode(text).ids
        assert found.encode(text, "A pair.").type_ids == wanted.encode(text, "A pair.").type_ids


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data_type": "int8"}, "data_type 'int8'"),
        ({"max_seq_length": 129}, "max_seq_length 129 is not between 4 and the model's 128"),
        ({"batch_size": 0}, "batch_size"),
        ({"tokenizer_name": "./nowhere"}, "no such folder"),
        ({"mode": QUESTION_ANSWERING}, "no trained head"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], words: str, tiny_classification: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        traced(tiny_classification, tmp_path, **options)


def test_a_tokenizer_of_another_model_is_refused(
    make_tiny_bert: Callable[..., Path], tiny_classification: Path, tmp_path: Path
) -> None:
    small = make_tiny_bert("sequence_classification", vocab_size=50)
    with pytest.raises(ModelError, match="belongs to another model"):
        traced(small, tmp_path, tokenizer_name=str(tiny_classification))


def test_a_file_that_is_off_is_not_written(
    tiny_classification: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = dataclasses.replace(precisions.get("fp32"), logit_error=0.0)
    monkeypatch.setattr(precisions, "get", lambda _: exact)
    with pytest.raises(ModelError, match="differ from transformers' by"):
        traced(tiny_classification, tmp_path)
    assert not list(tmp_path.rglob("traced_model*"))


# -- the command line ----------------------------------------------------------------------------


def run(*arguments: str) -> int:
    """The command's exit status."""
    try:
        main(["trace", *arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_published_flags_work(
    tiny_classification: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(tiny_classification)
    values = {
        "mode": "sequence_classification",
        "model_name_or_path": source,
        "tokenizer_name": source,
        "config_name": source,
        "cache_dir": str(tmp_path / "cache"),
        "max_seq_length": "32",
        "batch_size": "3",
        "seed": "7",
        "data_type": "bf16",
        "model_type": "thsext",
        "output": str(tmp_path / "out"),
    }
    arguments = [part for name, value in values.items() for part in (f"--{name}", value)]
    assert run(*arguments, "--do_lower_case", "--remove_padding", "--labels", "a, b, c") == 0
    out = capsys.readouterr().out
    assert "largest difference from transformers" in out
    info = read_info(tmp_path / "out" / "traced_model.pt")
    assert (info.data_type, info.labels) == ("bf16", {0: "a", 1: "b", 2: "c"})
    settings = yaml.safe_load((tmp_path / "out" / "model-config.yaml").read_text())
    assert settings["handler"]["max_length"] == 32


def test_flags_keep_their_names_and_take_dashes() -> None:
    import typer

    app = typer.Typer()
    app.command()(trace_command)
    options = {o for p in typer.main.get_command(app).params for o in p.opts}
    for name in PUBLISHED_FLAGS:
        assert f"--{name}" in options
        assert f"--{name.replace('_', '-')}" in options


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ("--output", str(tmp_path))
    for arguments, words in (
        (("--model_name_or_path", "./nowhere"), "no such folder"),
        ((), "--model_name_or_path is missing"),
        (("--model_name_or_path", "x", "--model_type", "ths", "--remove_padding"), "needs"),
    ):
        status = run("--mode", "question_answering", *arguments, *output)
        error = capsys.readouterr().err.strip()
        assert status == 1
        assert error.startswith("error: ")
        assert words in error
        assert "\n" not in error
