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


def test_the_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    packaged = Path(ft_handler.__file__).parent / "lib" / library.LIBRARY
    assert library.candidates() == [packaged]
    assert library.candidates(tmp_path) == [packaged, tmp_path / library.LIBRARY]
    assert library.candidates(tmp_path / "other.so") == [tmp_path / "other.so"]
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(tmp_path))
    assert library.candidates("elsewhere") == [tmp_path / library.LIBRARY]
    monkeypatch.setenv(library.LIBRARY_VARIABLE, "/a/b.so")
    assert library.candidates() == [Path("/a/b.so")]


@pytest.fixture
def places(unloaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Where the package's library and an archive's would be; both are missing."""
    monkeypatch.setattr(library, "__file__", str(tmp_path / "package" / "native" / "library.py"))
    packaged = tmp_path / "package" / "lib" / library.LIBRARY
    packaged.parent.mkdir(parents=True)
    archive = tmp_path / "archive"
    archive.mkdir()
    return packaged, archive / library.LIBRARY


def fake(path: Path, marker: str) -> None:
    """A file that only has a library's marker, somewhere in the middle."""
    path.write_bytes(b"\x7fELF" + bytes(5000) + marker.encode() + bytes(300))


CPU_2 = "ft_handler library interface=1-2 cuda= "
CUDA_2 = "ft_handler library interface=1-2 cuda=8.0;9.0+PTX "
CUDA_3 = "ft_handler library interface=2-3 cuda=9.0 "
SILENT = "a library of interface 1 has no marker"


def test_a_missing_library_lists_the_paths(places: tuple[Path, Path]) -> None:
    packaged, archived = places
    with pytest.raises(LibraryError) as caught:
        library.load_library(archived.parent)
    message = str(caught.value)
    assert f"{archived} (not found)" in message
    assert f"{packaged} (not found)" in message
    assert "pip install ." in message
    assert library.LIBRARY_VARIABLE in message


@pytest.mark.parametrize(
    ("packaged", "archived", "interface", "cuda", "chosen"),
    [
        (CPU_2, CPU_2, 2, False, "packaged"),
        (CPU_2, CPU_2, 1, False, "packaged"),
        # An archive of a later package, and one of an earlier.
        (CPU_2, CUDA_3, 3, False, "archived"),
        (CUDA_3, SILENT, 1, False, "archived"),
        # An archive made on a machine without a GPU, and a package installed on one.
        (CUDA_2, CPU_2, 2, True, "packaged"),
        (CPU_2, CUDA_2, 2, True, "archived"),
        (CPU_2, SILENT, 1, True, "archived"),
        (None, CPU_2, 2, False, "archived"),
        (CPU_2, None, 2, False, "packaged"),
    ],
)
def test_the_first_that_fits_is_chosen(
    places: tuple[Path, Path],
    packaged: str | None,
    archived: str | None,
    interface: int,
    cuda: bool,
    chosen: str,
) -> None:
    for place, marker in zip(places, (packaged, archived), strict=True):
        if marker is not None:
            fake(place, marker)
    found = library.find_library(places[1].parent, interface=interface, cuda=cuda)
    assert found == places[chosen == "archived"]


def test_those_that_do_not_fit_are_listed_with_the_reason(places: tuple[Path, Path]) -> None:
    packaged, archived = places
    fake(packaged, CPU_2)
    fake(archived, SILENT)
    with pytest.raises(LibraryError) as caught:
        library.find_library(archived.parent, interface=2, cuda=True)
    message = str(caught.value)
    assert f"{packaged} was built without CUDA" in message
    assert f"{archived} has interface 1 of the ops, interface 2 is needed" in message
    assert "FT_HANDLER_CUDA=1" in message
    fake(archived, CUDA_3)
    with pytest.raises(LibraryError, match="has interface 2 to 3 of the ops, interface 1 is"):
        library.find_library(archived, interface=1)


def test_a_named_file_is_wanted_alone(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged, archived = places
    fake(packaged, CUDA_2)
    fake(archived, CPU_2)
    with pytest.raises(LibraryError) as caught:
        library.find_library(archived, interface=2, cuda=True)
    assert str(packaged) not in str(caught.value)
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(archived))
    with pytest.raises(LibraryError, match="was built without CUDA"):
        library.find_library(interface=2, cuda=True)
    assert library.find_library(interface=2) == archived


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    path = tmp_path / library.LIBRARY
    fake(path, CUDA_2)
    assert library.read_marker(path) == library.Marker(1, 2, ("8.0", "9.0+PTX"))
    fake(path, CPU_2)
    assert library.read_marker(path) == library.Marker(1, 2, ())
    for content in (b"", b"not a library", b"ft_handler library interface=many"):
        path.write_bytes(content)
        assert library.read_marker(path) == library.UNMARKED
    with pytest.raises(LibraryError, match="cannot be read"):
        library.read_marker(tmp_path / "nothing.so")


def test_the_file_says_what_the_loaded_library_says() -> None:
    path, info = library.load_library(), library.build_info()
    marker = library.read_marker(path)
    assert [marker.first, marker.last] == info["interface"]
    assert marker.cuda_archs == tuple(info["cuda_archs"])
    assert marker.first <= 1
    assert marker.last == library.CURRENT


def test_one_library_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    path = library.load_library()
    assert library.load_library("/another/place", interface=1) == path
    with pytest.raises(LibraryError, match=r"is loaded already and has interface 1 to 5 .* 7 is"):
        library.load_library(interface=7)
    known = library.build_info()
    monkeypatch.setattr(library, "_read_build_info", lambda: {**known, "cuda_archs": []})
    with pytest.raises(LibraryError, match="is loaded already and was built without CUDA"):
        library.load_library(cuda=True)
    monkeypatch.setattr(library, "_read_build_info", lambda: {**known, "cuda_archs": ["9.0"]})
    assert library.load_library(cuda=True) == path


@pytest.mark.usefixtures("unloaded")
def test_a_broken_library_is_refused_in_words(tmp_path: Path) -> None:
    broken = tmp_path / library.LIBRARY
    broken.write_bytes(b"not a library")
    with pytest.raises(LibraryError, match="has interface 1 of the ops"):
        library.load_library(broken)
    with pytest.raises(LibraryError, match="does not load"):
        library.load_library(broken, interface=1)


@pytest.mark.usefixtures("unloaded")
def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(LibraryError, match=r"2\.9\.1\+cu128 is too old"):
        library.load_library()


def test_another_torch_is_refused_and_another_version_is_not() -> None:
    with pytest.raises(LibraryError, match=r"built on torch 1\.13\.1"):
        library.check_build({"version": "0.1.0", "torch_build": "1.13.1"}, Path("lib.so"))
    library.check_build({"version": "0.0.0", "torch_build": "2.13.0"}, Path("lib.so"))


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
    for name in ("version", "interface", "torch_build", "cpu_isa", "cpu_isas", "cuda_archs"):
        assert name in info
