"""`python -m nas` is `nas`."""

from hypernas.cli.main import entry

entry()
