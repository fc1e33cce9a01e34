"""Tiny random BERT checkpoints with a tokenizer of their own; nothing downloads."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch

SEQUENCE_CLASSIFICATION = "sequence_classification"
QUESTION_ANSWERING = "question_answering"
TOKEN_CLASSIFICATION = "token_classification"
EMBEDDINGS = "embeddings"
MODES = (SEQUENCE_CLASSIFICATION, QUESTION_ANSWERING)
#: In an order of no meaning; one without a prefix.
TOKEN_LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")

WORD_LIST = """
    the a an of to in is was it and not but with for on at this that film movie story actor plot
    scene music good bad great awful bright dull funny sad warm cold slow fast river mountain
    bridge city harbour museum garden captain engineer painter built opened wrote sailed founded
    who what where when which how many year day tower library station train old new first last
"""


def tiny_vocabulary() -> list[str]:
    """Specials, words, and every character alone and as a continuation: nothing is [UNK]."""
    characters = [*string.ascii_lowercase, *string.digits, *"áéíóúñüçß"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += characters + ["##" + c for c in characters] + list(string.punctuation)
    pieces += [w for w in WORD_LIST.split() if w not in pieces] + [
        "##ing",
        "##ed",
        "##s",
        "##er",
        "##ly",
    ]
    return list(dict.fromkeys(pieces))


def write_tokenizer(folder: Path) -> None:
    """`vocab.txt`, `tokenizer.json` and `tokenizer_config.json` of the tiny vocabulary."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece

    pieces = tiny_vocabulary()
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(WordPiece(vocab=ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(pieces[:5])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": 128,
        **{f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep", "mask")},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_tiny_bert(folder: Path, head: str = "sequence_classification", **settings: Any) -> Path:
    """A random BERT checkpoint whose answers differ from input to input; returns `folder`."""
    from transformers import (
        BertConfig,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertModel,
    )

    classes = {
        SEQUENCE_CLASSIFICATION: BertForSequenceClassification,
        QUESTION_ANSWERING: BertForQuestionAnswering,
        TOKEN_CLASSIFICATION: BertForTokenClassification,
        EMBEDDINGS: BertModel,
    }
    values: dict[str, Any] = {
        "vocab_size": len(tiny_vocabulary()),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 128,
        # Wide enough that logits move with the text; the default leaves them nearly constant.
        "initializer_range": 0.3,
    }
    if head == "sequence_classification":
        values.update(num_labels=3, id2label={0: "negative", 1: "neutral", 2: "positive"})
        values.update(label2id={"negative": 0, "neutral": 1, "positive": 2})
    if head == TOKEN_CLASSIFICATION:
        values.update(num_labels=len(TOKEN_LABELS), id2label=dict(enumerate(TOKEN_LABELS)))
        values.update(label2id={name: i for i, name in enumerate(TOKEN_LABELS)})
    values.update(settings)
    torch.manual_seed(7)
    model = classes[head](BertConfig(**values)).eval()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
