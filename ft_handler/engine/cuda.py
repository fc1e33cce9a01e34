"""Runs packed batches on one GPU.

The engine owns one stream: a batch is written into pinned memory, copied in once, replayed from a
CUDA graph of its token class (or launched plainly when its shape has none), copied out once, and
waited for once, in `result`.
"""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ft_handler import tasks
from ft_handler.engine.base import Done, Pending, synthetic_batch
from ft_handler.engine.graphs import GRAPH_BYTES, GraphPlan, graph_ints
from ft_handler.errors import EngineLost, OutOfDeviceMemory
from ft_handler.types import Floats, PackedBatch

if TYPE_CHECKING:
    from ft_handler.model.bundle import LoadedModel


@dataclass(slots=True)
class _Slot:
    """Pinned memory of one batch under way."""

    host_in: torch.Tensor  # [2 * max_tokens + max_sequences + 1] int32: ids, types, cu_seqlens
    host_out: torch.Tensor  # [capacity] fp32
    inbox: NDArray[np.int32]
    outbox: NDArray[np.float32]
    done: torch.cuda.Event = field(default_factory=torch.cuda.Event)


@dataclass(slots=True)
class _Graph:
    """A captured forward of one class."""

    graph: torch.cuda.CUDAGraph
    output: torch.Tensor  # [n] fp32 on the device, row by row


class _InFlight:
    """A batch on the GPU; `rows` is how many rows, or tokens, of outputs were computed."""

    def __init__(self, engine: CudaEngine, slot: _Slot, batch: PackedBatch, rows: int) -> None:
        self._engine, self._slot, self._batch, self._rows = engine, slot, batch, rows

    def result(self) -> Floats:
        try:
            self._slot.done.synchronize()
            columns = self._engine.columns
            flat = self._slot.outbox[: columns * self._rows]
            out: Floats = flat.reshape(self._rows, columns)[: self._batch.batch]
            if self._engine.per_token:
                out = flat.reshape(columns, self._rows)[:, : self._batch.total]
            copied: Floats = out.copy()
            return copied
        except _FAILURES as error:
            raise _translate(error) from error
        finally:
            self._engine.release(self._slot)


#: What a forward raises: TorchScript's own errors are no RuntimeError.
_FAILURES = (RuntimeError, torch.jit.Error)


def _translate(error: Exception) -> Exception:
    """Name a device failure without the word that makes TorchServe answer 507 to a whole batch."""
    text = str(error).replace("CUDA", "GPU").replace("cuda", "gpu")
    # TorchScript hands an allocator's error on as a plain one; only its text still tells.
    if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in text:
        return OutOfDeviceMemory("the GPU has no room for this batch")
    if isinstance(error, getattr(torch, "AcceleratorError", ())) or "GPU error" in text:
        return EngineLost(text)
    return RuntimeError(text)


