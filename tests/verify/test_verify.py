"""Both sides over the same data: a right file has no difference, a disturbed one fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORD_LIST

from ft_handler.cli.main import main
from ft_handler.errors import ConfigError, DataError, EngineError, ModelError
from ft_handler.model.bundle import read_info
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace
from ft_handler.verify import run as verifying
from ft_handler.verify.data import Layout
from ft_handler.verify.run import Report, VerifyOptions, verify

CLASSIFICATION, QA = "sequence_classification", "question_answering"
LABELS = ("negative", "neutral", "positive")
WORDS = WORD_LIST.split()
TEXTS = [" ".join(WORDS[i : i + 1 + i % 9]) for i in range(40)]


@pytest.fixture(scope="module")
def sources(tiny_classification: Path, tiny_qa: Path) -> dict[str, Path]:
    return {CLASSIFICATION: tiny_classification, QA: tiny_qa}


@pytest.fixture(scope="module")
def traced(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`traced(mode)` is a right file; with `disturbed=True` its weights are other ones."""
    made: dict[Any, Path] = {}

    def build(mode: str, disturbed: bool = False) -> Path:
        if (mode, disturbed) not in made:
            source = sources[mode]
            if disturbed:
                source = disturb(source, tmp_path_factory.mktemp("disturbed"), mode)
            output = tmp_path_factory.mktemp("traced")
            trace(TraceOptions(mode=mode, model_name_or_path=str(source), output=output))
            made[mode, disturbed] = output
        return made[mode, disturbed]

    return build


