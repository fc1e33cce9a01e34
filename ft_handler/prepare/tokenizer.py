"""The tokenizer's files of a traced folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ft_handler.errors import ModelError
from ft_handler.files import TOKENIZER_FILE, VOCABULARY_FILE
from ft_handler.prepare import hf, hub
from ft_handler.prepare.options import TraceOptions


@dataclass(frozen=True)
class WrittenTokenizer:
    """What the traced file should know of its tokenizer.

    text        of its tokenizer.json, to be carried inside
    lower_case  whether it lower-cases
    """

    text: str
    lower_case: bool


def write_tokenizer(
    options: TraceOptions, output: Path, vocab_size: int, longest: int
) -> WrittenTokenizer:
    """Write the tokenizer's files, without truncation or padding.

    Truncation belongs to the handler's settings: a tokenizer.json that truncates would do it
    silently.
    """
    transformers = hf.import_transformers()
    wanted = options.tokenizer_name or options.model_name_or_path
    source = hub.resolve(wanted, options.cache_dir)
    extra = {} if options.do_lower_case is None else {"do_lower_case": options.do_lower_case}
    with hf.quiet_transformers():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                source.name,
                cache_dir=options.cache_dir,
                local_files_only=source.local_only,
                use_fast=True,
                **extra,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"tokenizer {wanted}: {hf.first_line(error)}") from error
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(f"tokenizer {wanted}: has no fast form")
        backend.no_truncation()
        backend.no_padding()
        tokenizer.model_max_length = longest
        tokenizer.save_pretrained(str(output))
    backend.no_truncation()
    backend.no_padding()
    described = json.loads(backend.to_str())
    normalizer = described.get("normalizer") or {}
    if options.do_lower_case is not None:
        if "lowercase" not in normalizer:
            raise ModelError(f"tokenizer {wanted}: do_lower_case has nothing to set in it")
        normalizer["lowercase"] = options.do_lower_case
    text = json.dumps(described, ensure_ascii=False, indent=2) + "\n"
    (output / TOKENIZER_FILE).write_text(text, encoding="utf-8")
    vocabulary = backend.get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values(), default=-1)
    if largest >= vocab_size:
        raise ModelError(
            f"tokenizer {wanted}: has token {largest}, the model's vocabulary ends at "
            f"{vocab_size - 1}; it belongs to another model"
        )
    if described["model"].get("type") == "WordPiece":
        words = sorted(vocabulary, key=vocabulary.__getitem__)
        (output / VOCABULARY_FILE).write_text("\n".join(words) + "\n", encoding="utf-8")
    return WrittenTokenizer(text, bool(normalizer.get("lowercase", False)))
