"""ModelInfer calls as TorchServe's front hands them over, and what it can read as an answer."""

from __future__ import annotations

import json

import pytest

from ft_handler.errors import MalformedRequest
from ft_handler.request.replies import encode_error
from ft_handler.servers.torchserve import oip
from ft_handler.types import Incoming, Reply

CALL = {
    "id": "7",
    "model_name": "cls",
    "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["Y2Fmw6k="]}],
}
MODEL = {"model_name": "cls", "model_version": "1.0"}


def of(**tensor: object) -> dict[str, object]:
    return {**CALL, "inputs": [{**CALL["inputs"][0], **tensor}]}


@pytest.mark.parametrize(
    ("headers", "call"),
    [
        ({"body": {"content-type": "application/json"}}, True),
        ({"body": {"content-type": ""}}, False),  # Predictions, its input named so
        ({"data": {"content-type": "application/json"}}, False),
        ({"Host": "x", "body": {"content-type": "application/json"}}, False),  # HTTP
        ({}, False),
    ],
)
def test_calls_are_known_by_what_they_declare(headers, call):
    assert oip.is_call(headers) is call


@pytest.mark.parametrize("body", [CALL, bytearray(json.dumps(CALL).encode())])
def test_strings_are_as_they_were_sent(body):
    incoming = oip.incoming(oip.document_of({"body": body}))
    assert isinstance(incoming, Incoming)
    assert incoming.body == of(data=["café"])


def test_other_types_are_left_for_the_task_to_refuse():
    call = of(datatype="FP32", data=[1.0])
    assert oip.incoming(call) == Incoming(call)


@pytest.mark.parametrize(
    ("tensor", "word"),
    [
        ({"data": ["/w=="]}, "UTF-8"),
        ({"data": []}, "raw_input_contents"),
        ({"data": ["a"]}, "inputs[0]"),
    ],
)
def test_what_cannot_be_read_is_said(tensor, word):
    error = oip.incoming(of(**tensor))
    assert isinstance(error, MalformedRequest)
    assert word in str(error)


def test_an_empty_tensor_is_no_raw_one():
    assert isinstance(oip.incoming(of(shape=[0], data=[])), Incoming)


def test_a_refusal_becomes_outputs():
    good = Reply(200, "OK", b"{}")
    assert oip.answer(good, CALL, MODEL) is good
    refused = oip.answer(encode_error(MalformedRequest("no")), CALL, MODEL)
    assert refused.status == 400
    body = json.loads(refused.body)
    assert {key: body[key] for key in ("id", *MODEL)} == {"id": "7", **MODEL}
    assert {o["name"]: o["data"] for o in body["outputs"]} == {
        "code": [400], "type": ["MalformedRequest"], "message": ["no"],
    }  # fmt: skip
