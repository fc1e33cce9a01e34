"""Writes the figures of benchmarks/README.md, docs/precisions.md and README.md from
benchmarks/results/.

    python scripts/figures.py

Reads the newest DEVICE-encoder-*.json, DEVICE-families-*.json, DEVICE-serving-*.json and
cpu-memory-*.json and every cpu-precisions-*.json, as benchmarks/encoder.py, serving.py and
memory.py write them; DEVICE is cpu or a GPU's name. A result of a tree that was not committed is
refused: nobody could make it again. One that is older than the kernels it measures is marked.
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


def results(kind: str, gpu: bool = False) -> list[tuple[Path, dict[str, Any]]]:
    """Every result of a kind, by name; refuses those of no commit."""
    found = [
        (path, json.loads(path.read_text()))
        for path in sorted(RESULTS.glob(f"*-{kind}-*.json"))
        if path.name.startswith("cpu-") != gpu
    ]
    for path, data in found:
        commit = str(data["provenance"].get("commit", "unknown"))
        if not re.fullmatch(r"[0-9a-f]{7,40}", commit):
            raise SystemExit(
                f"error: {path.name} was measured on {commit!r}, not on a commit: measure it again "
                "with everything committed, or take it out of benchmarks/results"
            )
    return found


def _system(column: str) -> str:
    """A column's name without its precision."""
    return re.sub(r"_(fp32|bf16|int8)$", "", column)


def newest(kind: str, gpu: bool) -> tuple[Path, dict[str, Any]] | None:
    """The newest result of a kind by its date; of serving, that compares with another system."""
    found = results(kind, gpu)
    if kind == "serving":
        found = [(p, d) for p, d in found if "published" in {row["system"] for row in d["rows"]}]
    elif kind != "memory":  # repeats of a few systems stand beside the file that has them all
        systems = {p: len({_system(c) for row in d["rows"] for c in row["ms"]}) for p, d in found}
        found = [(p, d) for p, d in found if systems[p] == max(systems.values())]
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


def _is_other(column: str) -> bool:
    """Whether a GPU column is another system in the precision of ours."""
    return not column.startswith(("ours", "gemms")) and "fp8" not in column


def gpu_encoder(path: Path, data: dict[str, Any], what: str = "Encoder on a GPU") -> str:
    """Workload by column: milliseconds, ours last, with its two ratios, then ours in FP8."""
    rows = data["rows"]
    narrow = any("ours_fp8" in row["ms"] for row in rows)
    columns = [c for c in dict.fromkeys(c for r in rows for c in r["ms"]) if "ours" not in c]
    body = []
    for row in rows:
        ms = row["ms"]
        ours = ms["ours"]
        best = min(v for c, v in ms.items() if _is_other(c))
        cells = [row["workload"], f"{row['tokens']:,}"]
        cells += [f"{ms[c]:.3f}" if c in ms else "" for c in columns]
        floor = ms.get("gemms_graph")
        ratio = f"{ours / floor:.2f}" if floor else ""
        cells += [f"**{ours:.3f}**", f"{ours / best:.2f}", ratio]
        if narrow:
            fp8 = ms.get("ours_fp8")
            ratios = [_ratio(fp8, ours), _ratio(fp8, ms.get("gemms_fp8"))]
            cells += [f"**{fp8:.3f}**" if fp8 else "", *ratios]
        body.append(cells)
    head = ["workload", "tokens", *columns, "ours", "ours / best other", "ours / GEMMs"]
    if narrow:
        head += ["ours FP8", "FP8 / ours", "FP8 / its GEMMs"]
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


def _label(row: dict[str, Any], several: bool) -> str:
    """A serving row's column: ours by precision where a file has it in several."""
    return f"ours {row['precision']}" if several and row["system"] == "ours" else row["system"]


def serving(path: Path, data: dict[str, Any]) -> str:
    """Requests a second and latencies, ours beside the published behaviour."""
    p = data["provenance"]
    own = {row.get("precision") for row in data["rows"] if row["system"] == "ours"}
    measured = dict.fromkeys(_label(row, len(own) > 1) for row in data["rows"])
    ours = [name for name in measured if name.startswith("ours")]
    names = [n for n in ("published", *ours, "constant") if n in measured]
    body = []
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in data["rows"]:
        key = (row["mix"], row["batch_size"], row["workers"], row["connections"])
        cases.setdefault(key, {})[_label(row, len(own) > 1)] = row
    for key, systems in cases.items():
        cells = [str(part) for part in key]
        for name in names:
            row = systems.get(name)
            cells.append(
                f"{row['requests_per_s']:,.0f}, {row['p50_ms']:,.0f}/{row['p99_ms']:,.0f}"
                if row
                else ""
            )
        other = systems.get("published", {}).get("requests_per_s")
        for name in ours:
            rate = systems.get(name, {}).get("requests_per_s")
            cells.append(f"**{rate / other:.1f}x**" if rate and other else "")
        body.append(cells)
    head = [
        "lengths",
        "batch size",
        "workers",
        "connections",
        *names,
        *(f"{name} / published" for name in ours),
    ]
    precision = f"{p.get('precision')}" if len(own) < 2 else f"*published* in {p['precision']}"
    text = (
        f"**Through TorchServe**: {p.get('model')} of random weights, {precision}; "
        "requests/s, p50/p99 ms. *Published* pads every request to a fixed length, as TorchServe's "
        "Hugging Face example does"
        + ("; *constant* answers at once" if "constant" in names else "")
        + f". {origin(path, data)}\n\n"
    )
    return text + table(head, body)


