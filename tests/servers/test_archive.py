"""Archives: what is inside, what is refused, and the stock archiver beside ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tiny import QUESTION_ANSWERING, SEQUENCE_CLASSIFICATION

from ft_handler import load_library
from ft_handler.cli.main import main
from ft_handler.errors import ConfigError, LibraryError, ModelError
from ft_handler.files import LIBRARY
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace
from ft_handler.servers.torchserve.archive import HANDLER, archive, handler_path

pytest.importorskip("transformers")
pytest.importorskip("model_archiver")


def traced(source: Path, output: Path, mode: str, **options: Any) -> Path:
    """Trace a local checkpoint."""
    return trace(TraceOptions(mode=mode, model_name_or_path=str(source), output=output, **options))


@pytest.fixture(scope="module")
def classifier(tiny_classification: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A traced classification model's folder."""
    output = tmp_path_factory.mktemp("traced") / "sentiment"
    return traced(tiny_classification, output, SEQUENCE_CLASSIFICATION)


@pytest.fixture
def folder(classifier: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(classifier, tmp_path / "sentiment"))


def names(mar: Path) -> set[str]:
    """The files in an archive."""
    with zipfile.ZipFile(mar) as file:
        assert file.testzip() is None
        return set(file.namelist())


def manifest(mar: Path) -> dict[str, Any]:
    """The archive's manifest, about the model."""
    with zipfile.ZipFile(mar) as file:
        model: dict[str, Any] = json.loads(file.read("MAR-INF/MANIFEST.json"))["model"]
        return model


def test_contents(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "a store, with [odd] name*"
    mar = archive(folder, version="2.5", export_path=store)
    assert mar == store / "sentiment-2.5.mar"
    assert names(mar) == {
        "traced_model.pt",
        LIBRARY,
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "index_to_name.json",
        "model-config.yaml",
        "MAR-INF/MANIFEST.json",
    } | ({"special_tokens_map.json"} & {p.name for p in folder.iterdir()})
    found = manifest(mar)
    assert found["handler"] == HANDLER
    assert found["modelName"] == "sentiment"
    assert found["modelVersion"] == "2.5"
    assert found["serializedFile"] == "traced_model.pt"
    assert found["configFile"] == "model-config.yaml"
    assert [p.name for p in store.iterdir()] == ["sentiment-2.5.mar"]


def test_versions_lie_in_one_store(folder: Path, tmp_path: Path) -> None:
    versions = ["1.0", "2.0", "2.0-rc1"]
    made = [archive(folder, "m", version, tmp_path / "store") for version in versions]
    assert len(set(made)) == len(made)
    assert made[0].name == "m.mar"
    for mar, version in zip(made, versions, strict=True):
        assert (manifest(mar)["modelName"], manifest(mar)["modelVersion"]) == ("m", version)
        with pytest.raises(ModelError, match="--force"):
            archive(folder, "m", version, tmp_path / "store")
    for wrong in ("../2.0", "", "2 0"):
        with pytest.raises(ModelError, match="version"):
            archive(folder, "m", wrong, tmp_path / "store")


def test_an_archive_is_replaced_only_by_force(folder: Path, tmp_path: Path) -> None:
    mar = archive(folder, "m", export_path=tmp_path)
    with pytest.raises(ModelError, match="--force"):
        archive(folder, "m", export_path=tmp_path)
    mar.write_bytes(b"old")
    assert archive(folder, "m", export_path=tmp_path, force=True) == mar
    assert "traced_model.pt" in names(mar)


def test_folders_of_others_in_the_temporary_folder_survive(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    bystander = tmp_path / "shared-tmp" / "m"
    bystander.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(bystander.parent))
    archive(folder, "m", export_path=tmp_path)
    assert bystander.is_dir()
    assert tempfile.tempdir == str(bystander.parent)


@pytest.mark.parametrize("name", ["traced_model.pt", "model-config.yaml"])
def test_what_is_missing_is_named(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).unlink()
    with pytest.raises((ModelError, ConfigError), match=name):
        archive(folder, export_path=tmp_path)
    assert not list(tmp_path.glob("*.mar"))


def test_a_missing_library_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match=r"/nowhere/libx\.so"):
        archive(folder, export_path=tmp_path, library=Path("/nowhere/libx.so"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("handler:\n  colour: red\n", "colour"),
        (
            "handler:\n  mode: question_answering\n",
            "the traced file is for sequence_classification",
        ),
        ("- a list\n", "must hold a mapping"),
        ("handler: {\n", "not YAML"),
    ],
)
def test_contradictory_settings_are_refused(
    text: str, words: str, folder: Path, tmp_path: Path
) -> None:
    (folder / "model-config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        archive(folder, export_path=tmp_path)


def test_names_and_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model name"):
        archive(folder, "../escape", export_path=tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        archive(tmp_path / "nothing", export_path=tmp_path)


def test_plain_torchscript_is_refused(tiny_qa: Path, tmp_path: Path) -> None:
    output = traced(tiny_qa, tmp_path / "ths", QUESTION_ANSWERING, model_type="ths")
    with pytest.raises(ConfigError, match="trace with --model_type thsext"):
        archive(output, export_path=tmp_path)


def test_the_traced_file_alone_may_be_packed(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.name not in ("traced_model.pt", "model-config.yaml"):
            path.unlink()
    found = names(archive(folder, export_path=tmp_path))
    assert found == {"traced_model.pt", "model-config.yaml", LIBRARY, "MAR-INF/MANIFEST.json"}


def test_question_answering_needs_no_labels(tiny_qa: Path, tmp_path: Path) -> None:
    output = traced(tiny_qa, tmp_path / "qa", QUESTION_ANSWERING)
    assert "index_to_name.json" not in names(archive(output, export_path=tmp_path))


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["archive", str(folder), "--model-name", "m", "--export-path", str(tmp_path)]
    for more, status in (([], 0), ([], 1), (["--force"], 0)):
        with pytest.raises(SystemExit) as end:
            main([*arguments, *more])
        assert (end.value.code or 0) == status
    captured = capsys.readouterr()
    assert f"wrote {tmp_path / 'm.mar'}" in captured.out
    assert captured.err.startswith("error: ")


def test_the_stock_archiver_works(folder: Path, tmp_path: Path) -> None:
    files = [folder / n for n in ("tokenizer.json", "index_to_name.json")] + [load_library()]
    done = subprocess.run(
        [
            sys.executable, "-m", "model_archiver.model_packaging",
            "--model-name", "stock", "--version", "1.0",
            "--serialized-file", str(folder / "traced_model.pt"),
            "--handler", str(handler_path()),
            "--config-file", str(folder / "model-config.yaml"),
            "--extra-files", ",".join(map(str, files)),
            "--export-path", str(tmp_path),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    mar = tmp_path / "stock.mar"
    assert names(mar) >= {"traced_model.pt", LIBRARY, "tokenizer.json", handler_path().name}
    assert manifest(mar)["handler"] == handler_path().name


def test_the_shim_hands_over_to_the_package(tmp_path: Path) -> None:
    """As a worker imports it: copied out of the package, as a top-level module."""
    copied = shutil.copy(handler_path(), tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        f"import {Path(copied).stem} as shim, ft_handler.entry; "
        "print(shim.handle is ft_handler.entry.handle)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
