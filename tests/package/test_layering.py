"""Nothing imports upward: walks every import of the package and every include of csrc."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ft_handler"

#: Lowest first; a module may import from lower layers, and from its own folder.
LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "version errors files",
        "config types stats precisions",
        "native",
        "model text",
        "tasks",
        "architectures",
        "engine",
        "request",
        "prepare tuning",
        "runtime",
        "servers",
        "predictor entry doctor verify playground",
        "cli",
        "__main__",
    )
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

#: What a stage may use of the outside; torch stays out of what has nothing to do with it.
WITHOUT_TORCH = ("errors", "config", "types", "text", "tasks", "request")


def modules() -> list[Path]:
    return sorted(
        p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py" and "data" not in p.parts
    )


def room(path: Path) -> str:
    """The top-level folder, or the top-level module."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path, *, module_level_only: bool = False) -> set[str]:
    """Absolute names of everything `path` imports, outside TYPE_CHECKING blocks."""
    found: set[str] = set()

    def visit(node: ast.AST, inside_function: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if not (module_level_only and inside_function):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name} has a relative import"
                found.add(node.module or "")
                if node.module == "ft_handler":
                    found.update(f"ft_handler.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            visit(child, inside_function or is_function)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_modules_import_downward_only(path):
    here = room(path)
    assert here in RANK, f"{here} has no place in LAYERS"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "ft_handler" or len(parts) == 1 or parts[1] not in RANK:
            continue
        assert RANK[parts[1]] < RANK[here] or parts[1] == here, f"{here} imports {parts[1]}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_servers_know_no_other_server(path):
    here = name_of(path).split(".")
    if here[0] != "servers" or not (PACKAGE / "servers" / here[1]).is_dir():
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[:2] == ["ft_handler", "servers"] and (PACKAGE / "/".join(parts[1:3])).is_dir():
            assert len(parts) == 2 or parts[2] == here[1], f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_stages_without_tensors_do_not_import_torch(path):
    if room(path) in WITHOUT_TORCH:
        tops = {n.split(".")[0] for n in imports(path)}
        assert not tops & {"torch", "transformers", "ts"}


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_the_worker_never_needs_transformers(path):
    if RANK[room(path)] <= RANK["request"] or room(path) in ("servers", "entry"):
        tops = {n.split(".")[0] for n in imports(path, module_level_only=True)}
        assert not tops & {"transformers", "peft", "safetensors", "typer", "rich"}


def test_environment_variables_are_read_in_config_alone():
    for path in modules():
        if name_of(path) in (
            "config", "doctor", "servers.torchserve.java", "servers.torchserve.process"
        ):  # fmt: skip
            continue  # process builds the environment of a child process, doctor reports on it
        assert "os.environ" not in path.read_text(encoding="utf-8"), path.name
        assert "getenv" not in path.read_text(encoding="utf-8"), path.name


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def sources(folder: str) -> list[Path]:
    suffixes = {".h", ".cpp", ".cu", ".cuh", ".inc"}
    return sorted(p for p in (ROOT / "csrc" / folder).rglob("*") if p.suffix in suffixes)


def test_kernels_know_neither_torch_nor_the_bindings():
    found = sources("kernels")
    assert found
    for path in found:
        for include in includes(path):
            assert not include.startswith(("torch/", "ATen/", "c10/")), (path, include)
            assert "csrc/torch" not in include, (path, include)
            assert not include.startswith("../torch"), (path, include)


def test_the_bindings_stay_on_the_stable_abi():
    for path in sources("torch"):
        for include in includes(path):
            assert not include.startswith(("ATen/", "c10/", "torch/extension", "pybind11")), (
                path,
                include,
            )
            assert include not in ("torch/torch.h", "torch/script.h", "Python.h"), (path, include)


def test_cpu_and_gpu_kernels_do_not_include_each_other():
    for path in sources("kernels/cpu"):
        assert not any("cuda" in i for i in includes(path)), path
    for path in sources("kernels/cuda"):
        assert not any("cpu/" in i for i in includes(path)), path
