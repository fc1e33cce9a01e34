"""Answers in this process: the Python face of a traced model, without a server and without Java."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ft_handler.config import RawSettings, model_yaml
from ft_handler.errors import ConfigError, NotOffered
from ft_handler.model.info import ModelInfo
from ft_handler.runtime import Ready, open_model
from ft_handler.servers import server_settings
from ft_handler.types import Incoming


class Predictor:
    """A traced model that answers as it would over HTTP; safe from several threads.

    info  what the traced file says of itself
    """

    def __init__(self, ready: Ready) -> None:
        self._pipeline, self._explainer = ready.pipeline, ready.explainer
        self.info: ModelInfo = ready.info
        self.device = str(ready.device)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | None = None,
        num_threads: int | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> Predictor:
        """Load a traced folder or a traced file alone, and warm up.

        path         a folder's `model-config.yaml` gives the settings, as it does for a server
        device       "cpu", "cuda" or "auto" (a GPU where there is one); None leaves it to the
                     folder's settings
        num_threads  CPU threads of the encoder, of this whole process
        settings     further settings of `handler:`, which win over the folder's

        Raises FtHandlerError naming what is missing, unknown or contradictory.
        """
        source = Path(path)
        if not source.exists():
            raise ConfigError(f"{source}: no such folder or file; `ft-handler trace` makes one")
        wishes = {"device": device, "num_threads": num_threads, **(settings or {})}
        raw = RawSettings.of_model_dir(source, model_yaml(source))
        given = {name: value for name, value in wishes.items() if value is not None}
        return cls(
            open_model(source, raw.over(given), groups=server_settings(), gpu=0, explains=True)
        )

    def predict(self, inputs: object, **parameters: object) -> object:
        """The answer to one input, or a list of them to a list, in the shape that HTTP gives.

        inputs      whatever a request's body may be: a string, an object such as
                    `{"question": ..., "context": ...}`, or a list of them
        parameters  those of a request, such as `top_k=3`

        Raises RequestError with its `status` for input that a server would refuse.
        """
        return self._pipeline.predict(Incoming(inputs, parameters))

    def explain(self, inputs: object, **parameters: object) -> object:
        """What each word does for the answer, as `/explanations` says it (docs/explanations.md).

        inputs, parameters  as for `predict`, and of a classifier `target`, a label or its number

        Raises RequestError with its `status`, NotOffered for a task that explains nothing.
        """
        if self._explainer is None:
            raise NotOffered(f"answers of {self.info.mode} are not explained")
        return self._explainer.predict(Incoming(inputs, parameters))
