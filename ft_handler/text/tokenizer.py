"""Loads an archive's tokenizer, without truncation or padding of its own."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.normalizers import BertNormalizer

from ft_handler.errors import ConfigError
from ft_handler.files import TOKENIZER_FILE, VOCABULARY_FILE


def load_tokenizer(
    folder: Path | None,
    tokenizer_file: str = TOKENIZER_FILE,
    do_lower_case: bool | None = None,
    *,
    carried: str | None = None,
    vocabulary_lower: bool = True,
) -> Tokenizer:
    """The tokenizer of a model, without truncation or padding of its own.

    Reads the folder's `tokenizer_file`, else its `vocab.txt`, else what the traced file carries.

    carried           text of the traced file's own tokenizer.json
    vocabulary_lower  whether words of a `vocab.txt` are lower-cased, where `do_lower_case` is None

    Raises ConfigError when there is none, when `do_lower_case` cannot be honoured, or for an added
    token that normalizes to nothing.
    """
    places = [] if folder is None else [folder / tokenizer_file, folder / VOCABULARY_FILE]
    found = next((path for path in places if path.is_file()), None)
    if found is not None and found.name == VOCABULARY_FILE and found != places[0]:
        lower = vocabulary_lower if do_lower_case is None else do_lower_case
        return _plain(of_words(found, lower), str(found))
    origin = "the traced file's tokenizer" if found is None else str(found)
    text = carried if found is None else found.read_text(encoding="utf-8")
    if text is None:
        raise ConfigError(
            "the traced file carries no tokenizer, and there is none beside it; tried "
            + (", ".join(map(str, places)) or "no folder")
        )
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{origin} is not a tokenizer: {error}") from None
    if do_lower_case is not None:
        _set_lower_case(tokenizer, do_lower_case, origin)
    return _plain(tokenizer, origin)


def of_words(path: Path, lower_case: bool) -> Tokenizer:
    """BERT's tokenizer over the words of a `vocab.txt`."""
    legacy = BertWordPieceTokenizer.from_file(str(path), lowercase=lower_case)
    return Tokenizer.from_str(legacy.to_str())


def check_tokens(tokenizer: Tokenizer) -> None:
    """Raise ConfigError for an added token that normalizes to nothing.

    The tokenizers library finds one at every place of every text, and does not end.
    """
    for number, token in tokenizer.get_added_tokens_decoder().items():
        sought = token.content
        if token.normalized and tokenizer.normalizer is not None:
            sought = tokenizer.normalizer.normalize_str(sought)
        if not sought:
            raise ConfigError(
                f"added token {number} is empty, or normalizes to nothing, and would be found "
                "without end in every text: take it out, or set its 'normalized' to false"
            )


def lower_cases(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer lower-cases texts."""
    normalizer = tokenizer.normalizer
    if isinstance(normalizer, BertNormalizer):
        return bool(normalizer.lowercase)
    return "lowercase" in str(normalizer).lower()


def _plain(tokenizer: Tokenizer, origin: str) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        check_tokens(tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    return tokenizer


def _set_lower_case(tokenizer: Tokenizer, wanted: bool, origin: str) -> None:
    normalizer = tokenizer.normalizer
    if isinstance(normalizer, BertNormalizer):
        normalizer.lowercase = wanted
        tokenizer.normalizer = normalizer
    elif wanted != lower_cases(tokenizer):
        raise ConfigError(
            f"setting 'do_lower_case' is {str(wanted).lower()}, but {origin} has another "
            "normalizer than BERT's: set it there"
        )
