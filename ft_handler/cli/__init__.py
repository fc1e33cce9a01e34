"""The `ft-handler` command."""
