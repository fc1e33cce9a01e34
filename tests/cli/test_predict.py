"""`ft-handler predict`: what it hands to the predictor and what it prints."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ft_handler.cli.main import main
from ft_handler.errors import MalformedRequest, ModelError, RequestError, UnusableRequest

SURROGATE = MalformedRequest("text holds a lone surrogate")


class FakePredictor:
    """Answers with what it was given; refuses "refuse" and an unknown parameter."""

    loaded: tuple[Path, str, int | None]

    @classmethod
    def load(
        cls, path: Path, *, device: str = "auto", num_threads: int | None = None
    ) -> FakePredictor:
        if not path.exists():
            raise ModelError(f"{path}: no such folder")
        cls.loaded = (path, device, num_threads)
        return cls()

    def predict(self, inputs: object, **parameters: object) -> object:
        if inputs == "refuse":
            raise MalformedRequest("the body is empty")
        if isinstance(inputs, str) and any("\ud800" <= c <= "\udfff" for c in inputs):
            raise SURROGATE
        if "nonsense" in parameters:
            raise UnusableRequest("unknown parameter")
        return {"inputs": inputs, **parameters}

    def explain(self, inputs: object, **parameters: object) -> object:
        return {"explained": inputs, **parameters}


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("ft_handler.predictor")
    module.__dict__["Predictor"] = FakePredictor
    monkeypatch.setitem(sys.modules, "ft_handler.predictor", module)


def predict(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["predict", *arguments])
    return int(end.value.code or 0)


def answers(capsys: pytest.CaptureFixture[str]) -> list[object]:
    """The lines printed, each a JSON document."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def body(error: RequestError) -> dict[str, object]:
    return {"code": error.status, "type": error.type, "message": str(error)}


def test_a_line_for_each_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(str(tmp_path), "great fun", "très bien\nvraiment") == 0
    assert FakePredictor.loaded == (tmp_path, "auto", None)
    out = capsys.readouterr().out
    # As over HTTP: no blanks, characters as they are.
    assert out == '{"inputs":"great fun"}\n{"inputs":"très bien\\nvraiment"}\n'


@pytest.mark.parametrize(
    ("text", "inputs"),
    [
        ('{"question": "who?", "context": "me"}', {"question": "who?", "context": "me"}),
        (' ["a", {"text": "b"}]', ["a", {"text": "b"}]),
        ("7", "7"),
        ('"quoted"', '"quoted"'),
        ("null", "null"),
        ("[laughs] what a film", "[laughs] what a film"),
        ('{"text": "cut', '{"text": "cut'),
        ("", ""),
    ],
)
def test_only_objects_and_lists_are_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, inputs: object
) -> None:
    assert predict(str(tmp_path), text) == 0
    assert answers(capsys) == [{"inputs": inputs}]


def test_standard_input_a_body_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = 'one\r\n["two"]\n\n- \nörter\nlast'.encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="latin-1"))
    assert predict(str(tmp_path), "before", "-", "after") == 0
    given = ["before", "one", ["two"], "", "- ", "örter", "last", "after"]
    assert answers(capsys) == [{"inputs": one} for one in given]


def test_a_line_that_is_not_utf8_spoils_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\n\xff\ntwo\n")))
    assert predict(str(tmp_path), "-") == 1
    assert answers(capsys) == [{"inputs": "one"}, body(SURROGATE), {"inputs": "two"}]


def test_a_refused_text_is_its_error_and_the_rest_is_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(str(tmp_path), "one", "refuse", "two") == 1
    assert answers(capsys) == [
        {"inputs": "one"},
        body(MalformedRequest("the body is empty")),
        {"inputs": "two"},
    ]
    assert predict(str(tmp_path), "one", "--param", "nonsense=1") == 1
    assert answers(capsys) == [body(UnusableRequest("unknown parameter"))]


def test_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = {
        "top_k=3": ("top_k", 3),
        "truncation=false": ("truncation", False),
        "function_to_apply=none": ("function_to_apply", "none"),
        'note="a=b"': ("note", "a=b"),
        "empty=": ("empty", ""),
    }
    more = [part for given in parameters for part in ("--param", given)]
    assert predict(str(tmp_path), "--device", "cpu", "--threads", "2", *more, "--", "--text") == 0
    assert FakePredictor.loaded == (tmp_path, "cpu", 2)
    assert answers(capsys) == [{"inputs": "--text", **dict(parameters.values())}]


def test_explanations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(str(tmp_path), "--explain", "a film", "--param", "target=1") == 0
    assert answers(capsys) == [{"explained": "a film", "target": 1}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--param", "top_k"], "'top_k' is not NAME=VALUE"),
        (["--param", "=3"], "'=3' is not NAME=VALUE"),
        (["--param", "inputs=3"], "'inputs' is no parameter"),
        (["--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_usage_errors(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert predict(str(tmp_path), "text", *arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_a_model_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(str(tmp_path / "nowhere"), "text") == 1
    captured = capsys.readouterr()
    assert captured.err == f"error: {tmp_path / 'nowhere'}: no such folder\n"
    assert captured.out == ""
