"""What a user can do wrong. The command line prints the message of a UserError and exits with 2."""


class UserError(Exception):
    """Bad input: the message says what was wanted, what came and what to do."""


class DataError(UserError):
    """Training data that is missing, empty or unreadable."""


class StudyError(UserError):
    """A study that does not exist, exists already, or cannot be resumed as asked."""


class StoreError(UserError):
    """A store that cannot be opened, or holds another version's schema."""
