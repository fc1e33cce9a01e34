"""The command line: fast help, one clear line for errors, tracebacks only with --debug."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ft_handler.cli import main as cli
from ft_handler.errors import ModelError


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ft_handler", *arguments],
        capture_output=True, text=True, cwd=cwd, timeout=120,
    )  # fmt: skip


def test_help_lists_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in [*cli.COMMANDS, "bench"])


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom ft_handler.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: ft-handler " + name in done.stdout


def test_version() -> None:
    from ft_handler import __version__

    assert run("--version").stdout.split() == ["ft-handler", __version__]


def test_our_errors_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", "--model-store", str(tmp_path / "missing")])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: there is no model store at ")
    assert error.count("\n") == 1


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--model-store", str(tmp_path / "missing"), "--debug"])
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("error: ")


def test_unexpected_errors_are_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: str | None) -> None:
        raise ZeroDivisionError("a bug\nover two lines")

    monkeypatch.setattr(cli, "build", broken)
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ZeroDivisionError: a bug over two lines")
    assert error.count("\n") == 1


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    done = run(
        "trace", "--mode", "sequence_classification", "--model_name_or_path",
        str(tmp_path / "nowhere"), "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_benchmarks_need_a_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "ft_handler" / "cli.py"))
    with pytest.raises(Exception, match="run this in a clone"):
        cli.benchmark_script("encoder.py")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "encoder.py").write_text("")
    assert cli.benchmark_script("encoder.py") == tmp_path / "benchmarks" / "encoder.py"


def test_errors_of_the_package_reach_the_user_unchanged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: str | None) -> None:
        raise ModelError("x.pt: no such file")

    monkeypatch.setattr(cli, "build", broken)
    with pytest.raises(SystemExit):
        cli.main([])
    assert capsys.readouterr().err == "error: x.pt: no such file\n"
