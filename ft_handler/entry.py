"""The name that archives call: `--handler ft_handler.entry:handle`, or a file that imports it."""

from ft_handler.servers.torchserve.entry import handle

__all__ = ["handle"]
