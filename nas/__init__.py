"""hypernas: neural architecture search for Transformers and residual vision nets.

    import hypernas as nas

    study = nas.search("first", preset="quick", progress=True)   # or nas.open_study("first")
    study.front()                                                # the Pareto front, a pandas DataFrame
    model = study.best("knee").load()                            # its trained network, a torch module

The command `nas` does the same in a terminal. Names are loaded when they are first asked for, so that importing this
needs neither torch, Ray, Optuna nor a database.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypernas.api import Candidate, Study, create_study, open_study, search
    from hypernas.errors import DataError, SpaceError, StoreError, StudyError, UserError
    from hypernas.export.read import load
    from hypernas.search_spaces import load_space
    from hypernas.search_spaces.base import Choices, Cost, Key, Range, Space
    from hypernas.search_spaces.grid import Family, GridSpace, Growth, Joint, Solve

    __version__: str

# cuBLAS is deterministic only with workspaces of fixed size, and reads their size when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__all__ = [
    "Candidate",
    "Choices",
    "Cost",
    "DataError",
    "Family",
    "GridSpace",
    "Growth",
    "Joint",
    "Key",
    "Range",
    "Solve",
    "Space",
    "SpaceError",
    "StoreError",
    "Study",
    "StudyError",
    "UserError",
    "__version__",
    "create_study",
    "load",
    "load_space",
    "open_study",
    "search",
]

_HOMES = {
    "api": ("Candidate", "Study", "create_study", "open_study", "search"),
    "errors": ("DataError", "SpaceError", "StoreError", "StudyError", "UserError"),
    "export.read": ("load",),
    "search_spaces": ("load_space",),
    "search_spaces.base": ("Choices", "Cost", "Key", "Range", "Space"),
    "search_spaces.grid": ("Family", "GridSpace", "Growth", "Joint", "Solve"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from hypernas.version import version

        return version()
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hypernas' has no attribute {name!r}")
    return getattr(import_module(f"hypernas.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
