"""The command line: fast help, one clear line for errors, tracebacks only with --debug."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from ft_handler.cli import bench
from ft_handler.cli import main as cli
from ft_handler.errors import ModelError

#: Modules that take long to import, and rooms of this package that only a running command needs.
COSTLY = {
    "torch", "transformers", "numpy", "tokenizers", "safetensors", "peft", "orjson", "yaml", "ts",
    "ft_handler.model", "ft_handler.native", "ft_handler.engine", "ft_handler.tuning",
    "ft_handler.servers", "ft_handler.predictor", "ft_handler.doctor",
}  # fmt: skip
#: Runs the command, then prints which of COSTLY it has imported.
WATCHED = f"""
import sys
from ft_handler.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print("imported", *sorted({COSTLY!r} & set(sys.modules)))
"""


def run(
    *arguments: str, variables: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ft_handler", *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, **variables},
    )  # fmt: skip


def watched(*arguments: str, **variables: str) -> tuple[list[str], list[str]]:
    """The command's lines of output, and the costly modules it imported."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, **variables},
    )  # fmt: skip
    *lines, last = done.stdout.splitlines()
    assert last.startswith("imported"), done.stderr
    return lines, last.split()[1:]


def completions(words: str) -> tuple[list[str], list[str]]:
    """What bash would be offered after `words`, and the costly modules that took."""
    typed = words.split(" ")
    return watched(
        _FT_HANDLER_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(typed) - 1)
    )


def test_help_lists_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in [*cli.COMMANDS, "bench"])


def test_help_imports_nothing_heavy() -> None:
    lines, imported = watched("--help")
    assert any("Usage: ft-handler" in line for line in lines)
    assert imported == []
    # The same question finds them where a command does run.
    assert {"torch", "ft_handler.servers"} <= set(watched("handler-path")[1])


@pytest.mark.parametrize("name", [*cli.COMMANDS, "bench"])
def test_every_command_has_help(name: str) -> None:
    lines, imported = watched(name, "--help")
    assert any("Usage: ft-handler " + name in line for line in lines)
    assert imported == []


def test_both_ways_in_are_the_same_command() -> None:
    pyproject = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    declared = re.search(r'^ft-handler = "([\w.]+):(\w+)"$', pyproject, re.MULTILINE)
    assert declared
    # What an installer writes into the script.
    code = f"import sys; from {declared[1]} import {declared[2]}; sys.exit({declared[2]}())"
    for arguments in (["nonsense"], ["--version"], ["bench", "--help"]):
        script = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
        )
        module = run(*arguments)
        assert "ft-handler" in script.stdout + script.stderr
        assert "__main__" not in script.stdout + script.stderr
        assert (module.returncode, module.stdout, module.stderr) == (
            script.returncode,
            script.stdout,
            script.stderr,
        )


# -- shell completion ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("ft-handler ", [*cli.COMMANDS, "bench"]),
        ("ft-handler pre", ["predict"]),
        ("ft-handler bench ", [*bench.BENCHMARKS]),
        ("ft-handler --install", ["--install-completion"]),
        ("ft-handler trace --mo", [
            "--mode", "--model_name_or_path", "--model-name-or-path", "--model_type",
            "--model-type",
        ]),
        ("ft-handler trace --mode q", ["question_answering"]),
        ("ft-handler trace --data_type ", ["fp32", "fp16", "bf16", "int8", "fp8"]),
        ("ft-handler predict --device c", ["cpu", "cuda"]),
        ("ft-handler doctor --js", ["--json"]),
    ],
)  # fmt: skip
def test_completion(words: str, offered: list[str]) -> None:
    assert completions(words) == (offered, [])


def test_completion_script_is_shown_and_installed(tmp_path: Path) -> None:
    # typer's switch for tests: the shell is an argument, not what the process tree says.
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "True"}
    shown = run("--show-completion", "bash", variables=named)
    assert shown.returncode == 0, shown.stderr
    assert "_FT_HANDLER_COMPLETE=complete_bash" in shown.stdout
    assert shown.stdout.rstrip().endswith(" ft-handler")
    installed = run("--install-completion", "bash", variables={**named, "HOME": str(tmp_path)})
    assert installed.returncode == 0, installed.stderr
    (script,) = (p for p in tmp_path.rglob("*ft-handler*") if p.is_file())
    assert script.read_text().strip() == shown.stdout.strip()


# -- choices and errors --------------------------------------------------------------------------


def test_a_choice_that_is_none_is_a_usage_error() -> None:
    done = run("trace", "--mode", "poetry", "--output", "unused", variables={"COLUMNS": "200"})
    assert done.returncode == 2
    assert "Invalid value for '--mode'" in done.stderr
    assert "'poetry' is not one of 'sequence_classification', 'question_answering'" in done.stderr


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
    def broken() -> None:
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
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "ft_handler" / "cli" / "bench.py"))
    with pytest.raises(Exception, match="run this in a clone"):
        bench.benchmark_script("encoder.py")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "encoder.py").write_text("")
    assert bench.benchmark_script("encoder.py") == tmp_path / "benchmarks" / "encoder.py"


def test_errors_of_the_package_reach_the_user_unchanged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ModelError("x.pt: no such file")

    monkeypatch.setattr(cli, "build", broken)
    with pytest.raises(SystemExit):
        cli.main([])
    assert capsys.readouterr().err == "error: x.pt: no such file\n"
