"""TorchServe's published walk-through for FasterTransformer, command by command.

What differs from its text: the script and the handler are this package's, the checkpoint is a tiny
one, and the server has ports of its own and asks for no key.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from ports import free_port
from tiny import QUESTION_ANSWERING, SEQUENCE_CLASSIFICATION

from ft_handler import load_library
from ft_handler.files import LIBRARY
from ft_handler.servers.torchserve.java import find_java

#: As printed, for both of its models.
SETUP_CONFIG = """\
{
 "model_name":"bert-base-uncased",
 "mode":"question_answering",
 "do_lower_case":true,
 "num_labels":"0",
 "save_mode":"pretrained",
 "max_length":"128",
 "captum_explanation":false,
 "embedding_name": "bert",
 "FasterTransformer":true
}
"""
LABELS = {"0": "Not Accepted", "1": "Accepted"}
TEXT = "The old film was good, and the story of the captain was warm."
QUESTION = {
    "question": "Who built the bridge?",
    "context": "The engineer built the bridge in the old city.",
}


@dataclass
class Walk:
    """A server at the end of the walk-through, and where its commands ran."""

    mode: str
    folder: Path
    address: str
    management: str

    def curl(self, body: Any, path: str = "/predictions/my_tc") -> tuple[int, Any]:
        """`curl -X POST URL -T sample_text.txt`: the status and the answer."""
        sample = self.folder / "sample_text.txt"
        sample.write_text(body if isinstance(body, str) else json.dumps(body))
        done = subprocess.run(
            ["curl", "-s", "-X", "POST", self.address + path, "-T", str(sample),
             "-w", "\n%{http_code}"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        answer, _, status = done.stdout.rpartition("\n")
        return int(status), json.loads(answer)

    def predicted(self, body: Any) -> Any:
        """The answer to a body that has one."""
        status, answer = self.curl(body)
        assert status == 200, answer
        return answer


@pytest.fixture(scope="module", params=[SEQUENCE_CLASSIFICATION, QUESTION_ANSWERING])
def walk(
    request: pytest.FixtureRequest,
    make_tiny_bert: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Walk]:
    """Everything up to a worker that is READY, once for each of the two models."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    mode: str = request.param
    root = tmp_path_factory.mktemp("workspace")
    shape: dict[str, Any] = {"id2label": None, "label2id": None, "num_labels": 2}
    checkpoint = make_tiny_bert(mode, **(shape if mode == SEQUENCE_CLASSIFICATION else {}))
    build, example, artifacts = root / "build", root / "example", root / "Huggingface_Transformers"
    for folder in (build / "lib", example, artifacts, root / "tmp"):
        folder.mkdir(parents=True)
    shutil.copy(load_library(), build / "lib" / LIBRARY)
    (artifacts / "setup_config.json").write_text(SETUP_CONFIG)
    (artifacts / "index_to_name.json").write_text(json.dumps(LABELS))
    environment = {**os.environ, "TMPDIR": str(root / "tmp")}

    def command(*words: str, cwd: Path) -> str:
        done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    own = (sys.executable, "-m", "ft_handler")
    command(
        *own, "trace", "--mode", mode, "--model_name_or_path", str(checkpoint),
        "--tokenizer_name", str(checkpoint), "--batch_size", "1", "--data_type", "fp16",
        "--model_type", "thsext", cwd=build,
    )  # fmt: skip
    labelled = [str(artifacts / "index_to_name.json")] if mode == SEQUENCE_CLASSIFICATION else []
    extra = ["../Huggingface_Transformers/setup_config.json", *labelled, f"../build/lib/{LIBRARY}"]
    name = "BERTSeqClassification" if labelled else "BERTQA"
    command(
        sys.executable, "-m", "model_archiver.model_packaging", "--model-name", name,
        "--version", "1.0", "--serialized-file", "../build/traced_model.pt",
        "--handler", command(*own, "handler-path", cwd=example).strip(),
        "--extra-files", ",".join(extra), cwd=example,
    )  # fmt: skip
    (example / "model_store").mkdir()
    (example / f"{name}.mar").rename(example / "model_store" / f"{name}.mar")
    yield from serving(mode, example, name, environment, command)


