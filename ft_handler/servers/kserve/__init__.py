"""KServe's own Python server in front of a model: `python -m ft_handler.servers.kserve`."""
