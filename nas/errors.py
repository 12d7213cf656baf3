"""Errors that a user can put right. The message is all they need: the command line prints it and exits with 2."""


class UserError(Exception):
    """Bad input. The message names what was wanted, what came and what to do."""


class DataError(UserError):
    """Training data that is missing, damaged, too short or of an unknown format."""


class StudyError(UserError):
    """A study that is unknown, already there, or asked for something it cannot do."""


class StoreError(UserError):
    """A store that cannot be opened, or that another version wrote; `missing` when there is nothing to open yet."""

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing
