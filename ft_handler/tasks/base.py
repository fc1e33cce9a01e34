"""What a task is: everything that a kind of model is asked and answers, as one object.

A task is one file with one object of `Task`. Tracing, archives, configuration, the request path and
the servers ask it and never name one. `register` (see `ft_handler.tasks`) makes it known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Head:
    """A head, and where its weights stand in a transformers state dict.

    module   the scriptable class: built with its weights as keyword arguments, called with hidden
             states and `cu_seqlens` (see `ft_handler.model.heads`)
    weights  the class's arguments -> names in the state dict; `{base}` stands for the encoder's
             own prefix there, such as "bert"
    outputs  the transformers module whose weight has a row an output, such as "classifier"; None
             when the number of outputs is fixed
    """

    module: type[nn.Module]
    weights: Mapping[str, str]
    outputs: str | None = None


class Task(ABC):
    """One kind of model.

    name        the traced file's mode, and what `--mode` takes
    auto_class  the transformers class that loads such a checkpoint
    per_token   whether outputs are for each token, else for each sequence
    labelled    whether outputs are labels with names; else there are `columns(config)` of them
    sample      a request that every model of the task can answer
    """

    name: str
    auto_class: str
    per_token: bool
    labelled: bool
    sample: Mapping[str, str]

    @abstractmethod
    def head(self) -> Head:
        """The head most architectures have; one with another says so in its own file."""

    def columns(self, config: Any) -> int:
        """Outputs a token or a sequence, of a transformers configuration."""
        return int(config.num_labels)

    def sample_text(self) -> str:
        """The sample as the body of a plain-text request."""
        raise NotImplementedError
