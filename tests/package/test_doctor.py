"""The doctor answers whatever is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ft_handler import doctor
from ft_handler.cli.main import main


def test_report_names_every_probe() -> None:
    report = {finding.probe: finding for finding in doctor.report()}
    assert list(report) == [probe.__name__ for probe in doctor.PROBES]
    assert all(finding.answer for finding in report.values())
    assert "torch" in report["packages"].answer
    assert "cpu_isa" in report["library"].answer
    assert [name for name, finding in report.items() if finding.needed] == list(doctor.NEEDED)
    assert all(report[name].ok for name in doctor.NEEDED)


def test_a_failing_probe_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise SystemError("no such thing")

    monkeypatch.setattr(doctor, "PROBES", (broken, doctor.system))
    first, second = doctor.report()
    assert first == doctor.Finding("broken", False, False, "SystemError: no such thing")
    assert second.ok
    assert "Python" in second.answer


def named(name: str, *, well: bool) -> Callable[[], str]:
    """A probe of that name with an answer of its own."""

    def probe() -> str:
        if not well:
            raise doctor.Failed("is missing")
        return "is there"

    probe.__name__ = name
    return probe


@pytest.mark.parametrize(
    ("failing", "status", "verdict"),
    [
        ((), 0, "can answer requests"),
        (("gpu", "nvcc"), 0, "can answer requests"),
        (("java",), 0, "can answer requests; `ft-handler serve` also needs java"),
        (
            ("java", "torchserve"),
            0,
            "can answer requests; `ft-handler serve` also needs java and torchserve",
        ),
        (("packages", "java"), 1, "cannot answer requests: packages failed"),
        (("torch", "library"), 1, "cannot answer requests: torch, library failed"),
    ],
)
def test_the_exit_status_is_the_needed_probes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failing: tuple[str, ...],
    status: int,
    verdict: str,
) -> None:
    names = [probe.__name__ for probe in doctor.PROBES]
    monkeypatch.setattr(doctor, "NATIVE", ())
    monkeypatch.setattr(doctor, "PROBES", [named(n, well=n not in failing) for n in names])
    for arguments in ([], ["--json"]):
        with pytest.raises(SystemExit) as end:
            main(["doctor", *arguments])
        assert (end.value.code or 0) == status
        out = capsys.readouterr().out
        if arguments:
            document = json.loads(out)
            assert document["ok"] is (status == 0)
            assert list(document["probes"]) == names
            assert [n for n, p in document["probes"].items() if not p["ok"]] == [
                n for n in names if n in failing
            ]
        else:
            *lines, last = out.splitlines()
            assert last.split(maxsplit=1) == ["verdict", verdict]
            assert [n for n, line in zip(names, lines, strict=True) if " failed: " in line] == [
                n for n in names if n in failing
            ]


def test_a_missing_required_package_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED_PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package", "neither-this"))
    with pytest.raises(doctor.Failed, match=r"^no-such-package missing; torch .*, neither-this -$"):
        doctor.packages()


def test_a_library_that_does_not_load_says_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FT_HANDLER_LIBRARY", str(tmp_path / "nowhere.so"))
    monkeypatch.setattr(doctor, "PROBES", (doctor.library,))
    (found,) = doctor.report()
    assert not found.ok
    assert found.answer.startswith("not loaded: no libpyt_fastertransformer.so fits: ")
    assert "nowhere.so (missing)" in found.answer


def test_works_without_any_package(tmp_path: Path) -> None:
    """As on a machine where torch and all else are missing."""
    root = root_of_package(Path(doctor.__file__).resolve().parent.parent, tmp_path)
    plain, as_json = (
        subprocess.run(
            # -S leaves site-packages out.
            [sys.executable, "-S", "-m", "ft_handler.doctor", *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(root)},
        )
        for arguments in ([], ["--json"])
    )  # fmt: skip
    assert plain.returncode == as_json.returncode == 1
    assert plain.stderr == as_json.stderr == ""
    assert "torch -" in plain.stdout
    assert "No module named 'torch'" in plain.stdout
    assert "verdict      cannot answer requests: packages, torch, library failed" in plain.stdout
    document = json.loads(as_json.stdout)
    assert document["ok"] is False
    assert document["probes"]["system"]["ok"] is True
    assert document["probes"]["torch"]["ok"] is False


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

    def with_fake_torch(
        command: list[str], *, env: Mapping[str, str], **more: Any
    ) -> subprocess.CompletedProcess[str]:
        search = f"{tmp_path}{os.pathsep}{env['PYTHONPATH']}"
        done: subprocess.CompletedProcess[str] = real(
            command, env={**env, "PYTHONPATH": search}, **more
        )
        return done

    monkeypatch.setattr(subprocess, "run", with_fake_torch)
    (found,) = doctor.report()
    assert found == doctor.Finding("torch", False, True, "the process ended: -4")
