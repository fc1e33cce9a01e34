"""Endurance: a real TorchServe in odd and good traffic while workers die and models change.

    python benchmarks/soak.py --minutes 30
    python benchmarks/soak.py --minutes 1 --output build/soak.json
    python benchmarks/soak.py --minutes 30 --cls build/demo/sentiment --qa build/demo/qa

Three models are served: `cls` and `qa` with two workers each, and `swap`, the classifier again,
with one. All the while clients send requests of every odd kind, which must be answered 200 or 4xx,
and tagged ones, whose right answers are known beforehand. In turns a worker of `cls` or `qa` is
killed, `swap` gets a new version and loses the old one, and `swap` is scaled up and down. Of two
workers the younger one is killed, so that the older one lives through the whole run and shows
whether memory or file handles leak.

Fails when an answer is wrong, when a request is lost that no killed process can have held, when
more are lost than a killed worker can have held, when a worker ends that nobody ended, or when what
lives through the run keeps growing. docs/endurance.md says what is counted and why.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from ft_handler.predictor import Predictor
from ft_handler.servers.torchserve.archive import archive
from ft_handler.servers.torchserve.process import Server
from ft_handler.servers.torchserve.properties import ServeOptions

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))
from odd_requests import odd_requests
from ports import free_port
from provenance import provenance
from tiny import WORD_LIST, write_tiny_bert

MODES = {"cls": "sequence_classification", "qa": "question_answering"}
#: Served model -> whose traced folder it is.
MODELS = {"cls": "cls", "qa": "qa", "swap": "cls"}
WORKERS = {"cls": 2, "qa": 2, "swap": 1}
BATCH_SIZE = 8
SCORES_WITHIN = 1e-4
#: Clients learn a little later that the process which held their request is dead.
GRACE = 1.0
#: What lives through the run may grow so much after its first third; what leaks grows on and on.
GROWTH_SHARE, GROWTH_BYTES, GROWTH_HANDLES = 0.15, 64 << 20, 32
#: Java fills the heap it is given before it clears up, so its growth says nothing. It gets a small
#: heap, in which a leak ends in errors, and may take so much beside it.
JAVA_HEAP, JAVA_REST = 256 << 20, 384 << 20


@dataclass(frozen=True)
class Tagged:
    """A request whose right answer is known."""

    model: str
    document: Any
    answer: dict[str, Any]

    def right(self, found: Any) -> bool:
        """Whether an answer says the same, scores within rounding."""
        if not isinstance(found, dict) or found.keys() != self.answer.keys():
            return False
        return all(
            abs(found[key] - value) <= SCORES_WITHIN if key == "score" else found[key] == value
            for key, value in self.answer.items()
        )


@dataclass(frozen=True)
class Sent:
    """A request that was not answered as it should be: when it was under way, and what came."""

    model: str
    start: float
    end: float
    status: int | None


@dataclass(frozen=True)
class Ended:
    """A worker that the run ended itself; `until` is when that was certainly over."""

    model: str
    start: float
    until: float
    why: str


@dataclass
class Record:
    """What happened, written by many threads."""

    sent: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    lost: list[Sent] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    samples: list[dict[str, Any]] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def tagged_requests(folders: Mapping[str, Path], count: int) -> list[Tagged]:
    """`count` requests a model with the answers that this process computes itself."""
    rng = random.Random(11)
    words = WORD_LIST.split()

    def text(most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(2, most)))

    found: list[Tagged] = []
    for kind, folder in folders.items():
        predictor = Predictor.load(folder, device="cpu", num_threads=1)
        for number in range(count):
            document: Any
            if kind == "qa":
                document = {"question": f"who built {text(4)}", "context": f"{text(90)} {number}"}
            else:
                document = {"text": f"{number} {text(60)}"}
            answer = predictor.predict(document)
            assert isinstance(answer, dict)
            found += [Tagged(name, document, answer) for name, of in MODELS.items() if of == kind]
    return found


def odd_pool(number: int, size: int) -> list[tuple[str, Any]]:
    """`size` odd requests for every model, others for every number."""
    pool: list[tuple[str, Any]] = []
    kinds = st.one_of(
        *(st.tuples(st.just(model), odd_requests(MODES[of])) for model, of in MODELS.items())
    )

    @seed(number)
    @settings(
        max_examples=-(-size // 20), database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(kinds, min_size=20, max_size=20))
    def draw(batch: list[tuple[str, Any]]) -> None:
        pool.extend(batch)

    draw()
    return pool


class Client:
    """One keep-alive connection that is made anew when it breaks."""

    def __init__(self, base: str) -> None:
        self._where = urllib.parse.urlsplit(base).netloc
        self._connection: http.client.HTTPConnection | None = None

    def post(self, model: str, body: bytes, headers: Mapping[str, str]) -> tuple[int | None, bytes]:
        """Status and body; None when no answer came."""
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self._where, timeout=60)
        try:
            self._connection.request("POST", f"/predictions/{model}", body, dict(headers))
            answer = self._connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            self.close()
            return None, b""

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def traffic(
    base: str,
    number: int,
    tagged: Sequence[Tagged],
    odd: Callable[[], Sequence[tuple[str, Any]]],
    record: Record,
    stop: threading.Event,
) -> None:
    """One client: a tagged request and an odd one in turns, until it is told to stop."""
    rng = random.Random(number)
    client = Client(base)
    sent: Counter[str] = Counter()
    statuses: Counter[int] = Counter()
    while not stop.is_set():
        good = rng.random() < 0.5
        expected = rng.choice(tagged)
        if good:
            model, body = expected.model, json.dumps(expected.document).encode()
            headers: Mapping[str, str] = {"Content-Type": "application/json"}
        else:
            model, strange = rng.choice(odd())
            body, headers = strange.body, strange.headers
        start = time.monotonic()
        status, answer = client.post(model, body, headers)
        end = time.monotonic()
        sent["tagged" if good else "odd"] += 1
        statuses[status or 0] += 1
        if status is None or status >= 500 or (good and status != 200):
            with record.lock:
                record.lost.append(Sent(model, start, end, status))
        elif good and not _right(expected, answer):
            with record.lock:
                record.wrong.append(f"{model}: {answer[:200]!r}")
    client.close()
    with record.lock:
        record.sent += sent
        record.statuses += statuses


def _right(expected: Tagged, answer: bytes) -> bool:
    try:
        return expected.right(json.loads(answer))
    except ValueError:
        return False


class Operator:
    """Kills workers, swaps versions, scales; and knows which workers may be gone."""

    def __init__(self, server: Server, record: Record) -> None:
        self.server, self.record = server, record
        self.version = "1.0"
        #: Model -> workers that are to live.
        self.alive = {name: self.pids(name) for name in MODELS}
        self.lasting = {name: min(self.alive[name], key=_born) for name in MODES}

    def manage(self, method: str, path: str, **query: object) -> Any:
        """Call the management API."""
        url = f"{self.server.management}{path}"
        if query:
            url += "?" + urllib.parse.urlencode(query)
        return self.server.request(url, method=method, timeout=120)

    def pids(self, model: str, version: str | None = None) -> set[int]:
        """Process ids of a model's READY workers."""
        path = f"/models/{model}" + (f"/{version}" if version else "")
        workers = self.manage("GET", path)[0]["workers"]
        return {int(w["pid"]) for w in workers if w["status"] == "READY"}

    def wait_for(self, model: str, count: int, gone: frozenset[int] = frozenset()) -> None:
        """Wait until `count` workers are READY and none of those gone is among them."""
        deadline = time.monotonic() + 120
        while len(found := self.pids(model)) != count or found & gone:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{model}: {count} workers are not READY after two minutes")
            time.sleep(0.2)
        self.alive[model] = found

    def _end(self, model: str, why: str, start: float) -> None:
        with self.record.lock:
            self.record.ended.append(Ended(model, start, time.monotonic(), why))
            self.record.events[why] += 1

    def kill(self, model: str) -> None:
        """Kill the younger of two workers and wait for its successor."""
        victim = max(self.alive[model] - {self.lasting[model]}, key=_born)
        start = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        self._end(model, "kill", start)
        self.wait_for(model, WORKERS[model], frozenset({victim}))

    def swap(self) -> None:
        """Register the other version, make it the default, and unregister the old one."""
        old, new = self.version, "2.0" if self.version == "1.0" else "1.0"
        self.manage("POST", "/models", url=f"swap-{new}.mar", initial_workers=1, synchronous="true")
        self.manage("PUT", f"/models/swap/{new}/set-default")
        self.version = new
        self.wait_for("swap", 1)
        # What the old version still has to do was asked before the change, and takes a moment.
        time.sleep(2)
        start = time.monotonic()
        self.manage("DELETE", f"/models/swap/{old}")
        self._end("swap", "reload", start)

    def scale(self) -> None:
        """One more worker, and one less."""
        for count in (2, 1):
            start = time.monotonic()
            self.manage(
                "PUT", "/models/swap", min_worker=count, max_worker=count, synchronous="true"
            )
            self.wait_for("swap", count)
            if count == 1:
                self._end("swap", "scale down", start)
        self.record.events["scale up"] += 1

    def check(self) -> None:
        """Note workers that ended though nobody ended them."""
        for model, expected in self.alive.items():
            missing = {pid for pid in expected if not psutil.pid_exists(pid)}
            if missing:
                self.record.strange.append(f"{model}: {len(missing)} workers ended by themselves")
                self.wait_for(model, WORKERS[model], frozenset(missing))


