"""Hidden states that do not depend on the batch, to the last bit, where that is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

# In a process of its own, since the library reads the switch once: every sequence alone, and among
# the others, in two orders; prints how many rows of hidden states differ at all.
SCRIPT = """
import json, sys
import torch
from ft_handler import load_library

load_library()
ops = torch.ops.fastertransformer
hidden, heads, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
layers, wide, vocabulary = 3, 4 * hidden, 100
torch.manual_seed(0)

def normal(*shape, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)

def norm(*shape):
    return [1 + normal(*shape, scale=0.1), normal(*shape, scale=0.1)]

def linear(n, k):
    return [normal(layers, n, k, scale=k**-0.5), normal(layers, n, scale=0.1)]

parameters = [
    normal(vocabulary, hidden), normal(512, hidden), normal(2, hidden), *norm(hidden),
    *linear(3 * hidden, hidden), *linear(hidden, hidden), *norm(layers, hidden),
    *linear(wide, hidden), *linear(hidden, wide), *norm(layers, hidden),
]
lengths = [1, 7, 31, 64, 65, 113, 128, 129, 300, 511] + [5 + 7 * i for i in range(54)]
sequences = [torch.randint(vocabulary, (n,), device="cuda") for n in lengths]

def encode(some):
    ids = torch.cat([sequences[i] for i in some])
    ends = torch.tensor([0] + [lengths[i] for i in some]).cumsum(0).int().cuda()
    longest = max(lengths[i] for i in some)
    out = ops.encoder(ids, ids % 2, None, ends, longest, *parameters, heads, 1e-12)
    return dict(zip(some, out.split([lengths[i] for i in some])))

everyone = encode(list(range(64)))
others = encode(list(range(63, -1, -2)))
different = 0
for i in range(64):
    alone = encode([i])[i]
    assert alone.isfinite().all()
    different += int((alone != everyone[i]).any(1).sum())
    if i in others:
        different += int((alone != others[i]).any(1).sum())
print(json.dumps(different))
"""


def different_rows(hidden: int, heads: int, dtype: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(hidden), str(heads), dtype],
        env={**os.environ, "FT_HANDLER_BATCH_INVARIANT": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("hidden", "heads"), [(768, 12), (384, 12), (480, 6), (1024, 16)])
def test_alone_and_among_others(hidden: int, heads: int, dtype: str) -> None:
    done = different_rows(hidden, heads, dtype)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == 0


def test_it_is_refused_where_it_cannot_be_kept() -> None:
    done = different_rows(384, 12, "float32")
    assert done.returncode != 0
    assert "FT_HANDLER_BATCH_INVARIANT" in done.stderr
    assert "float16 or bfloat16" in done.stderr
