"""The model of a replica, loaded and asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ft_handler.config import CoreSettings, RawSettings
from ft_handler.request import spans
from ft_handler.request.replies import encode_error
from ft_handler.runtime import keep_out_of_collections, open_model
from ft_handler.servers import server_settings
from ft_handler.servers.answers import answers
from ft_handler.servers.folder import response_timeout
from ft_handler.servers.inputs import not_explained
from ft_handler.servers.ray.asked import Asked
from ft_handler.servers.ray.options import ModelOptions
from ft_handler.servers.signature import signature
from ft_handler.types import Incoming, Reply


class Loaded:
    """A model that is warm.

    sample     a request that it can answer
    signature  its tensors
    """

    def __init__(
        self,
        options: ModelOptions,
        yaml: Mapping[str, object],
        gpu: int | None,
        max_batch_size: int,
    ) -> None:
        """Load it; raises FtHandlerError naming what is missing, unknown or contradictory.

        yaml  the folder's model-config.yaml
        gpu   the GPU that this process was given
        """
        folder = Path(options.model)
        given = dict(options.settings)
        if options.device is not None:
            given["device"] = options.device
        raw = RawSettings.of_model_dir(folder, yaml)
        if raw.over(given).read(CoreSettings).num_threads is None:
            given["num_threads"] = options.threads
        ready = open_model(
            folder,
            raw.over(given),
            groups=server_settings(),
            gpu=gpu,
            name=options.name,
            version=options.version,
            # Windows make more sequences than requests.
            max_sequences=2 * max(64, max_batch_size),
            answer_within=response_timeout(yaml),
            tracer=spans.tracer(),
        )
        self._pipeline, self._explainer = ready.pipeline, ready.explainer
        self.sample = Incoming(dict(ready.task.sample))
        self.signature = signature(ready)
        keep_out_of_collections()

    def replies(self, asked: Sequence[Asked]) -> list[Reply]:
        """One reply a request, in order; raises EngineLost."""
        explains = self._explainer is not None
        predicted = [one for one in asked if not one.explain]
        explained = [one for one in asked if one.explain and explains]
        predictions, explanations, _ = answers(
            self._pipeline,
            self._explainer,
            [one.incoming for one in predicted],
            [one.incoming for one in explained],
            [one.trace for one in predicted],
            [one.trace for one in explained],
        )
        if not explains:
            refused = encode_error(not_explained())
            explanations = [refused] * (len(asked) - len(predicted))
        of = {False: iter(predictions), True: iter(explanations)}
        return [next(of[one.explain]) for one in asked]
