"""Embeddings: what is asked, what becomes of pooled states, and every form of answer."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import numpy as np
import pytest
from fakes import FakeEngine, items_of, model_info, pipeline_of, runner_of, sequence_logits

from ft_handler.errors import ConfigError
from ft_handler.tasks.embeddings import Parameters, TextInput, normalized
from ft_handler.text.tokenizer import load_tokenizer
from ft_handler.types import Incoming, Outputs

WIDTH = 16
TEXTS = ["a good film", "the old bridge of the city was built by an engineer", "warm"]
PROMPTS = {"query": "what film ", "document": ""}


def info_of(**chosen: Any) -> Any:
    return model_info(
        "embeddings", num_labels=WIDTH, chosen={"pooling": "mean", "prompts": PROMPTS, **chosen}
    )


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(tiny_tokenizer)


@pytest.fixture
def ask(tokenizer):
    """`ask(body, **settings)`: the status and the answer, of a model that does not normalise."""

    def asked(body, chosen=None, **settings):
        engine = FakeEngine("embeddings", WIDTH)
        pipeline = pipeline_of(tokenizer, engine, "embeddings", info_of(**chosen or {}), **settings)
        request = body if isinstance(body, Incoming) else Incoming(body)
        ((reply,), _) = pipeline.run([request])
        return reply.status, json.loads(reply.body)

    return asked


@pytest.fixture
def vector(tokenizer):
    """`vector(text)`: what the engine gives for a text of at most `most` tokens."""

    def of(text, most=128, left=False):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        ids = ids[-(most - 2) :] if left else ids[: most - 2]
        ids = [tokenizer.token_to_id("[CLS]"), *ids, tokenizer.token_to_id("[SEP]")]
        return sequence_logits(np.array(ids), np.zeros(len(ids), np.int64), WIDTH)

    return of


def as_floats(vector):
    """What JSON's shortest digits of fp32 read as."""
    return [float(str(x)) for x in vector]


def unit(vector):
    return vector / np.linalg.norm(vector.astype(np.float64))


def test_one_text_and_a_list_have_answers_with_room_for_more(ask, vector, tokenizer):
    one = {"embedding": as_floats(vector(TEXTS[0])), "tokens": 5}
    assert ask(TEXTS[0]) == (200, one)
    assert ask({"text": TEXTS[0]}) == (200, one)
    status, many = ask([TEXTS[0], {"text": TEXTS[1], "dimensions": 3}])
    assert status == 200
    assert many[0] == one
    assert many[1]["embedding"] == as_floats(vector(TEXTS[1])[:3])
    assert ask({"instances": TEXTS[:1]}) == (200, {"predictions": [one]})


@pytest.mark.parametrize(
    "parameters",
    [{}, {"truncate": True, "truncation_direction": "Right", "prompt_name": None}],
)
def test_text_embeddings_inference_gets_bare_vectors(ask, vector, parameters):
    wanted = [as_floats(vector(text)) for text in TEXTS]
    assert ask({"inputs": TEXTS, **parameters}) == (200, wanted)
    assert ask({"inputs": TEXTS[0], **parameters}) == (200, wanted[:1])
    assert ask({"inputs": TEXTS[0], "parameters": parameters}) == (200, wanted[:1])


def test_openai_gets_objects_and_what_was_used(ask, vector, tokenizer):
    status, answer = ask({"input": TEXTS, "model": "m", "user": "u", "encoding_format": "float"})
    assert status == 200
    tokens = sum(len(tokenizer.encode(text).ids) for text in TEXTS)
    assert answer == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": as_floats(vector(text))}
            for i, text in enumerate(TEXTS)
        ],
        "model": "m",
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    _, packed = ask({"input": TEXTS[0], "encoding_format": "base64", "dimensions": 4})
    (entry,) = packed["data"]
    found = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
    assert found.tolist() == vector(TEXTS[0])[:4].tolist()


