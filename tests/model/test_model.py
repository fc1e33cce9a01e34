"""The traced module against transformers' own, and what its file says of itself."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import (
    POSITIONS,
    fused,
    hf_logits,
    info_of,
    packed_of,
    ragged,
    random_bert,
)
from tiny import QUESTION_ANSWERING, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION

from ft_handler import load_model, precisions
from ft_handler.errors import ModelError
from ft_handler.files import METADATA_FILE
from ft_handler.model.bundle import LoadedModel, read_info, read_tokenizer, save_model
from ft_handler.model.heads import PAD_LOGIT
from ft_handler.model.info import ModelInfo

MODES = (SEQUENCE_CLASSIFICATION, QUESTION_ANSWERING, TOKEN_CLASSIFICATION)
# A refusal inside TorchScript is a torch.jit.Error, one inside an op a RuntimeError.
REFUSED = (RuntimeError, torch.jit.Error)
LENGTHS = [[1], [POSITIONS], [1, 64, 3], [5, 5, 5, 5], [2, 17, 63, 33, 1, 9, 40]]
# hidden, heads: head sizes 32, 64, 16, 20, 6, 128, and one head alone
SHAPES = [(64, 2), (128, 2), (64, 4), (60, 3), (30, 5), (128, 1), (24, 4)]


def worst(found: Any, wanted: Any, mask: torch.Tensor, mode: str) -> float:
    """Largest difference; for outputs of tokens over kept ones."""
    kept = slice(None) if mode == SEQUENCE_CLASSIFICATION else mask.bool()
    return max(float((a - b)[kept].abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("hidden", "heads"), SHAPES)
def test_fp32_agrees_with_transformers(mode: str, hidden: int, heads: int) -> None:
    bert = random_bert(mode, hidden_size=hidden, num_attention_heads=heads, intermediate_size=72)
    module = fused(bert, mode)
    for lengths in LENGTHS:
        batch = ragged(lengths)
        wanted = hf_logits(bert, *batch)
        padded = module(*batch)
        assert all(part.dtype == torch.float32 for part in padded)
        assert worst(padded, wanted, batch[1], mode) < 1e-4
        packed = module.packed(*packed_of(*batch))
        kept = batch[1].bool()
        parts = packed if mode == QUESTION_ANSWERING else [packed]
        if mode == TOKEN_CLASSIFICATION:
            parts = [packed.t()]
        for part, whole in zip(parts, padded, strict=True):
            rows = whole if mode == SEQUENCE_CLASSIFICATION else whole[kept]
            torch.testing.assert_close(part, rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("data_type", ["bf16", "fp16"])
def test_half_precision_errs_at_most_twice_as_much_as_transformers(
    mode: str, data_type: str
) -> None:
    settings = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    bert = random_bert(mode, **settings, num_hidden_layers=3, initializer_range=0.05)
    module = fused(bert, mode, data_type)
    half = copy.deepcopy(bert).to(precisions.get(data_type).dtype)
    ours = theirs = 0.0
    for lengths in LENGTHS:
        batch = ragged(lengths)
        wanted = hf_logits(bert, *batch)
        ours = max(ours, worst(module(*batch), wanted, batch[1], mode))
        theirs = max(theirs, worst(hf_logits(half, *batch), wanted, batch[1], mode))
    assert 0 < ours <= 2 * theirs


@pytest.mark.parametrize("mode", MODES)
def test_masks_with_holes(mode: str) -> None:
    bert = random_bert(mode)
    ids, mask, types = ragged([20, 13, 20], 20)
    mask[0, [3, 4, 11]] = 0
    mask[2, 1:19:2] = 0
    found = fused(bert, mode)(ids, mask, types)
    assert worst(found, hf_logits(bert, ids, mask, types), mask, mode) < 1e-4


@pytest.mark.parametrize("mode", [QUESTION_ANSWERING, TOKEN_CLASSIFICATION])
def test_pads_answer_minus_ten_thousand(mode: str) -> None:
    bert = random_bert(mode)
    ids, mask, types = ragged([7, 3], 9)
    for part in fused(bert, mode)(ids, mask, types):
        assert bool((part[mask == 0] == PAD_LOGIT).all())
        assert bool((part[mask == 1] > PAD_LOGIT / 2).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_other_integer_types(mode: str, dtype: torch.dtype) -> None:
    module = fused(random_bert(mode), mode)
    ids, mask, types = ragged([4, 11])
    wanted = module(ids, mask, types)
    found = (
        module(ids.int(), mask.int(), types.int())
        if dtype == torch.int32
        else module(ids, mask.bool(), types)
    )
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_empty_batches(mode: str) -> None:
    count = 3 if mode == SEQUENCE_CLASSIFICATION else 2
    module = fused(random_bert(mode, num_labels=count), mode)
    none = torch.empty(0, 5, dtype=torch.int64)
    padded = module(none, none, none)
    nothing = torch.empty(0, dtype=torch.int64)
    packed = module.packed(nothing, nothing, torch.zeros(1, dtype=torch.int32), 0)
    if mode == SEQUENCE_CLASSIFICATION:
        assert [tuple(p.shape) for p in (*padded, packed)] == [(0, 3), (0, 3)]
    else:
        each = [(0, 5), (0, 5)] if mode == QUESTION_ANSWERING else [(0, 5, 2)]
        assert [tuple(p.shape) for p in padded] == each
        assert tuple(packed.shape) == (2, 0)


@pytest.mark.parametrize("mode", MODES)
def test_alone_and_among_others(mode: str) -> None:
    module = fused(random_bert(mode), mode)
    ids, mask, types = ragged([6, 40, 1, 23])
    together = module(ids, mask, types)
    for i, n in enumerate(mask.sum(1).tolist()):
        alone = module(ids[i : i + 1, :n], mask[i : i + 1, :n], types[i : i + 1, :n])
        for a, b in zip(alone, together, strict=True):
            row = b[i : i + 1] if mode == SEQUENCE_CLASSIFICATION else b[i : i + 1, :n]
            torch.testing.assert_close(a, row, rtol=0, atol=1e-5)


def test_token_types_matter() -> None:
    module = fused(random_bert(SEQUENCE_CLASSIFICATION), SEQUENCE_CLASSIFICATION)
    ids, mask, types = ragged([12])
    assert not torch.allclose(module(ids, mask, types)[0], module(ids, mask, 1 - types)[0])


@pytest.mark.parametrize("mode", MODES)
def test_wrong_inputs_are_refused_in_words(mode: str) -> None:
    module = fused(random_bert(mode), mode)
    ids, mask, types = ragged([4, 11])
    too_long = torch.ones(1, POSITIONS + 1, dtype=torch.int64)
    cases: list[tuple[Any, str]] = [
        ((ids[0], mask[0], types[0]), "input_ids must be"),
        ((ids, mask[:, :5], types), "attention_mask is"),
        ((ids, mask, types[:1]), "token_type_ids is"),
        ((too_long, too_long, too_long), f"over the model's {POSITIONS} positions"),
        ((ids, mask * 0, types), "attention_mask"),
    ]
    for arguments, words in cases:
        with pytest.raises(REFUSED, match=words):
            module(*arguments)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(REFUSED, match="over the model's"):
        module.packed(ids[0, :4], types[0, :4], cu_seqlens, POSITIONS + 1)
    with pytest.raises(REFUSED, match=r"must be \[tokens\]"):
        module.packed(ids, types, cu_seqlens, 4)


# -- preparing, saving, loading ------------------------------------------------------------------


def saved(module: Any) -> bytes:
    """The module as a file's bytes."""
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", MODES)
def test_weights_have_names_that_a_person_can_read(mode: str) -> None:
    names = set(fused(random_bert(mode), mode).state_dict())
    assert {"encoder.layers.qkv.weight", "encoder.embeddings.word"} <= names
    heads = {n for n in names if n.startswith("head.")}
    wanted = "qa_weight" if mode == QUESTION_ANSWERING else "classifier_weight"
    assert f"head.{wanted}" in heads
    assert all(n.startswith(("encoder.embeddings.", "encoder.layers.", "head.")) for n in names)


