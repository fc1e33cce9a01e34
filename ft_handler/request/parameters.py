"""The parameters of a request, read strictly over a task's defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Generic

from pydantic import ValidationError

from ft_handler.config import wording
from ft_handler.errors import UnusableRequest
from ft_handler.tasks.base import Alias, ParamsT


class ParameterReader(Generic[ParamsT]):
    """Reads what clients give beside an input.

    kind     the task's frozen pydantic dataclass
    nulls    parameter -> what null means; for the others null is as good as absent
    aliases  other name -> the parameter it stands for
    """

    def __init__(
        self,
        kind: type[ParamsT],
        nulls: Mapping[str, object],
        aliases: Mapping[str, Alias] | None = None,
    ) -> None:
        if not is_dataclass(kind):
            raise TypeError(f"{kind.__name__} is no dataclass")
        self._make: Callable[..., ParamsT] = kind
        self._nulls = nulls
        self._aliases = aliases or {}
        self.names = tuple(f.name for f in fields(kind))
        self.accepted = frozenset((*self.names, *self._aliases))

    def read(self, given: Mapping[str, Any], defaults: ParamsT, where: str) -> ParamsT:
        """`defaults` with what was given; `where` begins the message of an UnusableRequest."""
        chosen: dict[str, Any] = {}
        for name, value in given.items():
            alias = self._aliases.get(name)
            if alias is not None:
                if alias.name in given:
                    continue
                if alias.truths is not None:
                    if value is None:
                        continue
                    if not isinstance(value, bool):
                        raise UnusableRequest(f"{where}'{name}' must be true or false")
                    value = alias.truths[value]
                name = alias.name
            if value is not None:
                chosen[name] = value
            elif name in self._nulls:
                chosen[name] = self._nulls[name]
        if not chosen:
            return defaults
        values = {name: getattr(defaults, name) for name in self.names}
        try:
            return self._make(**{**values, **chosen})
        except ValidationError as error:
            name, wanted = wording(error)[0]
            raise UnusableRequest(f"{where}'{name}' {wanted}") from None
