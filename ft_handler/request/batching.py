"""Length buckets under a token budget, packing, and the way back to arrival order.

Over padding-free kernels a bucket saves no arithmetic, so the plan merges whatever fits under the
budget and splits only beyond it, or where `length_buckets` says so; docs/buckets.md has the
measurements behind the defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ft_handler.types import Encoding, Floats, Outputs, PackedBatch

Indices = NDArray[np.int64]


@dataclass(slots=True)
class Sequences:
    """The token sequences of a whole batch, in arrival order, laid end to end.

    input_ids       [total] int64
    token_type_ids  [total] int64
    lengths         [sequences] int64
    owners          [sequences] which encoding each belongs to
    """

    input_ids: NDArray[np.int64]
    token_type_ids: NDArray[np.int64]
    lengths: Indices
    owners: Indices


def flatten(encodings: Sequence[Encoding[Any]]) -> Sequences:
    """Lay all sequences of all inputs end to end, in arrival order."""
    ids = [s for e in encodings for s in e.sequences]
    if not ids:
        return Sequences(*np.zeros((4, 0), np.int64))
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    owners = np.arange(len(encodings))
    if len(ids) != len(encodings):
        owners = np.repeat(owners, [len(e.sequences) for e in encodings])
    total = int(lengths.sum())
    flat = np.concatenate(ids)
    splits = np.array([s for e in encodings for s in e.splits], np.int64)
    if np.array_equal(splits, lengths):
        return Sequences(flat, np.zeros(total, np.int64), lengths, owners)
    runs = np.stack((splits, lengths - splits), axis=1)
    types = np.repeat(np.arange(runs.size) % 2, runs.ravel())
    return Sequences(flat, types, lengths, owners)


def default_buckets(max_positions: int) -> tuple[int, ...]:
    """The edges used when `length_buckets` is not set: one bucket for every length."""
    return (max_positions,)


def plan_buckets(lengths: Indices, edges: Sequence[int], max_batch_tokens: int) -> list[Indices]:
    """Indices of `lengths`, bucket by bucket: each index once, no bucket over the budget.

    lengths           [sequences] tokens
    edges             ascending upper edges; longer sequences share a last bucket
    max_batch_tokens  budget of a bucket; a longer sequence gets a bucket of its own

    Buckets keep arrival order inside; a bucket over the budget is sorted by length first, so that
    its parts hold sequences of similar lengths.
    """
    if len(lengths) == 0:
        return []
    # Most batches fit one bucket whole.
    if int(lengths.sum()) <= max_batch_tokens and (not edges or int(lengths.max()) <= edges[0]):
        return [np.arange(len(lengths))]
    bucket_of = np.searchsorted(np.asarray(edges), lengths)
    plan: list[Indices] = []
    for bucket in np.unique(bucket_of):
        members = np.flatnonzero(bucket_of == bucket)
        if int(lengths[members].sum()) <= max_batch_tokens:
            plan.append(members)
            continue
        members = members[np.argsort(lengths[members], kind="stable")]
        begin, tokens = 0, 0
        for at, length in enumerate(lengths[members].tolist()):
            if tokens and tokens + length > max_batch_tokens:
                plan.append(members[begin:at])
                begin, tokens = at, 0
            tokens += length
        plan.append(members[begin:])
    return plan


def pack(sequences: Sequences, members: Indices) -> PackedBatch:
    """One bucket's sequences end to end."""
    lengths = sequences.lengths
    if _everything(members, len(lengths)):
        ids, types, chosen = sequences.input_ids, sequences.token_type_ids, lengths
    else:
        source = _token_indices(lengths, members)
        chosen = lengths[members]
        ids, types = sequences.input_ids[source], sequences.token_type_ids[source]
    cu_seqlens = np.zeros(len(members) + 1, np.int32)
    np.cumsum(chosen, out=cu_seqlens[1:])
    return PackedBatch(ids, types, cu_seqlens, int(chosen.max(initial=0)))


def _everything(members: Indices, count: int) -> bool:
    """Whether a bucket has all sequences in the order of arrival."""
    return len(members) == count and bool((members == np.arange(count)).all())


def _token_indices(lengths: Indices, members: Indices) -> Indices:
    """Where the tokens of `members` lie in the flat arrays, in the order of `members`."""
    begins = np.cumsum(lengths) - lengths
    chosen = lengths[members]
    ends = np.cumsum(chosen)
    indices: Indices = np.repeat(begins[members] - (ends - chosen), chosen)
    indices += np.arange(len(indices))
    return indices


def restore(
    done: Sequence[tuple[Indices, Floats]], sequences: Sequences, per_token: bool
) -> Floats:
    """Outputs of the buckets in arrival order; sequences in no bucket of `done` get zeros.

    `[members, columns]` of each bucket become `[sequences, columns]`, or with `per_token`
    `[columns, tokens]` become `[columns, total]`.
    """
    count = len(sequences.lengths)
    if len(done) == 1 and _everything(done[0][0], count):
        return done[0][1]
    if per_token:
        out = np.zeros((done[0][1].shape[0], len(sequences.input_ids)), np.float32)
        for members, columns in done:
            out[:, _token_indices(sequences.lengths, members)] = columns
        return out
    out = np.zeros((count, done[0][1].shape[1]), np.float32)
    for members, rows in done:
        out[members] = rows
    return out


def outputs_of(
    values: Floats, sequences: Sequences, chosen: NDArray[np.bool_], per_token: bool
) -> Outputs:
    """The outputs of the sequences that are `chosen`, [sequences]."""
    lengths = sequences.lengths
    kept = values[:, np.repeat(chosen, lengths)] if per_token else values[chosen]
    return Outputs(kept, lengths[chosen])


def finite(values: Floats, sequences: Sequences, per_token: bool) -> NDArray[np.bool_]:
    """[sequences] whether every output of a sequence is a number."""
    if not per_token:
        rows: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(values), axis=1)
        return rows
    begins = np.cumsum(sequences.lengths) - sequences.lengths
    tokens = np.logical_and.reduce(np.isfinite(values), axis=0)
    return np.logical_and.reduceat(tokens, begins)
