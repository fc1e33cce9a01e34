"""The files of deploy/ say what the code does, and their own programs accept them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from ft_handler.cli.main import build
from ft_handler.servers.torchserve.properties import (
    ServeOptions,
    effective_properties,
    read_properties,
)

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "kubernetes" / "base"
DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile.*"))
SETTINGS = [DEPLOY / "docker" / "config.properties", BASE / "config.properties"]
PROXIES = [*sorted((DEPLOY / "proxy").iterdir()), BASE / "nginx.conf"]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """A program's verdict; the test is skipped where it is not installed."""
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not on PATH")
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=60
    )


def options_of(words: Sequence[str]) -> dict[str, Any]:
    """What an `ft-handler COMMAND ...` line means, without running it; fails for a wrong one."""
    assert words[0] == "ft-handler"
    command = typer.main.get_command(build()).commands[words[1]]  # type: ignore[attr-defined]
    return dict(command.make_context(words[1], list(words[2:])).params)


# containers


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_images_run_what_there_is(path: Path) -> None:
    text = path.read_text()
    final = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001:10001$", final, re.M)

    def words(instruction: str) -> list[str]:
        found = re.search(rf"{instruction} (\[.*\])$", final, re.M)
        assert found, instruction
        return list(json.loads(found[1]))

    serve = options_of(words("ENTRYPOINT") + words("^CMD"))
    assert serve["health_port"] == 8083
    health = words("    CMD")
    assert health[:2] == ["ft-handler", "ready"]
    asked = options_of(health)
    assert asked["config"] == serve["config"]
    timeout = re.search(r"--timeout=(\d+)s", final)
    assert timeout
    assert asked["timeout"] < int(timeout[1])
    # What the image is built from is let through to it.
    ignored = (ROOT / ".dockerignore").read_text()
    for source in re.findall(r"^COPY (?!--from)(\S+) ", text, re.M):
        assert source == "." or f"!{source}\n" in ignored, source


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    done = run("hadolint", path)
    assert done.returncode == 0, done.stdout


def test_everything_the_package_is_built_from_reaches_the_image() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[ignored.index("*") :][0] == "*"
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "csrc", "README.md",
                 "LICENSE", "CHANGELOG.md", "ft_handler"):  # fmt: skip
        assert f"!{name}" in ignored
        assert (ROOT / name).exists()


def composed() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text()))


def test_compose_file_is_one() -> None:
    file = DEPLOY / "docker" / "compose.yaml"
    done = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", file)
    assert done.returncode == 0, done.stdout


def test_compose_publishes_on_loopback_and_leaves_time_to_drain() -> None:
    services = composed()["services"]
    published = [port for service in services.values() for port in service["ports"]]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert not any(re.search(r":(808[124]|707[01])$", port) for port in published)
    assert all(service["read_only"] for service in services.values())
    final = (DEPLOY / "docker" / "Dockerfile.cpu").read_text()
    serve = options_of(
        ["ft-handler", "serve", *json.loads(re.findall(r"^CMD (.*)$", final, re.M)[0])]
    )
    assert int(services["torchserve"]["stop_grace_period"].removesuffix("s")) >= (
        serve["notice"] + serve["drain"] + 20
    )


def test_what_compose_mounts_is_there() -> None:
    if not (DEPLOY / "monitoring").is_dir():
        pytest.skip("deploy/monitoring is not in this tree")
    for service in composed()["services"].values():
        for volume in service["volumes"]:
            source = volume.rpartition(":")[0] if volume.endswith(":ro") else volume
            source = source.rpartition(":")[0]
            if source.startswith("."):
                assert (DEPLOY / "docker" / source).exists(), source


@pytest.mark.parametrize("path", SETTINGS, ids=lambda p: p.parent.name)
def test_settings_differ_where_they_have_to(path: Path) -> None:
    """Addresses, the store and who may ask; the rest is what config.properties chose."""
    own, root = read_properties(path), read_properties(ROOT / "config.properties")
    differing = {key for key in own.keys() | root.keys() if own.get(key) != root.get(key)}
    assert differing <= {
        "inference_address", "metrics_address", "model_store", "disable_token_authorization",
        "token_expiration_min",
    }  # fmt: skip
    found = effective_properties(ServeOptions(config=path))
    assert found["management_address"] == "http://127.0.0.1:8081"
    assert found["grpc_inference_address"] == "127.0.0.1"
    open_to_all = found["inference_address"] != "http://127.0.0.1:8080"
    assert not (open_to_all and found["disable_token_authorization"] == "true")


# Kubernetes


def resources() -> dict[str, Any]:
    found = {}
    for path in sorted(BASE.glob("*.yaml")):
        if path.name != "kustomization.yaml":
            document = yaml.safe_load(path.read_text())
            found[document["kind"]] = document
    return found


def built(folder: str) -> list[Any]:
    """What Kustomize makes of a folder."""
    done = run("kubectl", "kustomize", DEPLOY / "kubernetes" / folder)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("folder", ["plain", "base", "gpu"])
def test_resources_fit_their_schemas(folder: str) -> None:
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed (pip install '.[dev]')"
    )
    documents = list(resources().values()) if folder == "plain" else built(folder)
    assert len(documents) >= 8
    for document in documents:
        # Containers of the kind that ends after the others came with 1.29.
        for version in ("1.29", "1.33"):
            validator.validate(document, version, strict=True)


