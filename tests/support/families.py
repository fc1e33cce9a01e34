"""Tiny random models of every architecture, with tokenizers of the kind each has; no downloads."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from model_support import ragged
from tiny import WORD_LIST, tiny_vocabulary
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor

from ft_handler import architectures, precisions, tasks
from ft_handler.prepare.fuse import fuse
from ft_handler.tasks.base import AnyTask

LABELS = 3
POSITIONS = 160
INNER = {"distilbert": "hidden_dim"}
#: One task of each class that transformers reads models with: their heads are all there are.
KINDS = {t.auto_class: t for t in map(tasks.get, reversed(tasks.names())) if "For" in t.auto_class}


@dataclass(frozen=True)
class Family:
    """What an architecture's checkpoints have that others' do not.

    tokenizer  a function of this module that writes one
    settings   of the configuration, as published ones have them
    """

    tokenizer: str
    settings: Mapping[str, Any] = field(default_factory=dict)


_ROBERTA = {"layer_norm_eps": 1e-5, "type_vocab_size": 1, "max_position_embeddings": POSITIONS + 2}
FAMILIES = {
    "bert": Family("bert_words"),
    "roberta": Family("byte_pairs", _ROBERTA),
    "xlm-roberta": Family("xlm_pieces", _ROBERTA),
    "camembert": Family("camembert_pieces", _ROBERTA),
    "distilbert": Family("bert_words", {"sinusoidal_pos_embds": False}),
    "electra": Family("bert_words", {"embedding_size": 48}),
    "albert": Family("albert_pieces", {"embedding_size": 24}),
    "mpnet": Family(
        "mpnet_words", {"layer_norm_eps": 1e-5, "max_position_embeddings": POSITIONS + 2}
    ),
}


def random_model(
    model_type: str, task: AnyTask, head_size: int = 32, vocab_size: int = 211, **changes: Any
) -> Any:
    """transformers' model of an architecture for a task, with random weights and two layers."""
    import transformers

    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 2 * head_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        INNER.get(model_type, "intermediate_size"): 3 * head_size,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.15,
        **FAMILIES[model_type].settings,
        **changes,
    }
    if task.labelled:
        values.setdefault("num_labels", LABELS)
    config = transformers.AutoConfig.for_model(model_type, **values)
    model = getattr(transformers, task.auto_class).from_config(config).eval()
    for name, parameter in model.named_parameters():
        # transformers starts biases at 0 and norms at 1, which would hide a swap.
        if name.endswith("bias") or "norm" in name.lower():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        if "relative" in name:  # so large that one at another distance shows
            parameter.data.mul_(10)
    return model


def write_model(folder: Path, model_type: str, mode: str, **changes: Any) -> Any:
    """A checkpoint with its tokenizer in `folder`; returns the model."""
    folder.mkdir(parents=True, exist_ok=True)
    size = globals()[f"write_{FAMILIES[model_type].tokenizer}"](folder, model_type)
    model = random_model(model_type, tasks.get(mode), vocab_size=size, **changes)
    model.save_pretrained(folder)
    return model


def logits_of(model: Any, ids: Tensor, mask: Tensor, types: Tensor) -> list[Tensor]:
    """What transformers answers, in fp32; `types` are left out where a model knows none."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = types
    with torch.no_grad():
        return [part.float() for part in model(**inputs, return_dict=False)]


def fused(model: Any, task: AnyTask, data_type: str) -> Any:
    """The scripted module made of a transformers model."""
    architecture = architectures.get(model.config.model_type)
    architecture.check(model.config)
    return fuse(
        task,
        architecture.head(task),
        architecture.spec(model.config),
        architecture.weights(task, model.config, model.state_dict()),
        precisions.get(data_type),
        task.columns(model.config),
    )


def batch(model: Any, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Random padded ids of any but the pad, mask and types that the model knows."""
    architecture, config = architectures.get(model.config.model_type), model.config
    ids, mask, types = ragged(lengths)
    pad = architecture.pad(config) or 0
    ids = torch.where(ids <= pad, ids + pad + 1, ids)
    return (
        torch.where(mask.bool(), ids, pad),
        mask,
        types if architecture.token_types(config) > 1 else types * 0,
    )


def apart(task: AnyTask, found: Any, wanted: list[Tensor], mask: Tensor) -> float:
    """The largest difference of outputs that count."""
    kept = mask.bool() if task.per_token else slice(None)
    return max(float((a - b)[kept].abs().max()) for a, b in zip(found, wanted, strict=True))


# -- tokenizers ----------------------------------------------------------------------------------


