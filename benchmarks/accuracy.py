"""Development-set scores of the demo models through their traced files' packed entry.

    python benchmarks/accuracy.py                                   # SST-2 and SQuAD, fp32
    python benchmarks/accuracy.py --task sst2 --data-type fp32 bf16 fp16
    python benchmarks/accuracy.py --task squad --limit 500 --device cuda

Reads the sets and transformers' scores from $FT_HANDLER_SHARED (default ../shared). SQuAD is
decoded as the adapter's card says: over all windows of 384 tokens that share 128, the span of at
most 30 context tokens with the largest start + end logit, the first one on a tie. Exits with 1
when a full run is further from transformers' fp32 scores than 0.1 point (fp32) or 0.3 (bf16, fp16).
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import os
import re
import string
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from ft_handler import TraceOptions, load_model
from ft_handler.trace import TRACED_FILE, trace

sys.path.insert(0, str(Path(__file__).resolve().parent))
from provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
BASE = "sentence-transformers/all-MiniLM-L6-v2"
EXAMPLES = {
    "sst2": ("sequence_classification", "sequence_classification"),
    "squad": ("question_answering", "question_answering"),
}
ALLOWED = {"fp32": 0.1, "bf16": 0.3, "fp16": 0.3}
WINDOW, OVERLAP, LONGEST_ANSWER = 384, 128, 30
TOKENS_A_BATCH = 8192


def batches(lengths: list[int]) -> Iterator[list[int]]:
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


def run(module: Any, encodings: list[Any], device: str, name: str) -> list[list[np.ndarray]]:
    """The packed entry over all encodings; per output, one array an encoding, in order."""
    lengths = [len(e.ids) for e in encodings]
    results: list[Any] = [None] * len(encodings)
    done, shown = 0, time.monotonic()
    for group in batches(lengths):
        bounds = np.cumsum([0, *(lengths[i] for i in group)]).astype(np.int32)
        ids = torch.tensor([t for i in group for t in encodings[i].ids], device=device)
        types = torch.tensor([t for i in group for t in encodings[i].type_ids], device=device)
        longest = max(lengths[i] for i in group)
        cu_seqlens = torch.from_numpy(bounds).to(device)
        with torch.inference_mode():
            out = [part.cpu().numpy() for part in module.packed(ids, types, cu_seqlens, longest)]
        for row, i in enumerate(group):
            if len(out) == 1:
                results[i] = [out[0][row]]
            else:
                results[i] = [part[bounds[row] : bounds[row + 1]] for part in out]
        done += len(group)
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"  {name}: {done} of {len(encodings)} sequences", file=sys.stderr, flush=True)
    return results


def sst2(module: Any, tokenizer: Tokenizer, shared: Path, limit: int | None, device: str) -> Any:
    """Accuracy on SST-2 dev, and predictions that differ from transformers'."""
    lines = (shared / "data/sst2/dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split("\t", 1) for line in lines][:limit]
    results = run(module, tokenizer.encode_batch([t for _, t in rows]), device, "sst2")
    found = [int(r[0].argmax()) for r in results]
    recorded = (shared / "models/predictions_sst2.jsonl").read_text().splitlines()[:limit]
    theirs = [json.loads(line) for line in recorded]
    worst = max(
        float(np.abs(r[0] - np.array(t["logits"])).max())
        for r, t in zip(results, theirs, strict=True)
    )
    correct = sum(int(label) == f for (label, _), f in zip(rows, found, strict=True))
    return {
        "examples": len(rows),
        "accuracy": 100 * correct / len(rows),
        "predictions_unlike_transformers_fp32": sum(
            f != t["pred"] for f, t in zip(found, theirs, strict=True)
        ),
        "largest_logit_difference": worst,
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


def best_span(start: np.ndarray, end: np.ndarray, context: np.ndarray) -> tuple[float, int, int]:
    """(score, first, last) of the best span whose tokens are in the context."""
    a = np.where(context, start, -np.inf)[:, None]
    b = np.where(context, end, -np.inf)[None, :]
    scores = a + b
    n = len(start)
    apart = np.arange(n)[None, :] - np.arange(n)[:, None]
    scores[(apart < 0) | (apart >= LONGEST_ANSWER)] = -np.inf
    at = int(scores.argmax())  # row by row: the first on a tie
    return float(scores.flat[at]), at // n, at % n


def squad(module: Any, tokenizer: Tokenizer, shared: Path, limit: int | None, device: str) -> Any:
    """Exact match and F1 on SQuAD v1.1 dev, and answers that differ from transformers'."""
    with gzip.open(shared / "data/squad/dev-v1.1.json.gz", "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"]
    questions = [
        (qa["id"], qa["question"], paragraph["context"], [a["text"] for a in qa["answers"]])
        for article in articles
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ][:limit]
    tokenizer.enable_truncation(WINDOW, stride=OVERLAP, strategy="only_second")
    windows, owner = [], []
    for i, (_, question, context, _) in enumerate(questions):
        encoding = tokenizer.encode(question.lstrip(), context)
        for window in (encoding, *encoding.overflowing):
            windows.append(window)
            owner.append(i)
    results = run(module, windows, device, "squad")
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(questions)
    for window, i, (start, end) in zip(windows, owner, results, strict=True):
        context = np.array([s == 1 for s in window.sequence_ids])
        score, first, last = best_span(start, end, context)
        if score > best[i][0]:
            text = questions[i][2][window.offsets[first][0] : window.offsets[last][1]]
            best[i] = (score, text)
    recorded = json.loads((shared / "models/predictions_squad.json").read_text())
    answers = [text for _, text in best]
    truths = [q[3] for q in questions]
    exact = [
        max(normalized(a) == normalized(t) for t in ts)
        for a, ts in zip(answers, truths, strict=True)
    ]
    overlap = [max(f1(a, t) for t in ts) for a, ts in zip(answers, truths, strict=True)]
    return {
        "examples": len(questions),
        "windows": len(windows),
        "em": 100 * float(np.mean(exact)),
        "f1": 100 * float(np.mean(overlap)),
        "answers_unlike_transformers_fp32": sum(
            a != recorded[q[0]] for a, q in zip(answers, questions, strict=True)
        ),
    }


TASKS = {"sst2": sst2, "squad": squad}


def recorded_scores(shared: Path) -> dict[str, dict[str, float]]:
    """transformers' fp32 scores."""
    metrics = json.loads((shared / "models/metrics.json").read_text())
    return {
        "sst2": {"accuracy": metrics["sst2"]["accuracy_fp32"]},
        "squad": {k: metrics["squad"]["fp32"][k] for k in ("em", "f1")},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--data-type", nargs="+", choices=list(ALLOWED), default=["fp32"])
    parser.add_argument("--limit", type=int, help="first examples only; scores are not judged")
    parser.add_argument("--device", default="cpu")
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
            with tempfile.TemporaryDirectory() as folder:
                trace(
                    TraceOptions(
                        mode=mode,
                        model_name_or_path=arguments.model,
                        adapter=ROOT / "examples" / example / "adapter",
                        output=Path(folder),
                        data_type=data_type,
                    )
                )
                module = load_model(Path(folder) / TRACED_FILE, arguments.device).module
                tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
                begun = time.perf_counter()
                scores = TASKS[task](module, tokenizer, shared, arguments.limit, arguments.device)
            row = {"task": task, "data_type": data_type, "device": arguments.device, **scores}
            row["seconds"] = round(time.perf_counter() - begun, 1)
            rows.append(row)
            apart = {name: row[name] - value for name, value in wanted[task].items()}
            judged = arguments.limit is None
            bad = judged and any(abs(d) > ALLOWED[data_type] for d in apart.values())
            failed |= bad
            shown = ", ".join(f"{n} {row[n]:.3f} ({d:+.3f})" for n, d in apart.items())
            unlike = next(v for k, v in row.items() if "_unlike_" in k)
            verdict = "" if not judged else ": TOO FAR" if bad else ": as transformers"
            print(
                f"{task} {data_type} on {arguments.device}: {shown}, {unlike} of "
                f"{row['examples']} answers differ, {row['seconds']} s{verdict}",
                flush=True,
            )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"provenance": provenance(), "rows": rows}, indent=1)
        arguments.json.write_text(text + "\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
