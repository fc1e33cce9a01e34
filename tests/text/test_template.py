"""Special tokens around texts, for the tokenizers of every architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES, write_tokenizer_of
from tokenizers import Tokenizer

from ft_handler.text.template import Template

TEXTS = ("the old bridge", " a film", "x", "Captain's 1914")


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("token_types", [0, 1, 2])
def test_what_stands_around_texts_is_what_the_tokenizer_puts_there(
    tmp_path: Path, model_type: str, token_types: int
) -> None:
    write_tokenizer_of(tmp_path, model_type)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    template = Template(tokenizer, token_types)
    alone = [np.array(tokenizer.encode(t, add_special_tokens=False).ids) for t in TEXTS]
    for text, ids in zip(TEXTS, alone, strict=True):
        made = np.concatenate((template.single_before, ids, template.single_after))
        assert made.tolist() == tokenizer.encode(text).ids
        for second, others in zip(TEXTS, alone, strict=True):
            theirs = tokenizer.encode(text, second)
            parts = (template.before, ids, template.between, others, template.after)
            assert np.concatenate(parts).tolist() == theirs.ids
            assert template.pair_specials == len(theirs.ids) - len(ids) - len(others)
            of_type_0 = theirs.type_ids.count(0) if token_types > 1 else len(theirs.ids)
            assert template.split(len(ids), len(theirs.ids)) == of_type_0