def sentences(count: int = 400) -> list[str]:
    """Random sentences of the tiny vocabulary's words."""
    rng = random.Random(5)
    words = WORD_LIST.split()
    return [" ".join(rng.choices(words, k=rng.randint(3, 12))).capitalize() for _ in range(count)]


def _write(folder: Path, tokenizer: Tokenizer, **settings: Any) -> int:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"model_max_length": POSITIONS, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def _marks(**changes: str) -> dict[str, str]:
    """RoBERTa's special tokens, or others."""
    marks = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>", "unk": "<unk>"}
    marks |= {"pad": "<pad>", "mask": "<mask>", **changes}
    return {f"{name}_token": text for name, text in marks.items()}


def _specials(*texts: str) -> list[AddedToken]:
    return [AddedToken(t, special=True, lstrip=t == "<mask>", normalized=False) for t in texts]


def write_bert_words(folder: Path, model_type: str) -> int:
    """BERT's word pieces, which ELECTRA and DistilBERT have too."""
    from tiny import write_tokenizer

    write_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    named = {"distilbert": "DistilBertTokenizer"}.get(model_type, "BertTokenizer")
    settings = {**json.loads(path.read_text()), "tokenizer_class": named}
    path.write_text(json.dumps({**settings, "model_max_length": POSITIONS}))
    return len(tiny_vocabulary())


@functools.cache
def _byte_pairs() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        special_tokens=_specials("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    return str(tokenizer.to_str())


def write_byte_pairs(folder: Path, model_type: str) -> int:
    """RoBERTa's byte-level BPE."""
    tokenizer = Tokenizer.from_str(_byte_pairs())
    marks = _marks(mask="<mask>")
    return _write(folder, tokenizer, tokenizer_class="RobertaTokenizer", **marks)


@functools.cache
def _pieces(specials: tuple[str, ...], unknown: str) -> tuple[tuple[str, float], ...]:
    """A unigram vocabulary behind its special tokens."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    letters = sorted({c for piece in tiny_vocabulary() for c in piece} | set("ABCDEFGHIJKLMNOPQ"))
    trainer = trainers.UnigramTrainer(
        vocab_size=300, show_progress=False, unk_token=unknown, initial_alphabet=letters,
        special_tokens=[unknown],
    )  # fmt: skip
    tokenizer.train_from_iterator(sentences(), trainer)
    learned = [(t, s) for t, s in json.loads(tokenizer.to_str())["model"]["vocab"] if t != unknown]
    return (*((text, 0.0) for text in specials), *learned)


def _unigram(vocabulary: list[tuple[str, float]], unknown: str) -> Tokenizer:
    number = [text for text, _ in vocabulary].index(unknown)
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=number, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return tokenizer


def write_xlm_pieces(folder: Path, model_type: str) -> int:
    """XLM-RoBERTa's unigrams."""
    specials = ("<s>", "<pad>", "</s>", "<unk>")
    vocabulary = [*_pieces(specials, "<unk>"), ("<mask>", 0.0)]
    tokenizer = _unigram(vocabulary, "<unk>")
    tokenizer.add_special_tokens(_specials(*specials, "<mask>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return _write(folder, tokenizer, tokenizer_class="XLMRobertaTokenizer", **_marks())


def write_camembert_pieces(folder: Path, model_type: str) -> int:
    """CamemBERT's unigrams, whose special tokens stand behind unused ones."""
    specials = ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>")
    vocabulary = [*_pieces(specials, "<unk>"), ("<mask>", 0.0)]
    tokenizer = _unigram(vocabulary, "<unk>")
    tokenizer.add_special_tokens(_specials(*specials, "<mask>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 5), ("</s>", 6)],
    )
    return _write(folder, tokenizer, tokenizer_class="CamembertTokenizer", **_marks())


def write_albert_pieces(folder: Path, model_type: str) -> int:
    """ALBERT's unigrams between BERT's marks, which give the second text another type."""
    specials = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
    tokenizer = _unigram(list(_pieces(specials, "<unk>")), "<unk>")
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace("``", '"'),
            normalizers.Replace("''", '"'),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.add_special_tokens(_specials(*specials))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    marks = _marks(bos="[CLS]", eos="[SEP]", cls="[CLS]", sep="[SEP]", mask="[MASK]")
    return _write(folder, tokenizer, tokenizer_class="AlbertTokenizer", **marks)


def write_mpnet_words(folder: Path, model_type: str) -> int:
    """BERT's word pieces between RoBERTa's marks."""
    specials = ("<s>", "<pad>", "</s>", "[UNK]", "<mask>")
    words = [*specials, *(w for w in tiny_vocabulary() if not w.startswith("["))]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(_specials(*specials))
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return _write(folder, tokenizer, tokenizer_class="MPNetTokenizer", **_marks(unk="[UNK]"))
