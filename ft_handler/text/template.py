"""Special tokens around texts, and how pairs are cut."""

from __future__ import annotations

import json

import numpy as np
from tokenizers import Tokenizer

from ft_handler.errors import ConfigError
from ft_handler.types import Ids


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of a pair stay when `room` are left: the longer text loses first.

    The shorter text keeps its length where it fits into half of the room; else both get half,
    the longer one the odd token.
    """
    if first + second <= room:
        return first, second
    short, long = min(first, second), max(first, second)
    long = max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (long, short) if first > second else (short, long)


#: How tokenizers spell the token that pre-training puts in the place of a word.
_MASKS = ("[MASK]", "<mask>")


def mask_of(tokenizer: Tokenizer) -> int | None:
    """The token that stands for a word nobody sees: the mask, else the unknown token, if any."""
    known = (tokenizer.token_to_id(name) for name in _MASKS)
    mask = next((number for number in known if number is not None), None)
    if mask is not None:
        return int(mask)
    model = json.loads(tokenizer.to_str())["model"]
    if model.get("unk_id") is not None:  # of a unigram model
        return int(model["unk_id"])
    unknown = model.get("unk_token")
    number = None if unknown is None else tokenizer.token_to_id(unknown)
    return None if number is None else int(number)


class Template:
    """The special tokens before, between and after the texts, as the tokenizer places them.

    token_types  how many the model has; with fewer than two every token is of type 0
    """

    def __init__(self, tokenizer: Tokenizer, token_types: int) -> None:
        pair, single = tokenizer.encode("a", "a"), tokenizer.encode("a")
        order = pair.sequence_ids
        if 0 not in order or 1 not in order or order.index(0) > order.index(1):
            raise ConfigError(
                "the tokenizer does not build pairs in their order: check its post_processor"
            )
        first, second = order.index(0), order.index(1)
        ids = np.array(pair.ids, np.int64)
        self.before = ids[:first]
        self.between = ids[first + order.count(0) : second]
        self.after = ids[second + order.count(1) :]
        alone = single.sequence_ids
        ids = np.array(single.ids, np.int64)
        self.single_before = ids[: alone.index(0)]
        self.single_after = ids[alone.index(0) + alone.count(0) :]
        types = pair.type_ids if token_types > 1 else []
        # Tokens of type 0 after the first text: BERT's separator belongs to it.
        self.separators = types.index(1) - first - order.count(0) if 1 in types else None

    @property
    def pair_specials(self) -> int:
        """Special tokens of a pair."""
        return len(self.before) + len(self.between) + len(self.after)

    def alone(self, ids: Ids) -> Ids:
        """One text as a sequence."""
        return np.concatenate((self.single_before, ids, self.single_after))

    def pair(self, first: Ids, second: Ids) -> tuple[Ids, int]:
        """Two texts as one sequence, and how many leading tokens of it have token type 0."""
        sequence = np.concatenate((self.before, first, self.between, second, self.after))
        return sequence, self.split(len(first), len(sequence))

    def split(self, first: int, total: int) -> int:
        """Leading tokens of type 0 in a pair of `total` tokens whose first text has `first`."""
        if self.separators is None:
            return total
        return len(self.before) + first + self.separators
