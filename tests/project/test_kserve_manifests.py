"""deploy/kserve: KServe's own types accept the manifests, and their commands are ours."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from ft_handler.cli.main import build

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "build" / "servers" / "kserve" / "bin" / "python"
FOLDER = ROOT / "deploy" / "kserve"
MANIFESTS = [
    document
    for path in sorted(FOLDER.glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]

needs_kserve = pytest.mark.skipif(
    not PYTHON.exists(), reason="KServe is not installed (scripts/environments.sh)"
)


def of(kind: str) -> dict[str, dict[str, Any]]:
    return {m["metadata"]["name"]: m["spec"] for m in MANIFESTS if m["kind"] == kind}


def wrong(*documents: dict[str, Any]) -> list[list[str]]:
    """What KServe's types say of each document."""
    done = subprocess.run(
        [PYTHON, ROOT / "tests" / "clients" / "kserve_manifests.py"],
        input=json.dumps(documents), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@needs_kserve
def test_kserves_types_accept_them_and_would_say_what_is_wrong() -> None:
    runtime = next(m for m in MANIFESTS if m["kind"] == "ServingRuntime")
    misspelt, untyped, bare = (copy.deepcopy(runtime) for _ in range(3))
    misspelt["spec"]["containers"][0]["readynessProbe"] = {}
    untyped["spec"]["supportedModelFormats"][0]["version"] = 1
    del bare["spec"]["containers"]
    *found, first, second, third = wrong(*MANIFESTS, misspelt, untyped, bare)
    assert found == [[]] * len(MANIFESTS)
    name = runtime["metadata"]["name"]
    assert first == [f"{name}.spec.containers.0 has no readynessProbe"]
    assert second == [f"{name}.spec.supportedModelFormats.0.version is no str"]
    assert len(third) == 1
    assert "containers" in third[0]


def test_services_name_runtimes_that_are_there_and_speak_their_protocol() -> None:
    runtimes = of("ServingRuntime")
    services = of("InferenceService")
    assert {s["predictor"]["model"]["runtime"] for s in services.values()} == runtimes.keys()
    for service in services.values():
        model = service["predictor"]["model"]
        runtime = runtimes[model["runtime"]]
        assert model["protocolVersion"] in runtime["protocolVersions"]
        formats = [known["name"] for known in runtime["supportedModelFormats"]]
        assert model["modelFormat"]["name"] in formats


@needs_kserve
def test_our_runtime_starts_our_server() -> None:
    (container,) = of("ServingRuntime")["ft-handler"]["containers"]
    program = (
        "import json, sys\n"
        "from ft_handler.servers.kserve.__main__ import parser\n"
        "print(json.dumps(vars(parser().parse_args()), default=str))"
    )
    done = subprocess.run(
        [PYTHON, "-c", program, *container["args"]], capture_output=True, text=True, timeout=120,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    options = json.loads(done.stdout.splitlines()[-1])
    assert options["model_dir"] == "/mnt/models"
    ports = {options["http_port"], options["grpc_port"]}
    assert container["readinessProbe"]["httpGet"]["port"] == options["http_port"]
    published = {
        port["containerPort"]
        for service in of("InferenceService").values()
        for port in service["predictor"]["model"].get("ports", ())
    }
    assert published == {options["grpc_port"]}
    exposed = (FOLDER / "Dockerfile").read_text().partition("EXPOSE ")[2].partition("\n")[0]
    assert {int(port) for port in exposed.split()} == ports


def test_torchserves_runtime_starts_ours_without_an_envelope() -> None:
    (container,) = of("ServingRuntime")["ft-handler-torchserve"]["containers"]
    command = typer.main.get_command(build()).commands["serve"]  # type: ignore[attr-defined]
    options = command.make_context("serve", list(container["args"])).params
    assert options["model_store"] == Path("/mnt/models")
    assert options["token_auth"] is False
    assert "env" not in container
