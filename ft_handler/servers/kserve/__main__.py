"""`python -m ft_handler.servers.kserve --model_name=NAME --model_dir=DIR`, KServe's options too."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from ft_handler.errors import ConfigError, EnvironmentProblem, FtHandlerError


def main() -> None:
    """Open the model, then serve it until a signal comes; an error ends it with its message."""
    try:
        _serve()
    except FtHandlerError as error:
        sys.exit(f"error: {error}")


def parser() -> argparse.ArgumentParser:
    """KServe's options and ours; raises EnvironmentProblem without KServe."""
    try:
        from kserve import model_server
    except ImportError as error:
        raise EnvironmentProblem("KServe is missing: pip install 'ft-handler[kserve]'") from error
    options = argparse.ArgumentParser(
        prog="python -m ft_handler.servers.kserve",
        parents=[model_server.parser],
        description="Serve a traced model by KServe's REST and gRPC protocols.",
    )
    options.add_argument(
        "--model_dir",
        type=Path,
        required=True,
        help="The folder that `ft-handler trace` wrote, or a traced file alone.",
    )
    # It writes a header of the client's into the log.
    options.set_defaults(enable_latency_logging=False)
    return options


def _serve() -> None:
    options = parser().parse_args()
    from kserve import logging as kserve_logging

    from ft_handler.servers.kserve.model import EncoderModel
    from ft_handler.servers.kserve.server import serve

    if options.workers != 1:
        raise ConfigError(
            "--workers must be 1: a process holds one model and batches what comes to it; start "
            "more processes, or replicas"
        )
    if not options.model_dir.exists():
        raise ConfigError(f"--model_dir: there is no {options.model_dir}")
    if options.configure_logging:
        kserve_logging.configure_logging(options.log_config_file)
        ours = logging.getLogger("ft_handler")
        ours.handlers, ours.propagate = logging.getLogger("kserve").handlers, False
        ours.setLevel(logging.INFO)
    model = EncoderModel(options.model_name, options.model_dir)
    model.load()
    serve(
        [model],
        options.grpc_max_receive_message_length,
        enable_latency_logging=options.enable_latency_logging,
    )


if __name__ == "__main__":
    main()