@pytest.mark.parametrize("mode", MODES)
def test_a_file_saved_after_use_answers_the_same(mode: str) -> None:
    module = fused(random_bert(mode), mode)
    batch = ragged([4, 11])
    before = module(*batch)
    module.prepare()
    loaded = torch.jit.load(io.BytesIO(saved(module)))
    for a, b in zip(loaded(*batch), before, strict=True):
        assert torch.equal(a, b)


def test_released_weights_cannot_be_moved() -> None:
    module = fused(random_bert(SEQUENCE_CLASSIFICATION), SEQUENCE_CLASSIFICATION)
    batch = ragged([4, 11])
    before = module(*batch)[0]
    module.release()
    assert module.encoder.layers.qkv.weight.numel() == 0
    assert torch.equal(module(*batch)[0], before)
    module.to(torch.bfloat16)
    with pytest.raises(REFUSED, match="cannot move"):
        module(*batch)


def test_weights_are_prepared_again_for_another_type() -> None:
    bert = random_bert(SEQUENCE_CLASSIFICATION)
    module = fused(bert, SEQUENCE_CLASSIFICATION)
    batch = ragged([4, 11])
    before = module(*batch)[0]
    module.encoder.to(torch.bfloat16)
    torch.testing.assert_close(module(*batch)[0], before, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_file_round_trip(mode: str, tmp_path: Path) -> None:
    bert = random_bert(mode)
    module, info = fused(bert, mode), info_of(bert, mode)
    path = tmp_path / "traced_model.pt"
    save_model(module, info, path)
    assert read_info(path) == info
    loaded = load_model(path)
    assert loaded.info == info
    assert loaded.fused is loaded.module
    batch = ragged([4, 11])
    direct = torch.jit.load(str(path), map_location="cpu")
    for a, b, c in zip(module(*batch), loaded.module(*batch), direct(*batch), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_half_file_answers_on_the_cpu(tmp_path: Path) -> None:
    bert = random_bert(QUESTION_ANSWERING)
    path = tmp_path / "traced_model.pt"
    info = info_of(bert, QUESTION_ANSWERING, data_type="fp16")
    save_model(fused(bert, QUESTION_ANSWERING, "fp16"), info, path)
    loaded = load_model(path)
    dtypes = {name: tensor.dtype for name, tensor in loaded.module.state_dict().items()}
    assert dtypes["encoder.embeddings.word"] == torch.float16
    assert dtypes["head.qa_weight"] == torch.float32
    ids, mask, types = ragged([4, 11])
    wanted = hf_logits(bert, ids, mask, types)
    assert worst(loaded.module(ids, mask, types), wanted, mask, QUESTION_ANSWERING) < 0.02


def rewrite(path: Path, text: str | None) -> None:
    """Replace the metadata inside a traced file, or drop it."""
    with zipfile.ZipFile(path) as old:
        parts = [(i, old.read(i)) for i in old.infolist()]
    with zipfile.ZipFile(path, "w") as new:
        for item, content in parts:
            if item.filename.endswith("extra/" + METADATA_FILE):
                if text is None:
                    continue
                content = text.encode()
            new.writestr(item.filename, content)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"format_version": "2"}, "format_version must be a valid integer, not '2'"),
        ({"mode": "translation"}, "says mode translation, the weights say sequence_class"),
        ({"data_type": "int3"}, "data_type 'int3' is not one of fp32"),
        ({"model_type": "onnx"}, "model_type must be 'ths' or 'thsext', not 'onnx'"),
        ({"hidden_size": "64"}, "hidden_size must be a valid integer, not '64'"),
        ({"hidden_size": -64}, "hidden_size must be greater than or equal to 0, not -64"),
        ({"do_lower_case": 1}, "do_lower_case must be a valid boolean, not 1"),
        ({"labels": {"0": "a", "2": "b"}}, "without gaps"),
        ({"labels": ["a", "b"]}, "labels must be an object"),
        ({"labels": {"first": "a"}}, "labels must be a valid integer, .* not 'first'"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"vocab_size": 5}, "vocab_size 5, the weights say 211"),
        ({"num_layers": 7}, "num_layers 7"),
        ({"data_type": "bf16"}, "data_type"),
        ({"mode": QUESTION_ANSWERING}, "mode"),
        ({"num_labels": 3}, "num_labels 3"),
        ({"labels": {"0": "a"}}, "names 1 labels for 2 outputs"),
    ],
)
def test_contradictions_are_refused_in_words(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    bert = random_bert(SEQUENCE_CLASSIFICATION)
    path = tmp_path / "traced_model.pt"
    info = info_of(bert, SEQUENCE_CLASSIFICATION)
    save_model(fused(bert, SEQUENCE_CLASSIFICATION), info, path)
    raw = json.loads(info.to_json())
    for name, value in changes.items():
        if value is None:
            del raw[name]
        else:
            raw[name] = value
    rewrite(path, json.dumps(raw))
    with pytest.raises(ModelError, match=words):
        load_model(path)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "traced_model.pt"
    with pytest.raises(ModelError, match="no such file"):
        load_model(path)
    path.write_bytes(b"not a zip file")
    with pytest.raises(ModelError, match="not a TorchScript file"):
        load_model(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    with pytest.raises(ModelError, match=f"carries no {METADATA_FILE}"):
        load_model(path)
    bert = random_bert(SEQUENCE_CLASSIFICATION)
    save_model(fused(bert, SEQUENCE_CLASSIFICATION), info_of(bert, SEQUENCE_CLASSIFICATION), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ModelError, match="cut short"):
        load_model(path)


def test_fields_of_later_releases_are_ignored(tmp_path: Path) -> None:
    bert = random_bert(SEQUENCE_CLASSIFICATION)
    path = tmp_path / "traced_model.pt"
    info = info_of(bert, SEQUENCE_CLASSIFICATION)
    save_model(fused(bert, SEQUENCE_CLASSIFICATION), info, path)
    raw = json.loads(info.to_json())
    rewrite(path, json.dumps({**raw, "colour": {"deep": 1}}))
    assert load_model(path).info == info
    del raw["op_interface"]
    rewrite(path, json.dumps(raw))
    assert read_info(path).op_interface == 1


def test_a_file_carries_its_tokenizer(tmp_path: Path) -> None:
    bert = random_bert(SEQUENCE_CLASSIFICATION)
    module, info = fused(bert, SEQUENCE_CLASSIFICATION), info_of(bert, SEQUENCE_CLASSIFICATION)
    path = tmp_path / "other_name.pt"
    save_model(module, info, path, '{"model": "\u00e9t\u00e9"}')
    assert read_tokenizer(path) == '{"model": "\u00e9t\u00e9"}'
    assert load_model(path).info == info
    save_model(module, info, path)
    assert read_tokenizer(path) is None
    path.write_bytes(b"not a zip file")
    with pytest.raises(ModelError, match="not a TorchScript file"):
        read_tokenizer(path)


def test_only_fused_files_have_the_packed_entry() -> None:
    bert = random_bert(SEQUENCE_CLASSIFICATION)
    module = fused(bert, SEQUENCE_CLASSIFICATION)
    assert LoadedModel(module, info_of(bert, SEQUENCE_CLASSIFICATION)).fused is module
    plain = LoadedModel(module, info_of(bert, SEQUENCE_CLASSIFICATION, model_type="ths"))
    with pytest.raises(ModelError, match="of model_type 'ths', which pads"):
        _ = plain.fused


def test_metadata_must_be_an_object() -> None:
    with pytest.raises(ModelError, match="not JSON"):
        ModelInfo.from_json("{")
    with pytest.raises(ModelError, match="not a JSON object"):
        ModelInfo.from_json("[]")
