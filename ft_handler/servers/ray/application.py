"""Builds the application that `serve run ft_handler.servers.ray:app` runs."""

# Annotations are evaluated here, not kept as text: Ray looks for the class of the arguments.

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from ft_handler.servers.ray.front import Front
from ft_handler.servers.ray.options import Arguments, ModelOptions
from ft_handler.servers.ray.replica import Replica


def app(args: Arguments) -> Application:
    """The application of one model, whose replicas speak HTTP, or of several behind a front."""
    models = [
        one.model_copy(update={"model": str(Path(one.model).absolute())}) for one in args.each()
    ]
    bound = {one.name: _deployment(one).bind(one, args.max_request_size) for one in models}
    if len(models) == 1:
        return next(iter(bound.values()))
    front = serve.deployment(Front).options(
        num_replicas=args.front_replicas,
        max_ongoing_requests=sum(one.max_ongoing_requests for one in models),
        # It waits more than it computes, and should start where every CPU is a model's.
        ray_actor_options={"num_cpus": 0.1},
        logging_config={"enable_access_log": args.access_log},
    )
    return front.bind(
        {one.name: (one.version, bound[one.name]) for one in models}, args.max_request_size
    )


def _deployment(options: ModelOptions) -> Any:
    """The deployment of a model: Ray Serve's own options, from ours."""
    if options.autoscaling is None:
        scale: dict[str, Any] = {"num_replicas": options.replicas}
    else:
        scale = {"autoscaling_config": options.autoscaling}
    return serve.deployment(Replica).options(
        name=options.name,
        max_ongoing_requests=options.max_ongoing_requests,
        max_queued_requests=options.max_queued_requests,
        health_check_period_s=options.health_check_period_s,
        health_check_timeout_s=options.health_check_timeout_s,
        graceful_shutdown_timeout_s=options.graceful_shutdown_timeout_s,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.gpus},
        logging_config={"enable_access_log": options.access_log},
        **scale,
    )
