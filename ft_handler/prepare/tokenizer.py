"""The tokenizer's files of a traced folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer, Lowercase, Sequence

from ft_handler.errors import ConfigError, ModelError
from ft_handler.files import TOKENIZER_FILE, TOKENIZER_SETTINGS_FILES, VOCABULARY_FILE
from ft_handler.prepare import hf, hub
from ft_handler.prepare.adapters import read_json_object
from ft_handler.prepare.options import TraceOptions
from ft_handler.text.template import Template
from ft_handler.text.tokenizer import of_words

#: What tokenizers of one vocabulary disagree about: case, accents, widths, ligatures, marks and
#: blanks of every kind, Chinese characters, long words, special tokens inside a text.
HARD_TEXTS = (
    "The Film's actors don't RE-ENTER; e.g. 1,234.56% of £5 & €10 (a_b@c.de)...",
    "Ünïcödé naïve CAFÉ cafe\u0301 Straße STRASSE İstanbul ıI ŒUVRE ǅ",
    "Ａｂｃ ﬁlm ①②③ ½ x² ℃ Ⅻ ｶﾞ",
    "  two  blanks\ttab\nline\r\nfeed\u00a0no-break\u3000wide\u2028separator ",
    "zero\u200bwidth soft\u00adhyphen \ufeffmark \ufffd replaced \u0007 bell",
    "中文字符 と日本語 한국어 ไทย हिन्दी עברית العربية",
    "hello [MASK] film, a[SEP]b [CLS] <s> <mask> [unused1]",
    "emoji 😀 👩\u200d🚀 🇩🇪 — “quotes” ‘single’ … • § ¿",
    "UNAFFABLE " + "x" * 120 + " pneumonoultramicroscopicsilicovolcanoconiosis",
)
_BERT_FLAGS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
#: Classes that take tokenizer.json as it is, whatever their settings say of case.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True)
class WrittenTokenizer:
    """What the traced file should know of its tokenizer.

    text        of its tokenizer.json, to be carried inside
    lower_case  whether it lower-cases
    longest     most tokens that its configuration lets a text have; None where it says nothing
    notes       what it says that has no effect here
    doubts      what should be known before it is trusted
    """

    text: str
    lower_case: bool
    longest: int | None
    notes: tuple[str, ...]
    doubts: tuple[str, ...]


def write_tokenizer(
    options: TraceOptions, output: Path, vocab_size: int, lower_first: bool = False
) -> WrittenTokenizer:
    """Write the tokenizer's files, without truncation or padding.

    lower_first  put lower-casing before whatever the tokenizer does to texts itself

    Truncation belongs to the handler's settings: a tokenizer.json that truncates would do it
    silently. A checkpoint's own tokenizer.json is served as it is, under the settings beside it;
    what transformers makes of it is compared. Raises ModelError in words.
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
        except ImportError as error:
            # What slow tokenizers are made of; to install it would lead to the refusal below.
            named = _settings(source.file(TOKENIZER_SETTINGS_FILES[0], options.cache_dir))
            raise ModelError(
                f"tokenizer {wanted}: {named.get('tokenizer_class', 'its class')} cannot be read "
                f"here, and only one with a fast form can be served: {hf.first_line(error)}"
            ) from error
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ModelError(f"tokenizer {wanted}: {hf.first_line(error)}") from error
        backend = getattr(tokenizer, "backend_tokenizer", None)
        slow = f"{type(tokenizer).__name__} has no fast form"
        names = [TOKENIZER_FILE, *dict(tokenizer.vocab_files_names).values()]
        files = {name: source.file(name, options.cache_dir) for name in dict.fromkeys(names)}
        if not any(files.values()):
            raise ModelError(
                f"tokenizer {wanted}: none of its files is there ({', '.join(files)}); "
                "--tokenizer_name names another place"
            )
        if backend is None and files[TOKENIZER_FILE] is None:
            raise ModelError(f"tokenizer {wanted}: {slow}, and no {TOKENIZER_FILE} brings one")
        settings = _settings(source.file(TOKENIZER_SETTINGS_FILES[0], options.cache_dir))
        if settings.get("truncation_side", "right") != "right":
            raise ModelError(_LEFT.format(wanted, TOKENIZER_SETTINGS_FILES[0]))
        longest = int(tokenizer.model_max_length)
        tokenizer.save_pretrained(str(output))
    notes, doubts = [], []
    own = files[TOKENIZER_FILE]
    if backend is None:
        assert own is not None
        made = _read(own, wanted)
        doubts.append(f"tokenizer {wanted}: {slow}; its {TOKENIZER_FILE} is served")
    else:
        made = Tokenizer.from_str(backend.to_str())
    served = made
    if own is not None:
        served = _own(own, wanted, settings, made, options.do_lower_case)
        if served.truncation and served.truncation.get("direction", "right").lower() != "right":
            raise ModelError(_LEFT.format(wanted, TOKENIZER_FILE))
        if served.truncation:
            notes.append(
                f"tokenizer {wanted}: its {TOKENIZER_FILE} cuts texts at "
                f"{served.truncation['max_length']} tokens, which transformers does not obey; "
                "max_length in model-config.yaml decides"
            )
    for one in (made, served):
        one.no_truncation()
        one.no_padding()
    if not alike(made, served):
        doubts.append(
            f"tokenizer {wanted}: transformers {transformers.__version__} reads texts otherwise "
            f"than its {TOKENIZER_FILE} says; the file is served"
        )
    if lower_first:
        _lower_first(served)
    described = json.loads(served.to_str())
    normalizer = described.get("normalizer") or {}
    if options.do_lower_case is not None and (
        normalizer.get("lowercase") is not options.do_lower_case
    ):
        raise ModelError(f"tokenizer {wanted}: do_lower_case has nothing to set in it")
    lower_case = "lowercase" in str(served.normalizer).lower()
    if isinstance(served.normalizer, BertNormalizer):
        lower_case = bool(served.normalizer.lowercase)
    text = json.dumps(described, ensure_ascii=False, indent=2) + "\n"
    (output / TOKENIZER_FILE).write_text(text, encoding="utf-8")
    vocabulary = served.get_vocab(with_added_tokens=True)
    doubts += _fits(vocabulary, vocab_size, wanted)
    try:
        Template(served, token_types=2)
    except ConfigError as error:
        raise ModelError(f"tokenizer {wanted}: {error}") from None
    _write_words(served, output, lower_case)
    return WrittenTokenizer(
        text, lower_case, longest if longest < 10**9 else None, tuple(notes), tuple(doubts)
    )


