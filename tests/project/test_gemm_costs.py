"""What GEMM plans cost: the header is what the script makes of the measurements."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import gemm_costs  # noqa: E402
from gemm_costs import CARDS, RESULTS, Card, Plan, Shape, read_card  # noqa: E402


@pytest.fixture(scope="module")
def cards() -> list[Card]:
    return [read_card(gpu, RESULTS / name) for gpu, name in CARDS.items()]


def test_the_header_is_written_from_the_measurements(cards: list[Card]) -> None:
    written = gemm_costs.HEADER.read_text(encoding="utf-8")
    assert gemm_costs.header(cards) == written, "run scripts/gemm_costs.py"


def test_no_other_cards_costs_choose_better_on_a_measured_card(cards: list[Card]) -> None:
    tables = gemm_costs.tables_of(cards)
    measured = [(card, table) for card, table in zip(cards, tables, strict=True) if card.shapes]
    assert measured
    for card, table in measured:
        own = gemm_costs.loss(card.shapes, table)
        for other, theirs in zip(cards, tables, strict=True):
            losses = gemm_costs.loss(card.shapes, theirs)
            assert sum(x.share for x in own) <= sum(x.share for x in losses), other.gpu
            assert max(own).share <= max(losses).share, other.gpu


@pytest.mark.parametrize("struct", ["TileCost", "AfterCost", "LibraryCost"])
def test_costs_stand_in_the_order_of_the_librarys_structs(struct: str) -> None:
    names = {"TileCost": gemm_costs.TILE, "AfterCost": gemm_costs.AFTER}
    source = (ROOT / "csrc/kernels/cuda/gemm_sm90.h").read_text()
    body = re.search(rf"struct {struct} {{(.*?)}};", source, re.DOTALL)
    assert body
    fields = re.findall(r"float ([^;]*);", body[1])
    assert tuple(", ".join(fields).split(", ")) == names.get(struct, gemm_costs.LIBRARY)


def shape(tiles: dict[str, tuple[float, ...]], rounds: float, blocks: float) -> Shape:
    """A shape that every tile computes in exactly what its costs say."""
    amounts = (1.0, rounds, 0.0, rounds * blocks, 0.0, 0.0)
    ours = [
        Plan(
            tile,
            sum(c * a for c, a in zip(costs, amounts, strict=True)),
            {(tile, name): a for name, a in zip(gemm_costs.TILE, amounts, strict=True) if a},
        )
        for tile, costs in tiles.items()
    ]
    library = Plan("cublaslt", 10 * rounds, {("cublaslt", "gflop"): rounds})
    return Shape(int(64 * rounds), 768, int(64 * blocks), ours, library)


def test_a_fit_finds_the_costs_that_made_the_times() -> None:
    tiles = {"a": (2.0, 0.5, 0.0, 0.25, 0.0, 0.0), "b": (3.0, 0.0, 0.0, 0.375, 0.0, 0.0)}
    shapes = [shape(tiles, rounds, blocks) for rounds in (1.0, 2.0, 3.0) for blocks in (12, 48)]
    costs = gemm_costs.costs_of(Card("GPU", shapes=shapes))
    for tile, expected in tiles.items():
        assert tuple(costs[tile].values()) == pytest.approx(expected, abs=1e-9)
    assert costs["cublaslt"]["gflop"] == pytest.approx(10 * gemm_costs.LIBRARY_IN_A_CHAIN)
    assert all(x.share == 0 for x in gemm_costs.loss(shapes, costs))


def test_tiles_of_e4m3_operands_choose_better_by_their_own_costs(cards: list[Card]) -> None:
    """Than by those of fp16 operands, which take the tensor cores as long for a block of K."""
    shapes = [shape for shape in cards[0].shapes if shape.fp8]
    own = gemm_costs.costs_of(cards[0])
    # "trio 128x128" has no form of fp16 operands.
    borrowed = {
        row: own.get(row.removeprefix("fp8 "), own[row]) for row in own if row.startswith("fp8 ")
    }
    assert len(borrowed) == 13  # twelve tiles and the layer norm after them

    def lost(costs: gemm_costs.Costs) -> tuple[float, float]:
        """Over the shapes alone, and in stacks."""
        alone = sum(x.share for x in gemm_costs.loss(shapes, costs))
        stacks = 0.0
        for shape in shapes:
            if shape.stack:
                chosen = min(shape.ours, key=lambda p: p.estimate(costs)).name
                stacks += shape.stack[chosen] / min(shape.stack.values()) - 1
        return alone, stacks

    (alone, stacks), (alone_borrowed, stacks_borrowed) = lost(own), lost(borrowed)
    assert 0 < alone < 0.9 * alone_borrowed
    assert 0 < stacks < 0.7 * stacks_borrowed


def test_a_stack_moves_costs_that_times_alone_leave_open() -> None:
    """Two tiles of the same time alone, one of which is dearer between its neighbours."""
    plans = [Plan(tile, 10.0, {(tile, "fixed"): 1.0}) for tile in ("fp8 a", "fp8 b")]
    shapes = [Shape(64, 64, 64, plans, None, stack={"fp8 a": 40.0, "fp8 b": 42.0})]
    costs = gemm_costs.costs_of(Card("GPU", shapes=shapes))
    apart = costs["fp8 b"]["fixed"] - costs["fp8 a"]["fixed"]
    assert 1 < apart <= 2


def test_no_cost_is_below_zero() -> None:
    # A straight line through these would begin below zero.
    equations = [
        gemm_costs.Equation({("a", "fixed"): 1.0, ("a", "block"): us**0.5}, us, 1 / us)
        for us in (1.0, 9.0)
    ]
    costs = gemm_costs.fitted(equations)["a"]
    assert costs["fixed"] == 0
    assert costs["block"] > 0


def test_given_costs_win_and_the_first_card_fills_what_another_lacks(cards: list[Card]) -> None:
    first = cards[0]
    given = dict.fromkeys(gemm_costs.TILE, 7.0)
    text = gemm_costs.header([first, Card("NVIDIA X", {"tall": given})])
    ours, theirs = text.split('{"NVIDIA X"')
    row = re.search(r"\{.*\},  // tall norm", ours)
    assert row
    assert row[0] in theirs
    assert "{7.0f, 7.0f, 7.0f, 7.0f, 7.0f, 7.0f},  // tall\n" in theirs


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no GEMM plans"),
        ("[]", "holds no GEMM plans"),
        ('{"provenance": {"gpu": "NVIDIA H100"}}', "holds no GEMM plans"),
        ('{"provenance": {"gpu": "NVIDIA A100"}, "costs": {}}', "measured on NVIDIA A100"),
        ('{"provenance": {"gpu": "NVIDIA H100"}, "costs": {"tall": {"us": 1}}}', "has not the"),
    ],
)
def test_other_files_are_refused_in_words(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "plans.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match=words):
        read_card("NVIDIA H100", path)
