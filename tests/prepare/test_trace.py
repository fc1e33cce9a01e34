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
from tiny import (
    QUESTION_ANSWERING,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    tiny_vocabulary,
)

from ft_handler import load_model, precisions, tasks
from ft_handler.cli.main import main
from ft_handler.cli.trace import trace_command
from ft_handler.config import CoreSettings, RawSettings
from ft_handler.errors import ModelError
from ft_handler.model.bundle import read_info, read_tokenizer
from ft_handler.model.info import FORMAT_VERSION
from ft_handler.prepare import checkpoint
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.tokenizer import HARD_TEXTS
from ft_handler.prepare.trace import describe, trace

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


def test_the_file_says_which_interface_it_needs(
    tiny_classification: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_info(traced(tiny_classification, tmp_path) / "traced_model.pt").op_interface == 2
    task = tasks.get(SEQUENCE_CLASSIFICATION)
    later = dataclasses.replace(task.head(), op_interface=3)
    monkeypatch.setattr(type(task), "head", lambda _: later)
    assert read_info(traced(tiny_classification, tmp_path) / "traced_model.pt").op_interface == 3


def test_the_file_names_its_checkpoint_but_no_folder(
    classifier: Path, tiny_classification: Path, tmp_path: Path
) -> None:
    info = read_info(classifier / "traced_model.pt")
    assert (info.checkpoint, info.adapter) == (None, None)
    read = checkpoint.load_checkpoint(SEQUENCE_CLASSIFICATION, str(tiny_classification))
    options = TraceOptions(
        mode=SEQUENCE_CLASSIFICATION,
        model_name_or_path="owner/model",
        output=tmp_path,
        adapter=tmp_path / "lora" / ".." / "other",
    )
    info = describe(options, tasks.get(SEQUENCE_CLASSIFICATION), read, True)
    assert (info.checkpoint, info.adapter) == ("owner/model", "other")
    assert str(tmp_path) not in info.to_json()


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
        (TOKEN_CLASSIFICATION, "fp32", 1e-4),
        (TOKEN_CLASSIFICATION, "bf16", None),
    ],
)
def test_any_shape_after_tracing(
    mode: str,
    data_type: str,
    tolerance: float | None,
    tiny_classification: Path,
    tiny_qa: Path,
    tiny_tokens: Path,
    tmp_path: Path,
) -> None:
    source = {
        SEQUENCE_CLASSIFICATION: tiny_classification,
        QUESTION_ANSWERING: tiny_qa,
        TOKEN_CLASSIFICATION: tiny_tokens,
    }[mode]
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
        kept = slice(None) if mode == SEQUENCE_CLASSIFICATION else mask.bool()
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
        ({"data_type": "int3"}, "data_type 'int3'"),
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