def test_the_gpu_overlay_asks_for_a_gpu() -> None:
    pods = {
        name: next(d for d in built(name) if d["kind"] == "Deployment")["spec"]["template"]["spec"]
        for name in ("base", "gpu")
    }
    limits = {name: pod["containers"][0]["resources"]["limits"] for name, pod in pods.items()}
    assert "nvidia.com/gpu" not in limits["base"]
    assert limits["gpu"]["nvidia.com/gpu"] == "1"
    assert pods["base"]["containers"][0]["image"] == "ft-handler:cpu"
    assert pods["gpu"]["containers"][0]["image"] == "ft-handler:cuda"
    assert len(pods["gpu"]["containers"][0]["volumeMounts"]) == 4


def test_a_base_names_what_it_has() -> None:
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    assert sorted(listed["resources"]) == sorted(
        p.name for p in BASE.glob("*.yaml") if p.name != "kustomization.yaml"
    )
    for made in listed["configMapGenerator"]:
        assert all((BASE / name).is_file() for name in made["files"])
    volumes = resources()["Deployment"]["spec"]["template"]["spec"]["volumes"]
    maps = {v["configMap"]["name"] for v in volumes if "configMap" in v}
    assert maps == {made["name"] for made in listed["configMapGenerator"]}


def containers() -> Iterator[dict[str, Any]]:
    pod = resources()["Deployment"]["spec"]["template"]["spec"]
    yield from pod["initContainers"]
    yield from pod["containers"]


def test_pods_may_do_nothing_they_need_not() -> None:
    pod = resources()["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    mounted = {volume["name"] for volume in pod["volumes"]}
    for container in containers():
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= mounted


def test_pods_end_within_their_time() -> None:
    pod = resources()["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    serve = options_of(["ft-handler", "serve", *container["args"]])
    assert pod["terminationGracePeriodSeconds"] >= serve["notice"] + serve["drain"] + 20
    readiness = container["readinessProbe"]
    assert serve["notice"] > readiness["periodSeconds"] * readiness["failureThreshold"]
    assert serve["health_port"] == 8083
    asked = options_of(container["startupProbe"]["exec"]["command"])
    assert asked["timeout"] < container["startupProbe"]["timeoutSeconds"]
    assert asked["config"] == serve["config"]


def test_only_predictions_and_metrics_are_let_in() -> None:
    ingress = resources()["NetworkPolicy"]["spec"]["ingress"]
    assert all(rule["from"] for rule in ingress)
    assert sorted(port["port"] for rule in ingress for port in rule["ports"]) == [8082, 8084, 8443]
    ports = {p["containerPort"]: p["name"] for c in containers() for p in c["ports"]}
    assert ports == {8443: "http", 8082: "metrics", 8084: "exporter"}
    (port,) = resources()["Service"]["spec"]["ports"]
    assert port["targetPort"] == "http"


def test_prometheus_is_told_of_every_port_with_metrics() -> None:
    monitor = yaml.safe_load((DEPLOY / "kubernetes" / "podmonitor.yaml").read_text())["spec"]
    deployment = resources()["Deployment"]["spec"]
    assert monitor["selector"] == deployment["selector"]
    (container,) = deployment["template"]["spec"]["containers"]
    asked = [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]]
    assert asked == [port["name"] for port in container["ports"]]


def test_the_autoscaler_asks_for_what_the_adapter_offers() -> None:
    rules = yaml.safe_load((DEPLOY / "kubernetes" / "adapter-rules.yaml").read_text())
    offered = {rule["name"]["as"] for rule in rules["rules"]["custom"]}
    asked = {
        m["pods"]["metric"]["name"]
        for m in resources()["HorizontalPodAutoscaler"]["spec"]["metrics"]
    }
    assert asked == offered


# proxies


@pytest.mark.parametrize("path", PROXIES, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_proxies_take_as_large_bodies_as_the_server(path: Path) -> None:
    most = read_properties(ROOT / "config.properties")["max_request_size"]
    assert re.search(rf"(max_body_size|max_size|gt) {most}\b", path.read_text())


@pytest.mark.parametrize("path", PROXIES, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_proxies_understand_their_files(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "etc"
    (folder / "keys").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on PATH")
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
            "-nodes", "-keyout", "tls.key", "-out", "tls.crt", "-subj", "/CN=localhost",
        ],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    pem = (folder / "tls.crt").read_text() + (folder / "tls.key").read_text()
    (folder / "tls.pem").write_text(pem)
    shutil.copy(DEPLOY / "kubernetes" / "keys.example.map", folder / "keys.map")
    shutil.copy(DEPLOY / "kubernetes" / "keys.example.map", folder / "keys")
    (folder / "keys.list").write_text("Bearer key\n")
    (folder / "keys.caddy").write_text('header Authorization "Bearer key"\n')
    file = tmp_path / path.name
    text = path.read_text().replace("/run/ft-handler", f"{tmp_path}/run")
    text = re.sub(r"/tmp/(?=nginx.pid|\w+;)", f"{tmp_path}/run/", text)
    file.write_text(text.replace("/etc/ft-handler", str(folder)))
    done = {
        "nginx.conf": lambda: run("nginx", "-t", "-e", f"{tmp_path}/run/log", "-c", file),
        "haproxy.cfg": lambda: run("haproxy", "-c", "-f", file),
        "Caddyfile": lambda: run("caddy", "validate", "--adapter", "caddyfile", "--config", file),
    }[path.name]()
    assert done.returncode == 0, done.stdout + done.stderr
