"""transformers, imported when needed and kept quiet."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from ft_handler.errors import EnvironmentProblem


def import_transformers() -> Any:
    """transformers, or an EnvironmentProblem that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentProblem(
            "reading checkpoints needs transformers: pip install 'ft-handler[trace]'"
        ) from error
    return transformers


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence loading reports and progress bars: what they say is checked and said once, by us."""
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    if bars:  # downloads still show theirs
        enable_progress_bars()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)
        if bars:
            hf_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """An error's first line of text, for one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
