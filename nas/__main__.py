"""`python -m nas` is `nas`."""

from hypernas.cli import entry

entry()