def test_open_inference_has_one_tensor_of_vectors(ask, vector):
    tensor = {"name": "text", "datatype": "BYTES", "shape": [3], "data": TEXTS}
    status, answer = ask({"inputs": [tensor], "parameters": {"dimensions": 5}})
    assert status == 200
    embedding, tokens = answer["outputs"]
    assert (embedding["name"], embedding["datatype"]) == ("embedding", "FP32")
    assert embedding["shape"] == [3, 5]
    assert embedding["data"] == [x for text in TEXTS for x in as_floats(vector(text)[:5])]
    assert (tokens["datatype"], tokens["shape"], tokens["data"][0]) == ("INT64", [3], 5)


@pytest.mark.parametrize("dimensions", [None, 1, 5, WIDTH])
def test_dimensions_are_cut_and_then_normalised(ask, vector, dimensions):
    body = {"text": TEXTS[1], "normalize": True, "dimensions": dimensions}
    found = np.array(ask(body)[1]["embedding"])
    assert found == pytest.approx(unit(vector(TEXTS[1])[:dimensions]), abs=1e-6)
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)


def test_request_then_setting_then_model_decide_on_the_length(ask, vector):
    own, of_one = vector(TEXTS[0]), unit(vector(TEXTS[0]))

    def found(body=None, chosen=None, **settings):
        return ask({"text": TEXTS[0], **(body or {})}, chosen, **settings)[1]["embedding"]

    assert found() == pytest.approx(own)
    assert found(chosen={"normalize": True}) == pytest.approx(of_one)
    assert found(chosen={"normalize": True}, normalize=False) == pytest.approx(own)
    assert found({"normalize": True}, normalize=False) == pytest.approx(of_one)
    assert len(found(dimensions=7)) == 7
    assert len(found({"dimensions": 3}, dimensions=7)) == 3


def test_prompts_stand_before_the_text(ask, vector):
    def found(body, chosen=None, **settings):
        return ask({"text": TEXTS[2], **body}, chosen, **settings)[1]["embedding"]

    plain, asked = (as_floats(vector(text)) for text in (TEXTS[2], PROMPTS["query"] + TEXTS[2]))
    assert found({}) == found({"prompt_name": "document"}) == plain
    assert found({"prompt_name": "query"}) == asked
    assert found({}, prompt_name="query") == asked
    by_default = {"default_prompt_name": "query"}
    assert found({}, by_default) == found({"prompt_name": None}, by_default) == asked
    assert found({"prompt": None}, by_default) == plain
    assert found({"prompt": "the "}, by_default) == as_floats(vector("the warm"))
    # A form's field keeps the blank at its end, and digits stay digits.
    fields = {"text": "5", "prompt": "1"}
    assert ask(Incoming(None, fields))[1]["embedding"] == as_floats(vector("15"))