def _born(pid: int) -> float:
    return psutil.Process(pid).create_time()


def sample(processes: Mapping[str, int], start: float) -> dict[str, Any]:
    """Memory and file handles of processes, now."""
    found: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
    for name, pid in processes.items():
        process = psutil.Process(pid)
        found[name] = {
            "rss": process.memory_info().rss,
            "handles": process.num_fds(),
            "threads": process.num_threads(),
        }
    return found


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of values over seconds; 0 of fewer than two points."""
    if len(points) < 2:
        return 0.0
    return float(statistics.linear_regression(*zip(*points, strict=True)).slope)


def growth(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What each process that lived through the run had after a third of it, and at its end.

    Bytes and handles are medians of five samples; the slope is of the last two thirds, in bytes an
    hour.
    """
    settled = list(samples[len(samples) // 3 :])
    found: dict[str, dict[str, float]] = {}
    for name in samples[0].keys() - {"seconds"}:
        of: dict[str, float] = {}
        for what in ("rss", "handles"):
            values = [float(one[name][what]) for one in settled]
            of[f"{what}_settled"] = statistics.median(values[:5])
            of[f"{what}_end"] = statistics.median(values[-5:])
        points = [(float(one["seconds"]), float(one[name]["rss"])) for one in settled]
        of["rss_slope_per_hour"] = round(slope(points) * 3600)
        found[name] = of
    return found


def verdict(record: Record, grown: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What is wrong with a run; empty is good."""
    problems = [f"a wrong answer: {text}" for text in record.wrong[:5]]
    problems += record.strange
    unexplained = [s for s in record.lost if not any(_held(e, s) for e in record.ended)]
    for one in unexplained[:5]:
        problems.append(f"{one.model}: lost ({one.status}) while no process of it was ended")
    for ended in record.ended:
        count = sum(_held(ended, s) for s in record.lost)
        if count > BATCH_SIZE:
            problems.append(f"{ended.model}: a {ended.why} lost {count}, over a worker's batch")
    for name, of in grown.items():
        most = of["rss_settled"] + max(of["rss_settled"] * GROWTH_SHARE, GROWTH_BYTES)
        if of["rss_end"] > (JAVA_HEAP + JAVA_REST if name == "java" else most):
            problems.append(f"{name}: memory grew from {of['rss_settled']} to {of['rss_end']}")
        if of["handles_end"] - of["handles_settled"] > GROWTH_HANDLES:
            problems.append(f"{name}: handles {of['handles_settled']} to {of['handles_end']}")
    return problems


def _held(ended: Ended, sent: Sent) -> bool:
    """Whether a process that was ended can have held a request."""
    return (
        sent.model == ended.model and sent.start <= ended.until + GRACE and sent.end >= ended.start
    )


def traced_folders(given: Mapping[str, Path | None], scratch: Path) -> dict[str, Path]:
    """The traced folders to serve: those given, else of tiny random models made here."""
    from ft_handler.prepare.options import TraceOptions
    from ft_handler.prepare.trace import trace

    folders: dict[str, Path] = {}
    for kind, mode in MODES.items():
        folder = given[kind]
        if folder is None:
            source = write_tiny_bert(scratch / f"bert-{kind}", mode)
            folder = scratch / f"traced-{kind}"
            trace(TraceOptions(mode=mode, model_name_or_path=str(source), output=folder))
        folders[kind] = folder
    return folders


def make_store(folders: Mapping[str, Path], scratch: Path) -> Path:
    """Archives of every model, `swap` in two versions, with settings of this run."""
    import yaml

    store = scratch / "store"
    store.mkdir()
    for kind, folder in folders.items():
        own = scratch / f"served-{kind}"
        shutil.copytree(folder, own)
        config = own / "model-config.yaml"
        chosen = yaml.safe_load(config.read_text()) or {}
        chosen.update(batchSize=BATCH_SIZE, maxBatchDelay=5, minWorkers=1, maxWorkers=1)
        chosen.setdefault("handler", {})["num_threads"] = 1
        config.write_text(yaml.safe_dump(chosen))
        for name in (name for name, of in MODELS.items() if of == kind and name != "swap"):
            archive(own, model_name=name, export_path=store)
        if kind == MODELS["swap"]:
            for version in ("1.0", "2.0"):
                made = archive(own, model_name="swap", version=version, export_path=store)
                made.rename(store / f"swap-{version}.mar")
    return store


def started(store: Path, scratch: Path, output: IO[str]) -> Server:
    """A server of its own ports with every model READY."""
    port = free_port(5)
    options = ServeOptions(
        model_store=store, models=("cls.mar", "qa.mar", "swap-1.0.mar"), port=port,
        grpc_port=port + 3, token_auth=False, model_api=True,
        overrides={"vmargs": f"-Xmx{JAVA_HEAP}"},
    )  # fmt: skip
    server = Server(options, cwd=scratch, output=output)
    server.start()
    try:
        server.wait_ready(300)
        for name in MODES:
            query = urllib.parse.urlencode(
                {"min_worker": WORKERS[name], "max_worker": WORKERS[name], "synchronous": "true"}
            )
            server.request(f"{server.management}/models/{name}?{query}", method="PUT", timeout=120)
    except BaseException:
        server.stop()
        raise
    return server


def soak(
    server: Server, tagged: Sequence[Tagged], seconds: float, clients: int, pause: float
) -> tuple[Record, dict[str, dict[str, float]]]:
    """Run traffic and events for so long, and every event at least once; what happened, and grew.

    pause  seconds between events
    """
    record = Record()
    operator = Operator(server, record)
    pools = itertools.count(1)
    pool = odd_pool(next(pools), 400)
    stop = threading.Event()
    threads = [
        threading.Thread(
            target=traffic, args=(server.inference, n, tagged, lambda: pool, record, stop)
        )
        for n in range(clients)
    ]
    watched = {"java": server.pid} | {f"{n} worker": p for n, p in operator.lasting.items()}
    start = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        actions: tuple[Callable[[], None], ...] = (
            lambda: operator.kill("cls"), operator.swap, lambda: operator.kill("qa"),
            operator.scale,
        )  # fmt: skip
        for number in itertools.count():
            wait_until = time.monotonic() + pause
            while time.monotonic() < wait_until:
                record.samples.append(sample(watched, start))
                operator.check()
                time.sleep(max(0.0, min(1.0, wait_until - time.monotonic())))
            if number >= len(actions) and time.monotonic() - start > seconds:
                break
            actions[number % len(actions)]()
            pool = odd_pool(next(pools), 400)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return record, growth(record.samples)


def document(
    record: Record, grown: Mapping[str, Mapping[str, float]], problems: Sequence[str], **more: Any
) -> dict[str, Any]:
    """The result as JSON values."""
    lost = Counter(s.status or 0 for s in record.lost)
    row = {
        "requests": dict(record.sent),
        "statuses": {str(k): v for k, v in sorted(record.statuses.items())},
        "wrong": len(record.wrong),
        "lost": {str(k): v for k, v in sorted(lost.items())},
        "events": dict(record.events),
        "lost_by_event": [
            {"model": e.model, "why": e.why, "lost": sum(_held(e, s) for s in record.lost)}
            for e in record.ended
        ],
        "growth": grown,
        # Enough points to draw, whatever the length of the run.
        "samples": record.samples[:: max(1, len(record.samples) // 60)],
        "problems": list(problems),
    }
    return {"provenance": provenance(**more), "rows": [row]}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause", type=float, default=10, help="seconds between events")
    parser.add_argument("--cls", type=Path, help="a traced classifier; default a tiny random one")
    parser.add_argument("--qa", type=Path, help="a traced model of questions; likewise")
    parser.add_argument("--output", type=Path, help="where the result goes")
    options = parser.parse_args()
    # Tracing and the Predictor warn about what the tests look after.
    warnings.simplefilter("ignore")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ft-handler-soak-")))
        folders = traced_folders({"cls": options.cls, "qa": options.qa}, scratch)
        tagged = tagged_requests(folders, 60)
        store = make_store(folders, scratch)
        log = stack.enter_context((scratch / "server.log").open("w"))
        server = started(store, scratch, log)
        stack.callback(server.stop)
        record, grown = soak(server, tagged, options.minutes * 60, options.clients, options.pause)
        problems = verdict(record, grown)
    models = "tiny random models" if options.cls is None else "traced folders given"
    result = document(
        record, grown, problems, minutes=options.minutes, clients=options.clients, models=models
    )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    shown = {k: v for k, v in result["rows"][0].items() if k not in ("samples", "lost_by_event")}
    print(json.dumps(shown, indent=1))
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
