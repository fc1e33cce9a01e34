"""Development-set scores of the demo models through their traced files' packed entry.

    python benchmarks/accuracy.py                                   # SST-2 and SQuAD, fp32
    python benchmarks/accuracy.py --task sst2 --data-type fp32 bf16 fp16
    python benchmarks/accuracy.py --task squad --limit 500 --device cuda
    python benchmarks/accuracy.py --device cuda --data-type fp16 fp8 --neighbours
    python benchmarks/accuracy.py --device cuda --data-type fp8 --calibrate

--calibrate rounds int8 and fp8 for some 4,000 tokens of the set's texts and measures on as many
others what that costs, as `ft-handler trace --calibrate` does; answers are not looked at.
--neighbours runs every sequence alone and among 63 others, drawn at random: the largest difference
of a logit, and how many labels or answers change.

Reads the sets and transformers' scores from $FT_HANDLER_SHARED (default ../shared). SQuAD is
decoded as the adapter's card says: over all windows of 384 tokens that share 128, the span of at
most 30 context tokens with the largest start + end logit, the first one on a tie. Exits with 1
when a full run is further from transformers' fp32 scores than 0.1 point (fp32), 0.3 (bf16, fp16,
fp8) or 0.5 (int8), or when FP8 keeps less than 99.9 % of their F1, which is MLPerf's line.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import os
import random
import re
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from ft_handler import TraceOptions, load_model, precisions
from ft_handler.engine.base import Engine
from ft_handler.engine.select import engine_for
from ft_handler.files import TRACED_FILE
from ft_handler.prepare.trace import trace
from ft_handler.types import PackedBatch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
BASE = "sentence-transformers/all-MiniLM-L6-v2"
EXAMPLES = {
    "sst2": ("sequence_classification", "sequence_classification"),
    "squad": ("question_answering", "question_answering"),
}
ALLOWED = {"fp32": 0.1, "bf16": 0.3, "fp16": 0.3, "int8": 0.5, "fp8": 0.3}
LEAST_F1_OF_FP8 = 0.999
WINDOW, OVERLAP, LONGEST_ANSWER = 384, 128, 30
TOKENS_A_BATCH = 8192


class Input(NamedTuple):
    """One model input; of SQuAD also where its context tokens stand and what they cover."""

    ids: list[int]
    type_ids: list[int]
    context: slice = slice(0)
    offsets: Sequence[tuple[int, int]] = ()


def by_length(lengths: list[int]) -> Iterator[list[int]]:
    """Indices in groups of similar length under the token budget."""
    group: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and tokens + lengths[i] > TOKENS_A_BATCH:
            yield group
            group, tokens = [], 0
        group.append(i)
        tokens += lengths[i]
    if group:
        yield group


def shuffled(lengths: list[int]) -> Iterator[list[int]]:
    """Indices in random groups of 64."""
    order = random.Random(0).sample(range(len(lengths)), len(lengths))
    yield from (order[i : i + 64] for i in range(0, len(order), 64))


def alone(lengths: list[int]) -> Iterator[list[int]]:
    """Every index by itself."""
    yield from ([i] for i in range(len(lengths)))


Grouping = Callable[[list[int]], Iterator[list[int]]]
Results = list[list[np.ndarray]]


def run(engine: Engine, task: Sst2 | Squad, grouping: Grouping, name: str) -> Results:
    """The handler's engine over all sequences; per sequence one array an output, in order."""
    sequences = task.sequences
    lengths = [len(s.ids) for s in sequences]
    results: Results = [[] for _ in sequences]
    done, shown = 0, time.monotonic()
    for group in grouping(lengths):
        bounds = np.cumsum([0, *(lengths[i] for i in group)]).astype(np.int32)
        ids = np.array([t for i in group for t in sequences[i].ids])
        types = np.array([t for i in group for t in sequences[i].type_ids])
        batch = PackedBatch(ids, types, bounds, max(lengths[i] for i in group))
        out = engine.launch(batch).result()
        for row, i in enumerate(group):
            if task.per_token:
                results[i] = [part[bounds[row] : bounds[row + 1]] for part in out]
            else:
                results[i] = [out[row]]
        done += len(group)
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"  {name}: {done} of {len(sequences)} sequences", file=sys.stderr, flush=True)
    return results


def apart(some: Results, others: Results) -> float:
    """Largest difference of a logit."""
    return max(
        float(np.abs(a - b).max())
        for x, y in zip(some, others, strict=True)
        for a, b in zip(x, y, strict=True)
    )


class Sst2:
    """SST-2 dev: sentences and two labels."""

    per_token = False

    def __init__(self, tokenizer: Tokenizer, shared: Path, limit: int | None) -> None:
        rows = self.rows(shared)[:limit]
        self.truth = [int(label) for label, _ in rows]
        encodings = tokenizer.encode_batch([text for _, text in rows])
        self.sequences = [Input(e.ids, e.type_ids) for e in encodings]
        recorded = (shared / "models/predictions_sst2.jsonl").read_text().splitlines()[:limit]
        self.theirs = [json.loads(line) for line in recorded]

    @staticmethod
    def rows(shared: Path) -> list[list[str]]:
        """Labels and sentences."""
        lines = (shared / "data/sst2/dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
        return [line.split("\t", 1) for line in lines]

    @classmethod
    def texts(cls, shared: Path) -> list[dict[str, str]]:
        """Sentences as requests have them."""
        return [{"text": text} for _, text in cls.rows(shared)]

    def answers(self, results: Results) -> list[int]:
        return [int(r[0].argmax()) for r in results]

    def scores(self, results: Results) -> dict[str, Any]:
        """Accuracy, and predictions that differ from transformers'."""
        found = self.answers(results)
        correct = sum(t == f for t, f in zip(self.truth, found, strict=True))
        return {
            "examples": len(found),
            "accuracy": 100 * correct / len(found),
            "predictions_unlike_transformers_fp32": sum(
                f != t["pred"] for f, t in zip(found, self.theirs, strict=True)
            ),
            "largest_logit_difference": apart(
                results, [[np.array(t["logits"])] for t in self.theirs]
            ),
        }


def normalized(text: str) -> str:
    """SQuAD v1.1's comparison: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(prediction: str, truth: str) -> float:
    """Overlap of words."""
    a, b = normalized(prediction).split(), normalized(truth).split()
    same = sum((collections.Counter(a) & collections.Counter(b)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(a), same / len(b)
    return 2 * precision * recall / (precision + recall)


def best_span(start: np.ndarray, end: np.ndarray) -> tuple[float, int, int]:
    """(score, first, last) of the best span of a window's context tokens."""
    scores = start[:, None] + end[None, :]
    n = len(start)
    distance = np.arange(n)[None, :] - np.arange(n)[:, None]
    scores[(distance < 0) | (distance >= LONGEST_ANSWER)] = -np.inf
    at = int(scores.argmax())  # row by row: the first on a tie
    return float(scores.flat[at]), at // n, at % n


class Squad:
    """SQuAD v1.1 dev: questions, contexts in windows, accepted answers."""

    per_token = True

    def __init__(self, tokenizer: Tokenizer, shared: Path, limit: int | None) -> None:
        self.questions = self.rows(shared)[:limit]
        self.recorded = json.loads((shared / "models/predictions_squad.json").read_text())
        self.sequences: list[Input] = []
        self.owner: list[int] = []
        pairs = [(question.lstrip(), context) for _, question, context, _ in self.questions]
        for i, encoding in enumerate(tokenizer.encode_batch(pairs)):
            own = self.windows(encoding)
            self.sequences += own
            self.owner += [i] * len(own)

    @staticmethod
    def rows(shared: Path) -> list[tuple[str, str, str, list[str]]]:
        """Ids, questions, contexts and accepted answers."""
        with gzip.open(shared / "data/squad/dev-v1.1.json.gz", "rt", encoding="utf-8") as file:
            articles = json.load(file)["data"]
        return [
            (qa["id"], qa["question"], paragraph["context"], [a["text"] for a in qa["answers"]])
            for article in articles
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]

    @classmethod
    def texts(cls, shared: Path) -> list[dict[str, str]]:
        """Questions and contexts as requests have them."""
        return [{"question": q, "context": context} for _, q, context, _ in cls.rows(shared)]

    @staticmethod
    def windows(encoding: Any) -> list[Input]:
        """The context in windows of 384 tokens that share 128, each behind the whole question.

        Cut here, not by the tokenizer: its versions disagree about the last windows.
        """
        ids, types, offsets = encoding.ids, encoding.type_ids, encoding.offsets
        first, last = encoding.token_to_sequence, len(ids) - 1
        begin = next(i for i in range(len(ids)) if first(i) == 1)
        room = WINDOW - begin - 1
        made = []
        for at in range(begin, last, room - OVERLAP):
            until = min(at + room, last)
            made.append(
                Input(
                    [*ids[:begin], *ids[at:until], ids[last]],
                    [*types[:begin], *types[at:until], types[last]],
                    slice(begin, begin + until - at),
                    offsets[at:until],
                )
            )
            if until == last:
                break
        return made

    def answers(self, results: Results) -> list[str]:
        best: list[tuple[float, str]] = [(-np.inf, "")] * len(self.questions)
        for window, i, (start, end) in zip(self.sequences, self.owner, results, strict=True):
            score, first, last = best_span(start[window.context], end[window.context])
            if score > best[i][0]:
                text = self.questions[i][2][window.offsets[first][0] : window.offsets[last][1]]
                best[i] = (score, text)
        return [text for _, text in best]

    def scores(self, results: Results) -> dict[str, Any]:
        """Exact match and F1, and answers that differ from transformers'."""
        answers = self.answers(results)
        pairs = list(zip(answers, self.questions, strict=True))
        exact = [max(normalized(a) == normalized(t) for t in q[3]) for a, q in pairs]
        overlap = [max(f1(a, t) for t in q[3]) for a, q in pairs]
        return {
            "examples": len(answers),
            "windows": len(self.sequences),
            "em": 100 * float(np.mean(exact)),
            "f1": 100 * float(np.mean(overlap)),
            "answers_unlike_transformers_fp32": sum(a != self.recorded[q[0]] for a, q in pairs),
        }


TASKS: dict[str, type[Sst2] | type[Squad]] = {"sst2": Sst2, "squad": Squad}


def neighbours(engine: Engine, task: Sst2 | Squad, name: str) -> dict[str, Any]:
    """Every sequence alone against the same sequence among 63 others."""
    single = run(engine, task, alone, f"{name}, alone")
    among = run(engine, task, shuffled, f"{name}, among others")
    changed = zip(task.answers(single), task.answers(among), strict=True)
    return {
        "alone_or_among_63": {
            "sequences": len(task.sequences),
            "largest_logit_difference": apart(single, among),
            "answers_that_change": sum(a != b for a, b in changed),
        }
    }


def recorded_scores(shared: Path) -> dict[str, dict[str, float]]:
    """transformers' fp32 scores."""
    metrics = json.loads((shared / "models/metrics.json").read_text())
    return {
        "sst2": {"accuracy": metrics["sst2"]["accuracy_fp32"]},
        "squad": {k: metrics["squad"]["fp32"][k] for k in ("em", "f1")},
    }


def too_far(data_type: str, row: dict[str, Any], theirs: dict[str, float]) -> bool:
    """Whether a full run's scores are further from transformers' than the data type may be."""
    apart = any(abs(row[name] - score) > ALLOWED[data_type] for name, score in theirs.items())
    return apart or (
        data_type == "fp8" and "f1" in theirs and row["f1"] < LEAST_F1_OF_FP8 * theirs["f1"]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--data-type", nargs="+", choices=list(ALLOWED), default=["fp32"])
    parser.add_argument("--limit", type=int, help="first examples only; scores are not judged")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--neighbours", action="store_true", help="alone against among 63 others")
    parser.add_argument("--calibrate", action="store_true", help="int8 and fp8: on the set's texts")
    parser.add_argument("--tolerable-change", type=float, help="as ft-handler trace has it")
    parser.add_argument("--model", default=BASE, help="base checkpoint, a hub name or a folder")
    parser.add_argument("--json", type=Path, help="write the results here, with provenance")
    arguments = parser.parse_args()
    shared = Path(os.environ.get("FT_HANDLER_SHARED") or ROOT.parent / "shared")
    if not (shared / "data").is_dir():
        print(f"error: no development data in {shared} (FT_HANDLER_SHARED)", file=sys.stderr)
        return 2
    wanted = recorded_scores(shared)
    rows, failed = [], False
    for task in arguments.task:
        mode, example = EXAMPLES[task]
        for data_type in arguments.data_type:
            quantized = data_type in precisions.quantized_names()
            with tempfile.TemporaryDirectory() as folder:
                trace(
                    TraceOptions(
                        mode=mode,
                        model_name_or_path=arguments.model,
                        adapter=ROOT / "examples" / example / "adapter",
                        output=Path(folder),
                        data_type=data_type,
                        calibration=TASKS[task].texts(shared)
                        if quantized and arguments.calibrate
                        else None,
                        tolerable_change=arguments.tolerable_change if quantized else None,
                    )
                )
                model = load_model(Path(folder) / TRACED_FILE, arguments.device)
                engine = engine_for(model, torch.device(arguments.device))
                engine.warm_up()
                tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
            begun = time.perf_counter()
            data = TASKS[task](tokenizer, shared, arguments.limit)
            scores = data.scores(run(engine, data, by_length, task))
            if arguments.neighbours:
                scores |= neighbours(engine, data, task)
            row = {"task": task, "data_type": data_type, "device": arguments.device, **scores}
            row["seconds"] = round(time.perf_counter() - begun, 1)
            rows.append(row)
            apart = {name: row[name] - value for name, value in wanted[task].items()}
            judged = arguments.limit is None
            bad = judged and too_far(data_type, row, wanted[task])
            failed |= bad
            shown = ", ".join(f"{n} {row[n]:.3f} ({d:+.3f})" for n, d in apart.items())
            unlike = next(v for k, v in row.items() if "_unlike_" in k)
            verdict = "" if not judged else ": TOO FAR" if bad else ": as transformers"
            print(
                f"{task} {data_type} on {arguments.device}: {shown}, {unlike} of "
                f"{row['examples']} answers differ, {row['seconds']} s{verdict}",
                flush=True,
            )
            if arguments.neighbours:
                print(f"  {row['alone_or_among_63']}", flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"provenance": provenance(), "rows": rows}, indent=1)
        arguments.json.write_text(text + "\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
