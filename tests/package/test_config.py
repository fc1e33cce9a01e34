"""Settings are read strictly, and every mistake is named."""

from __future__ import annotations

import json

import pytest

from ft_handler import tasks
from ft_handler.config import (
    ENVIRONMENT,
    SECTION,
    CoreSettings,
    RawSettings,
    environment,
    limit_tokenizer_threads,
    settings_table,
    spelled,
)
from ft_handler.errors import ConfigError
from ft_handler.tasks.question_answering import QuestionSettings
from ft_handler.tasks.sequence_classification import ClassificationSettings

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


def read(folder, section=None, older=None, mode="sequence_classification"):
    """The core's settings and the task's, as a worker reads them."""
    if older is not None:
        (folder / "setup_config.json").write_text(json.dumps(older))
    raw = RawSettings.of_model_dir(folder, None if section is None else {"handler": section})
    task = tasks.get(mode)
    others = {name: tasks.get(name).settings for name in tasks.names() if name != mode}
    raw.refuse_unknown((CoreSettings, task.settings), others)
    return raw.read(CoreSettings), raw.read(task.settings)


def test_the_published_file_is_read(tmp_path):
    core, _ = read(tmp_path, older=PUBLISHED)
    assert (core.num_labels, core.max_length, core.do_lower_case) == (2, 150, True)
    assert core.mode is None


def test_an_older_file_says_its_mode_without_effect(tmp_path):
    (tmp_path / "setup_config.json").write_text(json.dumps({"mode": "text_generation"}))
    raw = RawSettings.of_model_dir(tmp_path, {"handler": {"mode": "question_answering"}})
    for settings in (raw, raw.over({"device": "cpu"})):
        assert settings.read(CoreSettings).mode == "question_answering"
        assert settings.older_mode == "text_generation"


def test_nothing_at_all_gives_the_defaults(tmp_path):
    assert read(tmp_path) == (CoreSettings(), ClassificationSettings())
    for yaml in ({"handler": None}, {"minWorkers": 1}):
        assert RawSettings.of_model_dir(tmp_path, yaml).read(CoreSettings) == CoreSettings()


def test_both_files_may_be_there_when_they_agree(tmp_path):
    core, own = read(tmp_path, {"max_length": 150, "truncation": False}, PUBLISHED)
    assert (core.max_length, own.truncation, core.num_labels) == (150, False, 2)


def test_arguments_win_over_files(tmp_path):
    (tmp_path / "setup_config.json").write_text(json.dumps(PUBLISHED))
    raw = RawSettings.of_model_dir(tmp_path, {"handler": {"device": "cuda"}})
    core = raw.over({"max_length": 7, "device": "cpu"}).read(CoreSettings)
    assert (core.max_length, core.device, core.num_labels) == (7, "cpu", 2)
    again = raw.over({"max_length": 7, "device": "cpu"}).over({"max_length": 9})
    core = again.read(CoreSettings)
    assert (core.max_length, core.device, core.num_labels) == (9, "cpu", 2)


@pytest.mark.parametrize(
    ("section", "older", "named"),
    [
        ({"max_lenght": 128}, None, "max_lenght"),
        ({"max_length": 128, "b": 1, "a": 2}, None, "settings in .*'a', 'b'"),
        (None, {"batch": 1}, "setup_config.json.*'batch'"),
        ({"max_length": 128}, PUBLISHED, "'max_length' is 128 .* 150"),
        ({"doc_stride": 5}, PUBLISHED, "'doc_stride'.* question_answering"),
        ({"max_seq_len": 64}, None, "'max_seq_len'"),
        ({"save_mode": "eager"}, None, "'save_mode'"),
        ({"max_explained_words": 0}, None, "'max_explained_words'"),
        ({"FasterTransformer": False}, None, "'FasterTransformer'"),
        ({"BetterTransformer": True}, None, "'BetterTransformer'"),
        ({"model_parallel": True}, None, "'model_parallel'"),
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


def test_settings_of_another_task_are_refused_where_they_ask_for_something(tmp_path):
    with pytest.raises(ConfigError, match=r"'function_to_apply'.* sequence_classification"):
        read(tmp_path, {"function_to_apply": "none"}, mode="question_answering")
    # Names that come with their defaults ask for nothing.
    read(tmp_path, {"function_to_apply": None, "truncation": True}, mode="question_answering")
    read(tmp_path, {"doc_stride": None, "max_answer_len": "15"})


def test_a_broken_older_file_is_named(tmp_path):
    (tmp_path / "setup_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"setup_config\.json is not JSON"):
        RawSettings.of_model_dir(tmp_path, None)


def test_long_values_are_cut_in_messages(tmp_path):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, {"device": "x" * 500})
    assert len(str(error.value)) < 250


def test_lists_and_names_are_normalised():
    raw = RawSettings(
        {SECTION: {"length_buckets": [32, "64"], "function_to_apply": "NONE", "device": " CPU "}}
    )
    core = raw.read(CoreSettings)
    assert (core.length_buckets, core.device) == ((32, 64), "cpu")
    assert raw.read(ClassificationSettings).function_to_apply == "none"


def test_spelled_values():
    texts = ["true", " False", "null", "12", "-3", "1.5", "yes", "", "softmax"]
    values = [True, False, None, 12, -3, "1.5", "yes", "", "softmax"]
    assert [spelled(text) for text in texts] == values
    assert spelled([1]) == [1]


def test_every_setting_is_documented():
    table = [
        row
        for group in (CoreSettings, ClassificationSettings, QuestionSettings)
        for row in settings_table(group)
    ]
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
