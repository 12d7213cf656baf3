"""Search spaces: what may be chosen, what it costs, how it is built. `load_space` finds one by name."""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hypernas.errors import SpaceError, nearest
from hypernas.search_spaces.base import Space

if TYPE_CHECKING:
    from hypernas.records import SpaceSpec, StudyRow

OF_OPTUNA = "optuna"  # the space of a study that Optuna made: none that is known here
SPACES = {"lm": "hypernas.search_spaces.lm:LanguageModels", "vision": "hypernas.search_spaces.vision:ImageClassifiers"}


def load_space(name: str, settings: Mapping[str, str] | None = None) -> Space:
    """The space `lm`, `vision`, `pkg.mod:Class` or `FILE.py:Class`, restricted by `settings`. Raises SpaceError.

    Imports the code that is named: for names from a store or a file there is `stored_space`.
    """
    if name == OF_OPTUNA:
        raise SpaceError(
            "a study that was imported from Optuna has no space here: it can be looked at (nas front, show, status, "
            "report and dashboard), and neither trained nor exported"
        )
    target = SPACES.get(name, name)
    if ":" not in target:
        raise SpaceError(
            f"unknown space {name!r}; {nearest(name, tuple(SPACES))} Your own: pkg.module:Space or FILE.py:Space"
        )
    source, _, attribute = target.rpartition(":")
    try:
        module = _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except ImportError as error:
        raise SpaceError(f"space {name!r}: {source} cannot be imported: {error}") from error
    if not hasattr(module, attribute):
        raise SpaceError(f"space {name!r}: {source} defines no {attribute!r}")
    space = getattr(module, attribute)()
    if not isinstance(space, Space):
        missing = [member for member in Space.__protocol_attrs__ if not hasattr(space, member)]  # type: ignore[attr-defined]
        raise SpaceError(f"space {name!r}: {attribute} lacks {', '.join(sorted(missing))}; docs/space.md says how")
    return space.restrict(settings) if settings else space


def stored_space(spec: "SpaceSpec") -> Space:
    """The space of a study or an export. Raises SpaceError, importing nothing, for code that nobody else names."""
    if spec.name not in (*SPACES, OF_OPTUNA) and not spec.own:
        raise SpaceError(
            f"space {spec.name!r} is not one of {', '.join(SPACES)}, and no study or export names code for others to "
            "run: give --space FILE.py:Class (in Python space=...) if you have its code and trust it"
        )
    return load_space(spec.name, spec.settings)


def name_space(row: "StudyRow", given: str | None) -> "StudyRow":
    """The study with its space named by whoever runs this; `given` None leaves the row's word."""
    return row if given is None else replace(row, space=replace(row.space, name=given, own=True))


def is_built_in(space: object) -> bool:
    """Whether the space comes with this package, rather than being a user's own."""
    return type(space).__module__.startswith(f"{__name__}.")


def _load_file(path: Path):
    if not path.is_file():
        raise SpaceError(f"no such file: {path}")
    name = f"hypernas_space_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the exporter look the module up by name
    spec.loader.exec_module(module)
    return module
