"""Differential test against transformers 4.57's pipelines on thousands of mutated texts.

The question-answering pipeline was removed from transformers 5.3, so the two sides run in
environments of their own and hand over files:

    python benchmarks/differential.py cases --task qa --count 3000 --output cases.json
    # in an environment with transformers 4.57 and peft
    python benchmarks/differential.py reference --base BASE --adapter ADAPTER --cases cases.json \
        --output ref.json
    # in the package's environment; DIR is what `ft-handler trace --adapter ADAPTER` wrote
    python benchmarks/differential.py compare --model DIR --cases cases.json --reference ref.json

Embeddings (`--task embeddings`) are held against sentence-transformers: its environment has that
package, `--base` is the checkpoint's folder, and there is no adapter.

Texts are drawn from the sets in FT_HANDLER_SHARED and mutated. Answers agree when texts, offsets
and labels are equal and scores differ by at most 1e-4. What differs is counted by class; a class
"other" is a fault on one side.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("FT_HANDLER_SHARED") or Path(__file__).resolve().parents[2] / "shared")
TOLERANCE = 1e-4
#: Of embeddings.
COSINE_TOLERANCE = 1e-5

QA_SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"top_k": 5},
    {"max_seq_len": 96, "doc_stride": 24, "top_k": 3},
    {"max_seq_len": 128, "handle_impossible_answer": True},
    {"align_to_words": False, "top_k": 3, "max_answer_len": 30},
)
#: What is put into texts, by what it tries.
STRANGE: dict[str, tuple[str, ...]] = {
    "combining": ("e\u0301", "a\u0308\u0323", "\u0301", "n\u0303o", "\u1112\u1161\u11ab"),
    "emoji": ("\U0001f469\u200d\U0001f4bb", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\u200d"),
    "cjk": ("\u6771\u4eac", "\u3042\u308a\u304c", "\ud55c\uad6d\uc5b4", "\u3002", "\u3000"),
    "right to left": ("\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d", "\u202e", "\u200f"),
    "line ends": ("\r\n", "\n\n", "\t", "\u2028", "\u0085", "\u00a0"),
    "controls": ("\x01", "\x07", "\x1b[0m", "\x7f", "\u0000", "\ufeff", "\u200b", "\u00ad"),
    "special tokens": ("[SEP]", "[CLS]", "[MASK]", "[PAD]", "[UNK]", "[sep]", " [MASK]", "##ing"),
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
    return " ".join(words)


def cases(args: argparse.Namespace) -> None:
    """Draw and mutate; written once, so that both sides get the same."""
    rng = random.Random(args.seed)
    draw = {"qa": questions, "classification": texts, "embeddings": alone}[args.task]
    drawn = draw(args.count, rng)
    args.output.write_text(json.dumps({"task": args.task, "cases": drawn}))


def questions(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Questions of SQuAD about a part of their paragraph."""
    data = json.loads(gzip.decompress((SHARED / "data/squad/dev-v1.1.json.gz").read_bytes()))
    pairs = [
        (q["question"], p["context"])
        for article in data["data"]
        for p in article["paragraphs"]
        for q in p["qas"]
    ]
    drawn = []
    for question, context in rng.sample(pairs, count):
        context = context[: rng.choice((60, 200, 500, 900, 4000))]
        drawn.append({
            "input": {"question": mutated(question, rng), "context": mutated(context, rng)},
            "parameters": rng.choice(QA_SETTINGS),
        })  # fmt: skip
    return drawn


