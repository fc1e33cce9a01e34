"""Whether a running TorchServe can be sent requests: every worker READY, and an answer to show."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
from collections.abc import Sequence

from ft_handler import tasks
from ft_handler.errors import ModelError, RequestTooLarge, UnusableRequest
from ft_handler.servers.torchserve.api import Api, workers_up
from ft_handler.servers.torchserve.draining import announced


class Readiness:
    """Asks one server again and again.

    A model that has answered its sample is taken at its workers' word for as long as they are the
    same processes: under load a sample would wait in the queue, and every instance would be found
    unready just when all are needed.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._proven: dict[str, frozenset[int]] = {}

    def obstacle(self, names: Sequence[str] = (), timeout: float = 5) -> str | None:
        """Why requests should not be sent yet, in a line; None when they may.

        names    models, as NAME or NAME/VERSION; none are all that are registered
        timeout  seconds for everything
        """
        deadline = _Deadline(timeout)
        if announced(self._api.port_of("management_address")):
            return "the server drains: it answers what is in flight and then stops"
        try:
            asked = list(names) or self._api.registered(deadline.left())
            if not asked:
                return "no model is registered"
            for name in asked:
                found = self._model(name, deadline)
                if found:
                    return f"{name}: {found}"
        except urllib.error.HTTPError as error:
            return f"the management API answers {error.code}: {_message(error)}"
        except TimeoutError:
            return f"no answer within {timeout:g} s"
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):
                return f"no answer within {timeout:g} s"
            return f"no server answers at {self._api.management}"
        return None

    def _model(self, name: str, deadline: _Deadline) -> str | None:
        path = urllib.parse.quote(name)
        try:
            described = self._api.describe(path, deadline.left())
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return "no such model is registered"
            raise
        up, wanted = workers_up(described)
        if up < wanted or not up:
            return f"{up} of {max(wanted, 1)} workers are READY"
        workers = frozenset(int(worker["pid"]) for worker in described["workers"])
        if self._proven.get(name) == workers:
            return None
        sample = self._sample(path, deadline)
        if sample is not None:
            try:
                url = f"{self._api.inference}/predictions/{path}"
                self._api.request(url, sample, "POST", deadline.left())
            except urllib.error.HTTPError as error:
                # Settings may leave the sample no room: that is an answer.
                if error.code not in (UnusableRequest.status, RequestTooLarge.status):
                    return f"a prediction is answered {error.code}: {_message(error)}"
        self._proven[name] = workers
        return None

    def _sample(self, path: str, deadline: _Deadline) -> bytes | None:
        """A request that the model can answer; None for one of another handler, which says none."""
        url = f"{self._api.management}/models/{path}?customized=true"
        described = self._api.request(url, timeout=deadline.left())[0]
        try:
            mode = json.loads(described["customizedMetadata"])["mode"]
            return json.dumps(dict(tasks.get(mode).sample)).encode()
        except (KeyError, TypeError, ValueError, ModelError):
            return None


class _Deadline:
    """Seconds left of some; raises TimeoutError when there are none."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def _message(error: urllib.error.HTTPError) -> str:
    """What an answer's body says of the error, else its reason."""
    try:
        return str(json.loads(error.read())["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(error.reason)
