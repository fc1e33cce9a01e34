"""Everything ft_handler raises on purpose.

FtHandlerError
├── LibraryError              the shared library is missing or does not fit
├── ModelError                a checkpoint or traced file is refused
├── DataError                 a file of examples is refused
├── ConfigError               settings are unknown or contradict each other
├── EnvironmentProblem        Java, TorchServe or a tool is missing
├── EngineError               a batch could not be computed
│   ├── OutOfDeviceMemory     the batch is too large for the GPU: split it
│   └── EngineLost            the process cannot use its GPU any more
└── RequestError              one client request is refused: owns an HTTP status
    ├── MalformedRequest      400
    ├── RequestTooLarge       413
    ├── UnsupportedMedia      415
    ├── UnusableRequest       422
    ├── InternalError         500
    ├── NotOffered            501
    ├── OutOfMemory           503
    └── Overloaded            503
"""

from __future__ import annotations


class FtHandlerError(Exception):
    """Base of every error this package raises on purpose."""


class LibraryError(FtHandlerError):
    """`libpyt_fastertransformer.so` cannot be found, loaded or used."""


class ModelError(FtHandlerError):
    """A checkpoint or a traced file is refused; the message says why."""


class DataError(FtHandlerError):
    """A file of examples is refused; the message says where it is wrong."""


class ConfigError(FtHandlerError):
    """A setting is unknown, has the wrong type or contradicts another."""


class EnvironmentProblem(FtHandlerError):
    """Something outside the package is missing; the message says how to get it."""


class EngineError(FtHandlerError):
    """A batch could not be computed."""


class OutOfDeviceMemory(EngineError):
    """The batch does not fit into the GPU's memory; smaller ones may."""


class EngineLost(EngineError):
    """The process cannot use its GPU any more and has to be started again."""


class RequestError(FtHandlerError):
    """One request is refused; its neighbours in the batch are not touched.

    `type` is the machine-readable name in the answer's body. The message is shown to the
    client and never quotes the client's own text.
    """

    status: int = 500
    reason: str = "Internal Server Error"

    @property
    def type(self) -> str:
        """The name clients may match on."""
        return type(self).__name__


class MalformedRequest(RequestError):
    """The payload cannot be understood (400)."""

    status = 400
    reason = "Bad Request"


class RequestTooLarge(RequestError):
    """The payload is over a configured limit (413)."""

    status = 413
    reason = "Payload Too Large"


class UnsupportedMedia(RequestError):
    """The payload is encoded in a way that is not read here (415)."""

    status = 415
    reason = "Unsupported Media Type"


class UnusableRequest(RequestError):
    """The payload is well formed but cannot be used (422)."""

    status = 422
    reason = "Unprocessable Entity"


class InternalError(RequestError):
    """Our own failure (500); the message tells the client nothing of it."""

    def __init__(self) -> None:
        super().__init__("internal error")


class NotOffered(RequestError):
    """A kind of request that this handler does not answer (501)."""

    status = 501
    reason = "Not Implemented"


class OutOfMemory(RequestError):
    """A single input did not fit into memory now (503)."""

    status = 503
    reason = "Service Unavailable"

    def __init__(self) -> None:
        super().__init__("not enough memory for this input")


class Overloaded(RequestError):
    """What came together was more than can be computed in time (503)."""

    status = 503
    reason = "Service Unavailable"

    def __init__(self) -> None:
        super().__init__("too much work at once: try again, or with less in one request")
