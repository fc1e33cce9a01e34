"""The documentation agrees with the code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from monitoring import rules

from ft_handler import __version__, tasks
from ft_handler.cli.bench import BENCHMARKS
from ft_handler.cli.main import COMMANDS, build
from ft_handler.config import ENVIRONMENT, settings_table
from ft_handler.errors import MalformedRequest, RequestError
from ft_handler.request.documents import Decoder, Limits
from ft_handler.request.replies import encode_error
from ft_handler.servers.torchserve.exporter import COUNTERS, GAUGES
from ft_handler.servers.torchserve.metrics import METRICS
from ft_handler.stats import STAGES, BatchStats
from ft_handler.types import Incoming

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    p
    for folder in ("", "docs/**/", "examples/**/", "benchmarks/**/", ".github/**/")
    for p in ROOT.glob(f"{folder}*.md")
)


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def rows(text: str) -> dict[str, list[str]]:
    """First cell, without its backticks -> the other cells, of every table row that has some."""
    found = {}
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split(" | ")]
        match = re.fullmatch(r"`([\w.]+)`", cells[0].lstrip("| "))
        if line.startswith("| `") and match:
            found[match[1]] = cells[1:]
    return found


def test_every_setting_and_default_is_documented() -> None:
    with_script()
    from settings_docs import groups

    text = page("docs/configuration.md").split("## Environment")[0]
    sections = re.split(r"^### ", text, flags=re.M)[1:]
    assert [s.partition("\n")[0] for s in sections] == list(groups())
    for section, group in zip(sections, groups().values(), strict=True):
        table = rows(section)
        assert list(table) == [name for name, _, _ in settings_table(group)]
        for name, default, meaning in settings_table(group):
            shown = default if isinstance(default, str) else json.dumps(default)
            assert table[name] == [f"`{shown}`", meaning], "run scripts/settings_docs.py"


def test_every_environment_variable_is_documented() -> None:
    table = rows(page("docs/configuration.md").split("## Environment")[1])
    assert {name: cells[0] for name, cells in table.items()} == dict(ENVIRONMENT)


def with_script() -> None:
    """Make the scripts importable."""
    if str(ROOT / "scripts") not in sys.path:
        sys.path.insert(0, str(ROOT / "scripts"))


def test_settings_script_changes_nothing() -> None:
    with_script()
    from settings_docs import updated

    text = page("docs/configuration.md")
    assert updated(text) == text, "run scripts/settings_docs.py"


def test_every_metric_is_documented() -> None:
    table = rows(page("docs/metrics.md"))
    kinds = {name: cells[0] for name, cells in table.items() if name.startswith("ft_")}
    exported = dict.fromkeys(GAUGES, "gauge") | dict.fromkeys(COUNTERS, "counter")
    assert kinds == {metric.name: metric.kind for metric in METRICS} | exported
    stages = re.findall(r"`(\w+)`", table["ft_stage_seconds_total"][1])
    assert stages == ["Stage", *STAGES]


def test_every_alert_is_documented() -> None:
    alerts = [rule["alert"] for rule in rules() if "alert" in rule]
    table = rows(page("docs/metrics.md"))
    assert [name for name in table if name.startswith("FtHandler")] == alerts


def test_documented_headers_are_those_of_replies() -> None:
    from ft_handler.request import tracing

    text = page("docs/tracing.md")
    for name in (tracing.REQUEST_ID, tracing.TRACEPARENT, tracing.SERVER_TIMING):
        assert f"`{name}`" in text
    (shown,) = re.findall(r"^Server-Timing: (.*)$", text, re.M)
    stats = BatchStats(seconds=dict.fromkeys(STAGES, 0.001))
    said = tracing._timing(stats)
    assert re.findall(r"(\w+);dur", shown) == ["queue", *re.findall(r"(\w+);dur", said)]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{path.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in anchors, f"{path.name} links to {target}"


def test_commands_in_the_documentation_exist() -> None:
    root = {option for p in typer.main.get_command(build()).params for option in p.opts}
    for path in PAGES:
        for name in re.findall(r"ft-handler ([a-z-]+)", path.read_text(encoding="utf-8")):
            assert name in {*COMMANDS, "bench", *root}, f"{path.name}: ft-handler {name}"
        for name in re.findall(r"ft-handler bench ([a-z]+)", path.read_text(encoding="utf-8")):
            assert name in BENCHMARKS


def test_options_in_the_documentation_exist() -> None:
    """Every --option on a line with an ft-handler command is one of that command."""
    known: dict[str, str] = {}
    for path in PAGES:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for block in re.findall(r"^```bash[^\n]*\n(.*?)^```", text, re.M | re.S):
            for command, rest in re.findall(r"^\s*ft-handler ([a-z-]+)([^\n&|]*)", block, re.M):
                if command == "bench":
                    continue
                if command not in known:
                    known[command] = subprocess.run(
                        [sys.executable, "-m", "ft_handler", command, "--help"],
                        capture_output=True, text=True, timeout=60,
                        env={"COLUMNS": "200", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
                    ).stdout  # fmt: skip
                for option in re.findall(r"(?<=\s)(--[\w-]+)", rest):
                    assert option in known[command], f"{path.name}: ft-handler {command} {option}"


@pytest.mark.parametrize("name", ["operations", "archives", "containers", "kubernetes"])
def test_commands_of_a_guide_are_run_or_say_why_not(name: str) -> None:
    text = page(f"docs/{name}.md")
    shown = re.findall(r"^```bash\n", text, re.M)
    assert len(shown) == len(re.findall(r"^<!-- not run: [^\n]+ -->\n```bash\n", text, re.M))
    if "```bash run\n" in text:
        assert f'"docs/{name}.md"' in page("tests/serve/test_examples.py")


def test_make_targets_in_the_documentation_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", page("Makefile"), re.M))
    for path in PAGES:
        for name in re.findall(r"(?:`|^)make ([a-z]+)", path.read_text(encoding="utf-8"), re.M):
            assert name in targets, f"{path.name}: make {name}"


def test_changelog_has_this_version() -> None:
    """What is not released yet stands first; every version has its date."""
    headings = re.findall(r"^## (.*)$", page("CHANGELOG.md"), re.M)
    if headings[0] == "Unreleased":
        del headings[0]
    found = [re.fullmatch(r"(\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)", title) for title in headings]
    assert all(found), headings
    assert next(f[1] for f in found if f) == __version__
    assert [f[2] for f in found if f] == sorted((f[2] for f in found if f), reverse=True)


def test_ci_calls_the_readme_test_command() -> None:
    assert "make test" in page(".ci/run")
    assert "make test" in page("README.md")
    workflow = yaml.safe_load(page(".github/workflows/ci.yml"))
    runs = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in runs


def test_hooks_run_what_the_check_runs() -> None:
    """Every tool of scripts/check.sh is a hook, from the same environment."""
    hooks = yaml.safe_load(page(".pre-commit-config.yaml"))["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]
    entries = [hook["entry"] for hook in hooks[0]["hooks"]]
    assert all(hook["language"] == "system" for hook in hooks[0]["hooks"])
    for tool in ("ruff check", "ruff format", "mypy", "clang-format", "bash -n"):
        assert tool in page("scripts/check.sh"), tool
        assert any(entry.startswith(tool) for entry in entries), tool


def test_nothing_waits_on_ping() -> None:
    """It says Healthy while workers load or crash: no command that is shown or run asks it."""
    for path in [*PAGES, *ROOT.glob("scripts/*"), *ROOT.glob("examples/**/*.sh")]:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            text = "".join(re.findall(r"^```.*?^```", text, re.M | re.S))
        assert "/ping" not in text, path


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md", "docs/precisions.md"])
def test_figures_are_those_of_the_results(name: str) -> None:
    """But for the mark of age, which a change of the kernels sets and a clone may lack."""
    with_script()
    import figures

    def unmarked(text: str) -> str:
        return re.sub(r"\s*(Rows of the [^\n]*:)?" + re.escape(figures.OLDER), "", text)

    text = page(name)
    found = figures.updated(text, figures.PAGES[name])
    assert unmarked(found) == unmarked(text), "run scripts/figures.py"


def test_the_readme_is_short() -> None:
    """Two minutes: what is longer belongs under docs/ or benchmarks/."""
    assert len(page("README.md").split()) < 1100


def decoder_for(mode: str) -> Decoder[Any, Any]:
    """A decoder with the documented defaults."""
    task = tasks.get(mode)
    return Decoder(task, task.parameters(), Limits(128, 250_000), {"model_name": "m"})


def documents(section: str) -> list[object]:
    """The JSON documents of a section's blocks: a block is one, or has one a line."""
    found: list[object] = []
    for block in re.findall(r"^```json\n(.*?)^```", section, re.M | re.S):
        try:
            found.append(json.loads(block))
        except ValueError:
            found += [json.loads(line) for line in block.splitlines()]
    return found


