"""KServe's model server with one traced model in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from kserve import ModelServer, model_server
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.model_repository_extension import ModelRepositoryExtension

from ft_handler.servers.kserve.model import EncoderModel
from ft_handler.servers.kserve.rest import routes


class _Answering(DataPlane):  # type: ignore[misc]
    """Ready is what answers: whoever asks whether a model is ready gets a real prediction made."""

    async def ready(self) -> bool:
        """Whether every model answers."""
        models = self.model_registry.get_models()
        return bool(models) and all([await self.model_ready(name) for name in list(models)])

    async def model_ready(
        self, model_name: str, disable_predictor_health_check: bool = False
    ) -> bool:
        """Whether a model answers; before each request only whether it is there."""
        ready = await super().model_ready(model_name, disable_predictor_health_check)
        if not ready or disable_predictor_health_check:
            return bool(ready)
        model = self.model_registry.get_model(model_name)
        return await model.answers() if isinstance(model, EncoderModel) else True


class _NotHere(NotImplementedError):
    reason = "models are loaded when the server starts, and stay"


class _Fixed(ModelRepositoryExtension):  # type: ignore[misc]
    """Nobody unloads a model by a request."""

    async def load(self, model_name: str) -> NoReturn:
        """Refuse."""
        raise _NotHere(_NotHere.reason)

    async def unload(self, model_name: str) -> NoReturn:
        """Refuse."""
        raise _NotHere(_NotHere.reason)


def serve(models: Sequence[EncoderModel], most_bytes: int, **options: Any) -> None:
    """Serve loaded models until a signal ends the process.

    most_bytes  of a body over REST
    options     of KServe's ModelServer
    """
    server = ModelServer(**options)
    server.dataplane = _Answering(model_registry=server.registered_models)
    server.model_repository_extension = _Fixed(model_registry=server.registered_models)
    model_server.app.router.routes[:0] = routes(server.dataplane, most_bytes)
    server.start(list(models))
