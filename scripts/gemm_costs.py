"""Writes what GEMM plans cost on each card, csrc/kernels/cuda/gemm_costs.h.

    python scripts/gemm_costs.py            # fits the costs and writes the header
    python scripts/gemm_costs.py --report   # what the estimate's choice loses on measured shapes

A test fails when the header is not what this makes. The costs of a card are fitted to its file in
benchmarks/results/, which benchmarks/cuda/gemm_plans.py measures: for every shape each plan's time,
and how much there is of what its estimate is made of (csrc/kernels/cuda/gemm_sm90.h). An estimate
is a sum of cost times amount, so the fit is linear: least squares of relative errors, no cost below
zero. Where plans were timed in stacks of layers too ("fp8_stacks"), how far they are apart there
counts besides: neighbours in a chain change what a kernel costs. Costs that a file gives under
"costs" are taken as they are; what a card's file neither gives nor has measured comes from the
first card.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "csrc" / "kernels" / "cuda" / "gemm_costs.h"
RESULTS = ROOT / "benchmarks" / "results"
#: What the names of a card begin with -> its file. The first serves every card that is not here.
CARDS = {"NVIDIA H100": "h100-gemm-plans.json", "NVIDIA H200": "h200-gemm-plans.json"}

#: The structs of gemm_sm90.h, by field.
TILE = ("fixed", "round", "tokens", "block", "heavy", "gelu")
AFTER = ("tile", "split", "tall", "element", "more", "partial")
#: The rows of AFTER: of operands in half precision, and of those in e4m3, whose layer norm writes a
#: copy of its rows.
AFTERS = {False: "after", True: "fp8 after"}
LIBRARY = ("fixed", "gflop", "more", "element")
#: In the order of gemm_library_amounts().
KINDS = ("cublaslt + activation", "cublaslt", "cublaslt + norm", "cublaslt + norm, large K")

#: A choice is among the fastest: plans that take longer than this of the best's time count less.
NEAR, FAR_WEIGHT = 1.5, 0.1
#: In a chain cuBLASLt's kernels neither start early nor let the next one do so, which does not show
#: where they are timed alone.
LIBRARY_IN_A_CHAIN = 1.1

#: Differences in a stack are taken among plans that lose less of the best's own time than this, and
#: count as a part of that time, so much more than a time alone does.
NEAR_IN_A_STACK, STACK_WEIGHT = 0.5, 2.0

Costs = dict[str, dict[str, float]]  # of each tile, AFTERS, and each kind of the library's product
Amounts = dict[tuple[str, str], float]


@dataclass(frozen=True)
class Plan:
    """A way to compute a shape, measured.

    amounts  how much there is of what the estimate is made of: (row of Costs, field) -> amount
    """

    name: str
    us: float
    amounts: Amounts

    def estimate(self, costs: Costs) -> float:
        """Microseconds, as the library would estimate them with these costs."""
        return sum(costs[row][name] * amount for (row, name), amount in self.amounts.items())


@dataclass(frozen=True)
class Shape:
    """A layer of one size: every plan of ours, and cuBLASLt's first guess.

    library  None: operands in e4m3, of which cuBLASLt has no such products
    stack    by plan, microseconds of a whole layer in a stack where this product has that plan;
             empty where that was not measured
    """

    rows: int
    n: int
    k: int
    ours: list[Plan]
    library: Plan | None
    stack: dict[str, float] = field(default_factory=dict)

    @property
    def fp8(self) -> bool:
        """Whether its operands are in e4m3."""
        return self.library is None

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.n} x {self.k}"


@dataclass(frozen=True)
class Card:
    """What is known of a card: costs that are given, and shapes that were measured."""

    gpu: str
    given: Costs = field(default_factory=dict)
    shapes: list[Shape] = field(default_factory=list)


def read_card(gpu: str, path: Path) -> Card:
    """A card's file; ends the script in words where it is none of these."""
    try:
        data = json.loads(path.read_text())
        stacks = {(s["rows"], s["n"], s["k"]): s["us"] for s in data.get("fp8_stacks", [])}
        shapes = [_shape(row, stacks) for row in data.get("rows", [])]
        given = {row: dict(costs) for row, costs in data.get("costs", {}).items()}
        card = data["provenance"]["gpu"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"error: {path.name} holds no GEMM plans: {error!r}") from None
    if not card.startswith(gpu):
        raise SystemExit(f"error: {path.name} was measured on {card}, not on {gpu}")
    if not shapes and not given:
        raise SystemExit(f"error: {path.name} holds no GEMM plans")
    for row, costs in given.items():
        if tuple(costs) != _fields(row):
            raise SystemExit(f"error: {path.name}: {row!r} has not the costs {_fields(row)}")
    return Card(gpu, given, shapes)


