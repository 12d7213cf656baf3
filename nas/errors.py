"""Errors that a user can put right. The message is all they need: the command line prints it and exits with 2."""

import re
from collections.abc import Sequence
from difflib import get_close_matches


class UserError(Exception):
    """Bad input. The message names what was wanted, what came and what to do."""


class DataError(UserError):
    """Training data that is missing, damaged, too short or of an unknown format."""


class StudyError(UserError):
    """A study that is unknown, already there, or asked for something it cannot do."""


class ClusterError(UserError):
    """The cluster under a search is gone: what is stored stays, and the search can be resumed."""


class StudyExistsError(StudyError):
    """A study that was to be created, and is there already."""


class SpaceError(UserError, ValueError):
    """A key or value that a search space does not know; the message names the legal ones."""


class StoreError(UserError):
    """A store that cannot be opened, or that another version wrote; `missing` when there is nothing to open yet."""

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


def shown(url: str) -> str:
    """A database's URL as a message may show it: without its password, wherever in it that stands."""
    return re.sub(r"([?&]password=)[^&#]*", r"\1***", re.sub(r"(://[^:/@]*):.*@", r"\1@", url))


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for a misspelt name: `did you mean 'depth'?`, or all known names when none is near."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))
