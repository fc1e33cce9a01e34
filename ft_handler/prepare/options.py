"""What to trace and where to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """What to trace and where to; the command line's options one for one.

    strict  refuse what is otherwise traced with a note
    """

    mode: str
    model_name_or_path: str
    output: Path
    tokenizer_name: str | None = None
    config_name: str | None = None
    cache_dir: str | None = None
    adapter: Path | None = None
    labels: list[str] | None = None
    max_seq_length: int | None = None
    do_lower_case: bool | None = None
    batch_size: int = DEFAULT_SAMPLES
    seed: int = 42
    data_type: str = "fp32"
    model_type: str = "thsext"
    ths_path: Path | None = None
    strict: bool = False
