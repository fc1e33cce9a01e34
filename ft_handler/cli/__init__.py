"""The `ft-handler` command: one module a command, each cheap to import.

What a command works with (torch, transformers, the server) is imported inside its function, so that
help and shell completion, which import every command, answer at once.
"""
