"""Every payload form of TorchServe, understood; answers in the form they were asked in."""

from __future__ import annotations

import ast
import json
import struct
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from malformed import as_request

from ft_handler import tasks
from ft_handler.errors import (
    MalformedRequest,
    RequestError,
    RequestTooLarge,
    UnsupportedMedia,
    UnusableRequest,
)
from ft_handler.request.bodies import read_body
from ft_handler.request.documents import Decoder, Limits
from ft_handler.request.forms import Instances, Listed, Nested, OpenInference, Single
from ft_handler.request.literals import parse_literal
from ft_handler.request.replies import encode_error
from ft_handler.servers.torchserve.adapter import incoming
from ft_handler.tasks import question_answering
from ft_handler.tasks.sequence_classification import ALL_LABELS, Parameters

DEFAULTS = Parameters()
QA_DEFAULTS = question_answering.Parameters()
PAIR = {"question": "who", "context": "an engineer"}
FORMS = {
    "single": Single,
    "list": Listed,
    "nested": Nested,
    "instances": Instances,
    "v2": OpenInference,
}


class Codec:
    """What TorchServe hands over, decoded for one task."""

    def __init__(self, mode, defaults, limits=Limits(128, 250_000)):  # noqa: B008
        model = {"model_name": "m", "model_version": "1.0"}
        self._decoder = Decoder(tasks.get(mode), defaults, limits, model)

    def decode(self, item, **headers):
        request = incoming(item, {name.replace("_", "-"): v for name, v in headers.items()})
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
        ({"body": {"inputs": {"text": "a", "text_pair": "b"}}}, [("a", "b")], "single"),
        ({"body": ["a", {"text": "b", "text_pair": "c"}]}, [("a", None), ("b", "c")], "list"),
        ({"body": bytearray(b'["a", "b"]')}, [("a", None), ("b", None)], "list"),
        ({"body": "['a', 'b']"}, [("a", None), ("b", None)], "list"),
        ({"body": {"inputs": ["a", "b"]}}, [("a", None), ("b", None)], "list"),
        ({"body": {"instances": ["a"]}}, [("a", None)], "instances"),
        ({"body": {"instances": [{"data": "a"}, {"text": "b"}]}}, [("a", None), ("b", None)],
         "instances"),
        # Pairs as lists; a list of texts stays one.
        ({"body": [["a", "b"], ["c", "d"]]}, [("a", "b"), ("c", "d")], "list"),
        ({"body": {"inputs": [["a", "b"]]}}, [("a", "b")], "list"),
        ({"body": {"instances": [["a", "b"], "c"]}}, [("a", "b"), ("c", None)], "instances"),
        ({"body": {"instances": [{"data": {"b64": "YQ=="}}, {"b64": "eydkYXRhJzogJ2InfQ=="}]}},
         [("a", None), ("b", None)], "instances"),
        ({"body": {"data": "a", "target": 1}}, [("a", None)], "single"),
        ({"body": {"instances": [{"data": "a", "target": 1}]}}, [("a", None)], "instances"),
        ({"body": {"inputs": "a", "options": {"wait_for_model": True}}}, [("a", None)], "nested"),
        ({"body": "a", "model_name": bytearray(b"m")}, [("a", None)], "single"),
        ({"text": b"a", "model_name": b"m", "model_version": b"1"}, [("a", None)], "single"),
        ({"text": bytearray(b"a")}, [("a", None)], "single"),
        ({"text": b"a", "text_pair": "b"}, [("a", "b")], "single"),
        ({"text": b"7", "target": b"1"}, [("7", None)], "single"),
        # A sentence may begin with a bracket, or be a number.
        ({"body": "[laughs] what a film"}, [("[laughs] what a film", None)], "single"),
        ({"body": "[[Film]] is great"}, [("[[Film]] is great", None)], "single"),
        ({"body": "{{user}} loves it"}, [("{{user}} loves it", None)], "single"),
        ({"body": bytearray(b"{wow} nice")}, [("{wow} nice", None)], "single"),
        ({"body": "[ ] fix"}, [("[ ] fix", None)], "single"),
        ({"body": "[1] a film"}, [("[1] a film", None)], "single"),
        ({"body": "42"}, [("42", None)], "single"),
        ({"body": '"quoted"'}, [('"quoted"', None)], "single"),
    ],
)  # fmt: skip
def test_forms_of_classification(codec, item, expected, form):
    request = codec.decode(item)
    assert texts(request) == expected
    assert isinstance(request.form, FORMS[form])
    every = Parameters(top_k=ALL_LABELS)
    assert all(i.params == (every if form == "nested" else DEFAULTS) for i in request.inputs)