def disturb(source: Path, folder: Path, mode: str) -> Path:
    """The checkpoint with noise in its last layer."""
    import transformers
    from tiny import write_tokenizer

    from ft_handler import tasks

    model = getattr(transformers, tasks.get(mode).auto_class).from_pretrained(source)
    weight = model.bert.encoder.layer[-1].output.dense.weight
    weight.data += 3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def data(traced: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files whose answers are mostly the right model's own."""
    from ft_handler.predictor import Predictor

    folder = tmp_path_factory.mktemp("data")
    answers: Any = Predictor.load(traced(CLASSIFICATION)).predict(TEXTS)
    labels = [a["label"] if i % 5 else "neutral" for i, a in enumerate(answers)]
    table = "".join(f"{t}\t{LABELS.index(x)}\n" for t, x in zip(TEXTS, labels, strict=True))
    (folder / "dev.tsv").write_text("sentence\tlabel\n" + table)
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    context = " ".join(WORDS[:60] * 4)  # windows
    questions = [{"question": text, "context": context} for text in TEXTS[:8]]
    found: Any = Predictor.load(traced(QA)).predict(questions)
    squad = [
        {"question": q["question"], "id": str(i), "answers": [{"text": f["answer"]}]}
        for i, (q, f) in enumerate(zip(questions, found, strict=True))
    ]
    document = {"data": [{"paragraphs": [{"context": context, "qas": squad}]}]}
    (folder / "squad.json").write_text(json.dumps(document))
    return {"tsv": folder / "dev.tsv", "txt": folder / "texts.txt", "squad": folder / "squad.json"}


def options(source: Path, data: Path, checkpoint: Path | None, **more: Any) -> VerifyOptions:
    return VerifyOptions(
        source=source,
        data=data,
        checkpoint=None if checkpoint is None else str(checkpoint),
        **{"device": "cpu", **more},
    )


def checked(report: Report) -> dict[str, Any]:
    """The report's document, which has to be JSON."""
    return dict(json.loads(json.dumps(report.document())))


def test_a_right_classifier_differs_in_nothing(
    traced: Callable[..., Path], sources: dict[str, Path], data: dict[str, Path]
) -> None:
    lines: list[str] = []
    steps: list[tuple[int, int]] = []
    asked = options(traced(CLASSIFICATION), data["tsv"], sources[CLASSIFICATION], batch_size=16)
    report = verify(asked, lines.append, lambda *step: steps.append(step))
    found = checked(report)
    assert (found["passed"], found["failures"], found["different"]) == (True, [], 0)
    assert (found["examples"], found["refused"]) == (40, 0)
    assert found["traced"]["metrics"] == found["transformers"]["metrics"]
    assert found["traced"]["metrics"]["accuracy"] > 80
    assert 0 < found["mean_difference"] <= found["largest_difference"] < 1e-4
    # Real tokens on one side, with their pads on the other.
    words = sum(len(text.split()) for text in TEXTS)
    assert found["traced"]["tokens"] == words + 2 * 40
    assert found["transformers"]["tokens"] > found["traced"]["tokens"]
    assert steps == [(16, 40), (32, 40), (40, 40)]
    assert any("40 examples" in line for line in lines)


def test_right_answers_to_questions_in_windows(
    traced: Callable[..., Path], sources: dict[str, Path], data: dict[str, Path]
) -> None:
    found = checked(verify(options(traced(QA), data["squad"], sources[QA], batch_size=3)))
    assert found["passed"] is True
    assert found["traced"]["metrics"] == {"exact_match": 100, "f1": 100}
    assert found["largest_difference"] < 1e-4
    assert found["traced"]["tokens"] > 8 * 240


def test_texts_alone_are_compared(
    traced: Callable[..., Path], sources: dict[str, Path], data: dict[str, Path]
) -> None:
    asked = options(traced(CLASSIFICATION), data["txt"], sources[CLASSIFICATION], limit=10)
    found = checked(verify(asked))
    assert (found["examples"], found["different"], found["passed"]) == (10, 0, True)
    assert found["traced"]["metrics"] == {}


def test_the_file_alone_without_its_folder(
    traced: Callable[..., Path], sources: dict[str, Path], data: dict[str, Path]
) -> None:
    file = traced(CLASSIFICATION) / "traced_model.pt"
    assert verify(options(file, data["txt"], sources[CLASSIFICATION], limit=3)).different == 0


@pytest.mark.parametrize(("mode", "name"), [(CLASSIFICATION, "tsv"), (QA, "squad")])
def test_disturbed_weights_fail(
    traced: Callable[..., Path],
    sources: dict[str, Path],
    data: dict[str, Path],
    mode: str,
    name: str,
) -> None:
    source = traced(mode, disturbed=True)
    found = checked(verify(options(source, data[name], sources[mode])))
    assert found["passed"] is False
    assert found["different"] > 0
    assert found["largest_difference"] > 0.1
    assert any("points below transformers'" in failure for failure in found["failures"])
    assert any("answers differ, 0 are allowed" in failure for failure in found["failures"])
    lenient = {"tolerance": 100.0, "most_different": "100%"}
    assert verify(options(source, data[name], sources[mode], **lenient)).failures == []


@pytest.mark.parametrize(
    ("allowed", "failed"), [("3", True), ("4", False), ("9%", True), ("10%", False), ("0", True)]
)
def test_how_many_answers_may_differ(allowed: str, failed: bool) -> None:
    same = [False] * 4 + [True] * 36
    figures = verifying.Figures({"accuracy": 90.0}, 0, 0.0)
    found = verifying.failures(figures, figures, same, 0.5, verifying._allowed(allowed))
    assert bool(found) is failed
    better = verifying.Figures({"accuracy": 90.6}, 0, 0.0)
    assert verifying.failures(better, figures, [True], 0.5, verifying._allowed("0")) == []
    assert verifying.failures(figures, better, [True], 0.5, verifying._allowed("0")) == [
        "accuracy is 0.60 points below transformers', 0.5 are allowed"
    ]


def test_what_no_server_would_answer_is_counted(
    traced: Callable[..., Path], sources: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "dev.jsonl"
    path.write_text('{"text": "a film", "label": 1}\n{"text": " ", "label": 1}\n')
    found = verify(options(traced(CLASSIFICATION), path, sources[CLASSIFICATION]))
    assert (found.examples, found.refused) == (1, 1)
    assert list(found.traced.metrics) == ["accuracy", "f1_macro"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"question": "who", "context": "me", "label": 1}', "no example can be answered by"),
        ('{"text": "a", "label": 1}\n{"text": "b"}', "line 2 has no answer, others have"),
        ('{"text": "a", "label": "dreadful"}', "line 1: its label is none of the model's"),
    ],
)
def test_data_for_another_model_is_refused(
    traced: Callable[..., Path], sources: dict[str, Path], tmp_path: Path, lines: str, words: str
) -> None:
    path = tmp_path / "dev.jsonl"
    path.write_text(lines)
    with pytest.raises(DataError, match=words):
        verify(options(traced(CLASSIFICATION), path, sources[CLASSIFICATION]))