def _fields(row: str) -> tuple[str, ...]:
    return AFTER if row in AFTERS.values() else LIBRARY if row in KINDS else TILE


def _amounts(row: str, values: list[float]) -> Amounts:
    return {(row, name): v for name, v in zip(_fields(row), values, strict=True) if v}


def _shape(row: dict[str, Any], stacks: dict[tuple[int, int, int], dict[str, float]]) -> Shape:
    fp8 = row["fp8"]
    ours = [
        Plan(name, us, _amounts(tile, product) | _amounts(AFTERS[fp8], after))
        for name, us, tile, product, after in row["ours"]
    ]
    library = None
    if not fp8:
        us, kind, product = row["library"]
        library = Plan("cublaslt", us, _amounts(kind, product))
    size = row["rows"], row["n"], row["k"]
    return Shape(*size, ours, library, stacks.get(size, {}) if fp8 else {})


class Equation(NamedTuple):
    """What costs times amounts should add up to, and what a microsecond of error counts."""

    amounts: Amounts
    us: float
    weight: float


def equations_of(shape: Shape) -> list[Equation]:
    """What a shape says of the costs: its plans' times, and their differences in a stack."""
    best = min(plan.us for plan in shape.ours)
    equations = [
        Equation(p.amounts, p.us, (1.0 if p.us <= NEAR * best else FAR_WEIGHT) / p.us)
        for p in shape.ours
    ]
    if not shape.stack:
        return equations
    least = min(shape.stack.values())
    near = [p for p in shape.ours if shape.stack[p.name] - least <= NEAR_IN_A_STACK * best]
    mean_us = sum(shape.stack[p.name] for p in near) / len(near)
    names = {name for p in near for name in p.amounts}
    mean = {name: sum(p.amounts.get(name, 0.0) for p in near) / len(near) for name in names}
    return equations + [
        Equation(
            {name: p.amounts.get(name, 0.0) - mean[name] for name in names},
            shape.stack[p.name] - mean_us,
            STACK_WEIGHT / best,
        )
        for p in near
    ]


def fitted(equations: list[Equation]) -> Costs:
    """The costs that make the sum of the squares of the equations' weighted errors least.

    None is below zero: what would be is taken out, the worst first, and the rest fitted anew.
    """
    if not equations:
        return {}
    names = sorted({name for equation in equations for name in equation.amounts})
    wanted = np.array([e.us * e.weight for e in equations])
    relative = np.array([[e.amounts.get(n, 0.0) * e.weight for n in names] for e in equations])
    # The same least squares in as few rows as there are names.
    basis, relative = np.linalg.qr(relative)
    wanted = basis.T @ wanted
    left = [i for i in range(len(names)) if relative[:, i].any()]
    found = np.zeros(0)
    while left:
        scale = np.linalg.norm(relative[:, left], axis=0)
        found = np.linalg.lstsq(relative[:, left] / scale, wanted, rcond=1e-9)[0] / scale
        if found.min() >= 0:
            break
        del left[int((found * scale).argmin())]
    costs: Costs = {row: dict.fromkeys(_fields(row), 0.0) for row, _ in names}
    for i, cost in zip(left, found, strict=True):
        row, name = names[i]
        costs[row][name] = _rounded(cost)
    return costs


def _rounded(cost: float) -> float:
    return float(f"{cost:.3g}")


def costs_of(card: Card) -> Costs:
    """A card's costs: those that are given, and those fitted to its shapes."""
    if not card.shapes:
        return card.given
    costs: Costs = {}
    for fp8 in AFTERS:
        equations = [e for s in card.shapes if s.fp8 == fp8 for e in equations_of(s)]
        costs |= fitted(equations)
    library = [shape.library for shape in card.shapes if shape.library is not None]
    for kind, alone in fitted([Equation(p.amounts, p.us, 1 / p.us) for p in library]).items():
        costs[kind] = {name: _rounded(LIBRARY_IN_A_CHAIN * cost) for name, cost in alone.items()}
    return {**costs, **card.given}