def processor(data: dict[str, Any]) -> str:
    """Processor, instruction set and threads of a result."""
    p = data["provenance"]
    return f"{p['cpu']}, {p['library']['cpu_isa']}, {p['threads']} threads"


def _ratio(part: float | None, whole: float | None) -> str:
    return f"{part / whole:.2f}" if part and whole else ""


def _others(ms: dict[str, float], precision: str) -> dict[str, float]:
    """Other engines' times in a precision."""
    return {
        name.removesuffix(f"_{precision}"): value
        for name, value in ms.items()
        if name.endswith(f"_{precision}") and not name.startswith(("ours", "gemms"))
    }


def all_precisions() -> str:
    """Every processor's table of workload by precision: ours, and other engines in int8."""
    parts = []
    for path, data in results("precisions"):
        measured = {c for row in data["rows"] for c in row["ms"]}
        engines = sorted({name for row in data["rows"] for name in _others(row["ms"], "int8")})
        floats = [f for f in ("fp32", "bf16") if f"ours_{f}" in measured]
        floors = [f for f in floats if f"gemms_{f}" in measured]
        int8 = "ours_int8" in measured
        head = [
            "workload", "tokens", *floats, *(f"{f} / GEMMs" for f in floors),
            *(["int8", *engines] if int8 else []),
            *([*(f"int8 / {f}" for f in floats), "int8 / best other"] if int8 else []),
        ]  # fmt: skip
        body = []
        for row in data["rows"]:
            ms = row["ms"]
            ours = ms.get("ours_int8")
            times = [ms.get(f"ours_{f}") for f in floats]
            cells = [row["workload"], f"{row['tokens']:,}", *map(_time, times)]
            cells += [_ratio(ms.get(f"ours_{f}"), ms.get(f"gemms_{f}")) for f in floors]
            if int8:
                others = _others(ms, "int8")
                cells += [f"**{_time(ours)}**", *(_time(others.get(name)) for name in engines)]
                cells += [_ratio(ours, time) for time in times]
                cells.append(_ratio(ours, min(others.values(), default=None)))
            body.append(cells)
        parts.append(
            f"**Precisions on a CPU**, milliseconds, medians; engines by name are in int8. "
            f"{processor(data)}. {origin(path, data)}\n\n" + table(head, body)
        )
    return "\n\n".join(parts)


def _time(ms: float | None) -> str:
    """Milliseconds with three digits or so."""
    return "" if ms is None else f"{ms:,.{0 if ms >= 100 else 1 if ms >= 10 else 2}f}"


TEXTS = {
    "base sst2 b1": "one sentence",
    "base sst2 b16": "16 sentences",
    "base squad b1": "one question and passage",
    "base squad b16": "16 questions and passages",
}


def precisions() -> str:
    """Processor and texts by precision: how many times as fast as fp32, and as other engines."""
    body, sources, older_ones = [], {}, False
    for path, data in results("precisions"):
        for row in data["rows"]:
            ms = row["ms"]
            if row["workload"] not in TEXTS or not {"ours_fp32", "ours_int8"} <= ms.keys():
                continue
            fp32, bf16, int8 = (ms.get(f"ours_{p}") for p in ("fp32", "bf16", "int8"))
            others = _others(ms, "int8")
            best = min(others, key=others.__getitem__, default=None)
            beside = f"{_ratio(others[best], int8)}x {NAMES.get(best, best)}" if best else ""
            speeds = [f"{_ratio(fp32, time)}x" if time else "" for time in (bf16, int8)]
            cells = [processor(data), TEXTS[row["workload"]], f"{_time(fp32)} ms", *speeds, beside]
            body.append(cells)
            sources[path.name] = f"[{path.name}](results/{path.name})"
            older_ones |= older(data["provenance"], "csrc/kernels/cpu")
    head = ["processor", "texts", "fp32", "bf16", "int8", "int8 beside the best other in int8"]
    parts = []
    if body:
        note = f"From {', '.join(sources.values())}.{OLDER if older_ones else ''}"
        parts.append(table(head, body) + f"\n\n{note}")
    if found := newest("memory", gpu=False):
        parts.append(memory(*found))
    return "\n\n".join(parts).replace("](results/", "](../benchmarks/results/")


