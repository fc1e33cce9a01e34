"""Writes the figures of benchmarks/README.md and README.md from the newest benchmarks/results/.

    python scripts/figures.py

Reads DEVICE-encoder-*.json, DEVICE-families-*.json and DEVICE-serving-*.json as
benchmarks/encoder.py and serving.py write them; DEVICE is cpu or a GPU's name. A result of a tree
that was not committed is refused: nobody could make it again. One that is older than the kernels it
measures is marked.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

OLDER = " **Older than the kernels: measured before their last change.**"


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
    for path, data in found:
        commit = str(data["provenance"].get("commit", "unknown"))
        if not re.fullmatch(r"[0-9a-f]{7,40}", commit):
            raise SystemExit(
                f"error: {path.name} was measured on {commit!r}, not on a commit: measure it again "
                "with everything committed, or take it out of benchmarks/results"
            )
    return max(found, key=lambda item: item[1]["provenance"]["date"], default=None)


def git(*arguments: str) -> tuple[int, str]:
    """Exit status and output of a git command in this clone."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git here
        return 128, ""
    return done.returncode, done.stdout.strip()


def older(provenance: dict[str, Any], folder: str) -> bool:
    """Whether a result lacks the last change of a folder of kernels; False without a history."""
    status, last = git("log", "-1", "--format=%H %cI", "--", folder)
    if status or not last:
        return False
    change, _, when = last.partition(" ")
    status, _ = git("merge-base", "--is-ancestor", change, provenance["commit"])
    if status in (0, 1):
        return status == 1
    # A commit that this clone does not have: the dates decide.
    return datetime.fromisoformat(provenance["date"]) < datetime.fromisoformat(when)


def origin(path: Path, data: dict[str, Any]) -> str:
    """One line: where the table comes from."""
    p = data["provenance"]
    device = p.get("gpu") or f"{p['cpu']}, {p['threads']} threads"
    link = path.relative_to(ROOT / "benchmarks").as_posix()
    mark = OLDER if older(p, f"csrc/kernels/{'cuda' if p.get('gpu') else 'cpu'}") else ""
    return (
        f"{device}; torch {p['versions']['torch']}; commit {p['commit'][:7]}, {p['date'][:10]} "
        f"([{path.name}]({link})).{mark}"
    )


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
        f"{origin(path, data)}\n\n"
    )
    return text + table(["system", *precisions], body)


def gpu_encoder(path: Path, data: dict[str, Any], what: str = "Encoder on a GPU") -> str:
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
    return f"**{what}**, milliseconds. {origin(path, data)}\n\n" + table(head, body)


def gpu_families(path: Path, data: dict[str, Any]) -> str:
    """The same of several architectures."""
    return gpu_encoder(path, data, "Architectures on a GPU, all with the sizes of BERT-base")


def cpu_families(path: Path, data: dict[str, Any]) -> str:
    """Architecture by system: milliseconds, ours last, with its ratio to the best other."""
    systems = dict.fromkeys(c for row in data["rows"] for c in row["ms"])
    columns = [c for c in systems if not c.startswith("ours")]
    body = []
    for row in data["rows"]:
        ms = row["ms"]
        others = {c: v for c, v in ms.items() if not c.startswith(("ours", "gemms"))}
        cells = [row["workload"], *(f"{ms[c]:,.0f}" if c in ms else "" for c in columns)]
        ratio = ms["ours_fp32"] / min(others.values())
        body.append([*cells, f"**{ms['ours_fp32']:,.0f}**", f"{ratio:.2f}"])
    names = [c.removesuffix("_fp32") for c in columns]
    head = ["workload", *names, "ours", "ours / best other"]
    return (
        "**Architectures on a CPU, all with the sizes of BERT-base**, fp32, milliseconds, medians. "
        f"{origin(path, data)}\n\n" + table(head, body)
    )


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
        + f". {origin(path, data)}\n\n"
    )
    return text + table(head, body)


