"""What torch-model-archiver packs as the handler: a real file that hands over to the package."""

from ft_handler.entry import handle

__all__ = ["handle"]
