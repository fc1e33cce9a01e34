"""TorchServe's own Open Inference gRPC (`ts_open_inference_protocol`): good and bad at once."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
import grpc
import ts

TEXTS = ("the film was great", 'café in the "old" harbour', "a bad plot")


class Client:
    """Calls ModelInfer with the protocol that TorchServe ships in its jar."""

    def __init__(self, port: int, protocol: tuple[Any, Any]) -> None:
        self._messages, services = protocol
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._stub = services.GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def infer(
        self, model: str, tensors: Mapping[str, Sequence[bytes]], raw: bool = False, **more: Any
    ) -> tuple[Any, dict[str, list[Any]]]:
        """The answer, and its outputs by name; strings come as JSON."""
        inputs = [
            {
                "name": name,
                "datatype": "BYTES",
                "shape": [len(values)],
                "contents": {} if raw else {"bytes_contents": list(values)},
            }
            for name, values in tensors.items()
        ]
        request = self._messages.ModelInferRequest(model_name=model, inputs=inputs, **more)
        answer = self._stub.ModelInfer(request, timeout=60)
        read = {
            "BYTES": lambda c: [json.loads(value) for value in c.bytes_contents],
            "FP32": lambda c: list(c.fp32_contents),
            "INT32": lambda c: list(c.int_contents),
            "INT64": lambda c: list(c.int64_contents),
        }
        return answer, {o.name: read[o.datatype](o.contents) for o in answer.outputs}


@pytest.fixture(scope="module")
def served(start_server: Callable[..., Any], store: Path) -> Any:
    return start_server(
        store, ["cls.mar", "qa.mar"], overrides={"ts_open_inference_protocol": "true"}
    )


@pytest.fixture(scope="module")
def client(served: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("protocol")
    with zipfile.ZipFile(Path(ts.__file__).parent / "frontend" / "model-server.jar") as jar:
        (folder / "torchserve_oip.proto").write_bytes(jar.read("proto/open_inference_grpc.proto"))
    sys.path.insert(0, str(folder))
    try:
        protocol = grpc.protos_and_services("torchserve_oip.proto")
    finally:
        sys.path.remove(str(folder))
    made = Client(int(served.server.properties["grpc_inference_port"]), protocol)
    yield made
    made.close()


def over_http(served: Any, model: str, tensors: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What `/v2/models/MODEL/infer` answers to the same tensors."""
    inputs = [
        {"name": name, "datatype": "BYTES", "shape": [len(values)], "data": list(values)}
        for name, values in tensors.items()
    ]
    url = f"{served.server.inference}/v2/models/{model}/infer"
    answer = served.session.post(url, json={"inputs": inputs}, timeout=60).json()
    return {o["name"]: o["data"] for o in answer["outputs"]}


def same(found: Mapping[str, list[Any]], wanted: Mapping[str, list[Any]]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name] == (pytest.approx(values, rel=1e-6) if name == "score" else values)
        for name, values in wanted.items()
    )


def test_answers_are_those_of_http(served: Any, client: Client) -> None:
    answer, outputs = client.infer("cls", {"text": [t.encode() for t in TEXTS]}, id="7")
    assert (answer.id, answer.model_name, answer.model_version) == ("7", "cls", "1.0")
    assert same(outputs, over_http(served, "cls", {"text": TEXTS}))
    asked = {"question": ["who built it"], "context": ["an engineer built the old bridge"]}
    answer, outputs = client.infer("qa", {k: [v[0].encode()] for k, v in asked.items()})
    assert answer.id == ""
    assert same(outputs, over_http(served, "qa", asked))


def test_what_is_refused_says_why_and_harms_nobody(served: Any, client: Client) -> None:
    before = served.pids("cls")
    wanted = over_http(served, "cls", {"text": TEXTS[:1]})

    def good(number: int) -> None:
        answer, outputs = client.infer("cls", {"text": [TEXTS[0].encode()]}, id=str(number))
        assert (answer.id, same(outputs, wanted)) == (str(number), True)

    def refused(tensors: Mapping[str, Sequence[bytes]], code: int, word: str, **more: Any) -> None:
        answer, outputs = client.infer("cls", tensors, id="bad", **more)
        assert answer.id == "bad"
        assert outputs.keys() == {"code", "type", "message"}
        assert outputs["code"] == [code]
        assert word in outputs["message"][0]

    bad: tuple[tuple[Mapping[str, Sequence[bytes]], int, str, dict[str, Any]], ...] = (
        ({"text": [b""]}, 422, "empty", {}),
        ({"text": [b"\xff\xfe"]}, 400, "UTF-8", {}),
        ({"one": [b"a"], "two": [b"b"]}, 422, "must be named", {}),
        ({"text": [b"a"]}, 400, "raw_input_contents", {"raw": True}),
        ({}, 422, "empty", {}),
    )
    with ThreadPoolExecutor(8) as pool:
        calls = []
        for number in range(6):
            calls.append(pool.submit(good, number))
            for tensors, code, word, more in bad:
                calls.append(pool.submit(refused, tensors, code, word, **more))
    for call in calls:
        call.result()
    assert served.pids("cls") == before


def test_an_id_that_is_refused_is_not_repeated(client: Client) -> None:
    answer, outputs = client.infer("cls", {"text": [b"a film"]}, id="7" * 2000)
    assert (answer.id, outputs["code"]) == ("", [413])


def test_the_front_is_open_inferences_over_http_too(served: Any) -> None:
    answer = served.session.get(f"{served.server.inference}/v2/health/ready", timeout=30)
    assert answer.json() == {"ready": True}
