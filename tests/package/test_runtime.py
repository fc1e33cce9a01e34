"""A traced folder made ready: settings against the file, labels, devices, tokenizers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from fakes import AsyncEngine, FakeEngine, model_info

from ft_handler import runtime
from ft_handler.config import RawSettings
from ft_handler.errors import ConfigError, EngineError, ModelError, OutOfDeviceMemory
from ft_handler.runtime import choose_device, open_model, read_labels, settle
from ft_handler.types import Incoming


class Model:
    """A loaded model that remembers how it was configured."""

    def __init__(self):
        self.options = []
        self.fused = self

    def configure(self, options):
        self.options.append(options)


@pytest.fixture
def model(monkeypatch):
    """What loading gives; its engine is a fake."""
    model = Model()
    monkeypatch.setattr(runtime, "read_tokenizer", lambda path: None)
    monkeypatch.setattr(runtime, "load_model", lambda path, device, folder: model)
    monkeypatch.setattr(runtime, "engine_for", lambda model, device, **_: FakeEngine())
    return model


@pytest.fixture
def folder(tiny_tokenizer, tmp_path):
    """A traced folder; the traced file itself is empty."""
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / name).write_bytes((tiny_tokenizer / name).read_bytes())
    (tmp_path / "traced_model.pt").write_bytes(b"")
    return tmp_path


def says(monkeypatch, mode="sequence_classification", **changes):
    """Let every traced file say this of itself."""
    monkeypatch.setattr(runtime, "read_info", lambda path: model_info(mode, **changes))
    monkeypatch.setattr(runtime, "engine_for", lambda model, device, **_: FakeEngine(mode))


def opened(folder, **settings):
    return open_model(folder, RawSettings({"the test": settings}))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mode": "question_answering"}, "'mode' is question_answering.*sequence_classification"),
        ({"mode": "text"}, "'mode'"),
        ({"num_labels": 2}, "'num_labels' is 2.* has 3"),
        ({"max_length": 129}, "'max_length' is 129.* 128 positions"),
        ({"doc_stride": 5}, "'doc_stride'"),
        ({"model_file": "other.pt"}, r"other\.pt"),
        ({"max_lenght": 5}, "max_lenght"),
        ({"max_length": 4}, None),
        ({"num_labels": 3}, None),
        ({"num_labels": 0}, None),
    ],
)
def test_settings_are_held_against_the_file(folder, model, monkeypatch, settings, named):
    says(monkeypatch)
    if named is None:
        opened(folder, **settings)
        return
    with pytest.raises(ConfigError, match=named):
        opened(folder, **settings)


def test_windows_may_not_be_longer_than_sequences(folder, model, monkeypatch):
    says(monkeypatch, "question_answering")
    with pytest.raises(ConfigError, match=r"'max_seq_len' .100. is over 'max_length' .50."):
        opened(folder, max_seq_len=100, max_length=50)
    assert opened(folder, num_labels=0).task.name == "question_answering"


@pytest.mark.parametrize("mask", [4, None])
def test_explanations_need_a_mask_where_a_setting_asks_for_them(folder, model, monkeypatch, mask):
    says(monkeypatch)
    monkeypatch.setattr(runtime, "mask_of", lambda tokenizer: mask)
    assert opened(folder).explainer is None
    ready = open_model(folder, RawSettings({}), explains=True)
    assert (ready.explainer is None) is (mask is None)
    if mask is None:
        with pytest.raises(ConfigError, match="neither a mask nor an unknown token"):
            opened(folder, captum_explanation=True)
    else:
        explainer = opened(folder, captum_explanation=True).explainer
        assert explainer.predict(Incoming("a film"))["words"] == ["a", "film"]


def test_a_task_nobody_knows_is_refused_in_words(folder, model, monkeypatch):
    changed = model_info()
    monkeypatch.setattr(
        runtime, "read_info", lambda path: type(changed)(**{**vars(changed), "mode": "other"})
    )
    with pytest.raises(ModelError, match="mode 'other' is not one of sequence_classification"):
        settle(folder, RawSettings({}))


def test_a_padded_model_is_refused(folder, model, monkeypatch):
    says(monkeypatch, model_type="ths", remove_padding=False)
    with pytest.raises(ConfigError, match="--model_type thsext"):
        opened(folder)


def test_a_tokenizer_of_another_model_is_refused(folder, model, monkeypatch):
    says(monkeypatch, vocab_size=30)
    with pytest.raises(ConfigError, match="do not belong together"):
        opened(folder)


def test_the_file_alone_is_enough(folder, model, monkeypatch, tiny_tokenizer):
    says(monkeypatch)
    carried = (tiny_tokenizer / "tokenizer.json").read_text()
    alone = folder / "alone"
    alone.mkdir()
    (alone / "x.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"carries no tokenizer"):
        opened(alone / "x.pt")
    monkeypatch.setattr(runtime, "read_tokenizer", lambda path: carried)
    ready = opened(alone / "x.pt")
    ((reply,), _) = ready.pipeline.run([Incoming("a good film")])
    assert json.loads(reply.body)["label"] in ready.info.labels.values()


def test_older_words_are_notes(folder, model, monkeypatch, caplog):
    says(monkeypatch)
    older = {"mode": "question_answering", "num_labels": "0", "save_mode": "pretrained"}
    (folder / "setup_config.json").write_text(json.dumps(older))
    raw = RawSettings.of_model_dir(folder, {"handler": {"mode": "sequence_classification"}})
    assert settle(folder, raw).task.name == "sequence_classification"
    assert "the mode in setup_config.json is not that of the traced file" in caplog.text
    assert "'save_mode' is pretrained" in caplog.text
    caplog.clear()
    older = {"mode": "sequence_classification", "save_mode": "torchscript"}
    (folder / "setup_config.json").write_text(json.dumps(older))
    settle(folder, RawSettings.of_model_dir(folder, None))
    assert caplog.text == ""


def broken(batch):
    raise RuntimeError("no kernel")


class Endless(FakeEngine):
    """An engine whose numbers have overflowed."""

    def launch(self, batch):
        done = super().launch(batch)
        done.result()[:] = float("inf")
        return done


@pytest.mark.parametrize("engine", [FakeEngine(fail=broken), Endless()])
def test_a_model_that_fails_on_its_sample_is_refused(folder, model, monkeypatch, engine):
    says(monkeypatch)
    monkeypatch.setattr(runtime, "engine_for", lambda model, device, **_: engine)
    with pytest.raises(EngineError, match="the warm-up sample is answered 500"):
        opened(folder)
    assert opened(folder, warmup=False).info.mode == "sequence_classification"


def test_settings_too_tight_for_the_sample_are_a_note(folder, model, monkeypatch, caplog):
    says(monkeypatch)
    opened(folder, max_length=4, truncation=False)
    assert "the warm-up sample is answered 422" in caplog.text


class Timed(AsyncEngine):
    """An engine whose time is what it computes: so many seconds a launch, and a token."""

    def __init__(self, clock, launch, token):
        super().__init__("question_answering")
        self._clock, self._launch, self._token = clock, launch, token

    def compute(self, batch):
        self._clock.now += self._launch + self._token * batch.total
        return super().compute(batch)


@pytest.mark.parametrize(
    ("token", "wanted"),
    # Seconds: of a slow device, of one that makes 4,300 tokens in 1.4 ms, and of a very fast one.
    [(1e-5, 3), (2.65e-7, 2), (3e-8, 1)],
)
def test_a_batch_goes_in_fewer_parts_on_a_faster_device(folder, model, monkeypatch, token, wanted):
    clock = SimpleNamespace(now=0.0)
    engine = Timed(clock, 250e-6, token)
    says(monkeypatch, "question_answering")
    monkeypatch.setattr(runtime, "engine_for", lambda model, device, **_: engine)
    monkeypatch.setattr(runtime, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    pipeline = opened(folder, max_batch_tokens=1 << 20).pipeline
    engine.events.clear()
    question = {"question": "Who?", "context": "word " * 160}
    assert 50_000 < 64 * sum(map(len, question.values())) < 55_000
    replies, _ = pipeline.run([Incoming(dict(question)) for _ in range(64)])
    assert {reply.status for reply in replies} == {200}
    assert engine.events == ["launch"] * wanted + ["wait"] * wanted


def test_a_device_without_room_for_what_is_timed_serves_small_parts(folder, model, monkeypatch):
    def small(batch):
        if batch.total > 2000:
            raise OutOfDeviceMemory("the GPU has no room for this batch")

    says(monkeypatch)
    monkeypatch.setattr(runtime, "engine_for", lambda model, device, **_: AsyncEngine(fail=small))
    (reply,), _ = opened(folder).pipeline.run([Incoming("the film")])
    assert reply.status == 200


def test_batch_invariance_is_an_argument_of_the_model(folder, model, monkeypatch):
    says(monkeypatch)
    opened(folder)
    assert model.options == []
    opened(folder, batch_invariant=True)
    assert model.options == ["batch_invariant"]


def test_labels_of_the_folder_win(folder, model, monkeypatch):
    says(monkeypatch)
    names = {"0": "bad", "1": "so so", "2": "good"}
    (folder / "index_to_name.json").write_text(json.dumps(names))
    answer = opened(folder).pipeline.predict(Incoming({"text": "a", "top_k": None}))
    assert {a["label"] for a in answer} == set(names.values())


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"0": "a"}', '{"0": 1, "1": 2, "2": 3}', '{"a": "b"}', '{"1": "a"}']
)
def test_labels_that_do_not_fit_are_named(tmp_path, text):
    (tmp_path / "index_to_name.json").write_text(text)
    with pytest.raises(ConfigError, match=r"index_to_name\.json"):
        read_labels(tmp_path, model_info())


def test_labels_are_read_only_where_the_task_has_some(folder, model, monkeypatch):
    says(monkeypatch, "question_answering")
    (folder / "index_to_name.json").write_text("[]")
    assert opened(folder).task.name == "question_answering"


def test_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device("auto", 0).type == "cpu"
    with pytest.raises(ConfigError, match="device"):
        choose_device("cuda", 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert str(choose_device("auto", 1)) == "cuda:1"
    assert choose_device("auto", None).type == "cpu"
    assert choose_device("cpu", 1).type == "cpu"
    assert str(choose_device("cuda", None)) == "cuda:0"
