"""The study store: the truth about studies, in SQLite (one file, WAL mode) or PostgreSQL."""

from hypernas.store.reader import Reader
from hypernas.store.store import Store

__all__ = ["Reader", "Store"]
