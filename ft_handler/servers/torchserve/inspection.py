"""What a traced file, the folder `ft-handler trace` wrote or a .mar holds, read and never run."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
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
class Code:
    """A file whose content is run by a server that loads it.

    runs    when: what reads it as a program
    digest  SHA-256 of its content, as `sha256:HEX`
    """

    name: str
    runs: str
    digest: str


@dataclass(frozen=True)
class Inspection:
    """What is at a path: the traced file and, around it, files with their bytes and settings.

    digest   SHA-256 of the file at the path, as `sha256:HEX`; None of a folder
    handler  what an archive names for TorchServe to run, a file in it or a module's function
    code     what a server that loads it runs
    """

    kind: Literal["traced file", "traced folder", "archive"]
    path: Path
    size: int
    traced: TracedFile
    files: Mapping[str, int]
    settings: Mapping[str, Any] | None
    manifest: Mapping[str, Any] | None
    digest: str | None
    handler: str | None
    code: tuple[Code, ...]

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
            "digest": self.digest,
            "handler": self.handler,
            "code": [asdict(one) for one in self.code],
        }


#: How a file's name ends -> what runs it.
_RUN = {
    ".py": "imported, if the handler or another file asks for it",
    ".so": "loaded as a library: machine code",
    ".pt": "loaded by torch: a program, and pickles",
    ".pth": "loaded by torch, if a handler asks for it: pickles",
    ".bin": "loaded by torch, if a handler asks for it: pickles",
    ".pkl": "unpickled, if a handler asks for it",
    ".sh": "a shell script, run if a handler asks for it",
    ".whl": "a Python package, installed where requirements name it",
}
_REQUIREMENTS = "packages, installed if install_py_dep_per_model is true: their code runs"


def inspect(path: Path, digest: str | None = None) -> Inspection:
    """Read what a traced file, a traced folder or a .mar says of itself.

    digest  `sha256:HEX` that the file must have; it is checked before anything is read

    Nothing of it is loaded or executed. Raises ModelError when it is none of them or has another
    digest, and ConfigError when its settings cannot be read.
    """
    if digest is not None:
        check_digest(path, digest)
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
    found = _digest_of(path)
    code = (Code(path.name, _RUN[".pt"], found),)
    return Inspection("traced file", path, traced.size, traced, {}, None, None, found, None, code)


def check_digest(path: Path, digest: str) -> None:
    """Raises ModelError unless a file has this SHA-256, given as `sha256:HEX`."""
    if not re.fullmatch(r"sha256:[0-9a-fA-F]{64}", digest):
        raise ModelError("a digest is sha256: and 64 hexadecimal digits")
    if not path.is_file():
        raise ModelError(f"{path}: no such file; a folder has no digest")
    found = _digest_of(path)
    if found != digest.lower():
        raise ModelError(f"{path}: the digest is {found}, not {digest.lower()}")


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return _digest(file)


def _digest(file: IO[bytes]) -> str:
    found = hashlib.sha256()
    while part := file.read(1 << 20):
        found.update(part)
    return f"sha256:{found.hexdigest()}"


def _code(
    names: Iterable[str], opened: Callable[[str], IO[bytes]], requirements: str | None = None
) -> tuple[Code, ...]:
    """Those of the files that a server runs, in their order."""
    found = []
    for name in names:
        runs = _RUN.get(Path(name).suffix)
        if name == requirements:
            runs = _REQUIREMENTS
        if runs is not None:
            with opened(name) as file:
                found.append(Code(name, runs, _digest(file)))
    return tuple(found)


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
        "traced folder", path, sum(files.values()), traced, files, settings,
        manifest=None, digest=None, handler=None,
        code=_code(files, lambda name: (path / name).open("rb")),
    )  # fmt: skip


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
    handler, requirements = model.get("handler"), model.get("requirementsFile")
    return Inspection(
        "archive", path, path.stat().st_size, traced, files, settings, manifest, _digest_of(path),
        None if handler is None else str(handler), _code(files, opened.open, requirements),
    )  # fmt: skip


def _model_file(settings: Mapping[str, Any], unset: str = TRACED_FILE) -> str:
    """The traced file's name, which the handler's settings may choose."""
    section = settings.get("handler")
    named = section.get("model_file") if isinstance(section, Mapping) else None
    return named if isinstance(named, str) else unset
