"""A traced model's folder into a .mar, on the stock archiver's library."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ft_handler.config import RawSettings, model_yaml
from ft_handler.errors import EnvironmentProblem, LibraryError, ModelError
from ft_handler.files import (
    CONFIG_FILE,
    GEMM_TABLE,
    LABELS_FILE,
    LIBRARY,
    OLDER_CONFIG_FILE,
    TOKENIZER_SETTINGS_FILES,
    VOCABULARY_FILE,
)
from ft_handler.model.bundle import read_tokenizer
from ft_handler.native.library import candidates
from ft_handler.runtime import settle
from ft_handler.servers.torchserve.settings import TorchServeSettings

HANDLER = "ft_handler.entry:handle"
FIRST_VERSION = "1.0"
SHIM = Path(__file__).resolve().parent / "data" / "ft_handler_shim.py"
# Taken along when they are there.
OPTIONAL_FILES = (
    VOCABULARY_FILE,
    *TOKENIZER_SETTINGS_FILES,
    LABELS_FILE,
    OLDER_CONFIG_FILE,
    GEMM_TABLE,
)

_temporary_folder = threading.Lock()


def handler_path() -> Path:
    """The file for `torch-model-archiver --handler`: it imports the installed package's handler."""
    return SHIM


def archive(
    directory: Path,
    model_name: str | None = None,
    version: str = FIRST_VERSION,
    export_path: Path = Path("model_store"),
    force: bool = False,
    library: Path | None = None,
) -> Path:
    """Pack the folder that `ft-handler trace` wrote; returns the .mar's path.

    The name defaults to the folder's; versions but the first are in the file's name, so that they
    lie in one store. The library travels in the archive. The archive appears
    whole or not at all. Raises ModelError, ConfigError or LibraryError naming what is missing or
    contradictory.
    """
    try:
        from model_archiver import model_packaging_utils as utils
        from model_archiver.model_archiver_config import ModelArchiverConfig
        from model_archiver.model_archiver_error import ModelArchiverError
        from model_archiver.model_packaging import generate_model_archive
    except ImportError as error:
        raise EnvironmentProblem(
            "archives need torch-model-archiver: pip install 'ft-handler[serve]'"
        ) from error
    name = model_name or directory.resolve().name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ModelError(f"model name {name!r}: letters, digits, '_', '-' and '.' only")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", version):
        raise ModelError(f"version {version!r}: letters, digits, '_', '-', '+' and '.' only")
    target = export_path / file_name(name, version)
    if target.exists() and not force:
        raise ModelError(f"{target} is there already; --force replaces it")
    model_file, extra = contents(directory, library)
    export_path.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        # In the store, so that the finished archive only has to be renamed.
        tempfile.TemporaryDirectory(prefix=".archive-", dir=export_path) as out,
    ):
        files, work = Path(scratch) / "files", Path(scratch) / "work"
        files.mkdir()
        work.mkdir()
        # The archiver splits its list of files at commas and expands wildcards; links in a folder
        # of our own spare user paths from both.
        for file in extra:
            (files / file.name).symlink_to(file.resolve())
        with _archiver_folder(work), _dotted_handler(utils.model_handlers):
            try:
                generate_model_archive(
                    ModelArchiverConfig(
                        model_name=name,
                        handler=HANDLER,
                        version=version,
                        serialized_file=str(model_file),
                        extra_files=str(files),
                        config_file=str(directory / CONFIG_FILE),
                        export_path=out,
                        # Weights hardly compress, and a stored archive is unpacked faster.
                        archive_format="zip-store",
                    )
                )
            except ModelArchiverError as error:
                raise ModelError(f"torch-model-archiver: {error}") from error
        os.replace(Path(out) / f"{name}.mar", target)
    return target


def file_name(name: str, version: str) -> str:
    """The archive's file: `NAME.mar` for the first version, so that later ones lie beside it."""
    return f"{name}.mar" if version == FIRST_VERSION else f"{name}-{version}.mar"


def contents(directory: Path, library: Path | None = None) -> tuple[Path, list[Path]]:
    """The traced file and the files that go beside it; raises when one is missing, by name."""
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such folder; `ft-handler trace --output` writes one")
    settings = directory / CONFIG_FILE
    if not settings.is_file():
        raise ModelError(f"{directory} lacks {CONFIG_FILE}")
    raw = RawSettings.of_model_dir(directory, model_yaml(directory))
    settled = settle(directory, raw, (TorchServeSettings,))
    tokenizer = directory / settled.core.tokenizer_file
    if not tokenizer.is_file() and read_tokenizer(settled.path) is None:
        raise ModelError(f"{directory} lacks {tokenizer.name}, and the traced file carries none")
    optional = (tokenizer.name, *OPTIONAL_FILES)
    files = [directory / name for name in optional if (directory / name).is_file()]
    return settled.path, [*files, find_library(library)]


def find_library(library: Path | None = None) -> Path:
    """The library's file, without loading it; raises LibraryError listing the paths tried."""
    # A folder that is named is wanted alone here, as a file is.
    named = library / LIBRARY if library is not None and library.is_dir() else library
    tried = candidates(named)
    for path in tried:
        if path.is_file():
            if path.name != LIBRARY:
                raise LibraryError(f"{path}: the archive's library must be named {LIBRARY}")
            return path
    raise LibraryError(f"{LIBRARY} not found; tried {', '.join(map(str, tried))}")


@contextmanager
def _archiver_folder(folder: Path) -> Iterator[None]:
    """Give the archiver a temporary folder of its own: it deletes `$TMPDIR/<model name>`."""
    with _temporary_folder:
        before = tempfile.tempdir
        tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = before


@contextmanager
def _dotted_handler(known: dict[str, str]) -> Iterator[None]:
    """Let the archiver take the installed package's handler by its dotted name."""
    known[HANDLER] = "text"
    try:
        yield
    finally:
        known.pop(HANDLER, None)
