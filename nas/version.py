"""The installed version of hypernas."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _installed


def version() -> str:
    """The installed version of hypernas."""
    try:
        return _installed("hypernas")
    except PackageNotFoundError:  # run from a checkout
        return "0+unknown"