def test_labels_of_other_names(
    traced: Callable[..., Path], sources: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text("bad\ta film\ngood\ta plot\n")
    more: dict[str, Any] = {"layout": Layout(columns=("label", "text"))}
    asked = options(
        traced(CLASSIFICATION),
        path,
        sources[CLASSIFICATION],
        labels=("bad", "so so", "good"),
        **more,
    )
    assert verify(asked).examples == 2
    asked = options(traced(CLASSIFICATION), path, sources[CLASSIFICATION], labels=("bad",), **more)
    with pytest.raises(DataError, match="--labels names 1 labels, the model has 3"):
        verify(asked)


def test_the_checkpoint_has_to_be_named_and_has_to_fit(
    traced: Callable[..., Path],
    make_tiny_bert: Callable[..., Path],
    data: dict[str, Path],
) -> None:
    # A folder is not recorded: whoever describes a served model would see where it lies.
    assert read_info(traced(CLASSIFICATION) / "traced_model.pt").checkpoint is None
    with pytest.raises(ConfigError, match="--checkpoint names it"):
        verify(options(traced(CLASSIFICATION), data["txt"], None))
    with pytest.raises(ModelError, match="num_layers 1, the traced file 2"):
        verify(options(traced(CLASSIFICATION), data["txt"], make_tiny_bert(num_hidden_layers=1)))
    with pytest.raises(ConfigError, match="no such folder or file"):
        verify(options(data["txt"].parent / "nothing", data["txt"], None))


def test_what_the_file_records_is_taken() -> None:
    from fakes import model_info

    asked = options(Path("x"), Path("y"), None)
    info = model_info(checkpoint="owner/model")
    assert verifying.named(asked, info) == "owner/model"
    with pytest.raises(ConfigError, match="from a folder 'lora': --adapter"):
        verifying.named(asked, model_info(checkpoint="owner/model", adapter="lora"))


def test_outputs_that_are_no_numbers_end_it(
    traced: Callable[..., Path],
    sources: dict[str, Path],
    data: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outputs = verifying.Traced.outputs

    def broken(self: Any, sequences: Any) -> Any:
        values = outputs(self, sequences).copy()
        values[-1] = float("nan")
        return values

    monkeypatch.setattr(verifying.Traced, "outputs", broken)
    with pytest.raises(EngineError, match="the traced file's outputs are not finite"):
        verify(options(traced(CLASSIFICATION), data["txt"], sources[CLASSIFICATION]))


# -- the command ---------------------------------------------------------------------------------


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main(["verify", *map(str, arguments)])
    return int(end.value.code or 0)


def test_the_command_says_what_was_found(
    traced: Callable[..., Path],
    sources: dict[str, Path],
    data: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ("--checkpoint", sources[CLASSIFICATION], "--device", "cpu", "--data", data["tsv"])
    assert command(traced(CLASSIFICATION), *common) == 0
    out, err = capsys.readouterr()
    assert "sequence_classification, fp32, on cpu: 40 examples" in out
    assert "0 answers differ" in out
    assert out.splitlines()[-1] == "passed"
    assert "loading " in err
    assert command(traced(CLASSIFICATION), *common, "--json", "--limit", 5) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["examples"], document["passed"]) == (5, True)


def test_the_commands_exit_status_is_the_verdict(
    traced: Callable[..., Path],
    sources: dict[str, Path],
    data: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = traced(CLASSIFICATION, disturbed=True)
    common = ("--checkpoint", sources[CLASSIFICATION], "--device", "cpu", "--data", data["tsv"])
    assert command(source, *common) == 1
    assert "failed: accuracy is" in capsys.readouterr().out
    assert command(source, *common, "--json") == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False
    assert command(source, *common, "--tolerance", 100, "--most-different", "100%") == 0


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--format", "xml"), 2, "'xml' is not one of"),
        (("--most-different", "few"), 1, "--most-different is 'few'"),
        (("--batch-size", "0"), 2, "--batch-size"),
    ],
)
def test_usage_errors(
    traced: Callable[..., Path],
    data: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    status: int,
    words: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert command(traced(CLASSIFICATION), "--data", data["tsv"], *arguments) == status
    assert words in capsys.readouterr().err
