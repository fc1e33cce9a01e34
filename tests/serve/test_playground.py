"""The playground in a headless Chromium, before models of every task and before a TorchServe."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import stub_server
import yaml
from browser import browser as headless
from browser import obstacle
from conftest import Running

from ft_handler.playground.local import Playground
from ft_handler.playground.upstream import Upstream, named
from ft_handler.prepare.options import TraceOptions
from ft_handler.prepare.trace import trace

pytest.importorskip("selenium", reason="selenium is not installed")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

OBSTACLE = obstacle()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))

ROOT = Path(__file__).resolve().parents[2]
AXE = ROOT / "build/axe/axe.min.js"
QUESTION = "who built the old bridge"
#: Characters of two UTF-16 units and of two code points, before and behind what may be an answer.
CONTEXT = (
    "\U0001f600 the old bridge was built by an engineer of the cafe\u0301 \U0001f600 that year"
)


class Page:
    """The page in a browser, and short ways to use it."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser, self.url = browser, url

    def open(self, model: str) -> None:
        """Load the page with a model chosen."""
        self.browser.get("about:blank")
        self.browser.get(f"{self.url}#{model}")
        self.wait(lambda: self.browser.find_elements(By.CSS_SELECTOR, "body[data-ready]"))

    def wait(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.browser, 30, 0.05).until(lambda _: condition())

    def __getitem__(self, name: str) -> Any:
        return self.browser.find_element(By.ID, name)

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements(By.CSS_SELECTOR, selector))

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.all(selector)]

    def fill(self, name: str, text: str) -> None:
        # Keys of the driver are of the basic plane alone.
        self.browser.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
            self[name], text,
        )  # fmt: skip

    def answered(self) -> str:
        """What the status says once there is an answer."""
        self.wait(lambda: self["answer"].get_attribute("aria-busy") == "false")
        return str(self["status"].text)

    def sent(self) -> tuple[Any, Any]:
        """The last request and its answer, as the page shows them."""
        read = "return [arguments[0].textContent, arguments[1].textContent]"
        shown = self.browser.execute_script(read, self["raw-request"], self["raw-answer"])
        return json.loads(shown[0]), json.loads(shown[1])

    def complaints(self) -> list[Any]:
        """What the console said since the last call."""
        return list(self.browser.get_log("browser"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with headless(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture(scope="module")
def models(
    traced: Mapping[str, Path],
    make_tiny_bert: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """A tiny model of every task, ready."""
    root = tmp_path_factory.mktemp("shown")
    sources = {
        "rank": ("reranking", {"num_labels": 1, "id2label": {0: "s"}, "label2id": {"s": 0}}),
        "emb": ("embeddings", {}),
    }
    folders = dict(zip(("cls", "qa", "tok"), traced.values(), strict=True))
    for name, (mode, changes) in sources.items():
        head = "embeddings" if name == "emb" else "sequence_classification"
        source = make_tiny_bert(head, **changes)
        folders[name] = root / name
        trace(TraceOptions(mode=mode, model_name_or_path=str(source), output=folders[name]))
    folders["zero"] = shutil.copytree(folders["cls"], root / "zero")
    config = folders["zero"] / "model-config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["handler"]["mode"] = "zero_shot_classification"
    config.write_text(yaml.safe_dump(settings))
    return {name: stub_server.opened(folder, name) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def stub(models: dict[str, Any]) -> Iterator[stub_server.Stub]:
    server = stub_server.Stub(models)
    with stub_server.running(server):
        yield server


@pytest.fixture(scope="module")
def shown(browser: Any, stub: stub_server.Stub) -> Iterator[Page]:
    playground = Playground(named(stub.url, stub.url, stub.url, None))
    with stub_server.running(playground):
        yield Page(browser, playground.url)


@pytest.fixture
def page(shown: Page, stub: stub_server.Stub) -> Iterator[Page]:
    """The page before a stub; nothing may be said in the console."""
    stub.headers.clear()
    shown.complaints()
    yield shown
    assert shown.complaints() == []


def test_classify(page: Page, stub: stub_server.Stub) -> None:
    page.open("cls")
    assert Select(page["task"]).first_selected_option.get_attribute("value") == (
        "sequence_classification"
    )
    page.fill("cls-text", "the film was great")
    stub.headers["Server-Timing"] = 'queue;dur=1.25, tokenize;dur=0.4;desc="read", compute;dur=33'
    page["send"].click()
    said = page.answered()
    request, answer = page.sent()
    assert request == {"text": "the film was great", "top_k": None}
    assert page.texts(".bars .name") == [one["label"] for one in answer]
    assert page.texts(".bars .score") == [f"{100 * one['score']:.1f} %" for one in answer]
    assert said == f"{answer[0]['label']}, {100 * answer[0]['score']:.1f} %"
    # The tiny model reads a token a word, and allows 128.
    page.wait(lambda: page["tokens"].text.startswith("6"))
    assert page["padding"].text.startswith("95 %\n122 more tokens")
    assert re.fullmatch(r"[\d.]+ ms\nqueue 1\.3 ms, tokenize 0\.4 ms, compute 33 ms",
                        page["time"].text)  # fmt: skip
    page.fill("cls-pair", "a sad story")
    page["send"].click()
    page.answered()
    assert page.sent()[0]["text_pair"] == "a sad story"


def test_ask_marks_the_answer(page: Page) -> None:
    page.open("qa")
    page.fill("qa-question", QUESTION)
    page.fill("qa-context", CONTEXT)
    page["qa-question"].send_keys(Keys.CONTROL, Keys.ENTER)
    said = page.answered()
    request, answers = page.sent()
    assert (request["question"], request["context"], request["top_k"]) == (QUESTION, CONTEXT, 3)
    assert len(answers) == 3
    assert said.startswith(answers[0]["answer"])
    assert page.texts(".answers li button span:first-child") == [a["answer"] for a in answers]
    for number, answer in enumerate(answers):
        button = page.all(".answers button")[number]
        if number:
            assert button.get_attribute("aria-pressed") == "false"
            button.send_keys(Keys.ENTER)
        assert button.get_attribute("aria-pressed") == "true"
        (mark,) = page.all("mark")
        assert mark.get_property("textContent") == CONTEXT[answer["start"] : answer["end"]]
        before = page.browser.execute_script(
            "return arguments[0].previousSibling?.textContent ?? ''", mark
        )
        assert before == CONTEXT[: answer["start"]]
        assert page.all(".text")[0].get_property("textContent") == CONTEXT


def test_entities_are_marked_with_their_labels(page: Page) -> None:
    page.open("tok")
    text = "the captain sailed from the harbour \U0001f600 to the museum"
    page.fill("tok-text", text)
    page["send"].click()
    said = page.answered()
    _, found = page.sent()
    assert found
    assert said == ("1 entity" if len(found) == 1 else f"{len(found)} entities")
    assert [mark.get_property("textContent") for mark in page.all("mark")] == [
        text[one["start"] : one["end"]] + one["entity_group"] for one in found
    ]
    assert [row.split()[0] for row in page.texts("tbody tr")] == [
        one["word"].split()[0] for one in found
    ]


def test_documents_are_ranked(page: Page) -> None:
    page.open("rank")
    texts = ["a warm film", "an engineer built the bridge", "the river"]
    page.fill("rank-query", QUESTION)
    page.fill("rank-texts", "\n\n".join(texts) + "\n")
    page["send"].click()
    said = page.answered()
    request, found = page.sent()
    assert request == {"query": QUESTION, "texts": texts}
    wanted = [texts[one["index"]] for one in found]
    assert page.texts(".bars .name") == wanted
    assert said == f"Best: {wanted[0]}"


def test_labels_of_ones_own(page: Page) -> None:
    page.open("zero")
    assert page["task"].get_attribute("value") == "zero_shot_classification"
    page.fill("zero-labels", "music , travel,,a film")
    page["zero-multi"].click()
    page["send"].click()
    page.answered()
    request, found = page.sent()
    assert request["candidate_labels"] == ["music", "travel", "a film"]
    assert request["multi_label"] is True
    assert page.texts(".bars .name") == found["labels"]


def test_two_texts_are_compared(page: Page) -> None:
    page.open("emb")
    page.fill("emb-first", "a warm film")
    page.fill("emb-second", "a warm film")
    page["send"].click()
    assert page.answered() == "Cosine similarity 1.000"
    _, found = page.sent()
    assert page.texts("tbody tr") == [
        f"{name} {one['tokens']} {len(one['embedding'])}"
        for name, one in zip(("First text", "Second text"), found, strict=True)
    ]


@pytest.mark.parametrize(("model", "lists"), [("cls", 1), ("qa", 4)])
def test_words_are_explained(page: Page, model: str, lists: int) -> None:
    page.open(model)
    page.fill("cls-text", "the film was great")
    page["explain"].click()
    assert page.answered().endswith("explained")
    request, answer = page.sent()
    assert "top_k" not in request
    assert len(page.all(".words")) == lists
    if model == "cls":
        assert page.texts(".words li span:first-child") == answer["words"]
        assert page.texts(".words .number") == [
            f"{'−' if number < 0 else '+'}{abs(number):.2f}" for number in answer["importances"]
        ]


def test_what_is_refused_is_said(shown: Page) -> None:
    shown.open("cls")
    Select(shown["task"]).select_by_value("question_answering")
    shown["send"].click()
    assert shown.answered() == "No answer."
    assert shown["error"].text.startswith("400 MalformedRequest: ")
    Select(shown["task"]).select_by_value("sequence_classification")
    shown["send"].click()
    assert shown.answered() != "No answer."
    assert not shown["error"].is_displayed()
    # An empty field is not sent at all, and the browser says so.
    shown.fill("cls-text", "")
    shown["send"].click()
    assert shown["cls-text"].get_property("validationMessage")
    # The browser notes the refused request, and nothing else.
    assert [c["level"] for c in shown.complaints() if "400" not in c["message"]] == []


def test_markup_is_text(page: Page) -> None:
    hostile = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    for model, field in (("cls", "cls-text"), ("qa", "qa-context"), ("tok", "tok-text")):
        page.open(model)
        page.fill(field, hostile)
        page["send"].click()
        page.answered()
        assert page.browser.title == "ft_handler playground"
        assert page.all("main img, main script") == []
    page.open("rank")
    page.fill("rank-texts", hostile)
    page["send"].click()
    assert page.answered() == f"Best: {hostile}"
    assert page.all("main img, main script") == []


def test_everything_is_reached_by_keyboard(page: Page) -> None:
    page.open("qa")
    reached: list[str] = []
    page.browser.execute_script("document.activeElement.blur()")
    for _ in range(10):
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        focused = page.browser.switch_to.active_element
        outline = focused.value_of_css_property("outline-style")
        assert outline != "none", focused.get_attribute("id")
        reached.append(focused.get_attribute("id") or focused.get_attribute("class"))
        if reached[-1] == "send":
            break
    assert reached == [
        "skip", "model", "task", "qa-question", "qa-context", "qa-top", "qa-none", "send"
    ]  # fmt: skip
    page.browser.switch_to.active_element.send_keys(Keys.ENTER)
    page.answered()
    assert page.all("mark")
    # Sending does not take the focus away, and the answer is announced.
    assert page.browser.switch_to.active_element.get_attribute("id") == "send"
    assert page["status"].get_attribute("aria-live") == "polite"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_schemes_and_accessibility(page: Page, scheme: str) -> None:
    page.browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    try:
        for model in ("cls", "qa", "tok", "rank", "emb"):
            page.open(model)
            page["send"].click()
            page.answered()
            ground = page.all("body")[0].value_of_css_property("background-color")
            light = sum(map(int, re.findall(r"\d+", ground)[:3])) > 3 * 128
            assert light == (scheme == "light")
            if AXE.is_file():
                page.browser.execute_script(AXE.read_text(encoding="utf-8"))
                found = page.browser.execute_async_script(
                    "axe.run().then((r) => arguments[0](r.violations.map((v) => "
                    "[v.id, v.nodes.map((n) => n.html + n.failureSummary)])))"
                )
                assert found == []
    finally:
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    if not AXE.is_file():
        pytest.skip(f"{AXE.relative_to(ROOT)} is not there (scripts/browser.sh)")


def test_a_narrow_window_needs_no_sideways_scrolling(page: Page) -> None:
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        for model in ("cls", "qa", "tok", "rank", "zero", "emb"):
            page.open(model)
            page["send"].click()
            page.answered()
            width = page.browser.execute_script("return document.documentElement.scrollWidth")
            assert width == 360, model
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_server_that_lists_nothing(browser: Any, stub: stub_server.Stub) -> None:
    """Its models are named by hand."""
    playground = Playground(Upstream(stub.url, "http://127.0.0.1:9", "http://127.0.0.1:9"))
    with stub_server.running(playground):
        page = Page(browser, playground.url)
        page.open("cls")
        assert "could not be listed" in page["error"].text
        assert page["model-name"].get_attribute("value") == "cls"
        page["send"].click()
        assert page.answered() != "No answer."
        page.wait(lambda: "not told by this server" in page["tokens"].text)


def test_a_real_server(browser: Any, running: Running) -> None:
    server = running.server
    playground = Playground(named(server.inference, None, None, None))
    with stub_server.running(playground):
        page = Page(browser, playground.url)
        page.complaints()
        page.open("qa")
        page["send"].click()
        page.answered()
        # Before anybody else asks: workers count once a second, and two are not told apart.
        page.wait(lambda: page["padding"].text.endswith("allowed"))
        assert int(page["tokens"].text.split()[0]) > 20
        request, answers = page.sent()
        assert answers == running.predict_json("qa", request).json()
        assert page.all("mark")[0].text == answers[0]["answer"].strip()
        page.open("cls")
        page["send"].click()
        page.answered()
        assert len(page.texts(".bars .name")) == 3
        assert page.complaints() == []


def test_the_command(running: Running, browser: Any, serve_page: Callable[..., str]) -> None:
    page = Page(browser, serve_page("--server", running.server.inference))
    page.open("cls")
    page["send"].click()
    assert page.answered() != "No answer."


@pytest.fixture
def serve_page(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """`serve_page(*options)` starts `ft-handler playground`, until the test ends; its URL."""
    with ExitStack() as stack:

        def start(*options: str) -> str:
            command = [sys.executable, "-m", "ft_handler", "playground", "--port", "0", *options]
            process = stack.enter_context(
                subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.terminate)
            assert process.stdout is not None
            return process.stdout.readline().split()[0]

        yield start
