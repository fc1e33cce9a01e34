"""Finding and loading the library, and what importing the package costs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import ft_handler
from ft_handler.errors import LibraryError
from ft_handler.native import library


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not loaded the library yet."""
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)


def in_fresh_python(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys, ft_handler; "
        "print([m for m in ('torch', 'numpy', 'transformers', 'typer') if m in sys.modules])"
    )
    assert in_fresh_python(code) == "[]"


def test_loading_models_needs_no_transformers_and_no_cuda() -> None:
    code = (
        "import sys, torch, ft_handler; ft_handler.load_model; ft_handler.load_library(); "
        "print([m for m in ('transformers', 'peft', 'typer') if m in sys.modules], "
        "torch.cuda.is_initialized())"
    )
    assert in_fresh_python(code) == "[] False"


def test_exported_names() -> None:
    assert sorted(ft_handler.__all__) == sorted({*ft_handler._HOMES, "__version__"})
    for name in ft_handler.__all__:
        assert getattr(ft_handler, name) is not None
    assert set(ft_handler.__all__) <= set(dir(ft_handler))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ft_handler.nothing


def test_loads_once_from_many_threads() -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(library.load_library())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert library.loaded_library() == found[0]
    assert library.build_info()["version"] == ft_handler.__version__


def test_the_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    packaged = Path(ft_handler.__file__).parent / "lib" / library.LIBRARY
    assert library.candidates() == [packaged]
    assert library.candidates(tmp_path) == [tmp_path / library.LIBRARY, packaged]
    assert library.candidates(tmp_path / "other.so") == [tmp_path / "other.so"]
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(tmp_path))
    assert library.candidates("elsewhere") == [tmp_path / library.LIBRARY]
    monkeypatch.setenv(library.LIBRARY_VARIABLE, "/a/b.so")
    assert library.candidates() == [Path("/a/b.so")]


@pytest.mark.usefixtures("unloaded")
def test_a_missing_library_lists_the_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "package" / "native" / "library.py"))
    with pytest.raises(LibraryError) as caught:
        library.load_library(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / library.LIBRARY) in message
    assert str(tmp_path / "package" / "lib" / library.LIBRARY) in message
    assert "pip install ." in message
    assert library.LIBRARY_VARIABLE in message


@pytest.mark.usefixtures("unloaded")
def test_a_broken_library_is_refused_in_words(tmp_path: Path) -> None:
    broken = tmp_path / library.LIBRARY
    broken.write_bytes(b"not a library")
    with pytest.raises(LibraryError, match="does not load"):
        library.load_library(broken)


@pytest.mark.usefixtures("unloaded")
def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(LibraryError, match=r"2\.9\.1\+cu128 is too old"):
        library.load_library()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        ({"version": "0.0.0", "torch_build": "2.13.0"}, "is of ft_handler 0.0.0"),
        ({"version": ft_handler.__version__, "torch_build": "1.13.1"}, "built on torch 1.13.1"),
    ],
)
def test_another_build_is_refused(build: dict[str, str], words: str) -> None:
    with pytest.raises(LibraryError, match=words):
        library.check_build(build, Path("lib.so"))


@pytest.mark.parametrize(
    ("archs", "capability", "served"),
    [
        (["8.0", "9.0"], (9, 0), True),
        (["8.0"], (8, 6), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (12, 0), True),
        (["12.0+PTX"], (9, 0), False),
        (["9.0a"], (9, 0), True),
        ([], (9, 0), False),
    ],
)
def test_compute_capabilities(archs: list[str], capability: tuple[int, int], served: bool) -> None:
    assert library.serves_capability(archs, capability) is served


def test_a_gpu_without_code_for_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library.load_library()
    device = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LibraryError, match="sees no CUDA GPU"):
        library.check_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(library, "build_info", lambda: {"cuda_archs": []})
    with pytest.raises(LibraryError, match="built without CUDA"):
        library.check_device(device)
    monkeypatch.setattr(library, "build_info", lambda: {"cuda_archs": ["7.5", "8.0"]})
    with pytest.raises(LibraryError, match=r"7\.5, 8\.0, and cuda:0 has 9\.0"):
        library.check_device(device)
    monkeypatch.setattr(library, "build_info", lambda: {"cuda_archs": ["9.0"]})
    library.check_device(device)


def test_build_info_is_complete() -> None:
    info = library.build_info()
    assert json.loads(json.dumps(info)) == info
    for name in ("version", "torch_build", "cpu_isa", "cpu_isas", "cuda_archs"):
        assert name in info
