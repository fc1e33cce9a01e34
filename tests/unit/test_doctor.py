"""The doctor answers whatever is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ft_handler import doctor


def test_report_names_every_probe() -> None:
    report = dict(doctor.report())
    assert list(report) == [probe.__name__ for probe in doctor.PROBES]
    assert all(report.values())
    assert "torch" in report["packages"]
    assert "cpu_isa" in report["library"]


def test_a_failing_probe_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise SystemError("no such thing")

    monkeypatch.setattr(doctor, "PROBES", (broken, doctor.system))
    assert doctor.report()[0] == ("broken", "failed: SystemError: no such thing")
    assert "Python" in doctor.report()[1][1]


def test_works_without_any_package(tmp_path: Path) -> None:
    """As on a machine where torch and all else are missing."""
    root = Path(doctor.__file__).resolve().parent.parent
    done = subprocess.run(
        # -S leaves site-packages out.
        [sys.executable, "-S", "-m", "ft_handler.doctor"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(root_of_package(root, tmp_path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "torch -" in done.stdout
    assert "No module named 'torch'" in done.stdout


def root_of_package(root: Path, scratch: Path) -> Path:
    """A folder with this package alone, wherever it is installed."""
    (scratch / "alone").mkdir()
    (scratch / "alone" / "ft_handler").symlink_to(root / "ft_handler")
    return scratch / "alone"


def test_a_crash_in_native_code_is_an_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(doctor, "PROBES", (doctor.torch,))
    real = subprocess.run

    def with_fake_torch(*arguments: object, **more: object) -> object:
        environment = dict(more.pop("env"))  # type: ignore[call-overload]
        environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}"
        return real(*arguments, env=environment, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(doctor.subprocess, "run", with_fake_torch)
    assert doctor.report() == [("torch", "failed: the process ended: -4")]
