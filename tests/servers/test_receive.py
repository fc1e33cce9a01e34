"""The buffered worker protocol reads and writes what TorchServe's own code does, byte for byte."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import struct
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_handler.servers.torchserve import receive


def pristine(name):
    """A copy of a module of TorchServe's that nobody has replaced anything in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name)
        spec = importlib.util.find_spec(name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        gc.collect()
    return module


@pytest.fixture(scope="module")
def protocol():
    """How TorchServe's own code reads and writes."""
    return pristine("ts.protocol.otf_message_handler")


@pytest.fixture(scope="module")
def unpack():
    """What TorchServe's own code hands a handler of the messages that its own reader makes."""
    return pristine("ts.service").Service.retrieve_data_for_inference


def handed_over(found):
    headers, inputs, ids = found
    return repr([h.get_request_properties() for h in headers]), repr(inputs), ids


class Connection:
    """A socket that delivers a stream in pieces of the given sizes."""

    def __init__(self, stream, sizes=(1 << 20,)):
        self.stream, self.sizes, self.turn, self.calls = stream, sizes, 0, 0

    def recv(self, length):
        size = min(length, self.sizes[self.turn % len(self.sizes)])
        self.turn += 1
        self.calls += 1
        piece, self.stream = self.stream[:size], self.stream[size:]
        return piece

    def recv_into(self, view):
        piece = self.recv(len(view))
        view[: len(piece)] = piece
        return len(piece)


def frame(data):
    return struct.pack("!i", len(data)) + data


def stream_of(batch):
    out = b"I"
    for request_id, headers, inputs in batch:
        out += frame(request_id)
        for pair in headers:
            out += b"".join(map(frame, pair))
        out += struct.pack("!i", -1)
        for field in inputs:
            out += b"".join(map(frame, field))
        out += struct.pack("!i", -1)
    return out + struct.pack("!i", -1)


TYPES = st.sampled_from([b"", b"application/json", b"text/plain", b"application/octet-stream"])
BODIES = st.binary(max_size=40) | st.sampled_from(
    [
        b'{"text": "a"}',
        b'"a"',
        b"NaN",
        b"{",
        b"caf\xc3\xa9",
        b"[1, 2]",
        b"x" * 3000,
        b'{"b": "\\u00e9\\ud83d\\ude00", "a": "x", "b": "y"}',
        b'{"a": "\\ud800"}',
        b'{"a": "\xff"}',
        b'{"a": "x", "top_k": 123456789012345678901234567890}',
        b'{"a": "\n"}',
        b'{"a": -0, "b": 1e999}',
        b'\xef\xbb\xbf{"a": "x"}',
        b"{}",
        b'{"a": {"b": 1.5}}',
    ]
)
TEXTS = st.text(max_size=9).map(str.encode) | st.sampled_from([b"body", b"data", b"x" * 36])
REQUESTS = st.tuples(
    TEXTS,
    st.lists(st.tuples(TEXTS, TEXTS), max_size=3),
    st.lists(st.tuples(st.sampled_from([b"body", b"data"]), TYPES, BODIES), max_size=2),
)


@given(
    st.lists(st.lists(REQUESTS, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 200), min_size=1, max_size=4),
)
@pytest.mark.parametrize("decode", [None, "true", "false"])
def test_handlers_get_the_same_of_the_same_bytes(protocol, unpack, decode, batches, sizes):
    stream = b"".join(map(stream_of, batches))
    with pytest.MonkeyPatch.context() as patch:
        if decode is None:
            patch.delenv("TS_DECODE_INPUT_REQUEST", raising=False)
        else:
            patch.setenv("TS_DECODE_INPUT_REQUEST", decode)
        stock_connection = Connection(stream, tuple(sizes))
        stock = [protocol.retrieve_msg(stock_connection) for _ in batches]
        reader = receive.Reader()
        patch.setattr(protocol, "_retrieve_buffer", reader.take)
        patch.setattr(protocol, "_retrieve_int", reader.integer)
        patch.setattr(protocol, "_retrieve_inference_msg", reader.message)
        connection = Connection(stream, tuple(sizes))
        ours = [protocol.retrieve_msg(connection) for _ in batches]
    for (command, batch), (stock_command, stock_batch) in zip(ours, stock, strict=True):
        assert command == stock_command
        # As repr: NaN is not equal to itself, and types show.
        assert handed_over(receive.for_handler(batch)) == handed_over(unpack(stock_batch))


def test_no_batch_is_refused_as_by_the_stock_code(unpack):
    for function in (unpack, receive.for_handler):
        with pytest.raises(ValueError, match="invalid inputs"):
            function(None)


def test_a_batch_costs_one_receive(protocol, monkeypatch):
    batch = [(b"id", [(b"Host", b"x")] * 5, [(b"body", b"text/plain", b"a film")])] * 64
    reader = receive.Reader()
    connection = Connection(stream_of(batch)[1:])
    assert len(reader.message(connection).ids) == 64
    assert connection.calls == 1


def test_another_connection_starts_afresh():
    reader = receive.Reader()
    assert reader.take(Connection(b"abcdef"), 2) == b"ab"
    assert reader.take(Connection(b"xyz"), 2) == b"xy"


def test_a_frontend_that_is_gone_ends_the_worker():
    with pytest.raises(SystemExit):
        receive.Reader().take(Connection(b"ab"), 3)


@given(st.integers(receive._CHUNK - 9, receive._CHUNK + 9), st.integers(1, 3), st.booleans())
def test_fields_around_the_buffer_s_size(length, count, whole):
    """A large field is received where it stays; what follows it is still read from the buffer."""
    batch = [
        (b"id%d" % i, [(b"Host", b"x")], [(b"body", b"", bytes([i]) * length)]) for i in [1, 2]
    ]
    stream = stream_of(batch * count)[1:] + frame(b"next")
    connection = Connection(stream, (1 << 22,) if whole else (70_001, 3, 1))
    reader = receive.Reader()
    found = reader.message(connection)
    values = [next(iter(inputs.values())) for inputs in found.inputs]
    assert values == [fields[0][2] for _, _, fields in batch * count]
    assert all(type(value) is bytearray for value in values)
    assert reader.take(connection, reader.integer(connection)) == b"next"


class Counted(bytearray):
    """A bytearray that counts every byte that is copied into it or out of it."""

    moved = 0

    def __init__(self, *args):
        super().__init__(*args)
        Counted.moved += len(self)

    def __getitem__(self, key):
        found = super().__getitem__(key)
        if isinstance(key, slice):
            Counted.moved += len(found)
        return found

    def __setitem__(self, key, value):
        if isinstance(key, slice):
            Counted.moved += len(value)
        super().__setitem__(key, value)

    def __iadd__(self, more):
        Counted.moved += len(more)
        return super().__iadd__(more)


@pytest.mark.parametrize("size", [1 << 21, 1 << 23])
@pytest.mark.parametrize("fields", [1, 40], ids=["one body", "a form of many fields"])
def test_work_grows_with_the_bytes_and_not_with_their_square(monkeypatch, fields, size):
    """However small the pieces: bytes moved in memory, and receives."""
    monkeypatch.setattr(receive, "bytearray", Counted, raising=False)
    monkeypatch.setattr(Counted, "moved", 0)
    inputs = [(b"f%d" % i, b"", b"x" * (size // fields)) for i in range(fields)]
    stream = stream_of([(b"id", [(b"Host", b"x")], inputs)])[1:]
    connection = Connection(stream, (4096,))
    (inputs,) = receive.Reader().message(connection).inputs
    assert [*map(len, inputs.values())] == [size // fields] * fields
    assert Counted.moved <= 4 * len(stream)
    assert connection.calls <= 1.1 * len(stream) / 4096 + 50


def test_undecodable_bodies_are_counted_and_logged_once_a_minute(caplog, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(receive, "undecodable", receive.Undecodable(lambda: now[0]))
    broken = [(b"body", b"application/json", b"secretword"), (b"data", b"text/plain", b"\xff")]
    stream = stream_of([(b"id", [], broken)] * 50)[1:]
    found = receive.Reader().message(Connection(stream * 2))
    assert found.inputs[0]["body"] == bytearray(b"secretword")
    assert receive.undecodable.take() == 100
    assert receive.undecodable.take() == 0
    assert len(caplog.records) == 1
    now[0] += 61
    receive.Reader().message(Connection(stream))
    assert [r.getMessage().split(":")[1][:4] for r in caplog.records] == [" 1 s", " 100"]
    assert "secretword" not in caplog.text


def test_the_stock_reader_s_lines_are_counted_too(protocol, caplog, monkeypatch):
    monkeypatch.delenv("TS_DECODE_INPUT_REQUEST", raising=False)
    monkeypatch.setattr(receive, "undecodable", receive.Undecodable())
    monkeypatch.setattr(logging.getLogger(), "filters", [])
    receive.quieten()
    receive.quieten()
    broken = [(b"body", b"application/json", b"{"), (b"data", b"text/plain", b"\xff")]
    stream = stream_of([(b"id", [], broken)] * 20)
    assert len(protocol.retrieve_msg(Connection(stream))[1]) == 20
    assert receive.undecodable.take() == 40
    assert [r.name for r in caplog.records] == [receive.__name__]
    logging.warning("another line")
    assert "another line" in caplog.text


def context_of(replies):
    from ts.context import Context, RequestProcessor

    context = Context("m", "", None, 1, None, "0.12.0")
    context.request_processor = [RequestProcessor({}) for _ in replies]
    for index, (status, phrase, headers, _) in enumerate(replies):
        if status is not None:
            context.set_response_status(status, phrase, index)
        for key, value in headers.items():
            context.set_response_header(index, key, value)
    return context


HEADERS = st.dictionaries(
    st.sampled_from(["content-type", "x-a", "x-é"]), st.sampled_from(["", "application/json", "b"])
)
REPLIES = st.lists(
    st.tuples(
        st.sampled_from([None, 200, 400]),
        st.sampled_from([None, "", "Bad Request"]),
        HEADERS,
        st.binary(max_size=30),
    ),
    max_size=5,
)


@given(REPLIES)
def test_the_same_bytes_go_out(protocol, replies):
    ids = {i: f"{i:08x}-é" for i in range(len(replies))}
    bodies = [body for *_, body in replies]
    args = (bodies, ids, "Prediction success", 200, context_of(replies))
    assert receive.create_response(*args) == bytes(protocol.create_predict_response(*args))


def test_anything_unusual_is_left_to_the_stock_writer(protocol):
    replies = [(200, "", {}, b"")]
    ids = {0: "a"}
    for body in ("text", {"a": 1}, bytearray(b"a")):
        assert receive.create_response([body], ids, "", 200, context_of(replies)) is None
    streaming = context_of([(200, "", {"ts_stream_next": "true"}, b"")])
    assert receive.create_response([b"a"], ids, "", 200, streaming) is None
    args = ([b"a"], ids, "", 200, context_of([(200, "", {"ts_stream_next": "false"}, b"")]))
    assert receive.create_response(*args) == bytes(protocol.create_predict_response(*args))


@pytest.fixture
def stock(protocol, monkeypatch):
    """TorchServe's own functions, put back afterwards."""
    from ts import service
    from ts.protocol import otf_message_handler as served

    for name in ("_retrieve_buffer", "_retrieve_int", "_retrieve_inference_msg"):
        monkeypatch.setattr(served, name, getattr(protocol, name))
    monkeypatch.setattr(served, "create_predict_response", protocol.create_predict_response)
    monkeypatch.setattr(service, "create_predict_response", protocol.create_predict_response)
    own = staticmethod(service.Service.retrieve_data_for_inference)
    monkeypatch.setattr(service.Service, "retrieve_data_for_inference", own)
    return service


def test_installed_it_answers_like_the_stock_path(protocol, stock, monkeypatch):
    from ts.protocol import otf_message_handler as served

    before = protocol.create_predict_response
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert receive.install() is True
    reader = served._retrieve_buffer
    assert receive.install() is True
    assert served._retrieve_buffer == reader
    request = (b"id", [(b"Host", b"x")], [(b"body", b"text/plain", b"a film")])
    headers, inputs, ids = stock.Service.retrieve_data_for_inference(
        served.retrieve_msg(Connection(stream_of([request])))[1]
    )
    declared = {"body": {"content-type": "text/plain"}, "Host": "x"}
    assert [h.get_request_properties() for h in headers] == [declared]
    assert (inputs, ids) == ([{"body": "a film"}], {0: "id"})
    replies = [(400, "Bad Request", {"content-type": "application/json"}, b"{}")]
    args = (["text"], {0: "a"}, "ok", 200, context_of(replies))
    assert stock.create_predict_response(*args) == before(*args)
    args = ([json.dumps({}).encode()], {0: "a"}, "ok", 200, context_of(replies))
    assert stock.create_predict_response(*args) == before(*args)
    args = (None, {0: "a"}, "Prediction failed", 503)
    assert stock.create_predict_response(*args) == before(*args)


def test_another_version_is_left_alone(protocol, stock, monkeypatch):
    import ts

    monkeypatch.setattr(ts, "__version__", "0.12.1")
    before = protocol._retrieve_inference_msg
    assert receive.install() is False
    assert protocol._retrieve_inference_msg is before
