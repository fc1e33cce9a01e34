"""KServe's model over a pipeline that fails: not ready, refusals, and the end of the process."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import HTTPException
from grpc_interceptor.exceptions import GrpcException
from kserve import InferInput, InferRequest

from ft_handler.errors import EngineLost, Overloaded
from ft_handler.request.replies import encode_error
from ft_handler.servers.kserve import model as module
from ft_handler.stats import BatchStats

failures: list[Any] = [
    ValueError("the client's text"),
    ValueError("the client's text"),
    [encode_error(Overloaded())],
    EngineLost("it fell off the bus"),
]


def run(incoming: Any, *, traces: Any) -> Any:
    """Fail in the next way."""
    failure = failures.pop(0)
    if isinstance(failure, Exception):
        raise failure
    return failure, BatchStats()


async def main() -> None:
    """Print how each failure is told."""
    model = module.EncoderModel("cls", Path("nowhere"))
    model.load()
    print("answers:", await model.answers())
    request = InferRequest("cls", [InferInput("text", [1], "BYTES", [b"a"])], from_grpc=True)
    try:
        await model.predict(request)
    except GrpcException as error:
        print(error.status_code.name, error.details)
    try:
        await model.predict({"instances": ["a"]})
    except HTTPException as error:
        print(error.status_code, flush=True)
    await model.predict({"instances": ["a"]})
    print("the process lives")


logging.basicConfig(level=logging.CRITICAL)
info = SimpleNamespace(mode="m", data_type="fp32", num_layers=1, hidden_size=1)
task = SimpleNamespace(sample={"text": "a"})
module.open_model = lambda *_, **__: SimpleNamespace(  # type: ignore[assignment]
    pipeline=SimpleNamespace(run=run), explainer=None, task=task, info=info, device="cpu"
)
module.signature = lambda _: {"inputs": [], "outputs": []}  # type: ignore[assignment]
asyncio.run(main())
