"""Settings are read strictly, and every mistake is named."""

from __future__ import annotations

import json

import pytest

from ft_handler.config import (
    ENVIRONMENT,
    HandlerConfig,
    environment,
    limit_tokenizer_threads,
    settings_table,
)
from ft_handler.errors import ConfigError

PUBLISHED = {
    "model_name": "bert-base-uncased",
    "mode": "sequence_classification",
    "do_lower_case": True,
    "num_labels": "2",
    "save_mode": "torchscript",
    "max_length": "150",
    "captum_explanation": False,
    "FasterTransformer": True,
    "BetterTransformer": False,
    "model_parallel": False,
    "embedding_name": "bert",
}


def read(tmp_path, section=None, older=None):
    if older is not None:
        (tmp_path / "setup_config.json").write_text(json.dumps(older))
    return HandlerConfig.from_model_dir(tmp_path, None if section is None else {"handler": section})


def test_the_published_file_is_read(tmp_path):
    config = read(tmp_path, older=PUBLISHED)
    assert (config.num_labels, config.max_length, config.do_lower_case) == (2, 150, True)
    assert config.mode == "sequence_classification"


def test_nothing_at_all_gives_the_defaults(tmp_path):
    assert read(tmp_path) == HandlerConfig()
    assert HandlerConfig.from_model_dir(tmp_path, {"handler": None}) == HandlerConfig()
    assert HandlerConfig.from_model_dir(tmp_path, {"minWorkers": 1}) == HandlerConfig()


def test_both_files_may_be_there_when_they_agree(tmp_path):
    config = read(tmp_path, {"max_length": 150, "truncation": False}, PUBLISHED)
    assert (config.max_length, config.truncation, config.num_labels) == (150, False, 2)


@pytest.mark.parametrize(
    ("section", "older", "named"),
    [
        ({"max_lenght": 128}, None, "max_lenght"),
        ({"max_length": 128, "b": 1, "a": 2}, None, "settings in .*'a', 'b'"),
        (None, {"batch": 1}, "setup_config.json.*'batch'"),
        ({"max_length": 128}, PUBLISHED, "'max_length' is 128 .* 150"),
        ({"mode": "question_answering"}, PUBLISHED, "'mode'"),
        ({"doc_stride": 5}, PUBLISHED, "'doc_stride'"),
        ({"mode": "sequence_classification", "max_seq_len": 64}, None, "'max_seq_len'"),
        ({"mode": "question_answering", "function_to_apply": "none"}, None, "function_to_apply"),
        ({"max_seq_len": 256, "max_length": 128}, None, "'max_seq_len' .256. .*'max_length'"),
        ({"save_mode": "pretrained"}, None, "'save_mode'"),
        ({"captum_explanation": True}, None, "'captum_explanation'"),
        ({"FasterTransformer": False}, None, "'FasterTransformer'"),
        ({"BetterTransformer": True}, None, "'BetterTransformer'"),
        ({"model_parallel": True}, None, "'model_parallel'"),
        ({"mode": "text"}, None, "'mode' in .* one of sequence_classification"),
        ({"max_length": 3}, None, "'max_length'.*at least 4"),
        ({"max_length": True}, None, "'max_length'"),
        ({"max_length": 12.5}, None, "'max_length'"),
        ({"truncation": "yes"}, None, "'truncation'.*true or false"),
        ({"truncation": None}, None, "'truncation'"),
        ({"length_buckets": [64, 32]}, None, "'length_buckets'.*ascending"),
        ({"length_buckets": [0]}, None, "'length_buckets'"),
        ({"length_buckets": "32,64"}, None, "'length_buckets'"),
        ({"model_file": "../x.pt"}, None, "'model_file'"),
        ({"model_file": ""}, None, "'model_file'"),
        ({"num_threads": 0}, None, "'num_threads'"),
        ({"device": "tpu"}, None, "'device'"),
        ([1], None, "'handler'"),
        (None, [1], "setup_config.json must hold an object"),
    ],
)
def test_mistakes_are_named(tmp_path, section, older, named):
    with pytest.raises(ConfigError, match=named):
        read(tmp_path, section, older)


def test_a_broken_older_file_is_named(tmp_path):
    (tmp_path / "setup_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"setup_config\.json is not JSON"):
        HandlerConfig.from_model_dir(tmp_path, None)


def test_long_values_are_cut_in_messages(tmp_path):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, {"mode": "x" * 500})
    assert len(str(error.value)) < 250


def test_lists_and_names_are_normalised():
    config = HandlerConfig.from_mapping(
        {"length_buckets": [32, "64"], "function_to_apply": "NONE", "device": " CPU "}, "here"
    )
    assert config.length_buckets == (32, 64)
    assert (config.function_to_apply, config.device) == ("none", "cpu")


def test_every_setting_is_documented():
    table = settings_table()
    assert len(table) > 30
    for name, _, text in table:
        assert text.endswith("."), name
        assert len(text) > 20, name


def test_environment_variables_are_the_documented_ones(monkeypatch):
    monkeypatch.setenv("FT_HANDLER_TUNE", "/a")
    assert environment("FT_HANDLER_TUNE") == "/a"
    monkeypatch.setenv("FT_HANDLER_TUNE", "")
    assert environment("FT_HANDLER_TUNE") is None
    with pytest.raises(KeyError):
        environment("FT_HANDLER_OTHER")
    assert all(name.isupper() and text.endswith(".") for name, text in ENVIRONMENT.items())


def test_tokenizer_threads_follow_unless_set(monkeypatch):
    for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    import os

    limit_tokenizer_threads(2)
    assert os.environ["RAYON_NUM_THREADS"] == "2"
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    limit_tokenizer_threads(1)
    assert os.environ["RAYON_NUM_THREADS"] == "2"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
