"""TorchServe's settings: config.properties with the command line's choices over it."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from ft_handler.errors import ConfigError

DATA = Path(__file__).resolve().parent / "data"
LOG_CONFIG = DATA / "log4j2.xml"
METRICS_CONFIG = DATA / "metrics.yaml"

#: What config.properties leaves open; TorchServe's own defaults would load archives from any URL,
#: print a log line for every metric, and query GPUs with bindings that fail.
SAFE_DEFAULTS = {
    "allowed_urls": "no-url-is-allowed",
    "disable_system_metrics": "true",
    "metrics_config": str(METRICS_CONFIG),
    "metrics_mode": "prometheus",
}

#: config.properties key -> what TorchServe takes when the key is missing.
ADDRESSES = {
    "inference_address": "http://127.0.0.1:8080",
    "management_address": "http://127.0.0.1:8081",
    "metrics_address": "http://127.0.0.1:8082",
}
GRPC_PORTS = {"grpc_inference_port": "7070", "grpc_management_port": "7071"}


def read_properties(path: Path) -> dict[str, str]:
    """A Java properties file as TorchServe's own launcher reads it: `key=value` lines."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    properties = {}
    for line in map(str.strip, lines):
        if line and not line.startswith(("#", "!")) and "=" in line:
            key, value = line.split("=", 1)
            properties[key.strip()] = value.strip()
    return properties


def archive_name(archive: Path) -> str:
    """The model's name in a `.mar` file's manifest."""
    return archive_model(archive)[0]


def archive_model(archive: Path) -> tuple[str, str]:
    """The model's name and version in a `.mar` file's manifest."""
    try:
        with zipfile.ZipFile(archive) as opened:
            manifest = json.loads(opened.read("MAR-INF/MANIFEST.json"))
        model = manifest["model"]
        return str(model["modelName"]), str(model.get("modelVersion", ""))
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{archive} is not a model archive: {error}") from None


@dataclass(frozen=True)
class ServeOptions:
    """What `ft-handler serve` was asked for; None leaves a choice to config.properties."""

    config: Path | None = None
    model_store: Path | None = None
    models: tuple[str, ...] = ()
    token_auth: bool | None = None
    model_api: bool | None = None
    port: int | None = None
    grpc_port: int | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)


def effective_properties(options: ServeOptions) -> dict[str, str]:
    """config.properties with the command line's choices put over it."""
    properties = read_properties(options.config) if options.config else {}
    here = options.config.parent if options.config else Path()
    if "model_store" in properties:
        # A store named in the file is relative to the file, wherever the server is started from.
        properties["model_store"] = str((here / properties["model_store"]).resolve())
    if options.model_store is not None:
        properties["model_store"] = str(options.model_store.resolve())
    properties.setdefault("model_store", str(Path("model_store").resolve()))
    for key, value in SAFE_DEFAULTS.items():
        properties.setdefault(key, value)
    if options.token_auth is not None:
        properties["disable_token_authorization"] = str(not options.token_auth).lower()
    if options.model_api is not None:
        properties["enable_model_api"] = str(options.model_api).lower()
    for offset, (key, default) in enumerate(ADDRESSES.items()):
        address = properties.setdefault(key, default)
        if options.port is not None:
            parts = urlsplit(address)
            properties[key] = f"{parts.scheme}://{parts.hostname}:{options.port + offset}"
    for offset, (key, default) in enumerate(GRPC_PORTS.items()):
        properties.setdefault(key, default)
        if options.grpc_port is not None:
            properties[key] = str(options.grpc_port + offset)
    properties.update(options.overrides)
    return properties


def wanted_models(options: ServeOptions, properties: Mapping[str, str]) -> dict[str, str]:
    """Name -> what TorchServe's `-m` takes, for the models to load at the start.

    Of several versions of a model all are loaded, the newest first, which makes it the default.
    """
    store = Path(properties["model_store"])
    if not store.is_dir():
        raise ConfigError(f"there is no model store at {store}; `ft-handler archive` makes one")
    listed = list(options.models)
    if not listed and ("load_models" in properties or "models" in properties):
        return {}  # config.properties decides
    if not listed:
        listed = [p.name for p in sorted(store.glob("*.mar"))]
        if not listed and properties.get("enable_model_api") != "true":
            raise ConfigError(
                f"no *.mar in {store} and the model API is off, so nothing could ever be served; "
                "make an archive with `ft-handler archive` or add --enable-model-api"
            )
    if listed == ["none"]:
        return {}
    wanted: dict[str, list[tuple[list[tuple[int, str]], str]]] = {}
    for item in listed:
        name, _, file = item.rpartition("=")
        path = store / file
        if not path.exists():
            raise ConfigError(f"no archive {file} in {store}")
        own, version = archive_model(path)
        wanted.setdefault(name or own, []).append((_rank(version), item))
    return {
        name: ",".join(item for _, item in sorted(items, reverse=True))
        for name, items in wanted.items()
    }


def _rank(version: str) -> list[tuple[int, str]]:
    """What versions are sorted by: 10.0 comes after 9.1, and 10.0-rc1 before 10.0."""
    parts = re.split(r"[.+-]", version)
    ranks = [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
    return [*ranks, (0, "")]


def sequence(models: Sequence[str]) -> tuple[str, ...]:
    """Models of repeated or comma-separated options."""
    return tuple(m for item in models for m in item.split(",") if m)
