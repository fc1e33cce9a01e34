"""What a traced file, the folder `ft-handler trace` wrote or a .mar holds, read and never run."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from ft_handler.config import model_yaml, parse_yaml
from ft_handler.errors import ModelError
from ft_handler.files import CONFIG_FILE, METADATA_FILE, TOKENIZER_FILE, TRACED_FILE
from ft_handler.model.info import ModelInfo

MANIFEST = "MAR-INF/MANIFEST.json"


@dataclass(frozen=True)
class TracedFile:
    """A traced file: its name, bytes, metadata, and whether it carries a tokenizer inside."""

    name: str
    size: int
    info: ModelInfo
    has_tokenizer: bool


@dataclass(frozen=True)
class Inspection:
    """What is at a path: the traced file and, around it, files with their bytes and settings."""

    kind: Literal["traced file", "traced folder", "archive"]
    path: Path
    size: int
    traced: TracedFile
    files: Mapping[str, int]
    settings: Mapping[str, Any] | None
    manifest: Mapping[str, Any] | None

    def document(self) -> dict[str, object]:
        """The same as JSON values; sizes are in bytes."""
        return {
            "kind": self.kind,
            "path": str(self.path),
            "size": self.size,
            "traced_file": {
                "name": self.traced.name,
                "size": self.traced.size,
                "has_tokenizer": self.traced.has_tokenizer,
                "metadata": asdict(self.traced.info),
            },
            "files": dict(self.files),
            "settings": self.settings,
            "manifest": self.manifest,
        }


def inspect(path: Path) -> Inspection:
    """Read what a traced file, a traced folder or a .mar says of itself.

    Nothing of it is loaded or executed. Raises ModelError when it is none of them, and ConfigError
    when its settings cannot be read.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file or folder; `ft-handler trace` makes one")
    try:
        with zipfile.ZipFile(path) as opened:
            if MANIFEST in opened.namelist():
                return _archive(path, opened)
    except zipfile.BadZipFile as error:
        raise ModelError(
            f"{path}: neither a traced file nor a .mar archive, or cut short"
        ) from error
    with path.open("rb") as file:
        traced = _traced(file, path.name, path.stat().st_size, str(path))
    return Inspection("traced file", path, traced.size, traced, {}, None, None)


def _traced(file: IO[bytes], name: str, size: int, origin: str) -> TracedFile:
    try:
        with zipfile.ZipFile(file) as opened:
            # TorchScript keeps extra files in one folder under the file's own name.
            extra = {n.partition("/extra/")[2]: n for n in opened.namelist() if "/extra/" in n}
            if METADATA_FILE not in extra:
                raise ModelError(
                    f"{origin}: carries no {METADATA_FILE}; it was not made by `ft-handler trace`"
                )
            info = ModelInfo.from_json(opened.read(extra[METADATA_FILE]), origin)
    except zipfile.BadZipFile as error:
        raise ModelError(f"{origin}: not a TorchScript file, or cut short") from error
    return TracedFile(name, size, info, TOKENIZER_FILE in extra)


def _folder(path: Path) -> Inspection:
    files = {f.name: f.stat().st_size for f in sorted(path.iterdir()) if f.is_file()}
    if CONFIG_FILE not in files:
        raise ModelError(f"{path}: no {CONFIG_FILE} in it; `ft-handler trace --output` writes one")
    settings = model_yaml(path)
    name = _model_file(settings)
    if name not in files:
        raise ModelError(f"{path}: {CONFIG_FILE} names the model {name}, which is not there")
    with (path / name).open("rb") as file:
        traced = _traced(file, name, files[name], str(path / name))
    return Inspection(
        "traced folder", path, sum(files.values()), traced, files, settings, manifest=None
    )


def _archive(path: Path, opened: zipfile.ZipFile) -> Inspection:
    try:
        manifest: Any = json.loads(opened.read(MANIFEST))
        model = manifest["model"]
        name = model["serializedFile"]
        settings_name = model.get("configFile")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: {MANIFEST} names no traced file (serializedFile)") from error
    files = {entry.filename: entry.file_size for entry in opened.infolist() if not entry.is_dir()}
    for wanted in (name, settings_name):
        if wanted is not None and wanted not in files:
            raise ModelError(f"{path}: {MANIFEST} names {wanted}, which is not in the archive")
    settings = None
    if settings_name is not None:
        settings = parse_yaml(opened.read(settings_name), f"{path}: {settings_name}")
        name = _model_file(settings, name)
        if name not in files:
            raise ModelError(f"{path}: {settings_name} names {name}, which is not in the archive")
    with opened.open(name) as file:
        traced = _traced(file, name, files[name], f"{path}: {name}")
    return Inspection("archive", path, path.stat().st_size, traced, files, settings, manifest)


def _model_file(settings: Mapping[str, Any], unset: str = TRACED_FILE) -> str:
    """The traced file's name, which the handler's settings may choose."""
    section = settings.get("handler")
    named = section.get("model_file") if isinstance(section, Mapping) else None
    return named if isinstance(named, str) else unset
