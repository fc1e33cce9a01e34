"""`ft-handler tune` with a measurer that needs no GPU: what it prints, keeps and survives."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import model_info

from ft_handler.cli.main import main
from ft_handler.tuning import measure, table

CLASSES = [32, 64, 1024]


class Ops:
    #: Whether the GPU has products in e4m3.
    narrow = True

    def serves_narrow(self, like: torch.Tensor) -> bool:
        return self.narrow and like.dim() == 2 and like.size(1) % 16 == 0  # as the op: of a weight

    def gemm_row_class(self, rows: int) -> int:
        return next(c for c in CLASSES if rows <= c)


Tune = Callable[..., tuple[int, list[int]]]


@pytest.fixture
def tune(monkeypatch, tmp_path: Path) -> Tune:
    """Runs the command over CLASSES; answers its exit status and the classes in the table."""
    path = tmp_path / "table.json"
    monkeypatch.delenv(table.VARIABLE, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: "GPU")
    monkeypatch.setattr("ft_handler.model.bundle.read_info", lambda path: model_info())
    for module in (table, measure):
        monkeypatch.setattr(module, "gemm_ops", Ops)

    def run(during: Callable[[int], None] = lambda rows: None) -> tuple[int, list[int]]:
        def measured(hidden, intermediate, heads, rows, dtype, library) -> list[table.Entry]:
            during(rows)
            return [table.Entry(dtype, rows, hidden, hidden, False, True, "sm90:tall x1", 12.5)]

        monkeypatch.setattr(measure, "measure", measured)
        with pytest.raises(SystemExit) as end:
            main(["tune", "--model", "m.pt", "--output", str(path), "--largest", "1024"])
        entries: list[dict[str, Any]] = table.read_table(path)["entries"]
        return int(end.value.code or 0), [entry["rows"] for entry in entries]

    return run


@pytest.mark.parametrize(
    ("data_type", "narrow", "dtype"),
    [
        ("fp16", True, "float16"),
        ("int8", True, "float16"),
        ("fp8", True, "float8_e4m3fn"),
        ("fp8", False, "float16"),
    ],
)
def test_the_products_that_the_gpu_computes_are_measured(
    tune: Tune, monkeypatch, capsys, tmp_path: Path, data_type: str, narrow: bool, dtype: str
) -> None:
    monkeypatch.setattr(Ops, "narrow", narrow)
    monkeypatch.setattr(
        "ft_handler.model.bundle.read_info", lambda path: model_info(data_type=data_type)
    )
    real = torch.empty  # on no device but a CPU here
    monkeypatch.setattr("torch.empty", lambda *size, device, **rest: real(*size, **rest))
    assert tune() == (0, CLASSES)
    assert f", {dtype}, on GPU" in capsys.readouterr().out
    entries = table.read_table(tmp_path / "table.json")["entries"]
    assert {entry["dtype"] for entry in entries} == {dtype}


def interrupt(rows: int, at: int, times: int = 1) -> None:
    if rows == at:
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)


def test_a_line_says_what_is_measured_and_what_is_left(tune: Tune, capsys) -> None:
    assert tune() == (0, CLASSES)
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert "on GPU: 3 token counts, 32 to 1,024" in first
    assert [re.sub(r"\d+ s left", "S left", line) for line in lines] == [
        f"{rows:6d} tokens:    12.50 us a layer  tall x1  ({i} of 3, S left)"
        for i, rows in enumerate(CLASSES, 1)
    ]
    assert last.startswith("3 plans written to ")


def test_a_terminal_has_a_bar(tune: Tune, capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert tune() == (0, CLASSES)
    out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert re.search(r"1,024 tokens .*3/3", out)
    assert "of 3," not in out  # the bar says it


def test_an_interrupt_ends_after_the_class_that_is_measured(tune: Tune, capsys) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert tune(lambda rows: interrupt(rows, at=64)) == (130, [32, 64])
    assert signal.getsignal(signal.SIGINT) is before
    out = capsys.readouterr().out
    assert "Ctrl-C again stops at once" in out
    assert "stopped, 2 of 3 token counts are measured: 2 plans written to " in out


def test_a_second_interrupt_does_not_wait(tune: Tune, capsys) -> None:
    assert tune(lambda rows: interrupt(rows, at=64, times=2)) == (130, [32])
    assert "stopped, 1 of 3 token counts are measured: 1 plans" in capsys.readouterr().out


def test_what_was_measured_before_a_failure_is_kept(tune: Tune, capsys) -> None:
    def fail(rows: int) -> None:
        if rows == 1024:
            raise RuntimeError("out of memory")

    assert tune(fail) == (1, [32, 64])
    captured = capsys.readouterr()
    assert "stopped, 2 of 3" in captured.out
    assert "out of memory" in captured.err


def test_another_gpus_table_is_refused_before_anything_is_measured(
    tune: Tune, capsys, tmp_path: Path
) -> None:
    table.write_table(tmp_path / "table.json", "OTHER", [])
    assert tune(lambda rows: pytest.fail("measured")) == (1, [])
    assert "measured on OTHER, and this is GPU" in capsys.readouterr().err
