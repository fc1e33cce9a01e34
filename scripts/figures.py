"""Writes the README's figures from the newest files in benchmarks/results/.

    python scripts/figures.py

Reads DEVICE-encoder-*.json and DEVICE-serving-*.json as benchmarks/encoder.py and serving.py write
them; DEVICE is cpu or a GPU's name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def newest(kind: str, gpu: bool) -> tuple[Path, dict[str, Any]] | None:
    """The newest result of a kind by its date; one system alone compares nothing."""
    found = [
        (path, json.loads(path.read_text()))
        for path in RESULTS.glob(f"*-{kind}-*.json")
        if path.name.startswith("cpu-") != gpu
    ]
    if kind == "serving":
        found = [(p, d) for p, d in found if len({row["system"] for row in d["rows"]}) > 1]
    else:  # repeats of a few columns stand beside the file that has them all
        columns = {p: len({c for row in d["rows"] for c in row["ms"]}) for p, d in found}
        found = [(p, d) for p, d in found if columns[p] == max(columns.values())]
    return max(found, key=lambda item: item[1]["provenance"]["date"], default=None)


def origin(path: Path, data: dict[str, Any]) -> str:
    """One line: where the table comes from."""
    p = data["provenance"]
    device = p.get("gpu") or f"{p['cpu']}, {p['threads']} threads"
    link = path.relative_to(ROOT).as_posix()
    return f"{device}; torch {p['versions']['torch']}; {p['date'][:10]} ([{path.name}]({link}))"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def cpu_encoder(path: Path, data: dict[str, Any]) -> str:
    """System by precision: milliseconds and the ratio to HF eager fp32."""
    row = data["rows"][0]
    ms = row["ms"]
    precisions = [p for p in ("fp32", "bf16", "int8") if any(n.endswith("_" + p) for n in ms)]
    base = ms.get("hf_fp32")
    body = []
    for system in dict.fromkeys(name.rpartition("_")[0] for name in ms):
        cells = [f"**{system}**" if system == "ours" else system]
        for precision in precisions:
            value = ms.get(f"{system}_{precision}")
            faster = f" ({base / value:.2f}x)" if value and base else ""
            cells.append(f"{value:,.0f} ms{faster}" if value else "")
        body.append(cells)
    text = (
        f"**Encoder on a CPU**: {row['workload']}, {row['tokens']:,} tokens ({row['padded']:,} "
        f"padded), medians, in brackets the speed-up over Hugging Face eager fp32. "
        f"{origin(path, data)}.\n\n"
    )
    return text + table(["system", *precisions], body)


def gpu_encoder(path: Path, data: dict[str, Any]) -> str:
    """Workload by column: milliseconds, ours last, with its two ratios."""
    rows = data["rows"]
    columns = [c for c in dict.fromkeys(c for r in rows for c in r["ms"]) if "ours" not in c]
    body = []
    for row in rows:
        ms = row["ms"]
        ours = ms["ours"]
        best = min(v for c, v in ms.items() if not c.startswith(("ours", "gemms")))
        cells = [row["workload"], f"{row['tokens']:,}"]
        cells += [f"{ms[c]:.3f}" if c in ms else "" for c in columns]
        floor = ms.get("gemms_graph")
        ratio = f"{ours / floor:.2f}" if floor else ""
        body.append([*cells, f"**{ours:.3f}**", f"{ours / best:.2f}", ratio])
    head = ["workload", "tokens", *columns, "ours", "ours / best other", "ours / GEMMs"]
    return f"**Encoder on a GPU**, milliseconds. {origin(path, data)}.\n\n" + table(head, body)


def serving(path: Path, data: dict[str, Any]) -> str:
    """Requests a second and latencies, ours beside the published behaviour."""
    p = data["provenance"]
    measured = {row["system"] for row in data["rows"]}
    names = [name for name in ("published", "ours", "constant") if name in measured]
    body = []
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in data["rows"]:
        key = (row["mix"], row["batch_size"], row["workers"], row["connections"])
        cases.setdefault(key, {})[row["system"]] = row
    for key, systems in cases.items():
        cells = [str(part) for part in key]
        for name in names:
            row = systems.get(name)
            cells.append(
                f"{row['requests_per_s']:,.0f}, {row['p50_ms']:,.0f}/{row['p99_ms']:,.0f}"
                if row
                else ""
            )
        ours, other = systems.get("ours"), systems.get("published")
        both = ours and other and other["requests_per_s"]
        cells.append(f"**{ours['requests_per_s'] / other['requests_per_s']:.1f}x**" if both else "")
        body.append(cells)
    head = [
        "lengths",
        "batch size",
        "workers",
        "connections",
        *names,
        "ours / published",
    ]
    text = (
        f"**Through TorchServe**: {p.get('model')} of random weights, {p.get('precision')}; "
        "requests/s, p50/p99 ms. *Published* pads every request to a fixed length, as TorchServe's "
        "Hugging Face example does"
        + ("; *constant* answers at once" if "constant" in names else "")
        + f". {origin(path, data)}.\n\n"
    )
    return text + table(head, body)


def figures() -> str:
    """Every table there is a result for."""
    parts = []
    for kind, gpu, write in (
        ("encoder", True, gpu_encoder),
        ("serving", True, serving),
        ("encoder", False, cpu_encoder),
        ("serving", False, serving),
    ):
        found = newest(kind, gpu)
        if found:
            parts.append(write(*found))
    return "\n\n".join(parts)


def updated(page: str) -> str:
    """The page with the tables between its two marks."""
    pattern = r"(<!-- figures: [^\n]*-->\n).*?(<!-- end of figures -->)"
    page, count = re.subn(pattern, lambda m: f"{m[1]}{figures()}\n{m[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"error: {PAGE} has {count} places for figures, not 1")
    return page


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
