"""The GEMM table: where it lives, what it keeps, what it refuses. Measuring needs a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ft_handler.errors import EnvironmentProblem
from ft_handler.model.encoder import NarrowProduct
from ft_handler.native.library import load_library
from ft_handler.tuning import measure, table


def entry(rows: int, plan: str = "sm90:ping-pong 128x192") -> table.Entry:
    return table.Entry("float16", rows, 2304, 768, False, False, plan, 8.5)


def test_the_default_place_is_named_after_the_gpu(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = tmp_path / ".cache/ft_handler/tuning/nvidia-h200-nvl.json"
    assert table.default_path("NVIDIA H200 (NVL)") == expected


def test_a_second_run_replaces_what_it_measured_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "table.json"
    table.write_table(path, "GPU", [entry(32), entry(64)])
    table.write_table(path, "GPU", [entry(64, "sm90:other"), entry(128)])
    found = table.read_table(path)
    assert found["gpu"] == "GPU"
    assert {e["rows"]: e["plan"] for e in found["entries"]} == {
        32: "sm90:ping-pong 128x192",
        64: "sm90:other",
        128: "sm90:ping-pong 128x192",
    }


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}'])
def test_other_files_are_refused_in_words(tmp_path: Path, content: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(EnvironmentProblem, match="not a GEMM table"):
        table.read_table(path)


class Recorder:
    """Stands for the library's ops: keeps the plans it is given, refuses some."""

    def __init__(self, unknown: str = "") -> None:
        self.plans: dict[tuple[str, int, int, int], str] = {}
        self.unknown = unknown

    def load_gemm_plan(self, device, dtype, rows, n, k, gelu, residual, norm, plan) -> None:
        if plan == self.unknown:
            raise RuntimeError("this build has no GEMM kernel; tune again")
        self.plans[(dtype, rows, n, k)] = plan


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> Path:
    """A GPU with a table in the package, [32, 64], and a home without one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(table.VARIABLE, raising=False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: "GPU")
    shipped = tmp_path / "shipped.json"
    monkeypatch.setattr(table, "shipped_path", lambda gpu: shipped)
    table.write_table(shipped, "GPU", [entry(32, "sm90:a"), entry(64, "sm90:b")])
    return tmp_path


def test_the_packages_table_serves_where_no_other_has_an_entry(gpu, monkeypatch) -> None:
    ops = Recorder()
    monkeypatch.setattr(table, "gemm_ops", lambda: ops)
    table.write_table(gpu / "own.json", "GPU", [entry(64, "sm90:own")])
    assert table.load_table(gpu / "own.json") == 5
    assert {(dtype, rows): plan for (dtype, rows, _, _), plan in ops.plans.items()} == {
        ("float16", 32): "sm90:a",
        ("float16", 64): "sm90:own",
        ("bfloat16", 32): "sm90:a",  # measured in fp16, good for both
        ("bfloat16", 64): "sm90:b",
    }


def test_an_entry_for_e4m3_is_for_no_other_type(gpu, monkeypatch) -> None:
    ops = Recorder()
    monkeypatch.setattr(table, "gemm_ops", lambda: ops)
    narrow = table.Entry(table.NARROW, 64, 2304, 768, False, False, "sm90:narrow", 5.5)
    table.write_table(gpu / "shipped.json", "GPU", [narrow])
    assert table.load_table() == 5
    assert ops.plans[table.NARROW, 64, 2304, 768] == "sm90:narrow"
    assert ops.plans["float16", 64, 2304, 768] == "sm90:b"


def test_a_kernel_the_library_lacks_is_an_error_in_a_named_table_alone(gpu, monkeypatch) -> None:
    ops = Recorder(unknown="sm90:a")
    monkeypatch.setattr(table, "gemm_ops", lambda: ops)
    assert table.load_table() == 2  # of both precisions
    table.write_table(gpu / "own.json", "GPU", [entry(32, "sm90:a")])
    with pytest.raises(EnvironmentProblem, match="tune again"):
        table.load_table(gpu / "own.json")


def test_tables_in_the_package_are_whole_and_bound_to_no_library_version() -> None:
    tables = list(Path(table.__file__).parent.glob("gemm-*.json"))
    assert tables
    for path in tables:
        found = table.read_table(path)
        assert table.shipped_path(found["gpu"]) == path
        entries = [table.Entry(**raw) for raw in found["entries"]]
        assert all(e.plan.startswith("sm90:") or e.plan == measure.LIBRARY_CHOICE for e in entries)
        # A chain of four layers is measured at a time.
        for dtype, rows in {(e.dtype, e.rows) for e in entries}:
            chain = [e for e in entries if (e.dtype, e.rows) == (dtype, rows)]
            assert len(chain) % 4 == 0


@pytest.mark.parametrize("dtype", ["float32", table.NARROW])
def test_the_stack_that_is_measured_is_an_encoder(dtype: str) -> None:
    load_library()
    encoder = measure.random_encoder(64, 176, 2, 2, dtype, "cpu")
    assert "few_tokens=0" in encoder.options
    # What the op gets besides where a GPU has products in e4m3, and the check that it could.
    narrow = dtype == table.NARROW
    assert [f"layers.{p}.narrow" in encoder.narrow_spec for p in ("qkv", "out", "up", "down")] == [
        narrow
    ] * 4
    edges = torch.tensor([0, 5, 12], dtype=torch.int32)
    ids = torch.randint(0, measure.VOCABULARY, (12,))
    hidden = encoder(ids, torch.zeros_like(ids), None, edges, 7)
    assert hidden.shape == (12, 64)
    assert hidden.isfinite().all()
    if narrow:
        for name in ("qkv", "out", "up", "down"):
            product = getattr(encoder.layers, name)
            assert isinstance(product, NarrowProduct)
            # Weights fill the range, and a random one is about its size in fp16.
            assert product.weight.float().abs().amax(-1).eq(448).all()
            assert 0.8 < product.dequantized().float().std() * product.shape[2] ** 0.5 < 1.2


def test_an_encoder_layer_has_four_linear_layers() -> None:
    layers = measure.layers_of(768, 3072)
    assert [(x.n, x.k, x.gelu, x.norm) for x in layers] == [
        (2304, 768, False, False),
        (768, 768, False, True),
        (3072, 768, True, False),
        (768, 3072, False, True),
    ]
