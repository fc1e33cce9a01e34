"""Texts of SST-2 and SQuAD, and what is done to them."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("FT_HANDLER_SHARED") or ROOT.parent / "shared")

#: What is put into texts, by what it tries.
STRANGE: dict[str, tuple[str, ...]] = {
    "combining": ("e\u0301", "a\u0308\u0323", "\u0301", "n\u0303o", "\u1112\u1161\u11ab"),
    "emoji": ("\U0001f469\u200d\U0001f4bb", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\u200d"),
    "cjk": ("\u6771\u4eac", "\u3042\u308a\u304c", "\ud55c\uad6d\uc5b4", "\u3002", "\u3000"),
    "right to left": ("\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d", "\u202e", "\u200f"),
    "line ends": ("\r\n", "\n\n", "\t", "\u2028", "\u0085", "\u00a0"),
    "controls": ("\x01", "\x07", "\x1b[0m", "\x7f", "\u0000", "\ufeff", "\u200b", "\u00ad"),
    "special tokens": ("[SEP]", "[CLS]", "[MASK]", "[PAD]", "[UNK]", "[sep]", " [MASK]", "##ing"),
    "other special tokens": ("<s>", "</s>", " <mask>", "<unk>", "<S>", "\u2581", "\u0120a"),
    "long words": ("a" * 101, "x" * 99, "donaudampfschifffahrts" * 6, "1234567890" * 12, "-" * 40),
    "case": ("\u0130", "\u00df", "\u03a3\u03c2", "\ufb01", "\u212a", "\uff21"),
    "unassigned": ("\ufffd", "\ue000", "\U000e0041", "\U0001f9ff", "\u0378"),
}  # fmt: skip


def mutated(text: str, rng: random.Random) -> str:
    """A text with a few strange things in it, between its words and inside them."""
    words = text.split(" ")
    for _ in range(rng.choice((0, 1, 2, 4, 8))):
        thing = rng.choice(STRANGE[rng.choice(list(STRANGE))])
        at = rng.randrange(len(words))
        place = rng.randrange(len(words[at]) + 1)
        match rng.randrange(4):
            case 0:
                words.insert(at, thing)
            case 1:
                words[at] = words[at][:place] + thing + words[at][place:]
            case 2:
                words[at] = words[at].upper() + thing
            case _:
                words[at : at + 2] = ["".join(words[at : at + 2]) + thing]
    match rng.randrange(24):
        case 0:
            return rng.choice(("", " ", "  ")).join(words[: rng.randrange(3)])
        case 1:
            return "  ".join(words)
        case 2:
            return " ".join(words) + " \n"
        case 3:
            return rng.choice(STRANGE[rng.choice(list(STRANGE))])
        case 4 | 5:
            return rng.choice((" ", "  ", "\n", "\u3000")) + " ".join(words)
    return " ".join(words)


def paragraphs() -> list[dict[str, Any]]:
    """The paragraphs of SQuAD, each with its questions."""
    data = json.loads(gzip.decompress((SHARED / "data/squad/dev-v1.1.json.gz").read_bytes()))
    return [p for article in data["data"] for p in article["paragraphs"]]


def questions(count: int, rng: random.Random) -> list[dict[str, str]]:
    """Questions of SQuAD about a part of their paragraph, both mutated."""
    pairs = [(q["question"], p["context"]) for p in paragraphs() for q in p["qas"]]
    drawn = []
    for question, context in rng.sample(pairs, count):
        context = context[: rng.choice((60, 200, 500, 900, 4000))]
        drawn.append({"question": mutated(question, rng), "context": mutated(context, rng)})
    return drawn


def sentences(count: int, rng: random.Random, pairs: float = 0.3) -> list[dict[str, str]]:
    """Sentences of SST-2, mutated, a share of them pairs, some far too long."""
    with (SHARED / "data/sst2/dev.tsv").open(encoding="utf-8") as file:
        found = [row[1] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)][1:]
    drawn = []
    for _ in range(count):
        one = {"text": mutated(rng.choice(found) * (1 if rng.random() < 0.97 else 30), rng)}
        if rng.random() < pairs:
            one["text_pair"] = mutated(rng.choice(found) * (1 if rng.random() < 0.9 else 25), rng)
        drawn.append(one)
    return drawn
