"""Starts a search from the command line's values: checks everything, opens the study, runs it, says what came of it."""

import shlex
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import click

from hypernas.config.study_config import StudyConfig, own_code, resumed
from hypernas.data.tasks import TASKS
from hypernas.engines.devices import on_what
from hypernas.errors import StoreError, StudyError
from hypernas.integrations.warm_start import warm_start
from hypernas.scaling.baseline import measure_baseline
from hypernas.show.status import status_of, verdict
from hypernas.show.tables import front_table, print_table
from hypernas.show.views import make_view
from hypernas.store import Reader, Store
from hypernas.study.driver import Outcome, run
from hypernas.study.search import Search, check_resumed, executor_of, open_search, prepare, ran_on
from hypernas.training.checkpoints import open_folder


def launch(given: Mapping[str, Any], evaluate: str = "training") -> int:
    """Runs a search to its end; the exit code. Raises UserError and SpaceError for bad input, before Ray starts."""
    config = StudyConfig(**given)
    stored = _stored_settings(config)
    if stored is not None:
        if not config.resume:
            raise StudyError(f"study {config.study!r} exists in {config.store}: --resume continues it")
        if stored.get("imported"):
            raise StudyError(f"study {config.study!r} was imported from Optuna, to be looked at: start another study")
        if "space" not in stored and "space" not in given:
            raise StudyError(
                f"study {config.study!r} searches a space of its own: --resume wants its --space FILE.py:Class again, "
                "as no study names code for others to run"
            )
        config = resumed(stored, given)
    prepared = prepare(config)  # whatever is wrong is found before anything is written
    first = warm_start(config.warm_start, config.store, prepared.plan) if config.warm_start else []
    if config.checkpoints is not None:
        open_folder(config.checkpoints)
    executor = executor_of(config)
    config = replace(config, gpus_per_trial=executor.gpus)
    prepared = replace(prepared, config=config, plan=replace(prepared.plan, memory=executor.memory))
    with closing(executor), Store(config.store, create=True) as store:
        check_resumed(store, config, executor)
        click.echo(on_what(executor), err=True)
        yardstick = None
        if stored is None and "ceg" in prepared.plan.objectives:
            yardstick = measure_baseline(store, executor, config, prepared.plan, partial(click.echo, err=True))
        search = open_search(store, prepared, evaluate, first, yardstick)
        finished = store.finished(search.row)
        unit = TASKS[search.plan.space.task].unit
        click.echo(
            f"study {config.study!r}: {'resumed at ' + str(finished) + ' of ' if finished else ''}{search.plan.trials} "
            f"trials of {search.plan.recipe.tokens:,} {unit}s, "
            f"{'halving, ' if search.halving else ''}{'inheriting, ' if config.inherit else ''}"
            f"results in {store.shown}",
            err=True,
        )
        with make_view(search.plan.trials, finished, unit, lambda: store.front(search.row)) as view:
            outcome = run(
                search,
                executor,
                view,
                seconds=config.time,
                device_hours=config.device_hours,
                other_device=config.other_device,
            )
        return _conclude(store, search, outcome)


def _conclude(store: Reader, search: Search, outcome: Outcome) -> int:
    """Prints the front, what beats the baseline, and how to go on; the exit code."""
    front = store.front(search.row)
    print_table(front_table(front, f"front of {search.row.name}"))
    click.echo(verdict(store, search.row))
    if not front and (failures := status_of(store, search.row)["failures"]):
        causes = ", ".join(f"{count} {kind}" for kind, count in failures.items())
        click.echo(f"no trial came to its end; failed: {causes}", err=True)
    if search.proposals.cache_hits:
        click.echo(f"{search.proposals.cache_hits} proposals were known already and not trained again")
    if search.proposals.refused:
        click.echo(f"{search.proposals.refused} proposals exceeded a limit or a worker's memory and were drawn again")
    click.echo(f"finished {outcome.finished} of {outcome.asked} trials")
    if outcome.finished >= outcome.asked:
        return 0
    if outcome.exhausted and not outcome.interrupted:
        click.echo("the space holds nothing new: every further proposal was trained before", err=True)
        return 0
    why = "interrupted" if outcome.interrupted else "out of its budget" if outcome.over_budget else "not finished"
    click.echo(f"{why}; nothing is lost. Continue with: {_again(store, search)}", err=True)
    return 1


def _again(store: Reader, search: Search) -> str:
    """The command that goes on with a search: whole but for a password, and what --resume repeats by itself."""
    config = search.config
    command = ["nas", "search", "--study", search.row.name, "--store", store.to_type, "--resume"]
    if own_code(config.space):
        command += ["--space", config.space]
    for flag, value in (("--address", config.address), ("--checkpoints", config.checkpoints)):
        command += [flag, value] if value else []
    command += ["--other-device"] if config.other_device else []
    return ("PGPASSWORD=... " if store.url.password else "") + shlex.join(command)


def _stored_settings(config: StudyConfig) -> Mapping[str, Any] | None:
    """The settings of the study if the store is there and holds it, and what it ran on; creates nothing."""
    try:
        with Reader(config.store) as store:
            if all(row["name"] != config.study for row in store.studies()):
                return None
            kept = {**store.study(config.study).settings.as_json(), **ran_on(store, config.study)}
            # Older rows name a space of one's own: code that a store names is not run.
            return {name: value for name, value in kept.items() if name != "space" or not own_code(value)}
    except StoreError as error:
        if not error.missing:
            raise
    return None
