"""Files that the first release wrote still answer as they did."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ft_handler import load_model
from ft_handler.model.bundle import read_info, read_tokenizer

FILES = Path(__file__).resolve().parents[1] / "data" / "format1"
MODES = ("sequence_classification", "question_answering")


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    """Sequences, and the logits that the first release gave for them."""
    found: dict[str, Any] = json.loads((FILES / "expected.json").read_text())
    return found


def sequences(recorded: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Ids and token types of each sequence."""
    return [
        (torch.tensor(s["input_ids"]), torch.tensor(s["token_type_ids"]))
        for s in recorded["sequences"]
    ]


@pytest.mark.parametrize("mode", MODES)
def test_the_metadata_is_read(mode: str) -> None:
    info = read_info(FILES / f"{mode}.pt")
    assert (info.format_version, info.op_interface) == (1, 1)
    assert (info.mode, info.architecture, info.data_type) == (mode, "bert", "fp32")
    assert (info.hidden_size, info.num_layers, info.max_positions) == (16, 1, 32)
    assert read_tokenizer(FILES / f"{mode}.pt") is None


@pytest.mark.parametrize("mode", MODES)
def test_packed_answers_are_the_same(mode: str, recorded: dict[str, Any]) -> None:
    parts = sequences(recorded)
    lengths = [len(ids) for ids, _ in parts]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    found = load_model(FILES / f"{mode}.pt").fused.packed(
        torch.cat([ids for ids, _ in parts]),
        torch.cat([types for _, types in parts]),
        cu_seqlens,
        max(lengths),
    )
    columns = found if mode == "question_answering" else [found]
    for logits, wanted in zip(columns, recorded[mode], strict=True):
        torch.testing.assert_close(logits, torch.tensor(wanted), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_padded_answers_are_the_same(mode: str, recorded: dict[str, Any]) -> None:
    module = load_model(FILES / f"{mode}.pt").module
    wanted = [torch.tensor(part) for part in recorded[mode]]
    begin = 0
    for row, (ids, types) in enumerate(sequences(recorded)):
        end = begin + len(ids)
        found = module(ids[None], torch.ones_like(ids)[None], types[None])
        for logits, whole in zip(found, wanted, strict=True):
            own = whole[row] if mode == "sequence_classification" else whole[begin:end]
            torch.testing.assert_close(logits[0], own, rtol=0, atol=1e-5)
        begin = end
