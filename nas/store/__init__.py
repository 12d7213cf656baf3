"""The study store: the truth about studies, in SQLite (one file, WAL mode) or PostgreSQL."""

from hypernas.store.queries import Proposal, Store

__all__ = ["Proposal", "Store"]
