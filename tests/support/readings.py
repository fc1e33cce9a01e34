"""Tokenizers of every kind that encoders have, and readers held against the library."""

from __future__ import annotations

import base64
import functools
import random
import zlib
from collections.abc import Callable, Sequence

from tiny import WORD_LIST
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from ft_handler.text.readers import Reader

#: A SentencePiece character map of a few rules: blanks of every kind, dots and an Arabic ligature
#: that become several words, characters that vanish, widths, ligatures, a letter with its mark.
CHARACTER_MAP = zlib.decompress(base64.b64decode(
    "eNoV02dMFEEchvF3V4zBkpioscRENMYaz5wxmlhi712xN1RAsfde7vQQEbB3UQ8boNhBFA8bxnr2xtmC8MHee/eZTX"
    "77zs5kk5n5zyhIUjmpSAmZx2XBL1vuYBpOqSJRCAy76pqsLBVtKkXH2/IyHozYLvzPWFwbyVteSugvFePbFWTL1UMq"
    "S9tdWMpCJdpJZCmyDCrAm8Arz1bac1tVmMTCF1JVsjqqoSZqoDZqoQ72ZUvMRw6sLG4r5ZLka2IrO9RW+gepPv0N0Q"
    "Bbt0iZ4bYa024Epq/sm1IzcvdxqQXZHK3QEixDrdEObdEB7dEJHcFy1Rnd0BUsUd3RCz3RG6Hoiz5gO9QPAzEAgzEI"
    "QzEEwxCGEYhIsxVBhmMkIhGFURiD0RiHsZiA8ZiEiZiCyZiGqZiB6ZiFmZiD2ZiHuViA+XCbwmOR2XtEw4MYLEYsli"
    "AOS0G5FI/lWGb2HyuwGquwFmuwHuuwERuwGZtAOZSIbaY2SIIXO7Adu7ATyaY+SEUK9mKPqT3ScAD7cQgHcQSHkYF0"
    "ZOIoKLGO4QSyTO3hwymcxBmcRg7OGiUtnSMv4Dw4WrqIK7iMq/DjOq6Bo6QbuI1buIs7uI97CCAXD/EAj/HI9IVZek"
    "I+RR4KkG+UtlTgt/TMjPkscR30LtHSK/Il3uC16cNbcNz1Hp/wEV/wGd/wFT/wHb/wE3/wG//w19z6EIX43XI4HHLK"
    "me/21ONKDFdkFKcjJ1W5GQFPIDYkN5nwBGIUSNJ/9kO2cA=="
))  # fmt: skip

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
OTHER_LETTERS = "ÄÖÜäöüßéèñçøåĠ▁中文字東京かなカナ한국שלוםمرحبا0123456789😀👩🚀’“”…"


def corpus() -> list[str]:
    """Sentences of the tiny vocabulary's words, with capitals, figures and other scripts."""
    rng = random.Random(3)
    words = [
        *WORD_LIST.split(),
        "don't",
        "it's",
        "1914",
        "café",
        "Müller",
        "東京",
        "שלום",
        "😀",
        "👩\u200d🚀",
    ]
    out = []
    for _ in range(300):
        line = " ".join(rng.choices(words, k=rng.randint(3, 12)))
        out.append(line.capitalize() + rng.choice(".!?…") + rng.choice(("", "  ", "\n\n")))
    return out


def with_specials(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with RoBERTa's special tokens; the mask takes in blanks before it."""
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, lstrip=t == "<mask>", normalized=False) for t in SPECIALS]
    )
    return tokenizer


@functools.cache
def _byte_pairs() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return str(tokenizer.to_str())


def byte_level(
    prefix: bool = False, trim: bool = True, normalizer: normalizers.Normalizer | None = None
) -> Tokenizer:
    """RoBERTa's: byte-level BPE."""
    tokenizer = with_specials(Tokenizer.from_str(_byte_pairs()))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=trim, add_prefix_space=prefix
    )
    return tokenizer