class Loss(NamedTuple):
    """What the estimate's choice among our plans costs more than the best, as a share of it."""

    share: float
    shape: str
    chosen: str
    best: str


def loss(shapes: list[Shape], costs: Costs) -> list[Loss]:
    """The loss at each shape."""
    losses = []
    for shape in shapes:
        best = min(shape.ours, key=lambda p: p.us)
        chosen = min(shape.ours, key=lambda p: p.estimate(costs))
        losses.append(Loss(chosen.us / best.us - 1, shape.name, chosen.name, best.name))
    return losses


def tables_of(cards: list[Card]) -> list[Costs]:
    """Every card's costs, those that it has not filled in from the first."""
    tables = [costs_of(card) for card in cards]
    return [{**tables[0], **table} for table in tables]


def header(cards: list[Card]) -> str:
    """The header; the first card's tiles are the ones there are."""
    tables = tables_of(cards)
    tiles = sorted(row for row in tables[0] if row not in AFTERS.values() and row not in KINDS)
    lines = [
        f"// Written by scripts/gemm_costs.py from {' and '.join(CARDS.values())}",
        "// in benchmarks/results/; do not edit.",
        "#pragma once",
        "",
        "#include <array>",
        "#include <string_view>",
        "",
        '#include "kernels/cuda/gemm_sm90.h"',
        "",
        "// clang-format off",
        "namespace ft::cuda {",
        "",
        *_names("kCostedTiles", tiles),
        "",
        *_names("kLibraryKinds", KINDS),
        "",
        "struct GemmCosts {",
        "  std::string_view gpu;  // what the names of its cards begin with",
        "  std::array<TileCost, kCostedTiles.size()> tiles;",
        "  AfterCost after, narrow_after;",
        "  std::array<LibraryCost, kLibraryKinds.size()> library;",
        "};",
        "",
        f"inline constexpr std::array<GemmCosts, {len(cards)}> kGemmCosts{{{{",
    ]
    for card, costs in zip(cards, tables, strict=True):
        lines += [
            f'  {{"{card.gpu}",',
            f"   {{{{  // {', '.join(TILE)}",
            *(f"     {_initializer(costs[tile])},  // {tile}" for tile in tiles),
            "   }},",
            f"   {_initializer(costs[AFTERS[False]])},  // {', '.join(AFTER)}",
            f"   {_initializer(costs[AFTERS[True]])},  // of e4m3 operands",
            f"   {{{{  // {', '.join(LIBRARY)}",
            *(f"     {_initializer(costs[kind])},  // {kind}" for kind in KINDS),
            "   }}},",
        ]
    return "\n".join([*lines, "}};", "", "}  // namespace ft::cuda", ""])


def _names(variable: str, names: Sequence[str]) -> list[str]:
    return [
        f"inline constexpr std::array<std::string_view, {len(names)}> {variable}{{",
        *(f'  "{name}",' for name in names),
        "};",
    ]


def _initializer(costs: dict[str, float]) -> str:
    return "{" + ", ".join(f"{cost!r}f" for cost in costs.values()) + "}"


def report(cards: list[Card]) -> str:
    """The loss of every card's costs on every card's shapes, in words."""
    lines = []
    tables = tables_of(cards)
    for card in cards:
        for fp8, operands in ((False, "half"), (True, "fp8")):
            shapes = [shape for shape in card.shapes if shape.fp8 == fp8]
            for other, costs in zip(cards, tables, strict=True):
                if not shapes:
                    continue
                losses = loss(shapes, costs)
                worst = max(losses)
                mean = sum(x.share for x in losses) / len(losses)
                lines.append(
                    f"{card.gpu}, {len(losses)} shapes in {operands}, costs of {other.gpu}: the "
                    f"choice costs {mean:.1%} more than the best plan, at most {worst.share:.1%} "
                    f"({worst.shape}: {worst.chosen}, best {worst.best})"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    cards = [read_card(gpu, RESULTS / name) for gpu, name in CARDS.items()]
    if arguments.report:
        print(report(cards))
    else:
        HEADER.write_text(header(cards), encoding="utf-8")


if __name__ == "__main__":
    main()
