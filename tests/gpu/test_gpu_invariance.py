"""Hidden states that do not depend on the batch, to the last bit, where that is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

# In a process of its own, since the library reads its switch once: every sequence alone, and among
# the others, in two orders; prints how many rows of hidden states differ at all.
SCRIPT = """
import json, sys
import torch
from ft_handler import load_library
from stacks import VOCABULARY, random_stack, specification

load_library()
ops = torch.ops.fastertransformer
hidden, heads, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
options, distance = sys.argv[4], int(sys.argv[5])
size = (hidden, heads, 4 * hidden)
spec = specification(size, distance=distance)
parameters = random_stack(size, dtype, 512, distance)
parameters[5][:, : 2 * hidden] *= 4  # queries and keys: maxima that grow as keys come
torch.manual_seed(0)
lengths = [1, 7, 31, 64, 65, 113, 128, 129, 300, 511] + [5 + 7 * i for i in range(54)]
sequences = [torch.randint(VOCABULARY, (n,), device="cuda") for n in lengths]

def encode(some):
    ids = torch.cat([sequences[i] for i in some])
    ends = torch.tensor([0] + [lengths[i] for i in some]).cumsum(0).int().cuda()
    longest = max(lengths[i] for i in some)
    out = ops.encode(ids, ids % 2, None, ends, longest, parameters, spec, options)
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


def different_rows(
    hidden: int,
    heads: int,
    dtype: str,
    options: str = "batch_invariant",
    switch: str = "",
    distance: int = 0,
) -> subprocess.CompletedProcess[str]:
    given = [str(hidden), str(heads), dtype, options, str(distance)]
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *given],
        env={
            **os.environ,
            "FT_HANDLER_BATCH_INVARIANT": switch,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        },
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


@pytest.mark.parametrize("distance", [20, 128, 600])
def test_alone_and_among_others_with_a_relative_bias(distance: int) -> None:
    done = different_rows(768, 12, "float16", distance=distance)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == 0


def test_the_switch_in_the_environment_wins() -> None:
    forced = different_rows(384, 12, "float16", options="", switch="1")
    assert json.loads(forced.stdout) == 0, forced.stderr
    forbidden = different_rows(384, 12, "float16", switch="0")
    assert json.loads(forbidden.stdout) > 0, forbidden.stderr


def test_it_is_refused_where_it_cannot_be_kept() -> None:
    done = different_rows(384, 12, "float32")
    assert done.returncode != 0
    assert "FT_HANDLER_BATCH_INVARIANT" in done.stderr
    assert "float16 or bfloat16" in done.stderr
