"""What to trace and where to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """What to trace and where to; the command line's options one for one.

    strict              refuse what is otherwise traced with a note
    pooling, normalize  how embeddings are made, in the place of what the checkpoint's files say
    calibration         texts by the keys of requests, which quantised products are rounded for, and
                        on which it is measured what they cost; None: measured on random tokens
    keep_products       products that are not quantised, or patterns of their names; None leaves it
                        to the measurement
    tolerable_change    of outputs, as a part of them, from which on products are kept; None: the
                        precision's own
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
    pooling: str | None = None
    normalize: bool | None = None
    calibration: Sequence[Mapping[str, str]] | None = None
    keep_products: Sequence[str] | None = None
    tolerable_change: float | None = None

    @property
    def wishes(self) -> dict[str, object]:
        """What was given of those options that only some tasks have."""
        given = {"pooling": self.pooling, "normalize": self.normalize}
        return {name: value for name, value in given.items() if value is not None}
