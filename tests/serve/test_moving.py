"""The page on leaving TorchServe: an archive, unpacked, is a folder that answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_pages_commands(store: Path, running: Any, tmp_path: Path) -> None:
    if shutil.which("ft-handler") is None:
        pytest.skip("ft-handler is not on PATH")
    (tmp_path / "model_store").mkdir()
    shutil.copy(store / "cls.mar", tmp_path / "model_store" / "sentiment.mar")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "run_doc.py", ROOT / "docs" / "moving.md"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == running.predict("cls", "Great fun.").json()
