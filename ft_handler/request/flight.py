"""Batches under way: launched, waited for without exception, halved where memory ran out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from ft_handler.engine.base import Engine, Pending
from ft_handler.errors import EngineLost, RequestError
from ft_handler.request.batching import Indices, Sequences, pack
from ft_handler.request.failures import as_result, log_failure, out_of_memory
from ft_handler.types import Encoding, Floats

logger = logging.getLogger(__name__)


class Flight:
    """The batches of some encodings' sequences.

    Whoever launches has to `collect` or `abandon`: a device's batch that nobody waits for keeps its
    memory.
    """

    def __init__(
        self, engine: Engine, encodings: Sequence[Encoding[Any]], sequences: Sequences
    ) -> None:
        self.sequences = sequences
        self._engine = engine
        self._encodings = encodings
        self._waiting: list[tuple[Indices, Pending | Exception]] = []

    def launch(self, plan: Iterable[Indices]) -> None:
        """Start every bucket of a plan; what a bucket fails of is known when it is collected.

        Raises EngineLost, and waits for what was launched before.
        """
        try:
            self._waiting += [(members, self._launched(members)) for members in plan]
        except BaseException:
            self.abandon()
            raise

    def _launched(self, members: Indices) -> Pending | Exception:
        try:
            return self._engine.launch(pack(self.sequences, members))
        except EngineLost:
            raise
        except Exception as error:
            return error

    def collect(self) -> list[tuple[Indices, Floats]]:
        """Wait for every bucket in turn: the outputs of those that succeeded.

        Items of the others get their error. Raises EngineLost, after which the rest has to be
        abandoned.
        """
        done: list[tuple[Indices, Floats]] = []
        while self._waiting:
            members, pending = self._waiting.pop(0)
            try:
                if isinstance(pending, Exception):
                    raise pending
                done.append((members, pending.result()))
            except EngineLost:
                raise
            except Exception as error:
                if out_of_memory(error) and len(members) > 1:
                    half = len(members) // 2
                    logger.warning("out of memory with %d sequences: halved", len(members))
                    for part in (members[half:], members[:half]):
                        self._waiting.insert(0, (part, self._launched(part)))
                else:
                    self._fail(members, error)
        return done

    def _fail(self, members: Indices, error: Exception) -> None:
        if out_of_memory(error):
            logger.error("one sequence does not fit into memory")
        else:
            log_failure("compute", error, with_message=True)
        for owner in self.sequences.owners[members].tolist():
            self.refuse(owner, as_result(error))

    def refuse(self, owner: int, error: RequestError) -> None:
        """Give an encoding's item its error, unless it has one."""
        item = self._encodings[owner].item
        if item.result is None:
            item.result = error

    def abandon(self) -> None:
        """Wait for whatever is still under way, and forget it."""
        while self._waiting:
            _, pending = self._waiting.pop(0)
            if not isinstance(pending, Exception):
                with contextlib.suppress(Exception):
                    pending.result()