NAMES = {"ctranslate2": "CTranslate2", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def memory(path: Path, data: dict[str, Any]) -> str:
    """Precision by what a worker's process takes."""
    body = []
    for row in data["rows"]:
        cells = [row["without"]["rss"], row["loaded"]["rss"], row["answered"]["rss"], row["peak"]]
        body.append([row["precision"], *(f"{mib:,.0f}" for mib in (row["file"], *cells))])
    head = ["precision", "traced file", "before loading", "loaded", "after answers", "peak"]
    return (
        f"**Memory of a worker** on a CPU, {data['provenance']['model']} of random weights, MiB "
        f"resident. {origin(path, data)}\n\n" + table(head, body)
    )


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
    parts += (gpu_encoder(*found, "FP8 on a GPU") for found in results("fp8", gpu=True))
    return "\n\n".join(filter(None, [*parts, all_precisions()]))


def _encoder_row(gpu: bool, precision: str) -> tuple[list[str], dict[str, Any]] | None:
    """BERT-base, 16 texts of up to 128 tokens: Hugging Face, the best other system, ours."""
    found = newest("encoder", gpu)
    rows = [r for r in found[1]["rows"] if r["workload"] == "base ragged b16 s128"] if found else []
    if not found or not rows:
        return None
    ms: dict[str, float] = rows[0]["ms"]
    if not gpu:
        ms = {n.removesuffix(f"_{precision}"): v for n, v in ms.items() if n.endswith(precision)}
    if "ours" not in ms:
        return None
    plain = ms.get("hf_sdpa" if gpu else "hf")
    others = [v for n, v in ms.items() if _is_other(n)]
    digits = 2 if gpu else 0
    cells = [f"{v:,.{digits}f} ms" if v else "" for v in (plain, min(others, default=None))]
    name = f"encoder alone, BERT-base, 16 texts of 25 to 128 tokens, {precision}"
    return [name, *cells, f"**{ms['ours']:,.{digits}f} ms**"], found[1]["provenance"]


def _fp8_row() -> tuple[list[str], dict[str, Any]] | None:
    """BERT-large, 256 questions: the best of packed torch in FP8, ours."""
    found = newest("fp8", gpu=True)
    if not found:
        return None
    for row in found[1]["rows"]:
        ms: dict[str, float] = row["ms"]
        others = [v for n, v in ms.items() if n.startswith("packed_fp8")]
        if others and row["workload"].startswith("large squad b256"):
            name = "encoder alone, BERT-large, 256 questions of SQuAD's lengths, fp8"
            cells = ["", f"{min(others):,.2f} ms", f"**{ms['ours_fp8']:,.2f} ms**"]
            return [name, *cells], found[1]["provenance"]
    return None


def _serving_row(gpu: bool, mix: str, precision: str) -> tuple[list[str], dict[str, Any]] | None:
    """Requests a second at the most connections, with one worker and the largest batches."""
    found = newest("serving", gpu)
    if not found:
        return None
    p = found[1]["provenance"]
    rows = [r for r in found[1]["rows"] if r["mix"] == mix and r["workers"] == 1]
    case = max((r["batch_size"], r["connections"]) for r in rows)
    rates = {
        r["system"]: r["requests_per_s"]
        for r in rows
        if (r["batch_size"], r["connections"]) == case
        and (r["system"] != "ours" or r.get("precision", p["precision"]) == precision)
    }
    if "ours" not in rates:
        return None
    model = {"base": "BERT-base", "minilm": "MiniLM"}.get(p["model"], p["model"])
    texts = {"sst2": "sentences of SST-2's lengths", "squad": "questions of SQuAD's lengths"}[mix]
    name = f"through TorchServe, {model}, {texts}, {case[1]} connections, {precision}"
    published = f"{rates['published']:,.0f}/s" if "published" in rates else ""
    cells = [published, "", f"**{rates['ours']:,.0f}/s**"]
    return [name, *cells], p


def summary() -> str:
    """The README's few rows."""
    rows = []  # what they are rows of, and they
    for of, gpu, kinds in (("GPU in fp16", True, ("fp16",)), ("CPU", False, ("fp32", "int8"))):
        rows += [(of, _encoder_row(gpu, precision)) for precision in kinds]
        if gpu:
            rows.append(("GPU in fp8", _fp8_row()))
        rows += [(of, _serving_row(gpu, mix, p)) for p in kinds for mix in ("sst2", "squad")]
    body, old = [], dict[str, None]()
    for of, found in rows:
        if found:
            cells, p = found
            body.append([p.get("gpu") or f"{p['cpu']}, {p['threads']} threads", *cells])
            if older(p, f"csrc/kernels/{'cuda' if p.get('gpu') else 'cpu'}"):
                old[of] = None
    text = table(["on", "what", "Hugging Face", "best other", "ours"], body) if body else ""
    return text + (f"\n\nRows of the {' and the '.join(old)}:{OLDER}" if old else "")


def updated(page: str, write: Callable[[], str] = figures) -> str:
    """The page with what is written between its two marks."""
    pattern = r"(<!-- figures: [^\n]*-->\n).*?(<!-- end of figures -->)"
    page, count = re.subn(pattern, lambda m: f"{m[1]}{write()}\n{m[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"error: a page has {count} places for figures, not 1")
    return page


#: Page -> what stands between its marks.
PAGES = {
    "benchmarks/README.md": figures,
    "docs/precisions.md": precisions,
    "README.md": summary,
}


if __name__ == "__main__":
    for name, write in PAGES.items():
        path = ROOT / name
        path.write_text(updated(path.read_text(encoding="utf-8"), write), encoding="utf-8")
