"""`python -m hypernas` is `nas`."""

from hypernas.cli.main import entry

entry()