class CudaEngine:
    """Runs a model on one GPU through graphs, on a stream of its own.

    model             loaded with its parameters on `device`
    max_tokens        tokens a captured batch may have; larger ones are launched plainly
    max_sequences     sequences a captured batch may have
    graph_memory      bytes the graphs may take; 0 captures none

    Safe to call from several threads; batches run in the order of their launches.
    """

    overlaps = True

    def __init__(
        self,
        model: LoadedModel,
        device: torch.device,
        *,
        max_tokens: int = 16384,
        max_sequences: int = 64,
        graph_memory: int = 1 << 30,
    ) -> None:
        self._module = model.fused
        self._device = device
        self._plan = GraphPlan.of(max_tokens, max_sequences, model.info.max_positions)
        self.per_token = tasks.get(model.info.mode).per_token
        self.columns = model.info.num_labels
        self._vocab_size, self._type_vocab_size = (
            model.info.vocab_size,
            model.info.type_vocab_size,
        )
        self._graph_memory = graph_memory
        self._graphs: dict[tuple[int, int, int], _Graph] = {}
        self._lock = threading.Lock()
        self._free: list[_Slot] = []
        self._max_tokens, self._max_sequences = self._plan.tokens[-1], self._plan.sequences[-1]
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._inputs = torch.zeros(
                2 * self._max_tokens + self._max_sequences + 1, dtype=torch.int32, device=device
            )

    def _slot(self, ints: int, floats: int) -> _Slot:
        for at, slot in enumerate(self._free):
            if len(slot.inbox) >= ints and len(slot.outbox) >= floats:
                return self._free.pop(at)
        # A power of two, so that odd large batches settle on few allocations.
        host_in = torch.zeros(
            max(len(self._inputs), 1 << (ints - 1).bit_length()), dtype=torch.int32, pin_memory=True
        )
        least = self.columns * (self._max_tokens if self.per_token else self._max_sequences)
        host_out = torch.zeros(max(least, 1 << max(0, floats - 1).bit_length()), pin_memory=True)
        return _Slot(host_in, host_out, host_in.numpy(), host_out.numpy())

    def release(self, slot: _Slot) -> None:
        """Give a batch's pinned memory back."""
        with self._lock:
            self._free.append(slot)

    def launch(self, batch: PackedBatch) -> Pending:
        """Stage a batch, start it and return; nothing here waits for the GPU."""
        if batch.total == 0 or batch.batch == 0:
            none = (self.columns, 0) if self.per_token else (0, self.columns)
            return Done(np.zeros(none, np.float32))
        # What the kernels are given wrong they answer with NaN; the host must not let it through.
        if not 0 <= int(batch.input_ids.min()) <= int(batch.input_ids.max()) < self._vocab_size:
            raise ValueError(f"input_ids must lie in [0, {self._vocab_size})")
        types = batch.token_type_ids
        if not 0 <= int(types.min()) <= int(types.max()) < self._type_vocab_size:
            raise ValueError(f"token_type_ids must lie in [0, {self._type_vocab_size})")
        shape = self._plan.class_of(batch.total, batch.batch, batch.max_seqlen)
        captured = self._graphs.get(shape) if shape else None
        if shape is None or captured is None:
            tokens, sequences, longest = batch.total, batch.batch, batch.max_seqlen
        else:
            tokens, sequences, longest = shape
        ints = graph_ints((tokens, sequences, longest))
        rows = tokens if self.per_token else sequences
        # The device first: leaving a stream of another one than the thread's makes a context on the
        # thread's, half a gigabyte of a GPU that serves somebody else.
        with (
            self._lock,
            torch.inference_mode(),
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),
        ):
            slot = self._slot(ints, self.columns * rows)
            try:
                inbox = slot.inbox
                inbox[: batch.total] = batch.input_ids
                inbox[tokens : tokens + batch.total] = batch.token_type_ids
                inbox[2 * tokens : 2 * tokens + batch.batch + 1] = batch.cu_seqlens
                # Sequences a graph has room for and this batch lacks are empty ones at the end.
                inbox[2 * tokens + batch.batch + 1 : ints] = batch.total
                if captured is not None:
                    # Rows past the batch keep ids of earlier batches: valid, and never read back.
                    self._inputs[:ints].copy_(slot.host_in[:ints], non_blocking=True)
                    captured.graph.replay()
                    output = captured.output
                else:
                    inputs = slot.host_in[:ints].to(self._device, non_blocking=True)
                    output = self._forward(inputs, tokens, sequences, longest)
                slot.host_out[: len(output)].copy_(output, non_blocking=True)
                slot.done.record(self._stream)
            except BaseException as error:
                self._free.append(slot)
                if isinstance(error, _FAILURES):
                    raise _translate(error) from error
                raise
        return _InFlight(self, slot, batch, rows)

    def _forward(
        self, inputs: torch.Tensor, tokens: int, sequences: int, longest: int
    ) -> torch.Tensor:
        """`[n]` fp32: row by row, so that one copy brings them home."""
        out = self._module.packed(
            inputs[:tokens],
            inputs[tokens : 2 * tokens],
            inputs[2 * tokens : 2 * tokens + sequences + 1],
            longest,
        )
        return out.reshape(-1)

    def warm_up(self) -> dict[str, float]:
        """Pack the weights, run a few batches, then capture graphs within their budget."""
        start = time.perf_counter()
        with torch.inference_mode(), torch.cuda.device(self._device):
            self._module.release()
            # Batches run on another stream, and the raw weights' memory is for the graphs' pool.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        for lengths in ([1], [7, 3], [self._plan.lengths[-1]]):
            # TorchScript optimises in its first calls; three in flight, as of a large batch's
            # parts, make their pinned memory now.
            batch = synthetic_batch(lengths, self._vocab_size)
            for pending in [self.launch(batch) for _ in range(3)]:
                pending.result()
        warm = time.perf_counter() - start
        spent = 0
        if self._graph_memory > 0:
            with torch.inference_mode(), torch.cuda.device(self._device):
                spent = self._capture_all()
        return {
            "seconds": warm,
            "capture_seconds": time.perf_counter() - start - warm,
            "graphs": float(len(self._graphs)),
            "graph_bytes": float(spent),
        }

    def _capture_all(self) -> int:
        """Capture what fits; returns the bytes that the graphs take."""
        # Largest first: the pool the graphs share is then laid out once.
        shapes = sorted(self._plan.shapes(), reverse=True)
        with torch.cuda.stream(self._stream):
            # Plans of GEMMs are made per token class, and never inside a capture.
            workspaces = {}
            for shape in {tokens: (tokens, n, longest) for tokens, n, longest in shapes}.values():
                # Lengths that are possible: one token, then none.
                self._inputs.zero_()
                self._inputs[2 * shape[0] + 1 : graph_ints(shape)] = 1
                torch.cuda.empty_cache()
                before = torch.cuda.memory_reserved()
                self._forward(self._inputs[: graph_ints(shape)], *shape)
                workspaces[shape[0]] = torch.cuda.memory_reserved() - before
            torch.cuda.synchronize()
            gc.collect()  # an object that dies during a capture may call the driver
            torch.cuda.empty_cache()
            # Of this process alone: another worker may be loading on the same GPU.
            reserved = torch.cuda.memory_reserved()
            pool = torch.cuda.graph_pool_handle()
            for shape in shapes:
                spent = torch.cuda.memory_reserved() - reserved
                room = self._graph_memory - (len(self._graphs) + 1) * GRAPH_BYTES
                if max(spent, workspaces[shape[0]]) > room:
                    continue
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    output = self._forward(self._inputs[: graph_ints(shape)], *shape)
                finally:
                    graph.capture_end()
                self._graphs[shape] = _Graph(graph, output)
            torch.cuda.synchronize()
            return torch.cuda.memory_reserved() - reserved + len(self._graphs) * GRAPH_BYTES
