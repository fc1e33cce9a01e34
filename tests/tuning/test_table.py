"""The GEMM table: where it lives, what it keeps, what it refuses. Measuring needs a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from ft_handler.errors import EnvironmentProblem
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


def test_an_encoder_layer_has_four_linear_layers() -> None:
    layers = measure.layers_of(768, 3072)
    assert [(x.n, x.k, x.gelu, x.norm) for x in layers] == [
        (2304, 768, False, False),
        (768, 768, False, True),
        (3072, 768, True, False),
        (768, 3072, False, True),
    ]
