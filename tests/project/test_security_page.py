"""What docs/security.md says of versions, defaults and limits is so."""

from __future__ import annotations

import importlib.util
import json
import re
import zipfile
from pathlib import Path

import pytest

from ft_handler.config import CoreSettings, settings_table
from ft_handler.servers.torchserve.properties import read_properties
from ft_handler.tasks import get, names

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/security.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def jar() -> zipfile.ZipFile:
    """TorchServe's jar."""
    spec = importlib.util.find_spec("ts")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("TorchServe is not installed")
    return zipfile.ZipFile(Path(spec.submodule_search_locations[0]) / "frontend/model-server.jar")


def row(name: str) -> str:
    """The table's row that begins with this."""
    (found,) = re.findall(rf"^\| {re.escape(name)}.*$", PAGE, re.M)
    return str(found)


def test_the_jar_holds_what_the_page_says(jar: zipfile.ZipFile) -> None:
    with jar:
        netty = jar.read("META-INF/io.netty.versions.properties").decode()
        versions = set(re.findall(r"^netty-codec\S*\.version=([\d.]+)\.Final", netty, re.M))
        assert len(versions) == 1
        assert versions.pop() in row("Netty, which speaks HTTP")
        grpc = re.search(rb"\x00\x06(1\.\d\d\.\d)", jar.read("io/grpc/internal/GrpcUtil.class"))
        assert grpc is not None
        assert f"gRPC {grpc[1].decode()}" in row("Netty inside gRPC")
        listed = jar.read("META-INF/DEPENDENCIES").decode()
        log4j = re.search(r"log4j-core:jar:([\d.]+)", listed)
        assert log4j is not None
        assert log4j[1] in row("Log4j")
        # A class that SnakeYAML has since 2.0, when it stopped making objects of any type.
        assert "org/yaml/snakeyaml/inspector/TagInspector.class" in jar.namelist()
        # Nothing gives up on a client that sends slowly, as the page says.
        own = [name for name in jar.namelist() if name.startswith("org/pytorch/serve/")]
        assert own
        for name in own:
            assert not re.search(rb"ReadTimeoutHandler|IdleStateHandler", jar.read(name)), name


def test_the_defaults_keep_to_this_machine() -> None:
    properties = read_properties(ROOT / "config.properties")
    hosts = {key: value for key, value in properties.items() if key.endswith("_address")}
    assert len(hosts) == 5
    for value in hosts.values():
        assert re.fullmatch(r"(http://)?127\.0\.0\.1(:\d+)?", value)
    assert properties["disable_token_authorization"] == "false"
    assert properties["enable_model_api"] == "false"
    assert properties["install_py_dep_per_model"] == "false"
    assert properties["token_expiration_min"] == str(7 * 24 * 60)
    assert re.search(properties["allowed_urls"], "http://127.0.0.1/x.mar") is None


def test_the_limits_are_those_of_the_settings() -> None:
    properties = read_properties(ROOT / "config.properties")
    for name, shown in (("max_request_size", "6,553,500"), ("job_queue_size", "1000"),
                        ("max_response_size", "33,554,432"),
                        ("default_response_timeout", "120")):  # fmt: skip
        assert properties[name] == shown.replace(",", "")
        assert re.search(rf"^\|[^|]*\| {shown}\b[^|]*\|[^|]*`{name}`", PAGE, re.M), name
    tables = [settings_table(CoreSettings), *(settings_table(get(n).settings) for n in names())]
    defaults = {name: default for table in tables for name, default, _ in table}
    for name in ("max_inputs_per_request", "max_text_chars", "max_texts", "max_labels",
                 "max_explained_words"):  # fmt: skip
        line = re.search(rf"^\|[^|]*\| ([\d,]+) \| `{name}`", PAGE, re.M)
        assert line is not None, name
        assert json.dumps(defaults[name]) == line[1].replace(",", "")
