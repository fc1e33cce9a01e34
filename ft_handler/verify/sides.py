"""The two sides: one engine's outputs and transformers' for the same sequences."""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np
import torch

from ft_handler.engine.base import Engine
from ft_handler.prepare.compare import Reference
from ft_handler.request.batching import Indices, Sequences, pack, plan_buckets, restore
from ft_handler.types import Floats, PackedBatch


class Side(Protocol):
    """One side. tokens and seconds are what it has computed so far."""

    tokens: int
    seconds: float

    def outputs(self, sequences: Sequences) -> Floats:
        """`[sequences, columns]`, or `[columns, total]` where outputs are for tokens."""


class Traced:
    """The traced file, packed as a server packs."""

    def __init__(self, engine: Engine, per_token: bool, positions: int, most_tokens: int) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._engine, self._per_token = engine, per_token
        self._positions, self._most_tokens = positions, most_tokens

    def outputs(self, sequences: Sequences) -> Floats:
        """What the engine gives."""
        begun = time.perf_counter()
        done: list[tuple[Indices, Floats]] = [
            (members, self._engine.launch(pack(sequences, members)).result())
            for members in plan_buckets(sequences.lengths, (self._positions,), self._most_tokens)
        ]
        values = restore(done, sequences, self._per_token)
        self.seconds += time.perf_counter() - begun
        self.tokens += len(sequences.input_ids)
        return values


class Transformers:
    """transformers' model in fp32, on padded batches; `tokens` counts the pads too."""

    def __init__(
        self,
        model: Reference,
        per_token: bool,
        device: torch.device,
        pad: int,
        most_tokens: int,
    ) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._model, self._per_token, self._device = model, per_token, device
        self._pad, self._most_tokens = pad, most_tokens

    def outputs(self, sequences: Sequences) -> Floats:
        """What the model gives, without what it gives for pads."""
        begun = time.perf_counter()
        # One query may have a thousand candidates.
        rows = max(1, self._most_tokens // int(sequences.lengths.max()))
        count = len(sequences.lengths)
        done: list[tuple[Indices, Floats]] = []
        for at in range(0, count, rows):
            members = np.arange(at, min(at + rows, count))
            done.append((members, self._padded(pack(sequences, members))))
        values = restore(done, sequences, self._per_token)
        self.seconds += time.perf_counter() - begun
        return values

    def _padded(self, batch: PackedBatch) -> Floats:
        lengths = torch.from_numpy(np.diff(batch.cu_seqlens))
        mask = torch.arange(batch.max_seqlen) < lengths[:, None]
        ids = torch.full(mask.shape, self._pad)
        types = torch.zeros(mask.shape, dtype=torch.int64)
        ids[mask] = torch.from_numpy(batch.input_ids)
        types[mask] = torch.from_numpy(batch.token_type_ids)
        with torch.inference_mode():
            parts = self._model(
                ids.to(self._device), mask.long().to(self._device), types.to(self._device)
            )
        if self._per_token:  # [B,S] or [B,S,C] of every part
            parts = tuple(part[mask].reshape(int(mask.sum()), -1).T for part in parts)
        self.tokens += mask.numel()
        values: Floats = np.concatenate([part.cpu().numpy() for part in parts])
        return values
