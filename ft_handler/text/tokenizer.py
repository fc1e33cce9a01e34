"""Loads an archive's tokenizer, without truncation or padding of its own."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.normalizers import BertNormalizer

from ft_handler.errors import ConfigError


def load_tokenizer(
    model_dir: Path, tokenizer_file: str = "tokenizer.json", do_lower_case: bool | None = None
) -> Tokenizer:
    """The tokenizer of an archive, without truncation or padding of its own.

    Reads `tokenizer_file`, else `vocab.txt` (lower-cased unless told otherwise). Raises
    ConfigError when neither is there, or when `do_lower_case` cannot be honoured.
    """
    path, vocab = model_dir / tokenizer_file, model_dir / "vocab.txt"
    if path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{path} is not a tokenizer: {error}") from None
    elif vocab.is_file():
        lower = do_lower_case is not False
        legacy = BertWordPieceTokenizer.from_file(str(vocab), lowercase=lower)
        tokenizer = Tokenizer.from_str(legacy.to_str())
    else:
        raise ConfigError(f"no tokenizer in the archive; tried {path} and {vocab}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if do_lower_case is not None:
        normalizer = tokenizer.normalizer
        if isinstance(normalizer, BertNormalizer):
            normalizer.lowercase = do_lower_case
            tokenizer.normalizer = normalizer
        elif do_lower_case != ("lowercase" in str(normalizer).lower()):
            raise ConfigError(
                f"setting 'do_lower_case' is {str(do_lower_case).lower()}, but {path.name} has "
                "another normalizer than BERT's: set it there"
            )
    return tokenizer
