"""Failures of ours: logged once, without a word of the client's, and told apart."""

from __future__ import annotations

import logging
import traceback

from ft_handler.errors import InternalError, OutOfDeviceMemory, OutOfMemory, RequestError

logger = logging.getLogger(__name__)


def log_failure(stage: str, error: BaseException, *, with_message: bool = False) -> None:
    """Log a failure; with its message only where the stage never sees the client's text."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    message = f": {error}" if with_message else ""
    logger.error("%s failed: %s%s\n%s", stage, type(error).__name__, message, frames)


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch might have fitted."""
    # Torch's CPU allocator raises a plain RuntimeError, and so does what wraps std::bad_alloc.
    return isinstance(error, (OutOfDeviceMemory, MemoryError)) or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in str(error) or "bad_alloc" in str(error))
    )


def as_result(error: BaseException) -> RequestError:
    """What an item gets whose computation failed so."""
    return OutOfMemory() if out_of_memory(error) else InternalError()
