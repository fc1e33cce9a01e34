"""`ft-handler inspect`: traced files, their folders and archives, read and never run."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from fakes import model_info

from ft_handler.cli.main import main
from ft_handler.errors import ConfigError, ModelError
from ft_handler.model.info import METADATA_FILE, ModelInfo
from ft_handler.servers.torchserve.inspection import MANIFEST, inspect

SETTINGS = "minWorkers: 1\nhandler:\n  max_length: 64\n  length_buckets: [16, 64]\n"


def packed(files: Mapping[str, str | bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file of these files."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    return out.getvalue()


def traced_file(
    info: ModelInfo | None = None, extra: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """A traced file without a model: what `inspect` may read of it, and code it must not run."""
    metadata = (info or model_info()).to_json()
    return packed(
        {
            "traced_model/data.pkl": b"cos\nsystem\n(S'exit 1'\ntR.",
            f"traced_model/extra/{METADATA_FILE}": metadata,
            **{f"traced_model/extra/{name}": content for name, content in extra.items()},
        }
    )


def manifest(**model: str) -> str:
    named = {
        "modelName": "sentiment",
        "serializedFile": "traced_model.pt",
        "configFile": "model-config.yaml",
        "handler": "ft_handler.entry:handle",
        "modelVersion": "1.0",
        **model,
    }
    return json.dumps({"archiverVersion": "0.12.0", "model": named})


def archive(path: Path, compression: int = zipfile.ZIP_STORED, **changes: str | bytes) -> Path:
    """A .mar; `changes` are by what a file is."""
    files: dict[str, str | bytes] = {
        MANIFEST: changes.get("manifest", manifest()),
        "traced_model.pt": changes.get("model", traced_file()),
        "model-config.yaml": changes.get("settings", SETTINGS),
        "tokenizer.json": "{}",
    }
    path.write_bytes(packed(files, compression))
    return path


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def shown(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(path), *options])
    assert not end.value.code
    return capsys.readouterr().out


def as_json(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(shown(path, capsys, "--json"))
    return document


def metadata(info: ModelInfo) -> dict[str, object]:
    """The metadata as JSON gives it back: names of keys are strings."""
    document: dict[str, object] = json.loads(json.dumps(dataclasses.asdict(info)))
    return document


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_a_traced_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], has_tokenizer: bool
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(traced_file(extra={"tokenizer.json": "{}"} if has_tokenizer else {}))
    size = path.stat().st_size
    assert as_json(path, capsys) == {
        "kind": "traced file",
        "path": str(path),
        "size": size,
        "traced_file": {
            "name": "model.pt",
            "size": size,
            "has_tokenizer": has_tokenizer,
            "metadata": metadata(model_info()),
        },
        "files": {},
        "settings": None,
        "manifest": None,
        "digest": sha256(path.read_bytes()),
        "handler": None,
        "code": [
            {
                "name": "model.pt",
                "runs": "loaded by torch: a program, and pickles",
                "digest": sha256(path.read_bytes()),
            }
        ],
    }


def test_a_traced_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = model_info("question_answering")
    (tmp_path / "other.pt").write_bytes(traced_file(info))
    (tmp_path / "model-config.yaml").write_text("handler:\n  model_file: other.pt\n")
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    (tmp_path / "a folder").mkdir()
    document = as_json(tmp_path, capsys)
    assert document["kind"] == "traced folder"
    assert document["traced_file"]["name"] == "other.pt"
    assert document["traced_file"]["metadata"] == metadata(info)
    assert document["settings"] == {"handler": {"model_file": "other.pt"}}
    assert list(document["files"]) == ["model-config.yaml", "other.pt", "vocab.txt"]
    assert document["files"]["vocab.txt"] == 6
    assert document["size"] == sum(document["files"].values())


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str], compression: int) -> None:
    path = archive(tmp_path / "sentiment.mar", compression)
    document = as_json(path, capsys)
    assert document["kind"] == "archive"
    assert document["size"] == path.stat().st_size
    assert document["traced_file"]["metadata"] == metadata(model_info())
    assert document["traced_file"]["size"] == len(traced_file())
    assert document["manifest"] == json.loads(manifest())
    assert document["settings"]["handler"] == {"max_length": 64, "length_buckets": [16, 64]}
    assert document["files"]["tokenizer.json"] == 2
    assert set(document["files"]) == {
        MANIFEST, "traced_model.pt", "model-config.yaml", "tokenizer.json"
    }  # fmt: skip


def test_an_archive_of_ours_and_its_folder(
    tiny_classification: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the other commands write is what this one reads."""
    pytest.importorskip("transformers")
    pytest.importorskip("model_archiver")
    folder = tmp_path / "sentiment"
    for arguments in (
        ["trace", "--mode", "sequence_classification", "--output", str(folder),
         "--model_name_or_path", str(tiny_classification)],
        ["archive", str(folder), "--export-path", str(tmp_path)],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert not end.value.code
    capsys.readouterr()
    inner, outer, alone = (
        as_json(path, capsys)
        for path in (folder, tmp_path / "sentiment.mar", folder / "traced_model.pt")
    )
    assert inner["traced_file"] == outer["traced_file"] == alone["traced_file"]
    assert inner["settings"] == outer["settings"]
    assert inner["traced_file"]["metadata"]["mode"] == "sequence_classification"
    assert outer["manifest"]["model"]["modelName"] == "sentiment"


def test_the_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = {0: "[red]good[/red]", 1: "\x1b[2J"}
    model = traced_file(model_info(labels=hostile, num_labels=2))
    path = archive(tmp_path / "a.mar", model=model)
    lines = [line.split(maxsplit=1) for line in shown(path, capsys).splitlines()]
    rows = {name: rest[0].strip() if rest else "" for name, *rest in lines}
    assert rows["mode"] == "sequence_classification"
    assert rows["hidden_size"] == "64"
    # As it stands, and nothing a terminal would obey.
    assert rows["labels"] == "0: [red]good[/red], 1: �[2J"
    assert rows["tokenizer"] == "not inside the traced file"
    assert rows["manifest.model.modelName"] == "sentiment"
    assert rows["settings.handler.max_length"] == "64"
    assert ["file", "tokenizer.json (2 bytes)"] in [[part.strip() for part in one] for one in lines]


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        inspect(tmp_path / "nowhere.pt")
    with pytest.raises(ModelError, match=r"no model-config\.yaml in it"):
        inspect(tmp_path)
    path = tmp_path / "x"
    path.write_text("not a zip")
    with pytest.raises(ModelError, match=r"neither a traced file nor a \.mar archive"):
        inspect(path)
    path.write_bytes(packed({"x/data.pkl": ""}))
    with pytest.raises(ModelError, match=f"carries no {METADATA_FILE}"):
        inspect(path)
    (tmp_path / "model-config.yaml").write_text("handler:\n  model_file: ../x\n")
    with pytest.raises(ModelError, match=r"names the model \.\./x, which is not there"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"manifest": "{"}, ModelError, "names no traced file"),
        ({"manifest": '{"model": "x"}'}, ModelError, "names no traced file"),
        ({"manifest": manifest(serializedFile="no.pt")}, ModelError, r"names no\.pt, which is not"),
        ({"manifest": manifest(configFile="no.yaml")}, ModelError, r"names no\.yaml, which is not"),
        ({"settings": "handler: {model_file: no.pt}"}, ModelError, r"names no\.pt, which is not"),
        ({"model": b"cut short"}, ModelError, r"a\.mar: traced_model\.pt: not a TorchScript file"),
        ({"model": packed({})}, ModelError, r"a\.mar: traced_model\.pt: carries no"),
        ({"settings": "a: b: c"}, ConfigError, r"model-config\.yaml is not YAML"),
        ({"settings": "- a list"}, ConfigError, "must hold a mapping"),
    ],
)
def test_a_broken_archive_is_said(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        inspect(archive(tmp_path / "a.mar", **changes))


def test_what_an_archive_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.mar"
    files: dict[str, str | bytes] = {
        MANIFEST: manifest(handler="own.py", requirementsFile="needs.txt"),
        "traced_model.pt": traced_file(),
        "model-config.yaml": SETTINGS,
        "own.py": "raise SystemExit('run')",
        "folder/other.py": "",
        "libx.so": b"\x7fELF",
        "needs.txt": "a-package",
        "notes.txt": "nothing",
    }
    path.write_bytes(packed(files))
    document = as_json(path, capsys)
    assert document["handler"] == "own.py"
    assert document["digest"] == sha256(path.read_bytes())
    assert {one["name"] for one in document["code"]} == {
        "traced_model.pt", "own.py", "folder/other.py", "libx.so", "needs.txt"
    }  # fmt: skip
    for one in document["code"]:
        content = files[one["name"]]
        assert one["digest"] == sha256(content.encode() if isinstance(content, str) else content)
    text = shown(path, capsys)
    assert "own.py: the handler" in text
    assert "needs.txt: packages, installed if install_py_dep_per_model is true" in text
    # A folder says what it holds, and has no digest of its own.
    (tmp_path / "model-config.yaml").write_text(SETTINGS)
    (tmp_path / "traced_model.pt").write_bytes(traced_file())
    document = as_json(tmp_path, capsys)
    assert document["digest"] is None
    assert {one["name"] for one in document["code"]} == {"traced_model.pt"}


def test_a_digest_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = archive(tmp_path / "a.mar")
    right = sha256(path.read_bytes())
    assert right in shown(path, capsys, "--digest", right.upper().replace("SHA256", "sha256"))
    for digest, words in (
        (sha256(b"another"), f"the digest is {right}, not {sha256(b'another')}"),
        (right[:-1], "a digest is sha256: and 64 hexadecimal digits"),
        (right.removeprefix("sha256:"), "a digest is sha256:"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["inspect", str(path), "--digest", digest])
        assert end.value.code == 1
        said = capsys.readouterr()
        assert words in said.err
        assert not said.out
    with pytest.raises(ModelError, match="a folder has no digest"):
        inspect(tmp_path, right)
    # Checked first: what has another digest is not even opened as an archive.
    path.write_text("not an archive")
    with pytest.raises(ModelError, match="the digest is"):
        inspect(path, right)
