"""Runs the commands of a Markdown file: every fenced block that is marked `bash run`, in order.

    python scripts/run_doc.py examples/sequence_classification/README.md [--print]

The blocks share one shell that stops at the first failure, so what a page shows is what works.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def blocks(text: str) -> list[str]:
    """The contents of the blocks marked `bash run`."""
    return re.findall(r"^```bash run\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def script(text: str) -> str:
    """The blocks as one shell script."""
    return "set -euo pipefail\n" + "\n".join(blocks(text))


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    program = script(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if sys.argv[2:] == ["--print"]:
        print(program)
        return
    raise SystemExit(subprocess.run(["bash", "-v", "-c", program]).returncode)


if __name__ == "__main__":
    main()
