"""`ft-handler ready` where there is nothing to be ready: one line, and a status that says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from ports import free_port

from ft_handler.cli.main import main


def test_no_server_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    port = free_port(3)
    with pytest.raises(SystemExit) as ended:
        main(["ready", "cls", "--port", str(port)])
    assert ended.value.code == 1
    assert capsys.readouterr() == ("", f"error: no server answers at http://127.0.0.1:{port + 1}\n")


def test_addresses_are_those_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    port = free_port(1)
    (tmp_path / "config.properties").write_text(f"management_address=http://127.0.0.1:{port}\n")
    with pytest.raises(SystemExit):
        main(["ready"])
    assert capsys.readouterr().err == f"error: no server answers at http://127.0.0.1:{port}\n"
    with pytest.raises(SystemExit):
        main(["ready", "--config", "none"])
    assert "cannot read none" in capsys.readouterr().err
