"""Ray Serve's parts without a running Ray; tests/serve/test_ray.py runs them where one can be."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray.serve", reason="Ray is not installed")

from pydantic import ValidationError
from ray.serve import schema

from ft_handler.errors import EngineLost, MalformedRequest
from ft_handler.servers.inputs import size_of
from ft_handler.servers.ray import app
from ft_handler.servers.ray.asked import Asked, cost_of
from ft_handler.servers.ray.options import Arguments, ModelOptions, Options
from ft_handler.servers.ray.replica import Replica
from ft_handler.types import Incoming, Reply

ROOT = Path(__file__).resolve().parents[2]


def test_one_model_speaks_http_itself() -> None:
    built = app(Arguments.model_validate({"model": "build/demo/cls/", "replicas": "3"}))
    deployment = built._bound_deployment
    assert deployment.func_or_class is Replica
    assert (deployment.name, deployment.num_replicas) == ("cls", 3)
    options, max_request_size = deployment.init_args
    assert Path(options.model) == Path.cwd() / "build/demo/cls"
    assert max_request_size == 6_553_500
    assert deployment.ray_actor_options["num_cpus"] == 1
    assert not deployment.ray_actor_options.get("num_gpus")


def test_several_models_stand_behind_a_front() -> None:
    built = app(
        Arguments.model_validate(
            {"models": "a=/m/one,b=/m/two", "num_gpus": "0.25", "num_cpus": "2.5",
             "autoscaling": '{"min_replicas": 2, "max_replicas": 5}', "max_request_size": "99"}
        )
    )  # fmt: skip
    models, size = built._bound_deployment.init_args
    assert (sorted(models), size) == (["a", "b"], 99)
    for version, behind in models.values():
        deployment = behind._bound_deployment
        assert version == "1.0"
        assert deployment.ray_actor_options == {"num_cpus": 2.5, "num_gpus": 0.25}
        scaling = deployment._deployment_config.autoscaling_config
        assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
        assert deployment.init_args[0].threads == 2


def test_what_one_model_says_wins_over_what_holds_for_all() -> None:
    arguments = Arguments.model_validate(
        {"replicas": 2, "settings": {"max_length": 64},
         "models": [{"model": "/m/a"}, {"model": "/m/b.pt", "replicas": "auto", "version": "2"}]}
    )  # fmt: skip
    first, second = arguments.each()
    assert (first.name, first.replicas, first.version) == ("a", 2, "1.0")
    assert (second.name, second.replicas, second.version) == ("b", "auto", "2")
    assert first.settings == second.settings == {"max_length": 64}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "model=DIR"),
        ({"model": "a", "models": "b=c"}, "model=DIR"),
        ({"models": "a=/x,a=/y"}, "same name"),
        ({"model": "/x", "name": "a b"}, "letters"),
        ({"models": [{"name": "a"}]}, "model"),
        ({"model": "/x", "replica": "2"}, "replica"),
        ({"model": "/x", "device": "tpu"}, "device"),
        ({"model": "/x", "num_cpus": "0"}, "num_cpus"),
        ({"model": "/x", "settings": "{"}, "settings"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Arguments.model_validate(given)


def test_every_option_is_documented() -> None:
    page = (ROOT / "docs" / "ray-serve.md").read_text(encoding="utf-8")
    section = page.split("## Options")[1].split("## Several models")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(
        f"| `{name}` | `{json.dumps(field.default)}` | {field.description} |"
        for name, field in Arguments.model_fields.items()
    )


def test_a_gpu_is_asked_for_where_the_device_is_one() -> None:
    def gpus(**given: Any) -> float:
        return ModelOptions.model_validate({"model": "/m", **given}).gpus

    assert [gpus(), gpus(device="cuda"), gpus(device="cuda", num_gpus=0.5)] == [0, 1, 0.5]


def test_a_batch_is_measured_by_what_its_requests_brought() -> None:
    assert size_of(Incoming(b"12345", {"top_k": b"2", "n": 3})) == 6
    assert size_of(Incoming({"inputs": ["abc", {"text": "de"}, 7]})) == 5
    assert size_of(MalformedRequest("no")) == 0
    assert cost_of([Asked(Incoming(), False, 1.0), Asked(Incoming(), False, 2.2)]) == 4


def serve_configs() -> list[str]:
    """The Serve configs of deploy/ray, as texts."""
    folder = ROOT / "deploy" / "ray"
    service = yaml.safe_load((folder / "rayservice.yaml").read_text())
    return [(folder / "serve.yaml").read_text(), service["spec"]["serveConfigV2"]]


@pytest.mark.parametrize("text", serve_configs(), ids=["serve.yaml", "rayservice.yaml"])
def test_the_configs_are_serves_and_build(text: str) -> None:
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = config.applications
    assert application.import_path == "ft_handler.servers.ray:app"
    built = app(Arguments.model_validate(application.args))
    assert built._bound_deployment is not None


def test_the_manifest_is_one_of_a_ray_service() -> None:
    service = yaml.safe_load((ROOT / "deploy/ray/rayservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert {"image", "resources"} <= container.keys()
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    # Every pod must hold a replica, and end no sooner than its requests.
    args = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]
    cpus = float(workers["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
    assert args["num_cpus"] <= cpus
    grace = workers["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > Options().graceful_shutdown_timeout_s


class Scripted:
    """A model that answers with a status, or loses its device."""

    sample = Incoming("a film")

    def __init__(self, status: int = 200, fails: Exception | None = None) -> None:
        self.status, self.fails = status, fails
        self.batches: list[list[Any]] = []

    def replies(self, asked: Sequence[Asked]) -> list[Reply]:
        self.batches.append([one.incoming.body for one in asked])
        if self.fails:
            raise self.fails
        return [Reply(self.status, "", str(one.incoming.body).encode()) for one in asked]


def replica_of(model: Scripted, batched: Any = None) -> Replica:
    """A replica that has loaded a scripted model."""
    replica = Replica.__new__(Replica)
    replica._model, replica._thread = model, ThreadPoolExecutor(1)  # type: ignore[assignment]
    replica._free = asyncio.Event()
    replica._free.set()
    replica._most, replica._bytes_a_request = 4, 10.0
    replica._batched = batched
    return replica


def test_health_is_an_answer() -> None:
    asyncio.run(replica_of(Scripted()).check_health())
    asyncio.run(replica_of(Scripted(422)).check_health())  # settings refuse the sample: it lives
    with pytest.raises(RuntimeError, match="500"):
        asyncio.run(replica_of(Scripted(500)).check_health())


def test_a_lost_device_ends_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []

    def end(status: int) -> None:
        ended.append(status)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    with contextlib.suppress(SystemExit):
        asyncio.run(replica_of(Scripted(fails=EngineLost("gone"))).check_health())
    assert ended == [1]


def test_what_comes_while_the_model_computes_waits_for_one_batch() -> None:
    async def scenario() -> tuple[list[str], list[float]]:
        events: list[str] = []
        costs: list[float] = []

        async def batched(asked: Asked) -> Reply:
            events.append(str(asked.incoming.body))
            costs.append(asked.cost)
            return Reply(200, "OK", b"")

        replica = replica_of(Scripted(), batched)
        replica._free.clear()
        waiting = [
            asyncio.create_task(replica.answer(Incoming("x" * size)))
            for size in (1, 25, 1000)
        ]  # fmt: skip
        await asyncio.sleep(0)
        events.append("free")
        replica._free.set()
        await asyncio.gather(*waiting)
        return events, costs

    events, costs = asyncio.run(scenario())
    assert events == ["free", "x", "x" * 25, "x" * 1000]
    assert costs == [1, 2.5, 4]  # at least a request, at most a batch


def test_a_batch_frees_the_model_whatever_happens() -> None:
    async def scenario(model: Scripted) -> Replica:
        replica = replica_of(model)
        with contextlib.suppress(ValueError):
            assert len(await replica._together([Asked(Incoming("a"), False, 1)])) == 1
        return replica

    for model in (Scripted(), Scripted(fails=ValueError("a failure"))):
        replica = asyncio.run(scenario(model))
        assert replica._free.is_set()
        assert model.batches == [["a"]]
