"""The study store: the truth about studies, in SQLite (one file, WAL mode) or PostgreSQL."""

from nas.store.queries import Proposal, Store

__all__ = ["Proposal", "Store"]