@pytest.mark.parametrize(
    ("title", "mode", "count"),
    [
        ("Sequence classification", "sequence_classification", 5),
        ("Question answering", "question_answering", 1),
        ("Token classification", "token_classification", 3),
        ("Reranking", "reranking", 4),
        ("Zero-shot classification", "zero_shot_classification", 4),
        ("Embeddings", "embeddings", 4),
        ("Open Inference v2", "sequence_classification", 1),
    ],
)
def test_documented_requests_are_understood(title: str, mode: str, count: int) -> None:
    sections = re.split(r"^## ", page("docs/http.md"), flags=re.M)
    section = next(s for s in sections if s.startswith(title))
    decoder = decoder_for(mode)
    requests = documents(section)
    assert len(requests) == count
    for request in requests:
        assert decoder.decode(Incoming(request)).inputs


def test_documented_explanations_are_understood() -> None:
    explanation = tasks.get("sequence_classification").explanation()
    assert explanation is not None
    decoder = Decoder(explanation, explanation.parameters(), Limits(128, 250_000), {})
    requests = documents(page("docs/explanations.md"))
    assert len(requests) == 4
    for request in requests:
        assert decoder.decode(Incoming(request)).inputs


def test_documented_data_is_what_is_read() -> None:
    from ft_handler.verify import data

    text = page("docs/verify.md")
    table = {name: cells for name, cells in rows(text).items() if name in data.FORMATS}
    assert list(table) == list(data.FORMATS)
    for name, cells in table.items():
        suffixes = re.findall(r"`\.(\w+)`", cells[0])
        assert suffixes == [s for s, kind in data._SUFFIXES.items() if kind == name]
    named = text.split("known by these names:")[1].split("Others are")[0]
    assert re.findall(r"`(\w+)`", named.replace("and for the answer", "")) == [
        name
        for key in (
            "text", "text_pair", "question", "context", "tokens", "query", "texts", "positive",
            "negative", "label",
        )
        for name, known in data._NAMES.items() if known == key
    ]  # fmt: skip


