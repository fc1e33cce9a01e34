"""Every payload form of TorchServe, understood; answers in the form they were asked in."""

from __future__ import annotations

import ast
import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_handler import tasks
from ft_handler.errors import MalformedRequest, RequestError, RequestTooLarge, UnusableRequest
from ft_handler.request.documents import Decoder, Limits
from ft_handler.request.forms import Instances, Listed, OpenInference, Single
from ft_handler.request.literals import parse_literal
from ft_handler.request.replies import encode_error
from ft_handler.servers.torchserve.adapter import incoming
from ft_handler.tasks import question_answering
from ft_handler.tasks.sequence_classification import ALL_LABELS, Parameters

DEFAULTS = Parameters()
QA_DEFAULTS = question_answering.Parameters()
PAIR = {"question": "who", "context": "an engineer"}
FORMS = {"single": Single, "list": Listed, "instances": Instances, "v2": OpenInference}


class Codec:
    """What TorchServe hands over, decoded for one task."""

    def __init__(self, mode, defaults, limits=Limits(128, 250_000)):  # noqa: B008
        model = {"model_name": "m", "model_version": "1.0"}
        self._decoder = Decoder(tasks.get(mode), defaults, limits, model)

    def decode(self, item):
        request = incoming(item)
        if isinstance(request, RequestError):
            raise request
        return self._decoder.decode(request)


@pytest.fixture(scope="module")
def codec():
    return Codec("sequence_classification", DEFAULTS)


@pytest.fixture(scope="module")
def qa():
    return Codec("question_answering", QA_DEFAULTS)


def texts(request):
    return [(i.text, i.text_pair) for i in request.inputs]


@pytest.mark.parametrize(
    ("item", "expected", "form"),
    [
        ({"body": bytearray(b"a film")}, [("a film", None)], "single"),
        ({"body": "a film"}, [("a film", None)], "single"),
        ({"data": b"a film"}, [("a film", None)], "single"),
        ({"data": "a film"}, [("a film", None)], "single"),
        ({"body": "\ufeffa film"}, [("a film", None)], "single"),
        ({"body": bytearray(b"\xef\xbb\xbfa film")}, [("a film", None)], "single"),
        ({"body": {"text": "a", "target": 1}}, [("a", None)], "single"),
        ({"body": bytearray(b'{"text": "a", "target": "1"}')}, [("a", None)], "single"),
        ({"body": "{'text': 'a', 'target': 1}"}, [("a", None)], "single"),
        ({"body": '\n {"text": "a"}'}, [("a", None)], "single"),
        ({"body": {"text": "a", "text_pair": "b"}}, [("a", "b")], "single"),
        ({"body": {"text": "a", "text_pair": None}}, [("a", None)], "single"),
        ({"body": {"data": "a"}}, [("a", None)], "single"),
        ({"body": {"inputs": "a"}}, [("a", None)], "single"),
        ({"body": {"inputs": {"text": "a", "text_pair": "b"}}}, [("a", "b")], "single"),
        ({"body": ["a", {"text": "b", "text_pair": "c"}]}, [("a", None), ("b", "c")], "list"),
        ({"body": bytearray(b'["a", "b"]')}, [("a", None), ("b", None)], "list"),
        ({"body": "['a', 'b']"}, [("a", None), ("b", None)], "list"),
        ({"body": {"inputs": ["a", "b"]}}, [("a", None), ("b", None)], "list"),
        ({"body": {"instances": ["a"]}}, [("a", None)], "instances"),
        ({"body": {"instances": [{"data": "a"}, {"text": "b"}]}}, [("a", None), ("b", None)],
         "instances"),
        ({"text": bytearray(b"a")}, [("a", None)], "single"),
        ({"text": b"a", "text_pair": "b"}, [("a", "b")], "single"),
        ({"text": b"7", "target": b"1"}, [("7", None)], "single"),
        # A sentence may begin with a bracket, or be a number.
        ({"body": "[laughs] what a film"}, [("[laughs] what a film", None)], "single"),
        ({"body": "[1] a film"}, [("[1] a film", None)], "single"),
        ({"body": "42"}, [("42", None)], "single"),
        ({"body": '"quoted"'}, [('"quoted"', None)], "single"),
    ],
)  # fmt: skip
def test_forms_of_classification(codec, item, expected, form):
    request = codec.decode(item)
    assert texts(request) == expected
    assert isinstance(request.form, FORMS[form])
    assert all(i.params == DEFAULTS for i in request.inputs)


