"""A worker's word on whether it computes, for `ft-handler serve`, which waits for it to end.

TorchServe tells how many requests are queued, and not which workers have taken some. So a worker
counts the batches it begins and ends, in a file of the folder that `ft-handler serve` makes in the
instance's temporary folder. An odd count is a batch under way.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from struct import Struct, error

FOLDER = "ft_handler_busy"
_COUNT = Struct("<q")


class Mark:
    """This process' count; it goes nowhere where no `ft-handler serve` waits for it."""

    def __init__(self) -> None:
        folder = Path(tempfile.gettempdir()) / FOLDER
        self._file = (
            os.open(folder / str(os.getpid()), os.O_CREAT | os.O_WRONLY, 0o600)
            if folder.is_dir()
            else None
        )
        self._count = 0

    def step(self) -> None:
        """A batch begins or ends."""
        self._count += 1
        if self._file is not None:
            os.pwrite(self._file, _COUNT.pack(self._count), 0)


def count(folder: Path, pid: int) -> int:
    """Begins and ends of a worker's batches; 0 for one that has not begun or does not count."""
    try:
        return int(_COUNT.unpack((folder / str(pid)).read_bytes())[0])
    except (OSError, error):
        return 0
