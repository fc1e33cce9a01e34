"""Differential tests against transformers 4.57's pipelines and sentence-transformers.

The question-answering pipeline was removed from transformers 5.3, so the two sides run in
environments of their own and hand over files:

    python benchmarks/differential cases --task question_answering --output cases.json
    # in an environment with transformers 4.57 and peft; for reranking and embeddings with
    # sentence-transformers; without --adapter BASE has the head itself
    python benchmarks/differential reference --base BASE --adapter ADAPTER --cases cases.json \
        --output reference.json
    # in the package's environment; DIR is what `ft-handler trace` wrote
    python benchmarks/differential compare --model DIR --cases cases.json \
        --reference reference.json --output result.json

Any architecture and task can do without a checkpoint: `model` writes a random one, with a tokenizer
of its kind or with one that `benchmarks/tokenization.py train` made.

Texts are drawn from the sets in FT_HANDLER_SHARED and mutated. Answers agree when texts, offsets
and labels are equal and scores differ by at most 1e-4. What differs is counted by class; a class
"other" is a fault on one side.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kinds import TOLERANCE, Told
from texts import ROOT

TASKS = (
    "sequence_classification",
    "question_answering",
    "token_classification",
    "reranking",
    "zero_shot_classification",
    "embeddings",
)
_BATCH = 32


def of_task(name: str) -> Any:
    """The module of a task here: `draw`, `asked`, `judged` and perhaps `refused`."""
    return importlib.import_module(name)


def cases(args: argparse.Namespace) -> None:
    """Draw and mutate; written once, so that both sides get the same."""
    drawn = of_task(args.task).draw(args.count, random.Random(args.seed))
    args.output.write_text(json.dumps({"task": args.task, "cases": drawn}))


def model(args: argparse.Namespace) -> None:
    """A random checkpoint of an architecture, wide enough that answers move with the text."""
    sys.path.insert(0, str(ROOT / "tests/support"))
    import torch
    import transformers
    from families import random_model, write_model

    from ft_handler import architectures, tasks

    torch.manual_seed(args.seed)
    changes = {"initializer_range": 0.3, **getattr(of_task(args.task), "CONFIGURED", {})}
    if args.tokenizer is None:
        write_model(args.output, args.family, args.task, **changes)
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.model_max_length = args.positions
    config = transformers.AutoConfig.for_model(args.family)
    first = architectures.get(args.family).first_position(config)
    changes |= {"vocab_size": len(tokenizer), "max_position_embeddings": first + args.positions}
    random_model(args.family, tasks.get(args.task), **changes).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


def reference(args: argparse.Namespace) -> None:
    """Ask the reference, case by case, and write down its answers and its errors."""
    from reference import tokenizer_of

    document = json.loads(args.cases.read_text())
    ask = of_task(document["task"]).asked(args.base, args.adapter)
    answers: list[Any] = []
    for number, case in enumerate(document["cases"]):
        try:
            got = ask(case)
            answers.append(got if isinstance(got, list) else [got])
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the tokenizers library panics past Exception
            answers.append({"error": type(error).__name__})
        if number % 500 == 499:
            print(number + 1, file=sys.stderr, flush=True)
    written = {
        "versions": versions("transformers", "torch", "tokenizers", "sentence-transformers"),
        "first_token": tokenizer_of(args.base).cls_token,
        "answers": answers,
    }
    args.output.write_text(json.dumps(written, default=float))


def versions(*names: str) -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def compare(args: argparse.Namespace) -> None:
    """Ask our pipeline in batches, and count what agrees and what differs, by class."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from provenance import provenance

    from ft_handler import build_info
    from ft_handler.config import RawSettings, model_yaml
    from ft_handler.runtime import open_model
    from ft_handler.types import Incoming

    document = json.loads(args.cases.read_text())
    theirs = json.loads(args.reference.read_text())
    task, asked = of_task(document["task"]), document["cases"]
    # With the settings beside it: how long texts may be is the checkpoint's to say.
    opened = open_model(args.model, RawSettings.of_model_dir(args.model, model_yaml(args.model)))
    told = Told(opened, theirs["first_token"])
    classes: Counter[str] = Counter()
    for at in range(0, len(asked), _BATCH):
        part = asked[at : at + _BATCH]
        # A batch of their own kind each: what one is must not change another.
        replies, _ = opened.pipeline.run(
            [Incoming({**case["input"], **case["parameters"]}) for case in part]
        )
        answers = theirs["answers"][at : at + _BATCH]
        for case, reply, answer in zip(part, replies, answers, strict=True):
            kind = kind_of(task, case, reply, answer, told)
            classes[kind] += 1
            if classes[kind] <= args.show and kind != "same":
                ours = reply.body.decode()
                print(kind, json.dumps(case), ours, json.dumps(answer), sep="\n  ")
    result = {
        "task": document["task"],
        "architecture": opened.info.architecture,
        "cases": len(asked),
        "tolerance": TOLERANCE,
        "classes": dict(classes.most_common()),
        "reference": theirs["versions"],
    }
    print(json.dumps(result, indent=1))
    if args.output:
        record = {"provenance": provenance(library=build_info()), **result}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


def kind_of(task: Any, case: dict[str, Any], reply: Any, answer: Any, told: Told) -> str:
    """The class of one case."""
    ours = json.loads(reply.body)
    failed = isinstance(answer, dict)
    if reply.status != 200:
        why = getattr(task, "refused", lambda *_: None)(case, ours["message"])
        if why is not None:
            return f"{why}, there an error" if failed else str(why)
        there = answer["error"] if failed else "answered"
        return f"refused here ({reply.status}), there {there}"
    if failed:
        return f"answered here, there {answer['error']}"
    return str(task.judged(case, ours if isinstance(ours, list) else [ours], answer, told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("cases")
    one.add_argument("--task", choices=TASKS, required=True)
    one.add_argument("--count", type=int, default=3000)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--output", type=Path, required=True)
    one.set_defaults(run=cases)
    two = commands.add_parser("reference")
    two.add_argument("--base", required=True)
    two.add_argument("--adapter")
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
    four = commands.add_parser("model")
    four.add_argument("--family", required=True, help="transformers' model type")
    four.add_argument("--task", choices=TASKS, required=True)
    four.add_argument("--tokenizer", help="a checkpoint's name or folder; else one of its kind")
    four.add_argument("--positions", type=int, default=512)
    four.add_argument("--seed", type=int, default=0)
    four.add_argument("--output", type=Path, required=True)
    four.set_defaults(run=model)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
