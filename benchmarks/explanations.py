"""How well explanations by occlusion agree with integrated gradients of transformers' model.

    # DIR is what `ft-handler trace --adapter ADAPTER` wrote of the checkpoint BASE
    python benchmarks/explanations.py --model DIR --base BASE --adapter ADAPTER --output out.json

Sentences are drawn from the SST-2 set in FT_HANDLER_SHARED. Both explain the logit of the predicted
label. The gradients are integrated over the embeddings' output, from a text of pads as TorchServe's
published handler does, and from one of masks, which is what occlusion puts in the place of words;
a word has the sum over its tokens. Agreement is Spearman's correlation of a sentence's words.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance
from tokenizers import Tokenizer

from ft_handler.predictor import Predictor
from ft_handler.prepare.checkpoint import load_checkpoint
from ft_handler.verify.data import Layout, read_examples
from ft_handler.verify.labels import correlations

SHARED = Path(os.environ.get("FT_HANDLER_SHARED") or Path(__file__).resolve().parents[2] / "shared")
#: A correlation of fewer words says nothing.
LEAST_WORDS = 5
BATCH = 25


def integrated_gradients(
    model: Any, ids: torch.Tensor, baseline: torch.Tensor, label: int, steps: int
) -> tuple[torch.Tensor, float]:
    """Attributions of the tokens `[tokens]`, and by how much their sum misses the difference."""
    layer = model.base_model.embeddings
    with torch.no_grad():
        begin, end = layer(input_ids=baseline), layer(input_ids=ids)

    def logits(embedded: torch.Tensor) -> torch.Tensor:
        hook = layer.register_forward_hook(lambda *_: embedded)
        try:
            batch = ids.expand(len(embedded), -1)
            out: torch.Tensor = model(input_ids=batch).logits[:, label]
        finally:
            hook.remove()
        return out

    total = torch.zeros_like(end[0])
    midpoints = (torch.arange(steps) + 0.5) / steps
    for part in midpoints.split(BATCH):
        embedded = (begin + part[:, None, None] * (end - begin)).requires_grad_()
        (gradient,) = torch.autograd.grad(logits(embedded).sum(), embedded)
        total += gradient.sum(0)
    attributions = (total / steps * (end - begin)[0]).sum(-1)
    with torch.no_grad():
        ends = logits(torch.cat((begin, end)))
    return attributions, float(attributions.sum() - (ends[1] - ends[0]))


def by_word(attributions: torch.Tensor, encoding: Any, offsets: list[list[int]]) -> list[float]:
    """Sums over the tokens of each word, in the order of the words' first characters."""
    sums = dict.fromkeys((begin for begin, _ in offsets), 0.0)
    for value, (begin, _), special in zip(
        attributions.tolist(), encoding.offsets, encoding.special_tokens_mask, strict=True
    ):
        if not special:
            sums[max(b for b in sums if b <= begin)] += value
    return list(sums.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    origin = provenance()
    examples = read_examples(SHARED / "data/sst2/dev.tsv", Layout())
    texts = [example.texts["text"] for example in random.Random(0).sample(examples, args.count * 2)]
    ours = Predictor.load(args.model, device="cpu")
    model = load_checkpoint(ours.info.mode, args.base, adapter=args.adapter).model
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    names = list(ours.info.labels.values())
    rows: dict[str, list[tuple[float, float, bool, float]]] = {"[PAD]": [], "[MASK]": []}
    deltas = []
    for text in texts:
        answer: Any = ours.explain(text)
        if len(answer["words"]) < LEAST_WORDS or len(deltas) == args.count:
            continue
        deltas.append(answer["delta"])
        encoding = tokenizer.encode(text)
        ids = torch.tensor([encoding.ids])
        special = torch.tensor([encoding.special_tokens_mask]).bool()
        for name, found in rows.items():
            baseline = torch.where(special, ids, tokenizer.token_to_id(name))
            label = names.index(answer["label"])
            tokens, missed = integrated_gradients(model, ids, baseline, label, args.steps)
            words = by_word(tokens, encoding, answer["offsets"])
            both = correlations(answer["importances"], words)
            best = int(np.argmax(answer["importances"])) == int(np.argmax(words))
            found.append((both["spearman"] / 100, both["pearson"] / 100, best, missed))
    result = {
        "provenance": origin,
        "rows": [
            {
                "model": ours.info.checkpoint,
                "sentences": len(deltas),
                "baseline": name,
                "steps": args.steps,
                "spearman_mean": float(np.mean([r[0] for r in found])),
                "spearman_median": float(np.median([r[0] for r in found])),
                "spearman_worst": float(min(r[0] for r in found)),
                "pearson_mean": float(np.mean([r[1] for r in found])),
                "same_most_important_word": float(np.mean([r[2] for r in found])),
                "gradients_delta_largest": float(max(abs(r[3]) for r in found)),
                "occlusion_delta_mean": float(np.mean(np.abs(deltas))),
            }
            for name, found in rows.items()
        ],
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