def test_documented_metrics_are_reported() -> None:
    from ft_handler.verify import entities, labels, orders, spans, vectors

    text = page("docs/verify.md").split("## What is reported")[1].split("## The verdict")[0]
    named = set(re.findall(r"`([\w@]+)`", text)) - {"handle_impossible_answer"}
    modules = (entities, labels, orders, spans, vectors)
    sources = "".join(Path(m.__file__ or "").read_text() for m in modules)
    assert orders.DEPTH == 10
    known = r"accuracy|\w*f1\w*|matthews|exact_match|pearson|spearman|map|score_difference"
    found = set(re.findall(rf'"({known}|order_changes|\w+_cosine)"', sources))
    assert named == found | {"precision", "recall", "f1", "ndcg@10", "mrr@10"}


def test_documented_errors_are_the_errors() -> None:
    text = page("docs/http.md")

    def below(error: type[RequestError]) -> Iterator[type[RequestError]]:
        for one in error.__subclasses__():
            if one.__module__.startswith("ft_handler."):
                yield one
                yield from below(one)

    for error in below(RequestError):
        assert f"| {error.status} | `{error.__name__}` |" in text
    decoder = decoder_for("sequence_classification")
    with pytest.raises(MalformedRequest) as refused:
        decoder.decode(Incoming({"txt": "wrong key"}))
    (shown,) = documents(re.split(r"^## Errors", text, flags=re.M)[1])
    assert json.loads(encode_error(refused.value).body) == shown


def test_documented_parameters_are_known() -> None:
    sections = re.split(r"^## ", page("docs/http.md"), flags=re.M)
    for title, mode in (
        ("Sequence", "sequence_classification"),
        ("Question", "question_answering"),
        ("Token", "token_classification"),
        ("Reranking", "reranking"),
        ("Zero-shot", "zero_shot_classification"),
        ("Embeddings", "embeddings"),
    ):
        section = next(s for s in sections if s.startswith(title))
        assert set(rows(section)) == {f.name for f in fields(tasks.get(mode).parameters)}
