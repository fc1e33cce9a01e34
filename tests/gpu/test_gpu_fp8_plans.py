"""Every plan of the products in fp8: what one tile answers, all of them do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ft_handler.tuning.measure import Layer, layers_of, random_encoder
from ft_handler.tuning.table import NARROW, Entry, gemm_ops, load_entry

pytestmark = pytest.mark.gpu

# A layer norm with its product rounds once where a kernel of its own rounds twice, and what then
# falls on the other side of an e4m3 number's edge is off by a 16th.
ONE_ROUNDING = 0.03


@pytest.mark.parametrize("rows", [113, 1344, 5000])
@pytest.mark.parametrize("hidden", [768, 1024])
def test_every_plan(hidden: int, rows: int) -> None:
    ops = gemm_ops()
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("products in fp8 are of compute capability 9.0")
    torch.manual_seed(0)
    encoder = random_encoder(hidden, 4 * hidden, hidden // 64, 2, NARROW)
    ids = torch.randint(1000, (rows,), device="cuda")
    edges = torch.tensor([*range(0, rows, 128), rows], dtype=torch.int32, device="cuda")
    known = int(ops.gemm_row_class(rows))

    def answer(layer: Layer, plan: str) -> Tensor:
        entry = Entry(NARROW, known, layer.n, layer.k, layer.gelu, layer.norm, plan, 0.0)
        load_entry(0, entry)
        found: Tensor = encoder(ids, ids % 2, None, edges, 128)
        return found.float()

    for layer in layers_of(hidden, 4 * hidden):
        weight = torch.empty(layer.n, layer.k, dtype=torch.float8_e4m3fn, device="cuda")
        named = ops.gemm_candidates(weight, known, layer.gelu, layer.norm, layer.norm)
        plans = named.split("\n")
        assert len(plans) >= 5
        first = answer(layer, plans[0])
        assert bool(torch.isfinite(first).all())
        for plan in plans[1:]:
            found = answer(layer, plan)
            if layer.norm:
                assert float((found - first).norm() / first.norm()) < ONE_ROUNDING, plan
            else:
                assert torch.equal(found, first), plan
        answer(layer, plans[0])