def serving(
    mode: str,
    folder: Path,
    name: str,
    environment: Mapping[str, str],
    command: Callable[..., str],
) -> Iterator[Walk]:
    """Start TorchServe as printed, hand the walk over when its worker is READY, and stop it."""
    port = free_port(5)
    address, management = (f"http://127.0.0.1:{port + i}" for i in (0, 1))
    settings = {
        "inference_address": address,
        "management_address": management,
        "metrics_address": f"http://127.0.0.1:{port + 2}",
        "grpc_inference_port": port + 3,
        "grpc_management_port": port + 4,
        "disable_token_authorization": "true",
        "disable_system_metrics": "true",
        "default_workers_per_model": 1,
    }
    lines = [f"{key}={value}" for key, value in settings.items()]
    (folder / "config.properties").write_text("\n".join(lines) + "\n")
    torchserve = (sys.executable, "-c", "from ts.model_server import start; start()")
    environment = {**environment, "JAVA_HOME": str(find_java().path.resolve().parents[1])}
    log = folder / "torchserve.log"
    with log.open("w") as output:
        subprocess.run(
            [*torchserve, "--start", "--model-store", "model_store", "--models",
             f"my_tc={name}.mar", "--ncs"],
            cwd=folder, env=environment, stdout=output, stderr=output, check=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 180
        while not ready(management):
            assert time.monotonic() < deadline, log.read_text()[-5000:]
            time.sleep(0.3)
        yield Walk(mode, folder, address, management)
    finally:
        subprocess.run([*torchserve, "--stop"], cwd=folder, env=environment, check=True)


def ready(management: str) -> bool:
    """Whether the model's worker can answer."""
    try:
        described = requests.get(f"{management}/models/my_tc", timeout=10).json()
        return [w["status"] for w in described[0]["workers"]] == ["READY"]
    except (requests.RequestException, KeyError, ValueError):
        return False


def test_the_published_samples_are_answered(walk: Walk) -> None:
    if walk.mode == SEQUENCE_CLASSIFICATION:
        one = walk.predicted(TEXT)
        assert one["label"] in LABELS.values()
        for body in ({"text": TEXT, "target": 1}, {"data": TEXT, "target": 0}):
            assert walk.predicted(body) == one
            assert walk.predicted({"instances": [body, body]}) == {"predictions": [one, one]}
        return
    one = walk.predicted(QUESTION)
    assert one["answer"] == QUESTION["context"][one["start"] : one["end"]]
    body = {**QUESTION, "target": 0}
    assert walk.predicted(body) == one
    assert walk.predicted(str(body)) == one  # as a Python literal
    assert walk.predicted({"instances": [body, {"data": body}]}) == {"predictions": [one, one]}


def test_explanations_are_no_predictions(walk: Walk) -> None:
    body = QUESTION if walk.mode == QUESTION_ANSWERING else {"text": TEXT, "target": 1}
    for path in ("/explanations/my_tc", "/v1/models/my_tc:explain"):
        status, answer = walk.curl(body, path)
        assert status == 501
        assert "explanations are not offered" in answer["message"]
    assert walk.curl(body)[0] == 200


def test_the_model_describes_itself(walk: Walk) -> None:
    answer = requests.get(
        f"{walk.management}/models/my_tc", params={"customized": "true"}, timeout=60
    )
    assert answer.status_code == 200
    (described,) = answer.json()
    own = described["customizedMetadata"]
    own = json.loads(own) if isinstance(own, str) else own
    assert (own["mode"], own["data_type"]) == (walk.mode, "fp16")
    assert [w["status"] for w in described["workers"]] == ["READY"]


def test_older_words_are_notes_in_the_log(walk: Walk) -> None:
    log = (walk.folder / "logs" / "model_log.log").read_text()
    assert "'save_mode' is pretrained" in log
    contradicted = "the mode in setup_config.json is not that of the traced file" in log
    assert contradicted is (walk.mode != QUESTION_ANSWERING)