@functools.cache
def _pieces(model: str) -> str:
    tokenizer = Tokenizer(models.Unigram() if model == "unigram" else models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    letters = sorted({*"".join(WORD_LIST.split()), *OTHER_LETTERS})
    kind = trainers.UnigramTrainer if model == "unigram" else trainers.BpeTrainer
    more = {"unk_token": "<unk>"} if model == "unigram" else {}
    trainer = kind(
        vocab_size=500, show_progress=False, special_tokens=list(SPECIALS),
        initial_alphabet=letters, **more,
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus(), trainer)
    return str(tokenizer.to_str())


def marked(
    model: str = "unigram",
    scheme: str = "always",
    words: bool = False,
    normalizer: normalizers.Normalizer | None = None,
) -> Tokenizer:
    """SentencePiece's: unigrams or BPE, a mark for every blank.

    words  whether all whitespace parts words, as older files say
    """
    tokenizer = with_specials(Tokenizer.from_str(_pieces(model)))
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    if words:
        metaspace = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.pre_tokenizer = metaspace
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return tokenizer


def mapped(*more: normalizers.Normalizer) -> normalizers.Normalizer:
    """XLM-RoBERTa's normalizer: a character map, then runs of blanks."""
    return normalizers.Sequence([normalizers.Precompiled(CHARACTER_MAP), *more])


def albert_normalizer() -> normalizers.Normalizer:
    """ALBERT's: quotes, accents, case, the map, runs of blanks."""
    return normalizers.Sequence(
        [
            normalizers.Replace("``", '"'),
            normalizers.Replace("''", '"'),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Precompiled(CHARACTER_MAP),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )


def camembert_normalizer() -> normalizers.Normalizer:
    """A newer CamemBERT's: whitespace first."""
    return normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " "),
            normalizers.NFC(),
            normalizers.Strip(left=True, right=True),
        ]
    )


#: Tokenizers whose texts may be cut at blanks.
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level,
    "bytes, blank added": lambda: byte_level(prefix=True),
    "bytes, offsets whole": lambda: byte_level(trim=False),
    "bytes, blank added, offsets whole": lambda: byte_level(prefix=True, trim=False),
    "bytes, NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "unigram": marked,
    "unigram, first alone marked": lambda: marked(scheme="first"),
    "unigram, none marked": lambda: marked(scheme="never"),
    "unigram by words": lambda: marked(words=True, normalizer=mapped()),
    "unigram by words, first alone marked": lambda: marked(scheme="first", words=True),
    "unigram as XLM-R": lambda: marked(
        normalizer=mapped(
            normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")
        )
    ),
    "unigram as ALBERT": lambda: marked(words=True, normalizer=albert_normalizer()),
    "unigram as CamemBERT": lambda: marked(normalizer=camembert_normalizer()),
    "unigram, lower-cased first": lambda: marked(
        words=True, normalizer=normalizers.Sequence([normalizers.Lowercase(), mapped()])
    ),
    "BPE with marks": lambda: marked("bpe"),
    "BPE with marks, mapped": lambda: marked("bpe", scheme="first", normalizer=mapped()),
}


def check(reader: Reader, tokenizer: Tokenizer, batch: Sequence[str]) -> None:
    """Ids and origins of a batch are the library's, text by text."""
    wanted = [tokenizer.encode(text, add_special_tokens=False) for text in batch]
    assert [ids.tolist() for ids in reader.ids(batch)] == [e.ids for e in wanted]
    found, origins = reader.located(batch)
    assert [ids.tolist() for ids in found] == [e.ids for e in wanted]
    for origin, encoding in zip(origins, wanted, strict=True):
        assert [tuple(row) for row in origin[:, :2].tolist()] == encoding.offsets
        words = [encoding.token_to_word(token) for token in range(len(encoding))]
        for row, word, own in zip(origin[:, 2:].tolist(), words, encoding.offsets, strict=True):
            assert tuple(row) == (own if word is None else encoding.word_to_chars(word))