@pytest.mark.parametrize(
    ("item", "form"),
    [
        ({"body": PAIR}, "single"),
        ({"body": bytearray(json.dumps(PAIR).encode())}, "single"),
        ({"body": json.dumps(PAIR)}, "single"),
        ({"data": bytearray(str(PAIR).encode())}, "single"),
        ({"body": {"data": PAIR}}, "single"),
        ({"body": {"inputs": PAIR}}, "single"),
        ({"body": [PAIR]}, "list"),
        ({"body": {"instances": [PAIR]}}, "instances"),
        ({"question": bytearray(b"who"), "context": "an engineer"}, "single"),
    ],
)
def test_forms_of_question_answering(qa, item, form):
    request = qa.decode(item)
    (item,) = request.inputs
    assert (item.question, item.context, item.params) == ("who", "an engineer", QA_DEFAULTS)
    assert isinstance(request.form, FORMS[form])


def test_parameters_beside_the_input_and_under_their_own_key(codec, qa):
    for item in (
        {"body": {"text": "a", "top_k": 2, "function_to_apply": "sigmoid", "truncation": False}},
        {"body": {"text": "a", "top_k": 2,
                  "parameters": {"function_to_apply": "sigmoid", "truncation": False}}},
        {"body": {"inputs": ["a"],
                  "parameters": {"top_k": 2, "function_to_apply": "sigmoid", "truncation": False}}},
        {"text": b"a", "top_k": b"2", "function_to_apply": b"sigmoid", "truncation": b"false"},
        {"data": b"a", "top_k": "2", "function_to_apply": "sigmoid", "truncation": "false"},
    ):  # fmt: skip
        (item,) = codec.decode(item).inputs
        assert item.params == Parameters(2, "sigmoid", False)
    (item,) = qa.decode({"body": {**PAIR, "doc_stride": 3, "max_answer_len": None}}).inputs
    assert (item.params.doc_stride, item.params.max_answer_len) == (3, 15)


def test_parameters_of_one_element_stay_with_it(codec):
    body = {"inputs": [{"text": "a", "top_k": 1}, "b"], "parameters": {"top_k": 3}}
    assert [i.params.top_k for i in codec.decode({"body": body}).inputs] == [1, 3]
    assert codec.decode({"body": "a"}).inputs[0].params.top_k is None


def test_a_null_top_k_asks_for_every_label(codec):
    assert codec.decode({"body": {"text": "a", "top_k": None}}).inputs[0].params.top_k == ALL_LABELS


def test_both_readers_agree_on_a_repeated_key(codec):
    raw = '{"text": "a", "text": "b"}'
    assert texts(codec.decode({"body": raw})) == [("b", None)]
    assert texts(codec.decode({"body": json.loads(raw)})) == [("b", None)]


def v2(**changes):
    tensor = {"name": "x", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}
    return {"body": {"id": "7", "inputs": [tensor], **changes}}


def test_open_inference_requests(codec, qa):
    request = codec.decode(v2(parameters={"top_k": 2}))
    assert (type(request.form), request.form.model["id"]) == (OpenInference, "7")
    assert texts(request) == [("a", None), ("b", None)]
    assert request.inputs[0].params.top_k == 2
    nested = {"name": "x", "shape": [2, 1], "datatype": "BYTES", "data": [["a"], ["b"]],
              "parameters": {"content_type": "str"}}  # fmt: skip
    assert texts(codec.decode(v2(inputs=[nested]))) == [("a", None), ("b", None)]
    pair = [{**nested, "name": "text_pair"}, {**nested, "name": "text"}]
    assert texts(codec.decode(v2(inputs=pair))) == [("a", "a"), ("b", "b")]
    columns = [{**nested, "name": "question"}, {**nested, "name": "context"}]
    request = qa.decode(v2(inputs=columns))
    assert [(i.question, i.context) for i in request.inputs] == [("a", "a"), ("b", "b")]


def test_open_inference_answers(codec, qa):
    good, bad = {"label": "good", "score": 0.9}, {"label": "bad", "score": 0.8}
    request = codec.decode(v2())
    reply = request.form.document([good, bad])
    assert reply == {
        "id": "7",
        "model_name": "m",
        "model_version": "1.0",
        "outputs": [
            {"name": "label", "shape": [2], "datatype": "BYTES", "data": ["good", "bad"]},
            {"name": "score", "shape": [2], "datatype": "FP32", "data": [0.9, 0.8]},
        ],
    }
    reply = request.form.document([[good, bad], [bad, good]])
    assert reply["outputs"][0]["shape"] == [2, 2]
    assert reply["outputs"][0]["data"] == ["good", "bad", "bad", "good"]
    reply = request.form.document([{**good, "truncated": True}, bad])
    assert reply["outputs"][2]["data"] == [True, False]
    request = codec.decode(v2(outputs=[{"name": "score"}]))
    reply = request.form.document([good, bad])
    assert [o["name"] for o in reply["outputs"]] == ["score"]
    columns = [{"name": n, "shape": [1], "datatype": "BYTES", "data": ["a"]} for n in PAIR]
    request = qa.decode({"body": {"inputs": columns}})
    answer = {"score": 0.5, "start": 1, "end": 2, "answer": "x"}
    reply = request.form.document([[answer], [answer, answer]])
    assert "id" not in reply
    assert [(o["name"], o["datatype"]) for o in reply["outputs"]] == [
        ("answer", "BYTES"), ("score", "FP32"), ("start", "INT64"), ("end", "INT64")
    ]  # fmt: skip
    assert reply["outputs"][0]["data"] == ["x", "", "x", "x"]