def texts(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Sentences of SST-2, some of them pairs, some far too long."""
    with (SHARED / "data/sst2/dev.tsv").open(encoding="utf-8") as file:
        sentences = [row[1] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)][1:]
    drawn = []
    for _ in range(count):
        one = {"text": mutated(rng.choice(sentences) * (1 if rng.random() < 0.97 else 30), rng)}
        if rng.random() < 0.3:
            one["text_pair"] = mutated(
                rng.choice(sentences) * (1 if rng.random() < 0.9 else 25), rng
            )
        drawn.append({"input": one, "parameters": {}})
    return drawn


def alone(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """The same without pairs, to be embedded in several ways."""
    drawn = texts(count, rng)
    for case in drawn:
        case["input"].pop("text_pair", None)
        case["parameters"] = rng.choice(({}, {}, {"dimensions": 128}, {"prompt": "query: "}))
    return drawn


def embedded(args: argparse.Namespace, asked: list[dict[str, Any]]) -> dict[str, Any]:
    """What sentence-transformers makes of every case; dimensions are cut, then normalised."""
    import sentence_transformers
    import torch
    import transformers

    model = sentence_transformers.SentenceTransformer(args.base, device="cpu")
    answers: list[Any] = []
    for case in asked:
        options = dict(case["parameters"])
        if dimensions := options.pop("dimensions", None):
            options |= {"truncate_dim": dimensions, "normalize_embeddings": True}
        vector = model.encode(case["input"]["text"], show_progress_bar=False, **options)
        answers.append([{"embedding": vector.tolist()}])
    return {
        "sentence_transformers": sentence_transformers.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "answers": answers,
    }


def reference(args: argparse.Namespace) -> None:
    """Ask transformers' pipeline, case by case, and write down its answers and its errors."""
    document = json.loads(args.cases.read_text())
    if document["task"] == "embeddings":
        args.output.write_text(json.dumps(embedded(args, document["cases"])))
        return
    import torch
    import transformers
    from peft import PeftModel
    from transformers import (
        AutoTokenizer,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        pipeline,
    )

    tokenizer = AutoTokenizer.from_pretrained(args.base, model_max_length=512)
    asks = document["task"] == "qa"
    auto = BertForQuestionAnswering if asks else BertForSequenceClassification
    base = auto.from_pretrained(args.base, dtype=torch.float32, num_labels=2)
    model = PeftModel.from_pretrained(base, args.adapter).merge_and_unload().eval()
    name = "question-answering" if asks else "text-classification"
    options: dict[str, Any] = {} if asks else {"top_k": None, "truncation": True}
    ask = pipeline(name, model=model, tokenizer=tokenizer, **options)
    answers: list[Any] = []
    for number, case in enumerate(document["cases"]):
        try:
            got = ask(**case["input"], **case["parameters"]) if asks else ask(case["input"])
            answers.append(got if isinstance(got, list) else [got])
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the tokenizers library panics past Exception
            answers.append({"error": type(error).__name__})
        if number % 500 == 499:
            print(number + 1, file=sys.stderr, flush=True)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    args.output.write_text(json.dumps({**versions, "answers": answers}))


def compare(args: argparse.Namespace) -> None:
    """Ask our pipeline in batches, and count what agrees and what differs, by class."""
    from ft_handler.config import RawSettings, model_yaml
    from ft_handler.runtime import open_model
    from ft_handler.types import Incoming

    document = json.loads(args.cases.read_text())
    theirs = json.loads(args.reference.read_text())
    asked = document["cases"]
    # With the settings beside it: how long texts may be is the checkpoint's to say.
    raw = RawSettings.of_model_dir(args.model, model_yaml(args.model))
    model = open_model(args.model, raw)
    more = {"top_k": 2} if document["task"] == "classification" else {}
    judge: Callable[..., str] = {
        "qa": judged_answer,
        "classification": judged_labels,
        "embeddings": judged_vector,
    }[document["task"]]
    classes: Counter[str] = Counter()
    for at in range(0, len(asked), 32):
        part = asked[at : at + 32]
        # A batch of their own kind each: what one is must not change another.
        replies, _ = model.pipeline.run(
            [Incoming({**case["input"], **case["parameters"], **more}) for case in part]
        )
        for case, reply, answer in zip(part, replies, theirs["answers"][at : at + 32], strict=True):
            ours = json.loads(reply.body)
            if reply.status != 200:
                kind = f"refused here ({reply.status}), there " + (
                    answer["error"] if isinstance(answer, dict) else "answered"
                )
            elif isinstance(answer, dict):
                kind = f"answered here, there {answer['error']}"
            else:
                kind = judge(case, ours if isinstance(ours, list) else [ours], answer)
            classes[kind] += 1
            if classes[kind] <= args.show and kind != "same":
                print(kind, json.dumps(case), json.dumps(ours), json.dumps(answer), sep="\n  ")
    result = {
        "task": document["task"],
        "cases": len(asked),
        "transformers": theirs["transformers"],
        "torch": theirs["torch"],
        **{k: theirs[k] for k in ("sentence_transformers",) if k in theirs},
        "tolerance": TOLERANCE,
        "classes": dict(classes.most_common()),
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def judged_labels(case: dict[str, Any], ours: list[Any], theirs: list[Any]) -> str:
    """Whether two lists of labels and scores are the same."""
    mine = {one["label"]: one["score"] for one in ours}
    other = {one["label"]: one["score"] for one in theirs}
    if mine.keys() != other.keys() and len(mine) == len(other):
        # The adapter's labels have names; a base model's are numbered.
        names = [one["score"] for one in ours], [one["score"] for one in theirs]
        same = all(abs(a - b) <= TOLERANCE for a, b in zip(*names, strict=True))
    else:
        same = mine.keys() == other.keys() and all(
            abs(mine[k] - other[k]) <= TOLERANCE for k in mine
        )
    return "same" if same else "other"


def judged_vector(case: dict[str, Any], ours: list[Any], theirs: list[Any]) -> str:
    """Whether two vectors point the same way: 1 - cosine is at most 1e-5, and their lengths."""
    a, b = ours[0]["embedding"], theirs[0]["embedding"]
    if len(a) != len(b):
        return "other"
    lengths = [math.sqrt(math.fsum(x * x for x in v)) for v in (a, b)]
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    same = 1 - product / (lengths[0] * lengths[1]) <= COSINE_TOLERANCE
    return "same" if same and abs(lengths[0] - lengths[1]) <= COSINE_TOLERANCE else "other"


def judged_answer(case: dict[str, Any], ours: list[Any], theirs: list[Any]) -> str:
    """Whether two lists of answers are the same, else the documented class they differ by."""

    def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
        return (a["answer"], a["start"], a["end"]) == (b["answer"], b["start"], b["end"]) and abs(
            a["score"] - b["score"]
        ) <= TOLERANCE

    pairs = list(zip(ours, theirs, strict=False))
    if all(same(a, b) for a, b in pairs):
        if len(ours) == len(theirs):
            return "same"
        rest = (ours if len(ours) > len(theirs) else theirs)[len(pairs) :]
        return "list ends elsewhere, at scores near 0" if rest[0]["score"] < 1e-3 else "other"
    if any(one.get("truncated") for one in ours):
        return "question cut here"
    if "[CLS]" in case["input"]["question"] + case["input"]["context"]:
        return "[CLS] spelt out: there it may be an answer's begin"
    differ = [(a, b) for a, b in pairs if not same(a, b)]
    if all(a["score"] < 1e-3 and b["score"] < 1e-3 for a, b in differ):
        return "answers of scores near 0 in another order"
    if all(abs(a["score"] - b["score"]) <= TOLERANCE for a, b in differ):
        return "equal scores in another order"
    if case["parameters"].get("align_to_words", True) and "max_seq_len" in case["parameters"]:
        return "words cut by a window"
    return "other"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("cases")
    one.add_argument("--task", choices=("qa", "classification", "embeddings"), required=True)
    one.add_argument("--count", type=int, default=3000)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--output", type=Path, required=True)
    one.set_defaults(run=cases)
    two = commands.add_parser("reference")
    two.add_argument("--base", required=True)
    two.add_argument("--adapter", help="not for embeddings")
    two.add_argument("--cases", type=Path, required=True)
    two.add_argument("--output", type=Path, required=True)
    two.set_defaults(run=reference)
    three = commands.add_parser("compare")
    three.add_argument("--model", type=Path, required=True)
    three.add_argument("--cases", type=Path, required=True)
    three.add_argument("--reference", type=Path, required=True)
    three.add_argument("--output", type=Path)
    three.add_argument("--show", type=int, default=3, help="how many of a class to print")
    three.set_defaults(run=compare)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
