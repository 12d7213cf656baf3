"""The study store: the truth about studies, in SQLite (one file, WAL mode) or PostgreSQL.

Both names bring SQLAlchemy, so they are loaded when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypernas.store.reader import Reader
    from hypernas.store.store import Store

__all__ = ["Reader", "Store"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hypernas.store' has no attribute {name!r}")
    return getattr(import_module(f"hypernas.store.{name.lower()}"), name)