@pytest.mark.parametrize(
    ("item", "form"),
    [
        ({"body": PAIR}, "single"),
        ({"body": bytearray(json.dumps(PAIR).encode())}, "single"),
        ({"body": json.dumps(PAIR)}, "single"),
        ({"data": bytearray(str(PAIR).encode())}, "single"),
        ({"body": {"data": PAIR}}, "single"),
        ({"body": {**PAIR, "target": "x"}}, "single"),
        ({"body": {"instances": [{**PAIR, "target": 0}]}}, "instances"),
        ({"body": {"question": ["who"], "context": "an engineer"}}, "list"),
        ({"body": {"inputs": {"question": ["who"], "context": ["an engineer"]}}}, "list"),
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


@pytest.mark.parametrize(
    "error", [MalformedRequest, RequestTooLarge, UnsupportedMedia, UnusableRequest]
)
def test_errors_have_one_body(error):
    reply = encode_error(error("why"))
    assert reply.status == error.status
    assert json.loads(reply.body) == {
        "code": error.status, "type": error.__name__, "message": "why", "error": "why"
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
    with pytest.raises(MalformedRequest, match="unknown key 'secret'; known keys: text, "):
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
        assert not text.strip() or not text.isprintable()
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


# -- what a body is ------------------------------------------------------------------------------

JSON, PLAIN, BINARY = "application/json", "text/plain", "application/octet-stream"


def read(content_type, body):
    """What the adapter and the reader make of an HTTP body: a text or a document."""
    request = as_request(content_type, body)
    if isinstance(request, RequestError):
        raise request
    return read_body(request)


EDITS = st.tuples(
    st.sampled_from(["cut", "double", "put"]),
    st.integers(0, 10**6),
    st.sampled_from("{}[],:\"\\ax1"),
)  # fmt: skip


def edited(text, edits):
    for edit, place, put in edits:
        at = place % len(text) if text else 0
        text = (
            text[:at]
            + {"cut": "", "double": text[at : at + 1] * 2, "put": put}[edit]
            + (text[at:] if edit == "put" else text[at + 1 :])
        )
    return text


@given(st.recursive(
    st.booleans() | st.integers(-9, 9) | st.text("ab\\ \n", max_size=4),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text("ab", max_size=3), v, max_size=3),
    max_leaves=6,
), st.lists(EDITS, max_size=3))  # fmt: skip
def test_broken_json_is_refused_or_a_text_and_never_repaired(document, edits):
    text = edited(json.dumps(document), edits)
    begins = text.lstrip(" \t\r\n")[:1] in ("{", "[") and text.lstrip()[:1] in ("{", "[")
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
        with pytest.raises(MalformedRequest):
            read(JSON, text.encode())
        if text.strip():
            assert read(PLAIN, text.encode()) == text
            if begins and text.lstrip()[1:].lstrip()[:1] == '"':
                with pytest.raises(MalformedRequest):
                    read(BINARY, text.encode())
    else:
        if isinstance(parsed, (dict, list)):
            for kind in (JSON, PLAIN, BINARY, None, "application/vnd.api+json", "Text/Plain"):
                assert read(kind, text.encode()) == parsed


@pytest.mark.parametrize("content_type", [PLAIN, BINARY, None])
@given(value=LITERALS)
def test_a_literal_is_known_by_its_single_quotes(content_type, value):
    text = repr({"text": value})
    if depth(value) < 6:
        assert read(content_type, text.encode()) == {"text": value}
    with pytest.raises(MalformedRequest):
        read(JSON, text.encode())


@pytest.mark.parametrize(
    ("charset", "text"),
    [
        ("iso-8859-1", "caf\u00e9"), ("ISO-8859-15", "10 \u20ac"), ("windows-1252", "10 \u20ac"),
        ("utf-16", "caf\u00e9"), ("utf-16le", "caf\u00e9"), ("shift_jis", "\u6620\u753b"),
        ("iso-2022-jp", "\u6620\u753b"), ("\"gb18030\"", "\u7535\u5f71"), ("UTF-8", "caf\u00e9"),
        ("us-ascii", "plain"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [PLAIN, BINARY, JSON])
def test_a_declared_charset_is_the_charset(charset, text, kind):
    written = json.dumps(text, ensure_ascii=False) if kind == JSON else text
    body = written.encode(charset.strip('"'))
    assert read(f"{kind}; Charset={charset}; x=1", body) == text


def test_names_of_charsets_never_reach_the_registry(codec, monkeypatch):
    import codecs

    monkeypatch.setattr(codecs, "lookup", lambda name: pytest.fail("asked the registry"))
    with pytest.raises(UnsupportedMedia, match="charset"):
        codec.decode({"body": bytearray(b"a")}, Content_Type="text/plain; charset=x-1")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "GZIP", "secret"])
def test_a_compressed_body_is_refused_by_name(codec, encoding):
    for name in ("Content_Encoding", "content_encoding"):
        with pytest.raises(UnsupportedMedia, match="Content-Encoding") as refused:
            codec.decode({"body": bytearray(b"\x1f\x8b")}, **{name: encoding, "Content_Type": JSON})
        assert (encoding.lower() in str(refused.value)) is (encoding != "secret")
    assert codec.decode({"body": bytearray(b"a")}, Content_Encoding="identity").inputs


def test_null_characters_are_texts(codec, qa):
    assert texts(codec.decode({"body": ["a\0b", "c"]})) == [("a\0b", None), ("c", None)]
    assert qa.decode({"body": {**PAIR, "context": "a\0b"}}).inputs[0].context == "a\0b"


def test_unknown_keys_are_named_where_they_are_words(codec):
    long = "a" * 41
    for body, named in (
        ({"text": "a", "temperature": 1}, "temperature"),
        ({"text": "a", "parameters": {"temperature": 1}}, "temperature"),
        ({"inputs": ["a"], "stream": True}, "stream"),
        ({"text": "a", "a whole sentence": 1}, None),
        ({"text": "a", long: 1}, None),
        ({"text": "a", "parameters": {"parameters": {}}}, "parameters"),
    ):
        with pytest.raises(MalformedRequest, match="inputs, instances") as refused:
            codec.decode({"body": body})
        assert (f"'{named}'" in str(refused.value)) is (named is not None)
        assert "sentence" not in str(refused.value)
        assert long not in str(refused.value)


# -- other people's clients ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "meant"),
    [
        ({"topk": 2}, {"top_k": 2}),
        ({"topk": 2, "top_k": 3}, {"top_k": 3}),
        ({"topk": None}, {"top_k": ALL_LABELS}),
        ({"return_all_scores": True}, {"top_k": ALL_LABELS}),
        ({"return_all_scores": False}, {"top_k": 1}),
        ({"return_all_scores": None}, {}),
        ({"return_all_scores": True, "top_k": 2}, {"top_k": 2}),
        ({"function_to_apply": "SOFTMAX"}, {"function_to_apply": "softmax"}),
        ({"truncation": "longest_first"}, {"truncation": True}),
        ({"truncation": "do_not_truncate"}, {"truncation": False}),
        ({"truncation": "only_second"}, {"truncation": "only_second"}),
        ({"padding": "max_length", "max_length": 12}, {"max_length": 12}),
        ({"padding": True, "options": {"use_cache": False}}, {}),
    ],
)
def test_older_names_of_parameters(codec, given_, meant):
    for body in ({"text": "a", **given_}, {"inputs": ["a"], "parameters": given_}):
        (item,) = codec.decode({"body": body}).inputs
        assert item.params == Parameters(**meant)


@pytest.mark.parametrize("bad", [{"return_all_scores": "yes"}, {"truncation": "longest"}])
def test_bad_values_of_older_names_are_refused(codec, bad):
    with pytest.raises(UnusableRequest, match=next(iter(bad))):
        codec.decode({"body": {"text": "a", **bad}})


def test_several_questions_about_one_context(qa):
    body = {"question": ["who", "what"], "context": "an engineer", "topk": 2}
    inputs = qa.decode({"body": body}).inputs
    assert [(i.question, i.context, i.params.top_k) for i in inputs] == [
        ("who", "an engineer", 2), ("what", "an engineer", 2)
    ]  # fmt: skip
    with pytest.raises(UnusableRequest, match="2 questions, but 1 contexts"):
        qa.decode({"body": {**body, "context": ["x"]}})
    with pytest.raises(RequestTooLarge):
        qa.decode({"body": {**body, "question": ["who"] * 129}})


def test_a_text_in_inputs_gets_a_list_in_a_list():
    answer = {"label": "a", "score": 1.0}
    codec = Codec("sequence_classification", Parameters(top_k=3))
    request = codec.decode({"body": {"inputs": "a"}})
    assert request.inputs[0].params.top_k == 3  # a setting comes before what clients are used to
    assert request.form.document([[answer, answer]]) == [[answer, answer]]
    assert request.form.document([answer]) == [[answer]]


def test_open_inference_requests_as_clients_write_them(codec):
    tensor = {"name": "x", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}
    for changes in (
        {"model_name": "m", "model_version": "1"},
        {"parameters": None, "outputs": None, "id": None},
        {"parameters": {"binary_data_output": True, "timeout": 5, "priority": 1,
                        "sequence_id": 1, "sequence_start": True, "sequence_end": False}},
        {"parameters": {"content_type": "str", "headers": {"a": "b"}}},
        {"inputs": [{**tensor, "parameters": None}]},
        {"inputs": [{**tensor, "parameters": {"content_type": "np", "headers": None}}]},
        {"outputs": [{"name": "score", "parameters": {"binary_data": False}}]},
        {"outputs": [{"name": "score", "parameters": None}]},
    ):  # fmt: skip
        assert texts(codec.decode(v2(**changes))) == [("a", None), ("b", None)]


def binary(strings, size=None, **changes):
    """A body with one binary tensor, and the header that says where it begins."""
    data = b"".join(struct.pack("<I", len(s)) + s for s in strings)
    tensor = {"name": "x", "shape": [len(strings)], "datatype": "BYTES",
              "parameters": {"binary_data_size": len(data) if size is None else size}}  # fmt: skip
    head = json.dumps({"inputs": [{**tensor, **changes}]}).encode()
    return {"body": bytearray(head + data)}, {"Inference_Header_Content_Length": str(len(head))}


def test_binary_tensors_are_read(codec, qa):
    strings = ["a", "caf\u00e9 {", "c" * 300]
    item, headers = binary([s.encode() for s in strings])
    assert texts(codec.decode(item, **headers)) == [(s, None) for s in strings]
    pair = [{"name": n, "shape": [1], "datatype": "BYTES",
             "parameters": {"binary_data_size": 4 + len(t)}} for n, t in PAIR.items()]  # fmt: skip
    head = json.dumps({"inputs": pair}).encode()
    tail = b"".join(struct.pack("<I", len(t)) + t.encode() for t in PAIR.values())
    request = qa.decode(
        {"body": bytearray(head + tail)}, inference_header_content_length=str(len(head))
    )
    assert [(i.question, i.context) for i in request.inputs] == [tuple(PAIR.values())]


@given(st.binary(max_size=40), st.integers(-1, 50), st.integers(0, 400))
def test_bad_binary_tensors_are_refused_in_words(codec, data, size, head):
    item, headers = binary([data], size)
    for length in (headers, {"Inference_Header_Content_Length": str(head)}, {}):
        try:
            request = codec.decode(item, **length)
        except (MalformedRequest, UnusableRequest):
            continue
        assert texts(request) == [(data.decode(), None)]


def test_binary_tensors_without_their_header_are_refused_by_its_name(codec):
    item, _ = binary([b"a"])
    document = json.loads(item["body"][:-5])
    with pytest.raises(MalformedRequest, match="Inference-Header-Content-Length"):
        codec.decode({"body": document})
