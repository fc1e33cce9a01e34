"""What lies beside a checkpoint's configuration and weights, for the task to read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ft_handler.errors import ModelError
from ft_handler.prepare.adapters import UNSAFE_PICKLE
from ft_handler.prepare.hub import Source
from ft_handler.prepare.wrapped import state_dict


@dataclass(frozen=True)
class Beside:
    """A checkpoint's further files, as `tasks.base.Files` wants them."""

    source: Source
    cache_dir: str | None

    def json(self, name: str) -> Any:
        """What a JSON file holds, None where there is none; raises ModelError."""
        path = self.source.file(name, self.cache_dir)
        if path is None:
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"its {name} is not JSON: {error}") from error

    def tensors(self, folder: str) -> Mapping[str, Tensor]:
        """The weights in a folder of the checkpoint; raises ModelError where there are none."""
        try:
            return state_dict(self.source, self.cache_dir, f"{folder}/")
        except pickle.UnpicklingError as error:
            raise ModelError(f"its {folder}: {UNSAFE_PICKLE}") from error
        except ModelError as error:
            raise ModelError(f"its {folder} {error}") from error
