"""Agreement of question answering with transformers 4.57's pipeline on real questions.

The pipeline was removed from transformers 5.3, so the two sides run in environments of their own:

    # in an environment with transformers 4.57 and peft
    python benchmarks/qa_agreement.py reference --base BASE --adapter ADAPTER --output ref.json
    # in the package's environment; DIR is what `ft-handler trace --adapter ADAPTER` wrote
    python benchmarks/qa_agreement.py compare --model DIR --reference ref.json --output out.json

Questions are drawn from the SQuAD set in FT_HANDLER_SHARED. Answers agree when text and offsets
are equal and the score differs by at most 1e-4.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("FT_HANDLER_SHARED") or Path(__file__).resolve().parents[2] / "shared")
TOLERANCE = 1e-4

#: Request parameters tried; the short windows make nearly every context a long one.
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "top_k=5": {"top_k": 5},
    "short windows, top_k=3": {"max_seq_len": 96, "doc_stride": 24, "top_k": 3},
    "no-answer allowed": {"handle_impossible_answer": True, "max_seq_len": 96, "doc_stride": 24},
    "tokens, not words": {"align_to_words": False, "top_k": 3},
}


def questions(count: int) -> list[dict[str, str]]:
    """The same draw on both sides."""
    path = SHARED / "data/squad/dev-v1.1.json.gz"
    data = json.loads(gzip.decompress(path.read_bytes()))["data"]
    pairs = [
        {"question": q["question"], "context": p["context"]}
        for article in data
        for p in article["paragraphs"]
        for q in p["qas"]
    ]
    return random.Random(0).sample(pairs, count)


def reference(args: argparse.Namespace) -> None:
    """Ask transformers' pipeline and write down its answers."""
    import torch
    import transformers
    from peft import PeftModel
    from transformers import AutoTokenizer, BertForQuestionAnswering, pipeline

    base = BertForQuestionAnswering.from_pretrained(args.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, args.adapter).merge_and_unload().eval()
    tokenizer = AutoTokenizer.from_pretrained(args.base, model_max_length=512)
    asked = questions(args.count)
    answers: dict[str, list[list[dict[str, Any]]]] = {}
    for name, params in SETTINGS.items():
        ask = pipeline("question-answering", model=model, tokenizer=tokenizer)
        answers[name] = []
        for pair in asked:
            got = ask(question=pair["question"], context=pair["context"], **params)
            answers[name].append(got if isinstance(got, list) else [got])
        print(f"{name}: {len(asked)} questions", file=sys.stderr, flush=True)
    document = {"transformers": transformers.__version__, "torch": torch.__version__}
    args.output.write_text(json.dumps({**document, "answers": answers}))


def compare(args: argparse.Namespace) -> None:
    """Ask our pipeline, request by request in batches, and count what agrees."""
    from ft_handler.config import RawSettings
    from ft_handler.runtime import open_model
    from ft_handler.types import Incoming

    model = open_model(args.model, RawSettings({}))
    theirs = json.loads(args.reference.read_text())
    asked = questions(args.count)
    rows = []
    for name, params in SETTINGS.items():
        ours: list[list[dict[str, Any]]] = []
        for at in range(0, len(asked), 16):
            batch = [Incoming({**pair, **params}) for pair in asked[at : at + 16]]
            for reply in model.pipeline.run(batch)[0]:
                assert reply.status == 200, reply.body
                answer = json.loads(reply.body)
                ours.append(answer if isinstance(answer, list) else [answer])
        rows.append(row(name, ours, theirs["answers"][name], args.show, asked))
        print(rows[-1], flush=True)
    result = {
        "provenance": {
            "transformers": theirs["transformers"],
            "reference_torch": theirs["torch"],
            "questions": args.count,
            "set": "SQuAD v1.1 dev",
            "model": f"{model.info.num_layers} layers of {model.info.hidden_size}, "
            f"{model.info.data_type}, CPU",
            "tolerance": TOLERANCE,
        },
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def row(
    name: str, ours: list[Any], theirs: list[Any], show: bool, asked: list[Any]
) -> dict[str, Any]:
    """How many questions agree: the first answer, its offsets, its score, and all answers."""
    text = offsets = score = everything = 0
    worst = 0.0
    for pair, a, b in zip(asked, ours, theirs, strict=True):
        same = [
            (x["answer"], x["start"], x["end"]) == (y["answer"], y["start"], y["end"])
            and abs(x["score"] - y["score"]) <= TOLERANCE
            for x, y in zip(a, b, strict=False)
        ]
        x, y = a[0], b[0]
        text += x["answer"] == y["answer"]
        offsets += (x["start"], x["end"]) == (y["start"], y["end"])
        difference = abs(x["score"] - y["score"])
        score += difference <= TOLERANCE
        if x["answer"] == y["answer"]:
            worst = max(worst, difference)
        everything += all(same) and len(a) == len(b)
        if show and not (all(same) and len(a) == len(b)):
            print(name, pair["question"], *zip(a, b, strict=False), sep="\n   ")
    return {
        "settings": name,
        "questions": len(ours),
        "answer": text,
        "offsets": offsets,
        "score": score,
        "all_answers": everything,
        "largest_score_difference": float(f"{worst:.2g}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("reference")
    one.add_argument("--base", required=True)
    one.add_argument("--adapter", required=True)
    one.add_argument("--output", type=Path, required=True)
    one.set_defaults(run=reference)
    two = commands.add_parser("compare")
    two.add_argument("--model", type=Path, required=True)
    two.add_argument("--reference", type=Path, required=True)
    two.add_argument("--output", type=Path)
    two.add_argument("--show", action="store_true", help="print what differs")
    two.set_defaults(run=compare)
    for command in (one, two):
        command.add_argument("--count", type=int, default=200)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
