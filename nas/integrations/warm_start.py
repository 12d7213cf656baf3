"""Architectures to train first, from an earlier search: another study's front, a file, or an Optuna database.

They are trained again rather than believed: what another search measured, on other data or for another budget, does not
compare with what this one measures. With halving that costs little.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypernas.config.keys import SEARCHED
from hypernas.config.plan import Plan
from hypernas.errors import UserError, shown
from hypernas.files import read_json
from hypernas.records import Recipe
from hypernas.search_spaces.base import Choices, FixedTrial, SpaceError
from hypernas.show.json_shapes import front_rows
from hypernas.store import Reader

OPTUNA = "optuna:"


def warm_start(source: str, store: str, plan: Plan) -> list[tuple[Any, Recipe]]:
    """Architectures and how to train them here, from FILE.json, [STORE#]STUDY or optuna:URL#STUDY.

    A study gives its front. A file holds a list of architectures, or what `nas front --json` prints. Learning rates
    come along where they are known; tokens are this study's own. Raises UserError naming what is not in this search.
    """
    if source.startswith(OPTUNA):
        return _optuna(source, plan)
    rows = _file(source) if source.endswith(".json") else _study(source, store, plan)
    if not rows:
        raise UserError(f"--warm-start {shown(source)}: there is no architecture in it yet")
    found = []
    for place, row in enumerate(rows):
        name = f"trial {row['trial']}" if "trial" in row else f"entry {place}"
        try:
            arch = plan.space.from_json(row.get("arch", row))
            recipe = _recipe(row.get("training", {}), plan)
            plan.params(arch, recipe)  # raises where it is outside the search
        except SpaceError as error:
            raise UserError(f"--warm-start {shown(source)}: {name} is not in this search: {error}") from error
        found.append((arch, recipe))
    return found


def _recipe(training: Mapping[str, Any], plan: Plan) -> Recipe:
    """This study's recipe with what the other one searched, as far as it is searched here too."""
    picked: dict[str, Any] = {}
    for name in SEARCHED:
        domain = plan.domains[name]
        if name in training and not (isinstance(domain, Choices) and training[name] not in domain.values):
            picked[name] = training[name]
    return plan.recipe_with(picked)


def _file(source: str) -> list[dict[str, Any]]:
    try:
        rows = read_json(Path(source))
    except OSError as error:
        raise UserError(f"--warm-start {shown(source)}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--warm-start {shown(source)}: not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and _is_architecture(row) for row in rows):
        raise UserError(f"--warm-start {shown(source)}: wanted a list of architectures, as `nas front --json` prints")
    return rows


def _is_architecture(row: dict[str, Any]) -> bool:
    return isinstance(row.get("arch", row), dict) and isinstance(row.get("training", {}), dict)


def _study(source: str, store: str, plan: Plan) -> list[dict[str, Any]]:
    address, _, name = source.rpartition("#")
    with Reader(address or store, waits=True) as opened:
        row = opened.study(name)
        if row.settings.imported:
            raise UserError(
                f"--warm-start {shown(source)}: that study was imported from Optuna; optuna:URL#STUDY reads Optuna's "
                "own database, where its parameters are those of this search"
            )
        if row.space.name != plan.space_spec.name:
            raise UserError(
                f"--warm-start {shown(source)}: that study searches space {row.space.name}, "
                f"this one {plan.space_spec.name}"
            )
        return front_rows(row, opened.front(row))


def _optuna(source: str, plan: Plan) -> list[tuple[Any, Recipe]]:
    from hypernas.integrations.optuna_db import best_params  # brings Optuna

    address, hash, name = source.removeprefix(OPTUNA).rpartition("#")
    if not hash or not address or not name:
        raise UserError(f"--warm-start {shown(source)}: wanted optuna:URL#STUDY, like optuna:sqlite:///old.db#first")
    found = []
    best = best_params(address, name)
    if not best:
        raise UserError(f"--warm-start {shown(source)}: there is no architecture in it yet")
    for number, params in best:
        try:
            arch, recipe = plan.suggest(FixedTrial(params))
            plan.params(arch, recipe)
        except (SpaceError, KeyError, TypeError) as error:
            raise UserError(
                f"--warm-start {shown(source)}: trial {number} with {params} is not in this search: {error}"
            ) from error
        found.append((arch, recipe))
    return found