@pytest.mark.parametrize("left", [False, True])
def test_long_texts_are_cut_at_one_end_and_say_so(ask, vector, left):
    direction = "left" if left else "right"
    more = {"truncation_direction": direction}
    wanted = as_floats(vector(TEXTS[1], most=6, left=left))
    _, answer = ask({"text": TEXTS[1], **more}, max_length=6)
    assert answer == {"embedding": wanted, "tokens": 6, "truncated": True}
    assert ask({"inputs": TEXTS[1], **more}, max_length=6) == (200, [wanted])
    _, answer = ask({"input": TEXTS[1:], **more}, max_length=6)
    assert [entry.get("truncated") for entry in answer["data"]] == [True, None]
    for body in ({"text": TEXTS[1], "truncate": False}, {"inputs": TEXTS[1], "truncate": False}):
        status, error = ask(body, max_length=6)
        assert status == 422
        assert error["message"] == ("the input has 14 tokens, the limit is 6 and truncation is off")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"inputs": [101, 7592]}, 422, "token ids are not accepted"),
        ({"inputs": [[101, 7592]]}, 422, "token ids are not accepted"),
        ({"input": [101, 7592]}, 422, "token ids are not accepted"),
        ({"input": [[101], [7592]]}, 422, "token ids are not accepted"),
        ({"input": 5}, 422, "token ids are not accepted"),
        ({"input": []}, 422, "the list of inputs is empty"),
        ({"inputs": []}, 422, "the list of inputs is empty"),
        ({"input": None}, 422, "an input must be a string"),
        ({"inputs": ["a", ""]}, 422, r"inputs\[1\]: 'text' is empty"),
        ({"inputs": ["a", None]}, 422, r"inputs\[1\]: an input must be a string"),
        ({"inputs": [["a", "b"]]}, 422, r"inputs\[0\]: an input must be a string"),
        ([["a", "b"]], 422, r"inputs\[0\]: an input must be a string"),
        ({"input": "a", "encoding_format": "int8"}, 422, "'encoding_format' must be one of float"),
        ({"input": "a", "model": 5}, 422, "'model' must be a string"),
        ({"input": "a", "model": "\ud800"}, 422, "'model' must be a string"),
        ({"input": "a", "nonsense": 5}, 400, "unknown key 'nonsense'"),
        ({"input": "a", "dimensions": 17}, 422, "'dimensions' must be at most 16"),
        ({"text": "a", "dimensions": 0}, 422, "'dimensions' must be at least 1"),
        ({"text": "a", "prompt_name": "no"}, 422, "'prompt_name' must be one of query, document"),
        ({"text": "a", "prompt": "\ud800"}, 400, "'prompt' holds a lone surrogate"),
        ({"text": "a", "normalize": "yes"}, 422, "'normalize' must be true or false"),
        ({"text": "a", "truncation_direction": "up"}, 422, "must be one of right, left"),
        ({"text": ["a"]}, 422, "'text' must be a string"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_in_words(ask, body, status, words):
    found, error = ask(body)
    assert found == status
    assert re.search(words, error["message"]), error["message"]


def test_a_model_without_prompts_says_so(ask):
    status, error = ask({"text": "a", "prompt_name": "query"}, {"prompts": {}})
    assert (status, error["message"]) == (
        422, "'prompt_name' names nothing: this model has no prompts",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt_name": "no"}, "setting 'prompt_name' must be one of query, document"),
        ({"dimensions": 17}, "setting 'dimensions' must be at most 16"),
    ],
)
def test_settings_the_model_contradicts_are_refused(tokenizer, settings, words):
    with pytest.raises(ConfigError, match=words):
        runner_of("embeddings", tokenizer, info=info_of(), **settings)


def test_a_refused_item_leaves_its_neighbours_their_vectors(tokenizer, vector):
    engine = FakeEngine("embeddings", WIDTH)
    pipeline = pipeline_of(tokenizer, engine, "embeddings", info_of())
    replies, _ = pipeline.run(
        [Incoming(TEXTS[0]), Incoming({"text": "a", "dimensions": 99}), Incoming(TEXTS[2])]
    )
    assert [reply.status for reply in replies] == [200, 422, 200]
    for reply, text in ((replies[0], TEXTS[0]), (replies[2], TEXTS[2])):
        assert json.loads(reply.body)["embedding"] == as_floats(vector(text))


def test_what_is_predicted_does_not_depend_on_the_batch(tokenizer):
    runner = runner_of("embeddings", tokenizer, info=info_of(normalize=True))
    values = np.random.default_rng(3).standard_normal((40, WIDTH)).astype(np.float32)
    params = [Parameters(), Parameters(dimensions=5), Parameters(normalize=False)]
    items = items_of([TextInput("warm", params[i % 3]) for i in range(40)])
    encodings = runner.encode(items)
    lengths = np.full(40, 3)
    together = runner.predict(encodings, Outputs(values, lengths))
    for i, encoding in enumerate(encodings):
        (alone,) = runner.predict([encoding], Outputs(values[i : i + 1], lengths[i : i + 1]))
        assert np.array_equal(alone["embedding"], together[i]["embedding"])
        assert alone["embedding"].dtype == np.float32


def test_nothing_is_divided_by_nothing():
    vectors = np.zeros((2, 3), np.float32)
    vectors[1, 2] = 1e-30
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(normalized(vectors)).all()


def test_the_pipeline_predicts_what_http_answers(tokenizer, ask):
    engine = FakeEngine("embeddings", WIDTH)
    pipeline = pipeline_of(tokenizer, engine, "embeddings", info_of())
    for body in (TEXTS[0], TEXTS, {"inputs": TEXTS}, {"input": TEXTS, "encoding_format": "base64"}):
        assert pipeline.predict(Incoming(body)) == ask(body)[1]
