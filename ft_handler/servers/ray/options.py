"""What an application on Ray Serve may be told, from the command line or from a config file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ft_handler.servers.web import MAX_REQUEST_SIZE

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def _mapping(value: object) -> object:
    """The command line has texts alone: a mapping is written as JSON there."""
    return json.loads(value) if isinstance(value, str) else value


def _models(value: object) -> object:
    """`NAME=DIR,NAME=DIR` of the command line as a config file would have it."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",")]
    return [{"name": name, "model": folder} for name, _, folder in pairs]


MappingOption = Annotated[dict[str, Any], BeforeValidator(_mapping)]


class Options(BaseModel):
    """What may be said of one model, or of all of them at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str = Field("1.0", description="What paths and Open Inference answers call it.")
    device: Literal["auto", "cpu", "cuda"] | None = Field(
        None, description="As the setting of that name; `cuda` asks for a GPU."
    )
    settings: MappingOption = Field(
        {}, description="Settings of `handler:`, which win over the folder's."
    )
    replicas: int | Literal["auto"] = Field(
        1, description="Processes that hold the model; `auto` lets Ray Serve scale as it sees fit."
    )
    autoscaling: MappingOption | None = Field(
        None, description="Ray Serve's `autoscaling_config`, in the place of `replicas`."
    )
    num_cpus: float = Field(
        1,
        gt=0,
        description="CPUs of a replica, which are also its threads unless `num_threads` is set.",
    )
    num_gpus: float | None = Field(
        None, ge=0, description="GPUs of a replica or a share of one; 1 where `device` is `cuda`."
    )
    max_batch_size: int | None = Field(
        None, ge=1, description="Most requests of a batch; null is the folder's `batchSize`."
    )
    max_batch_delay: float | None = Field(
        None,
        ge=0,
        description="Milliseconds to wait for more; null is the folder's `maxBatchDelay`.",
    )
    max_batch_bytes: int = Field(
        65_536,
        ge=1,
        description="Most bytes of what the requests of a batch brought, the measure of its "
        "tokens; one request always runs.",
    )
    max_ongoing_requests: int = Field(
        256, ge=1, description="Requests that a replica has taken, waiting ones included."
    )
    max_queued_requests: int = Field(
        1000,
        ge=-1,
        description="Requests that wait for a replica; more answer 503, -1 is no bound.",
    )
    health_check_period_s: float = Field(
        10, gt=0, description="Seconds between two checks that a replica answers its sample."
    )
    health_check_timeout_s: float = Field(
        60, gt=0, description="Seconds after which a check that has no answer has failed."
    )
    graceful_shutdown_timeout_s: float = Field(
        30, ge=0, description="Seconds that a replica has to finish what it has taken."
    )
    access_log: bool = Field(False, description="A line for every request in the replica's log.")

    @property
    def gpus(self) -> float:
        """GPUs of a replica, or a share of one."""
        if self.num_gpus is None:
            return 1 if self.device == "cuda" else 0
        return self.num_gpus

    @property
    def threads(self) -> int:
        """Threads of a replica where its folder sets none."""
        return max(1, math.floor(self.num_cpus))


class ModelOptions(Options):
    """One model.

    model  the folder that `ft-handler trace` wrote, or a traced file alone
    name   what paths call it; the folder's own name where it is not given
    """

    model: str = Field(description="The folder, or the traced file, of the model.")
    name: str = Field("", description="What paths call the model; empty is the folder's name.")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and not values.get("name") and values.get("model"):
            path = Path(str(values["model"]))
            return {**values, "name": path.stem if path.suffix == ".pt" else path.absolute().name}
        return values

    @field_validator("name")
    @classmethod
    def _is_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("letters, digits, '_', '-' and '.' only")
        return name


class Arguments(Options):
    """What `serve run ft_handler.servers.ray:app` takes, as NAME=VALUE.

    What is said beside `models` holds for each of them that does not say it itself.
    """

    model: str | None = Field(None, description="The folder, or the traced file, of one model.")
    name: str | None = Field(None, description="What paths call the one model.")
    models: Annotated[list[dict[str, Any]] | None, BeforeValidator(_models)] = Field(
        None,
        description="Several models: NAME=DIR,NAME=DIR, or in a config file a list of their "
        "options.",
    )
    max_request_size: int = Field(
        MAX_REQUEST_SIZE, ge=1, description="Bytes of a body; more answer 413."
    )
    front_replicas: int = Field(
        1, ge=1, description="Processes that pass requests on where there are several models."
    )

    def each(self) -> list[ModelOptions]:
        """The models; raises ValueError where there is none, or two have one name."""
        common = self.model_dump(include=set(Options.model_fields), exclude_unset=True)
        if (self.model is None) == (self.models is None):
            raise ValueError("say model=DIR for one model or models=NAME=DIR,... for several")
        given = self.models or [{"model": self.model, "name": self.name}]
        found = [ModelOptions.model_validate({**common, **one}) for one in given]
        names = [one.name for one in found]
        if len(set(names)) != len(names):
            raise ValueError("two models have the same name")
        return found

    @model_validator(mode="after")
    def _complete(self) -> Arguments:
        self.each()
        return self
