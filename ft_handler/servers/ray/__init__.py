"""Ray Serve: `serve run ft_handler.servers.ray:app model=DIR` (docs/ray-serve.md)."""

from ft_handler.servers.ray.application import app

__all__ = ["app"]