def figures() -> str:
    """Every table there is a result for."""
    parts = []
    for kind, gpu, write in (
        ("encoder", True, gpu_encoder),
        ("families", True, gpu_families),
        ("serving", True, serving),
        ("encoder", False, cpu_encoder),
        ("families", False, cpu_families),
        ("serving", False, serving),
    ):
        found = newest(kind, gpu)
        if found:
            parts.append(write(*found))
    return "\n\n".join(parts)


def _encoder_row(gpu: bool) -> tuple[list[str], dict[str, Any]] | None:
    """BERT-base, 16 texts of up to 128 tokens: Hugging Face, the best other system, ours."""
    found = newest("encoder", gpu)
    rows = [r for r in found[1]["rows"] if r["workload"] == "base ragged b16 s128"] if found else []
    if not found or not rows:
        return None
    ms: dict[str, float] = rows[0]["ms"]
    if not gpu:
        ms = {n.removesuffix("_fp32"): v for n, v in ms.items() if n.endswith("_fp32")}
    plain = ms.get("hf_sdpa" if gpu else "hf")
    others = [v for n, v in ms.items() if not n.startswith(("ours", "gemms"))]
    digits = 2 if gpu else 0
    cells = [f"{v:,.{digits}f} ms" if v else "" for v in (plain, min(others))]
    name = f"encoder alone, BERT-base, 16 texts of 25 to 128 tokens, {'fp16' if gpu else 'fp32'}"
    return [name, *cells, f"**{ms['ours']:,.{digits}f} ms**"], found[1]["provenance"]


def _serving_row(gpu: bool, mix: str) -> tuple[list[str], dict[str, Any]] | None:
    """Requests a second at the most connections, with one worker and the largest batches."""
    found = newest("serving", gpu)
    if not found:
        return None
    rows = [r for r in found[1]["rows"] if r["mix"] == mix and r["workers"] == 1]
    case = max((r["batch_size"], r["connections"]) for r in rows)
    rates = {
        r["system"]: r["requests_per_s"]
        for r in rows
        if (r["batch_size"], r["connections"]) == case
    }
    p = found[1]["provenance"]
    model = {"base": "BERT-base", "minilm": "MiniLM"}.get(p["model"], p["model"])
    texts = {"sst2": "sentences of SST-2's lengths", "squad": "questions of SQuAD's lengths"}[mix]
    name = f"through TorchServe, {model}, {texts}, {case[1]} connections, {p['precision']}"
    cells = [f"{rates['published']:,.0f}/s", "", f"**{rates['ours']:,.0f}/s**"]
    return [name, *cells], p


def summary() -> str:
    """The README's few rows."""
    body, marks = [], {True: False, False: False}
    for gpu in (True, False):
        for found in (
            _encoder_row(gpu),
            _serving_row(gpu, "sst2"),
            _serving_row(gpu, "squad"),
        ):
            if found:
                cells, p = found
                device = p.get("gpu") or f"{p['cpu']}, {p['threads']} threads"
                body.append([device, *cells])
                marks[gpu] |= older(p, f"csrc/kernels/{'cuda' if gpu else 'cpu'}")
    text = table(["on", "what", "Hugging Face", "best other", "ours"], body) if body else ""
    names = [name for gpu, name in ((True, "GPU"), (False, "CPU")) if marks[gpu]]
    return text + (f"\n\nRows of the {' and the '.join(names)}:{OLDER}" if names else "")


def updated(page: str, write: Callable[[], str] = figures) -> str:
    """The page with what is written between its two marks."""
    pattern = r"(<!-- figures: [^\n]*-->\n).*?(<!-- end of figures -->)"
    page, count = re.subn(pattern, lambda m: f"{m[1]}{write()}\n{m[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"error: a page has {count} places for figures, not 1")
    return page


#: Page -> what stands between its marks.
PAGES = {"benchmarks/README.md": figures, "README.md": summary}


if __name__ == "__main__":
    for name, write in PAGES.items():
        path = ROOT / name
        path.write_text(updated(path.read_text(encoding="utf-8"), write), encoding="utf-8")
