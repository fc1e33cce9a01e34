"""What a task's module here has, and what judges are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Scores that differ by no more are the same.
TOLERANCE = 1e-4

Case = dict[str, Any]
#: Asks the reference about one case.
Ask = Callable[[Case], Any]


@dataclass(frozen=True)
class Told:
    """What is known when answers are judged.

    model        ours, opened
    first_token  of the reference's tokenizer, such as "[CLS]"
    """

    model: Any
    first_token: str

    def answered(self, case: Case) -> list[Any]:
        """Our answers to a case, as a list."""
        from ft_handler.types import Incoming

        found = self.model.pipeline.predict(Incoming({**case["input"], **case["parameters"]}))
        return found if isinstance(found, list) else [found]


def near(a: float, b: float) -> bool:
    """Whether two scores are the same."""
    return abs(a - b) <= TOLERANCE
