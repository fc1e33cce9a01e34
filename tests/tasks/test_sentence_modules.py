"""What sentence-transformers' files say of a checkpoint, and what of it is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from sentences import write_json, write_modules

from ft_handler.errors import ModelError
from ft_handler.prepare.beside import Beside
from ft_handler.prepare.hub import Source
from ft_handler.tasks.sentence_modules import Sentences, read_sentences


def read(folder: Path, pooling: Any = None, normalize: bool | None = None) -> Sentences:
    return read_sentences(Beside(Source(str(folder), local_only=True), None), pooling, normalize)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "last"])
def test_one_pooling_and_a_normalisation(tmp_path: Path, pooling: str, normalize: bool) -> None:
    found = read(write_modules(tmp_path, pooling, normalize=normalize))
    assert (found.pooling, found.normalize, found.dense) == (pooling, normalize, None)
    assert (found.longest, found.lower_case, dict(found.prompts)) == (None, False, {})


@pytest.mark.parametrize(
    ("said", "pooling"),
    [
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"], "pooling_mode_mean_tokens": True}, "cls"),
        ({"pooling_mode_mean_tokens": False}, "mean"),
        ({}, "mean"),
    ],
)
def test_both_spellings_of_a_pooling(tmp_path: Path, said: dict[str, Any], pooling: str) -> None:
    write_modules(tmp_path, "max")
    write_json(tmp_path, "1_Pooling/config.json", said)
    assert read(tmp_path).pooling == pooling


def test_without_a_list_of_modules_it_is_the_mean(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert (found.pooling, found.normalize, found.listed) == ("mean", False, False)


def test_options_win(tmp_path: Path) -> None:
    write_modules(tmp_path, "cls", "max", normalize=True)
    found = read(tmp_path, "last", False)
    assert (found.pooling, found.normalize) == ("last", False)


def test_lengths_case_and_prompts(tmp_path: Path) -> None:
    write_modules(tmp_path, "mean")
    write_json(
        tmp_path, "sentence_roberta_config.json", {"max_seq_length": 96, "do_lower_case": True}
    )
    prompts = {"query": "query: ", "passage": "", "none": None}
    write_json(
        tmp_path, "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": "query", "similarity_fn_name": "cosine"},
    )  # fmt: skip
    found = read(tmp_path)
    assert (found.longest, found.lower_case) == (96, True)
    assert found.prompts == {"query": "query: ", "passage": ""}
    assert found.default_prompt_name == "query"


@pytest.mark.parametrize("curve", ["Tanh", "Identity"])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_dense_layer_is_read(tmp_path: Path, curve: str, pickled: bool) -> None:
    write_modules(tmp_path, "cls", dense=curve, normalize=True)
    if pickled:
        from safetensors.torch import load_file

        path = tmp_path / "2_Dense" / "model.safetensors"
        torch.save(
            {"linear.weight": load_file(path)["linear.weight"]}, path.with_name("pytorch_model.bin")
        )
        path.unlink()
    dense = read(tmp_path).dense
    assert dense is not None
    assert (dense.path, dense.curve) == ("2_Dense", curve)
    assert (dense.weight.shape, dense.bias.shape) == ((24, 64), (24,))
    assert bool(dense.bias.any()) is not pickled  # a layer may have none


def _modules(*names: str, **paths: str) -> Callable[[Path], None]:
    modules = [{"type": name, "path": paths.get(name, "")} for name in names]
    return lambda folder: write_json(folder, "modules.json", modules)


def _file(name: str, document: Mapping[str, Any]) -> Callable[[Path], None]:
    return lambda folder: write_json(folder, name, document)


_OURS = "sentence_transformers.models."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_file("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}), "cls and mean"),
        (_file("1_Pooling/config.json", {"pooling_mode_weightedmean_tokens": True}), "weightedm"),
        (_file("1_Pooling/config.json", {"pooling_mode_mean_sqrt_len_tokens": True}), "sqrt_len"),
        (_file("1_Pooling/config.json", {"include_prompt": False}), "include_prompt"),
        (_modules(_OURS + "Transformer", _OURS + "CNN"), r"models\.CNN, which is not served"),
        (_modules("custom_st.Transformer"), r"custom_st\.Transformer, which is not served"),
        (_modules(_OURS + "Transformer"), "chains Transformer; served"),
        (_modules(*(_OURS + n for n in ("Transformer", "Pooling", "Normalize", "Dense"))),
         "chains Transformer, Pooling, Normalize, Dense; served"),
        (_modules(_OURS + "Transformer", **{_OURS + "Transformer": "0_Transformer"}),
         "folder 0_Transformer: trace that folder"),
        (_file("modules.json", {"a": 1}), "not a list of modules"),
        (_file("2_Dense/config.json", {"activation_function": "torch.nn.GELU"}), "activation GELU"),
        (_file("2_Dense/config.json", {"use_residual": True}), "with a residual"),
        (_file("2_Dense/config.json", {"module_input_name": "token_embeddings"}), "token_embed"),
        (_file("sentence_bert_config.json", {"transformer_task": "fill-mask"}), "fill-mask"),
        (_file("config_sentence_transformers.json", {"model_type": "SparseEncoder"}), "Sparse"),
        (lambda folder: (folder / "modules.json").write_text("[{"), "modules.json is not JSON"),
        (lambda folder: (folder / "2_Dense/model.safetensors").unlink(), "its 2_Dense has no"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_named(
    tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    write_modules(tmp_path, "mean", dense="Tanh")
    read(tmp_path)
    change(tmp_path)
    with pytest.raises(ModelError, match=words):
        read(tmp_path)
