"""Asks a model over gRPC, with the protocol that TorchServe ships in its own jar.

    python examples/grpc_client.py 127.0.0.1:7070 sentiment "A warm, funny film."

Needs grpcio and grpcio-tools. Over gRPC TorchServe loses the status of a refused request: the call
succeeds and the body is the error, {"code", "type", "message"}.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import grpc


def torchserve_protocol() -> tuple[Any, Any]:
    """Messages and services of `inference.proto`, compiled from the installed TorchServe."""
    spec = importlib.util.find_spec("ts")
    if spec is None or spec.origin is None:
        raise SystemExit("error: TorchServe is not installed")
    folder = tempfile.mkdtemp(prefix="torchserve_protocol_")
    with zipfile.ZipFile(Path(spec.origin).parent / "frontend" / "model-server.jar") as jar:
        target = Path(folder) / "torchserve_inference.proto"
        target.write_bytes(jar.read("proto/inference.proto"))
        jar.extract("google/rpc/status.proto", folder)
    sys.path.insert(0, folder)
    return grpc.protos_and_services("torchserve_inference.proto")


class Client:
    """A connection to TorchServe's gRPC inference port.

    token  the inference key of key_file.json, when token authorization is on
    """

    _protocol: tuple[Any, Any] | None = None

    def __init__(self, address: str, token: str | None = None) -> None:
        if Client._protocol is None:
            Client._protocol = torchserve_protocol()
        self._messages, services = Client._protocol
        self._channel = grpc.insecure_channel(address)
        self._stub = services.InferenceAPIsServiceStub(self._channel)
        self._metadata = [("authorization", f"Bearer {token}")] if token else []
        if token:
            self._metadata.insert(0, ("protocol", "gRPC"))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def predict(self, model: str, body: bytes) -> bytes:
        """The answer to one request; `body` is what would be an HTTP request's body."""
        request = self._messages.PredictionsRequest(model_name=model, input={"data": body})
        return bytes(self._stub.Predictions(request, metadata=self._metadata).prediction)

    def stream(self, model: str, body: bytes) -> list[bytes]:
        """The same through StreamPredictions: its one answer, after which the stream ends."""
        request = self._messages.PredictionsRequest(model_name=model, input={"data": body})
        answers = self._stub.StreamPredictions(request, metadata=self._metadata)
        return [bytes(answer.prediction) for answer in answers]


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        raise SystemExit(__doc__)
    address, model, text, *token = sys.argv[1:]
    with Client(address, *token) as client:
        print(client.predict(model, text.encode()).decode())
