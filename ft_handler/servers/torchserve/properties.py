"""TorchServe's settings: config.properties with the command line's choices over it."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ft_handler.errors import ConfigError
from ft_handler.servers.torchserve import envelope, propertyfile

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


#: How TorchServe reads an address: no IPv6 literal, no path, no slash at the end.
_ADDRESS = re.compile(r"(https?)://([^:/^]+)(?::([0-9]+))?|unix:(/.*)")
_VARIABLE = re.compile(r"\$\$([^$]+[^$])\$\$")


def read_properties(path: Path) -> dict[str, str]:
    """A properties file as Java reads it; raises ConfigError naming the file.

    Java takes the bytes for Latin-1; a file that is UTF-8 is read as that.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    try:
        return propertyfile.parse(text)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Address:
    """Where one of TorchServe's HTTP interfaces listens: host and port, or a Unix socket's path."""

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"{self.scheme}://{self.host}:{self.port}"


def address(key: str, value: str) -> Address:
    """An address as TorchServe understands it; raises ConfigError naming the key."""
    match = _ADDRESS.fullmatch(value)
    if match is None:
        why = (
            "; TorchServe reads no IPv6 address here, but a host name that stands for one"
            if "[" in value
            else ""
        )
        raise ConfigError(
            f"{key} is {value!r}, not http://HOST:PORT, https://HOST:PORT or unix:/PATH{why}"
        )
    scheme, host, port, path = match.groups()
    if path:
        return Address("unix", path=path)
    default = 443 if scheme == "https" else 80
    return Address(scheme, host, default if port is None else port_number(key, port))


def port_number(key: str, value: str) -> int:
    """A TCP port; raises ConfigError naming the key."""
    if not re.fullmatch(r"[0-9]{1,5}", value) or not 0 < int(value) < 1 << 16:
        raise ConfigError(f"{key}: {value!r} is no port; 1 to 65535 are")
    return int(value)


def archive_model(archive: Path) -> tuple[str, str]:
    """The model's name and version in a `.mar` file's manifest."""
    try:
        with zipfile.ZipFile(archive) as opened:
            manifest = json.loads(opened.read("MAR-INF/MANIFEST.json"))
        model = manifest["model"]
        return str(model["modelName"]), str(model.get("modelVersion", ""))
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{archive} is not a model archive: {error}") from None


def default_config() -> Path | None:
    """config.properties of the current folder, where there is one."""
    return path if (path := Path("config.properties")).exists() else None


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


def effective_properties(
    options: ServeOptions, environment: Mapping[str, str] | None = None
) -> dict[str, str]:
    """config.properties with the command line's choices put over it.

    `environment` is the server's; the file may name its variables. Raises ConfigError for
    what could never serve: an address or port that is none, an envelope.
    """
    environment = environment or {}
    properties = read_properties(options.config) if options.config else {}
    for key, value in properties.items():
        # TorchServe puts variables in; a blank at the end is never meant.
        properties[key] = _VARIABLE.sub(lambda m: environment.get(m[1], m[0]), value).strip()
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
        found = address(key, properties.setdefault(key, default))
        if options.port is not None:
            found = _moved(key, found, options.port + offset)
            properties[key] = str(found)
    for offset, (key, default) in enumerate(GRPC_PORTS.items()):
        properties.setdefault(key, default)
        if options.grpc_port is not None:
            properties[key] = str(options.grpc_port + offset)
    properties.update(options.overrides)
    for key in ADDRESSES:
        found = address(key, properties[key])
        if found.path and key == "management_address":
            raise ConfigError(
                f"{key} is a Unix socket, but `ft-handler serve` asks there whether workers are "
                "ready and needs a port; plain torchserve takes it"
            )
        if found.path and properties.get("use_native_io", "true").lower() != "true":
            raise ConfigError(f"{key} is a Unix socket, and those need use_native_io=true")
    for key in GRPC_PORTS:
        port_number(key, properties[key])
    chosen = properties.get("service_envelope")
    if properties.get("enable_envvars_config", "false").lower() == "true":
        chosen = environment.get("TS_SERVICE_ENVELOPE") or chosen
    envelope.refuse(chosen)
    return properties


def shown(key: str, value: str, path: str) -> str:
    """What a user types after `curl` to ask for a path of one of TorchServe's interfaces."""
    found = address(key, value)
    return f"--unix-socket {found.path} http://localhost{path}" if found.path else f"{found}{path}"


def _moved(key: str, found: Address, port: int) -> Address:
    """The address on another port; a Unix socket has none, so only the first may not be one."""
    if not found.path:
        return replace(found, port=port_number("--port", str(port)))
    if key == next(iter(ADDRESSES)):
        raise ConfigError(f"--port cannot move {key}, which is the Unix socket {found.path}")
    return found


def wanted_models(options: ServeOptions, properties: Mapping[str, str]) -> dict[str, str]:
    """Name -> what TorchServe's `-m` takes, for the models to load at the start.

    Of several versions of a model all are loaded, the newest first, which makes it the default.
    """
    store = Path(properties["model_store"])
    if not store.is_dir():
        raise ConfigError(f"there is no model store at {store}; `ft-handler archive` makes one")
    listed = list(options.models)
    if "model_snapshot" in properties:
        # TorchServe restores the snapshot and looks at nothing else.
        if listed:
            raise ConfigError(
                "the settings are a snapshot, which says itself which models are loaded: leave "
                "--models out, or name another file with --config"
            )
        return {}
    if not listed and any(key in properties for key in ("load_models", "models")):
        return {}  # config.properties decides
    everything = [name.lower() for name in listed] == ["all"]
    if not listed or everything:
        listed = [p.name for p in sorted(store.glob("*.mar"))]
        if not listed and properties.get("enable_model_api") != "true":
            raise ConfigError(
                f"no *.mar in {store} and the model API is off, so nothing could ever be served; "
                "make an archive with `ft-handler archive` or add --enable-model-api"
            )
    if [name.lower() for name in listed] == ["none"]:
        return {}
    wanted: dict[str, list[tuple[list[tuple[int, str]], str]]] = {}
    for item in listed:
        name, _, file = item.rpartition("=")
        if item.lower() in ("all", "none"):
            raise ConfigError(f"--models {item} stands alone, without other models beside it")
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