def scaled(source: Path, target: Path, name: str, factor: float) -> Path:
    """A copy of a checkpoint in which one tensor is multiplied."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    state = load_file(str(target / "model.safetensors"))
    state[name] = state[name] * factor
    save_file(state, str(target / "model.safetensors"), metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("name", "factor", "words"),
    [
        # A residual beyond fp16's largest number, of weights within it.
        ("bert.encoder.layer.0.output.dense.weight", 2e4, "overflow in fp16"),
        ("bert.embeddings.word_embeddings.weight", 1e7, "not finite in fp16: embeddings.word"),
    ],
)
def test_what_overflows_is_refused(
    name: str, factor: float, words: str, tiny_classification: Path, tmp_path: Path
) -> None:
    source = scaled(tiny_classification, tmp_path / "source", name, factor)
    with pytest.raises(ModelError, match=words):
        traced(source, tmp_path / "out", data_type="fp16")
    assert not list(tmp_path.rglob("traced_model*"))
    traced(source, tmp_path / "out", data_type="bf16")


def test_a_checkpoint_that_is_not_finite_is_refused(
    tiny_classification: Path, tmp_path: Path
) -> None:
    source = scaled(tiny_classification, tmp_path / "nan", "classifier.bias", float("nan"))
    with pytest.raises(ModelError, match="not finite in fp32: classifier_bias"):
        traced(source, tmp_path / "out")


def test_messages_name_no_scratch_folder(
    tiny_classification: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object) -> tuple[float, float]:
        raise ModelError(f"{path}: is not liked")

    monkeypatch.setattr("ft_handler.prepare.trace.compare", refuse)
    with pytest.raises(ModelError, match="is not liked") as error:
        traced(tiny_classification, tmp_path)
    assert ".checking-" not in str(error.value)
    assert str(tiny_classification) in str(error.value)


def test_the_checkpoints_own_folder_is_not_written_to(
    tiny_classification: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_classification, tmp_path / "source"))
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    with pytest.raises(ModelError, match="give --output another folder"):
        traced(source, source)
    with pytest.raises(ModelError, match="give --output another folder"):
        traced(tiny_classification, source, tokenizer_name=str(source))
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


# -- tokenizers ----------------------------------------------------------------------------------


def with_tokenizer(
    source: Path, target: Path, change: Callable[[Any], None], **settings: Any
) -> Path:
    """A copy of a checkpoint whose tokenizer.json is changed, and the settings beside it."""
    from tokenizers import Tokenizer

    shutil.copytree(source, target)
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    change(tokenizer)
    tokenizer.save(str(target / "tokenizer.json"))
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return target


def compatibility(tokenizer: Any) -> None:
    from tokenizers import normalizers

    parts = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.StripAccents()]
    tokenizer.normalizer = normalizers.Sequence(parts)


def by_blanks(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


def accents_kept(tokenizer: Any) -> None:
    from tokenizers import normalizers

    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)


@pytest.mark.parametrize("change", [compatibility, by_blanks, accents_kept])
def test_a_checkpoints_own_tokenizer_is_served(
    change: Callable[[Any], None], tiny_classification: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    source = with_tokenizer(tiny_classification, tmp_path / "source", change)
    said: list[str] = []
    options = TraceOptions(
        mode=SEQUENCE_CLASSIFICATION, model_name_or_path=str(source), output=tmp_path / "out"
    )
    trace(options, said.append)
    own = Tokenizer.from_file(str(source / "tokenizer.json"))
    served = read_tokenizer(tmp_path / "out" / "traced_model.pt")
    assert served is not None
    for text in HARD_TEXTS:
        assert Tokenizer.from_str(served).encode(text).ids == own.encode(text).ids
    # A vocab.txt would be read as BERT's own tokenizer where no tokenizer.json is beside it.
    assert not (tmp_path / "out" / "vocab.txt").exists()
    made = transformers.AutoTokenizer.from_pretrained(str(source)).backend_tokenizer
    differs = any(made.encode(text).ids != own.encode(text).ids for text in HARD_TEXTS)
    assert any("reads texts otherwise" in line for line in said) is differs
    if differs:
        with pytest.raises(ModelError, match=r"reads texts otherwise .*\(--strict\)"):
            trace(dataclasses.replace(options, strict=True))


def test_settings_beside_a_tokenizer_are_honoured(
    tiny_classification: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    source = with_tokenizer(
        tiny_classification, tmp_path / "source", lambda _: None, do_lower_case=False
    )
    traced(source, tmp_path / "out", model_type="ori")
    cased = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert cased.encode("Film").ids != cased.encode("film").ids
    config = json.loads((source / "tokenizer_config.json").read_text())
    size = Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab_size()
    more = {str(size): {"content": "[ENTITY]", "special": True}}
    config["added_tokens_decoder"] = more
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"has token {size}"):
        traced(source, tmp_path / "more", model_type="ori")


@pytest.mark.parametrize("strict", [False, True])
def test_a_short_vocabulary_belongs_to_another_model(
    strict: bool, make_tiny_bert: Callable[..., Path], tmp_path: Path
) -> None:
    size = len(tiny_vocabulary())
    for vocab_size, refused in ((size + 8, False), (size + 130, strict), (2 * size + 1, True)):
        source = make_tiny_bert(SEQUENCE_CLASSIFICATION, vocab_size=vocab_size)
        output = tmp_path / str(vocab_size)
        if refused:
            with pytest.raises(ModelError, match=r"belongs? to another model"):
                traced(source, output, strict=strict)
        else:
            traced(source, output, strict=strict)


def test_a_checkpoint_without_a_tokenizer_is_refused(
    tiny_classification: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_classification, tmp_path / "source"))
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        (source / name).unlink()
        if name != "tokenizer.json":
            with pytest.raises(ModelError, match=r"none of its files .*--tokenizer_name"):
                traced(source, tmp_path / "out")
    traced(source, tmp_path / "out", tokenizer_name=str(tiny_classification))


def test_what_a_tokenizer_says_of_truncation(tiny_classification: Path, tmp_path: Path) -> None:
    def served_length(source: Path, name: str, **options: Any) -> int:
        traced(source, tmp_path / name, **options)
        settings = yaml.safe_load((tmp_path / name / "model-config.yaml").read_text())
        return int(settings["handler"]["max_length"])

    def cuts(tokenizer: Any) -> None:
        tokenizer.enable_truncation(8, direction="left")

    def unchanged(tokenizer: Any) -> None:
        pass

    short = with_tokenizer(tiny_classification, tmp_path / "s", unchanged, model_max_length=40)
    assert served_length(short, "40") == 40
    assert served_length(short, "64", max_seq_length=64) == 64
    endless = with_tokenizer(
        tiny_classification, tmp_path / "e", unchanged, model_max_length=10**30
    )
    assert served_length(endless, "128") == 128
    left = with_tokenizer(tiny_classification, tmp_path / "l", unchanged, truncation_side="left")
    also = with_tokenizer(tiny_classification, tmp_path / "a", cuts)
    said: list[str] = []
    right = with_tokenizer(
        tiny_classification, tmp_path / "r", lambda tokenizer: tokenizer.enable_truncation(8)
    )
    options = TraceOptions(
        mode=SEQUENCE_CLASSIFICATION,
        model_name_or_path=str(right),
        output=tmp_path / "right",
        strict=True,
    )
    trace(options, said.append)
    assert any("cuts texts at 8 tokens" in line for line in said)
    for source in (left, also):
        with pytest.raises(ModelError, match="truncation_side 'left'"):
            traced(source, tmp_path / "left")


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