_LEFT = (
    "tokenizer {}: truncation_side 'left' in its {} is not served: long texts lose their end, "
    "never their beginning; set it to 'right' there to accept that"
)


def _settings(path: Path | None) -> Mapping[str, Any]:
    return {} if path is None else read_json_object(path)


def _read(path: Path, wanted: str) -> Tokenizer:
    """A tokenizer.json; raises ModelError in words."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"tokenizer {wanted}: {hf.first_line(error)}") from error


def _own(
    path: Path,
    wanted: str,
    settings: Mapping[str, Any],
    made: Tokenizer,
    lower_case: bool | None,
) -> Tokenizer:
    """The checkpoint's own tokenizer.json under the settings beside it.

    made        what transformers makes of it
    lower_case  the user's wish
    """
    own = _read(path, wanted)
    normalizer = own.normalizer
    if isinstance(normalizer, BertNormalizer):
        if settings.get("tokenizer_class") not in _PLAIN_CLASSES:
            for name, flag in _BERT_FLAGS.items():
                if name in settings:
                    setattr(normalizer, flag, settings[name])
        if lower_case is not None:
            normalizer.lowercase = lower_case
        own.normalizer = normalizer
    # The settings beside the file may name more tokens.
    for number, token in sorted(made.get_added_tokens_decoder().items()):
        if own.token_to_id(token.content) is None:
            (own.add_special_tokens if token.special else own.add_tokens)([token])
        if own.token_to_id(token.content) != number:
            raise ModelError(
                f"tokenizer {wanted}: its {TOKENIZER_FILE} gives an added token the number "
                f"{own.token_to_id(token.content)}, {TOKENIZER_SETTINGS_FILES[0]} says {number}"
            )
    return own


def _lower_first(tokenizer: Tokenizer) -> None:
    own = tokenizer.normalizer
    if isinstance(own, BertNormalizer) and own.lowercase:
        return
    tokenizer.normalizer = Sequence([Lowercase()] if own is None else [Lowercase(), own])


def alike(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give the same tokens and types for every hard text and pair."""
    pairs = zip(HARD_TEXTS, (*HARD_TEXTS[1:], "a"), strict=True)
    return all(
        a.ids == b.ids and a.type_ids == b.type_ids
        for text, pair in pairs
        for a, b in (
            (one.encode(text), other.encode(text)),
            (one.encode(text, pair), other.encode(text, pair)),
        )
    )


def _fits(vocabulary: Mapping[str, int], vocab_size: int, wanted: str) -> list[str]:
    """Doubts about a vocabulary beside the model's; raises ModelError for another model's."""
    largest = max(vocabulary.values(), default=-1)
    if largest >= vocab_size:
        raise ModelError(
            f"tokenizer {wanted}: has token {largest}, the model's vocabulary ends at "
            f"{vocab_size - 1}; it belongs to another model"
        )
    said = f"tokenizer {wanted}: has {largest + 1} tokens, the model's vocabulary {vocab_size}"
    # Vocabularies are padded to round sizes, never to twice their size.
    if largest + 1 < vocab_size / 2:
        raise ModelError(f"{said}; it belongs to another model")
    if vocab_size - largest - 1 >= max(128, vocab_size // 100):
        return [f"{said}: it may belong to another model"]
    return []


def _write_words(served: Tokenizer, output: Path, lower_case: bool) -> None:
    """Write vocab.txt where it says all there is to say of the tokenizer.

    A worker reads it where an archive holds no tokenizer.json.
    """
    path = output / VOCABULARY_FILE
    path.unlink(missing_ok=True)
    if json.loads(served.to_str())["model"].get("type") != "WordPiece":
        return
    vocabulary = served.get_vocab(with_added_tokens=True)
    if not {"[CLS]", "[SEP]"} <= vocabulary.keys():  # another family's marks, such as MPNet's
        return
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    if any("\n" in word or word != word.strip() for word in words):
        return
    path.write_text("\n".join(words) + "\n", encoding="utf-8")
    if not alike(served, of_words(path, lower_case)):
        path.unlink()
