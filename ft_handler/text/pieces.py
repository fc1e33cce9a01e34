"""Tokens as text, and which of them begin a word."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ft_handler.text.readers import Origins
from ft_handler.types import Ids

#: Of models that do not say which token stands for what they do not know.
_UNKNOWN = ("<unk>", "[UNK]")
#: First and last characters of scripts that put no blank between words.
_UNSPACED = np.array(
    [
        (0x0E00, 0x0EFF),  # Thai, Lao
        (0x1000, 0x109F),  # Myanmar
        (0x1780, 0x17FF),  # Khmer
        (0x3000, 0x312F),  # marks, Hiragana, Katakana, Bopomofo
        (0x31F0, 0x31FF),  # Katakana
        (0x3400, 0x4DBF),  # Han
        (0x4E00, 0x9FFF),
        (0xF900, 0xFAFF),
        (0xFF01, 0xFF9F),  # full and half width
        (0x20000, 0x3FFFF),
    ]
)


class Pieces:
    """What the tokens of one tokenizer spell.

    marked  whether tokens that continue a word are marked, as WordPiece's "##" does
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._decoder = tokenizer, tokenizer.decoder
        self.marked = bool(getattr(tokenizer.model, "continuing_subword_prefix", None))
        named = (getattr(tokenizer.model, "unk_token", None), *_UNKNOWN)
        known = (tokenizer.token_to_id(name) for name in named if name)
        self._unknown = next((number for number in known if number is not None), -1)

    def spelled(self, ids: Ids, origins: Origins, text: str) -> list[str]:
        """Each token as the vocabulary has it; one that is unknown as it stands in the text."""
        name, unknown = self._tokenizer.id_to_token, self._unknown
        return [
            text[begin:end] if number == unknown else name(number) or ""
            for number, (begin, end, *_) in zip(ids.tolist(), origins.tolist(), strict=True)
        ]

    def joined(self, tokens: Sequence[str]) -> str:
        """The text that tokens spell together."""
        return " ".join(tokens) if self._decoder is None else self._decoder.decode(list(tokens))

    def begin_words(self, ids: Ids, origins: Origins, text: str) -> NDArray[np.bool_]:
        """[tokens] whether each begins a word.

        Where continuing tokens are marked, words are the tokenizer's own. Elsewhere a word begins
        at a blank, behind one, and at every token of a script that has none.
        """
        if not len(ids):
            return np.zeros(0, np.bool_)
        begins: NDArray[np.bool_]
        if self.marked:
            begins = word_begins(origins)
        else:
            codes = np.frombuffer(f"\0{text}\0".encode("utf-32-le"), np.uint32)
            firsts = origins[:, 0]
            before, at = codes[firsts], codes[firsts + 1]
            begins = np.logical_or.reduce([firsts == 0, before == ord(" "), at == ord(" ")])
            # The tokens of a character that has several all have its place.
            apart = firsts >= np.concatenate(([0], origins[:-1, 1]))
            for i in np.flatnonzero(~begins & apart & (_unspaced(before) | _unspaced(at))).tolist():
                begins[i] = not unicodedata.category(chr(at[i])).startswith("M")
        begins[ids == self._unknown] = True
        begins[0] = True
        return begins


def word_begins(origins: Origins) -> NDArray[np.bool_]:
    """[tokens] whether each begins one of the tokenizer's own words."""
    begins = np.ones(len(origins), np.bool_)
    begins[1:] = (origins[1:, 2:] != origins[:-1, 2:]).any(axis=1)
    return begins


def _unspaced(codes: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Whether characters are of a script without blanks."""
    inside = (codes[:, None] >= _UNSPACED[:, 0]) & (codes[:, None] <= _UNSPACED[:, 1])
    found: NDArray[np.bool_] = np.logical_or.reduce(inside, axis=1)
    return found