def test_answers_take_the_form_of_the_question():
    answer = {"label": "a", "score": 1.0}
    for form, expected in (
        (Single(), answer),
        (Listed(), [answer]),
        (Instances(), {"predictions": [answer]}),
    ):
        assert form.document([answer]) == expected


@pytest.mark.parametrize("error", [MalformedRequest, RequestTooLarge, UnusableRequest])
def test_errors_have_one_body(error):
    reply = encode_error(error("why"))
    assert reply.status == error.status
    assert json.loads(reply.body) == {
        "code": error.status, "type": error.__name__, "message": "why"
    }  # fmt: skip


def test_limits_are_settings():
    codec = Codec("sequence_classification", DEFAULTS, Limits(inputs=2, chars=5))
    assert len(codec.decode({"body": ["abcde", "b"]}).inputs) == 2
    for body in (["a", "b", "c"], "abcdef"):
        with pytest.raises(RequestTooLarge):
            codec.decode({"body": body})


def test_form_errors_say_what_to_send(codec):
    with pytest.raises(MalformedRequest, match="text/plain"):
        codec.decode({})
    with pytest.raises(MalformedRequest, match="not both"):
        codec.decode({"body": "a", "data": "b"})
    with pytest.raises(MalformedRequest, match="unknown key; known keys: text, "):
        codec.decode({"secret": b"a", "text": b"b"})


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text() | st.sampled_from(
        ["text", "text_pair", "inputs", "instances", "data", "parameters", "top_k", "question",
         "context", "shape", "datatype", "name", "id", "outputs", "doc_stride"]), v),
    max_leaves=12,
)  # fmt: skip


@given(JSON_VALUES | st.binary() | st.dictionaries(st.text(), JSON_VALUES))
def test_whatever_arrives_is_a_request_or_a_refusal(codec, qa, value):
    for one in (codec, qa):
        for item in ({"body": value}, {"data": value}, value if isinstance(value, dict) else {}):
            refusal = None
            try:
                assert one.decode(item).inputs
            except RequestError as error:
                refusal = error
            if refusal is not None:
                assert 400 <= refusal.status < 500
                assert json.loads(encode_error(refusal).body)["message"]


@given(st.text())
def test_texts_arrive_unchanged(codec, text):
    try:
        request = codec.decode({"body": {"text": text}})
    except RequestError:
        assert not text.strip() or "\0" in text or not text.isprintable()
        return
    assert texts(request) == [(text, None)]


LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
    max_leaves=6,
)  # fmt: skip


def depth(value):
    children = value.values() if isinstance(value, dict) else value
    inner = [depth(v) for v in children] if isinstance(value, (dict, list)) else []
    return 1 + max(inner, default=0)


@given(LITERALS)
def test_literals_are_read_as_python_reads_them(value):
    if depth(value) > 6:
        with pytest.raises(ValueError, match="nested too deep"):
            parse_literal(repr(value))
    else:
        assert parse_literal(repr(value)) == value == ast.literal_eval(repr(value))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1", "{'a' 1}", "{1: 2}", "f'x'", "'a' 'b'", "b'a'", "{'a': 1,, }", "[1 2]",
     "(1,)", "'\\U00110000'", "'a\nb'", "[" * 10_000, "{'a':" * 10_000, "-" * 10_000 + "1",
     "lambda: 0", "1e5", "{**{}}", "'" + "\\" * 9999],
)  # fmt: skip
def test_what_is_no_plain_literal_is_refused(text):
    with pytest.raises(ValueError, match=r"literal|dict|nested|escape|after"):
        parse_literal(text)


def test_escapes_are_pythons():
    for text in (r"'it\'s'", r'"\x41\u00e9\U0001f600"', r"'\n\t\\ \d'", '"a\\\nb"'):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert parse_literal(text) == ast.literal_eval(text)
