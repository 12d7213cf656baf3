"""Starts a search from the command line's values: checks everything, opens the study, runs it, says what came of it.

The checks come first and need neither torch nor Optuna nor Ray, so that a wrong flag is answered at once: what brings
those libraries is imported inside the functions that run after them.
"""

import shlex
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from hypernas.config.plan import Plan, check_evaluation, check_fits, make_plan
from hypernas.config.study_config import HUB, StudyConfig, own_code, resume_settings, without_own_code
from hypernas.errors import ClusterError, StoreError, StudyError, StudyExistsError
from hypernas.records import State, is_lost, name_trials
from hypernas.store.files import check_store

if TYPE_CHECKING:
    from hypernas.engines.protocol import Executor
    from hypernas.store import Reader, Store
    from hypernas.study.driver import Interrupt, Outcome
    from hypernas.study.search import Search


def launch(given: Mapping[str, Any], evaluate: str = "training") -> int:
    """Runs a search to its end and says what came of it; the exit code. Raises as `run_search`."""
    search, outcome = run_search(given, evaluate, progress=True)
    from hypernas.store import Reader
    from hypernas.study.driver import Interrupt

    search.store.check_held()  # or a file that came in its place would be read
    with Interrupt().caught(), Reader(search.config.store, waits=True) as store:  # all is done but for saying so
        return _conclude(store, search, outcome)


def run_search(
    given: Mapping[str, Any], evaluate: str = "training", *, progress: bool = False
) -> "tuple[Search, Outcome]":
    """Runs a search to its end. `given` are flags by their names in StudyConfig; `progress` is shown on stderr.

    Raises UserError and SpaceError for bad input, before Ray starts.
    """
    config, plan, stored = check_search(given)
    if stored is not None:
        check_evaluation(config.study, stored.get("evaluate", "training"), evaluate)
        config = _where_it_ran(config, stored, given)
    try:
        return _run_search(config, plan, stored is None, evaluate, progress)
    except StudyExistsError:
        if not config.resume:
            raise
    # Another driver has just created it: this one starts again, to go on with the study as it is.
    return run_search(given, evaluate, progress=progress)


def check_search(given: Mapping[str, Any]) -> tuple[StudyConfig, Plan, Mapping[str, Any] | None]:
    """The configuration, its plan, and the settings of the study that it continues: what can be checked without torch.

    Raises UserError, SpaceError and StoreError for values that no search can start from; writes nothing.
    """
    config = StudyConfig(**given)
    plan = None if config.resume else make_plan(config)  # before the store is opened: reading it takes longer
    stored = _stored_settings(config)
    if stored is None:
        return config, plan or make_plan(config), None
    if not config.resume:
        raise StudyError(f"study {config.study!r} exists in {config.store}: --resume continues it")
    if stored.get("imported"):
        raise StudyError(f"study {config.study!r} was imported from Optuna, to be looked at: start another study")
    if "space" not in stored and "space" not in given:
        raise StudyError(
            f"study {config.study!r} searches a space of its own: --resume wants its --space FILE.py:Class again, "
            "as no study names code for others to run"
        )
    config = resume_settings(stored, given)
    return config, make_plan(config), stored


def _where_it_ran(config: StudyConfig, stored: Mapping[str, Any], given: Mapping[str, Any]) -> StudyConfig:
    """The configuration with the engine, GPUs and workers that the study ran on last, unless flags say otherwise."""
    from hypernas.store import Reader
    from hypernas.study.search import ran_on

    with Reader(config.store, waits=True) as store:
        return resume_settings({**stored, **ran_on(store, config.study)}, given)


def _run_search(config: StudyConfig, plan: Plan, new: bool, evaluate: str, progress: bool) -> "tuple[Search, Outcome]":
    """Checks data, workers and devices, then trains."""
    from hypernas.engines.devices import on_what
    from hypernas.store import Store
    from hypernas.study.driver import Interrupt
    from hypernas.study.search import check_resumed, executor_of, open_search, prepare
    from hypernas.training.checkpoint_files import open_folder

    say: Callable[[str], None] = partial(click.echo, err=True) if progress else lambda line: None
    prepared = prepare(config, plan)  # whatever is wrong is found before anything is written
    first = []
    if config.warm_start is not None:
        from hypernas.integrations.warm_start import warm_start

        first = warm_start(config.warm_start, config.store, prepared.plan)
    if config.checkpoints is not None:
        open_folder(config.checkpoints)
    executor = executor_of(config, evaluate)
    config = replace(config, gpus_per_trial=executor.gpus)
    prepared = replace(prepared, config=config, plan=replace(prepared.plan, memory=executor.memory))
    interrupt = Interrupt()
    with interrupt.caught(), closing(executor), interrupt.at_once(Store, config.store, create=True) as store:
        check_fits(prepared.plan)
        check_resumed(store, config, executor)
        say(prepared.read)
        say(on_what(executor))
        yardstick = None
        if new and "ceg" in prepared.plan.objectives:
            from hypernas.scaling.baseline import measure_baseline  # brings SciPy, a second that few searches need

            yardstick = measure_baseline(store, executor, config, prepared.plan, say)
        if new:  # whatever the flags say: one that came into being since was not compared with them
            prepared = replace(prepared, config=replace(config, resume=False))
        search = open_search(store, prepared, evaluate, first, yardstick)
        return search, _drive(store, search, executor, say, progress, interrupt)


def _drive(
    store: "Store",
    search: "Search",
    executor: "Executor",
    say: Callable[[str], None],
    progress: bool,
    interrupt: "Interrupt",
) -> "Outcome":
    """Says what is searched, and trains, under a live view where there is `progress` to be shown."""
    from hypernas.data.tasks import TASKS
    from hypernas.show.views import Silent, make_view
    from hypernas.study.driver import View, run

    config, plan = search.config, search.plan
    finished = store.finished(search.row)
    unit = TASKS[plan.space.task].unit
    say(
        f"study {config.study!r}: {'resumed at ' + str(finished) + ' of ' if finished else ''}{plan.trials} "
        f"trials of {plan.recipe.tokens:,} {unit}s, "
        f"{'halving, ' if search.halving else ''}{'inheriting, ' if config.inherit else ''}"
        f"results in {store.shown}"
    )
    watching: AbstractContextManager[View] = nullcontext(Silent())
    if progress:
        watching = make_view(plan.trials, finished, unit, lambda: store.front(search.row))
    with watching as view:
        try:
            return run(
                search,
                executor,
                view,
                seconds=config.time,
                device_hours=config.device_hours,
                other_device=config.other_device,
                interrupt=interrupt,
            )
        except ClusterError as error:
            raise ClusterError(f"{error}. Continue with: {_again(store, search)}") from error


def _conclude(store: "Reader", search: "Search", outcome: "Outcome") -> int:
    """Prints the front, what beats the baseline, and how to go on; the exit code."""
    from hypernas.show.status import status_of, verdict
    from hypernas.show.tables import front_table, print_table

    front = store.front(search.row)
    print_table(front_table(front, f"front of {search.row.name}"))
    click.echo(verdict(store, search.row))
    if not front and (failures := status_of(store, search.row)["failures"]):
        causes = ", ".join(f"{count} {kind}" for kind, count in failures.items())
        click.echo(f"no trial came to its end; failed: {causes}", err=True)
    if lost := [trial.number for trial in store.trials(search.row, states=(State.FAILED,)) if is_lost(trial)]:
        click.echo(f"{name_trials(lost)} lost all workers: {_again(store, search)} tries again", err=True)
    if search.proposals.cache_hits:
        click.echo(f"{search.proposals.cache_hits} proposals were known already and not trained again")
    if search.proposals.refused:
        click.echo(f"{search.proposals.refused} proposals exceeded a limit or a worker's memory and were drawn again")
    search.store.check_held()
    click.echo(f"finished {outcome.finished} of {outcome.asked} trials")
    if outcome.finished >= outcome.asked:
        return 0
    if outcome.exhausted and not outcome.interrupted:
        click.echo("the space holds nothing new: every further proposal was trained before", err=True)
        return 0
    why = "interrupted" if outcome.interrupted else "out of its budget" if outcome.over_budget else "not finished"
    click.echo(f"{why}; nothing is lost. Continue with: {_again(store, search)}", err=True)
    return 1


def _again(store: "Reader", search: "Search") -> str:
    """The command that goes on with a search: whole but for a password, and what --resume repeats by itself."""
    config = search.config
    command = ["nas", "search", "--study", search.row.name, "--store", store.to_type, "--resume"]
    if own_code(config.space):
        command += ["--space", config.space]
    if (config.sampler or "").startswith(HUB):
        command += ["--sampler", str(config.sampler)]
    for flag, value in (("--address", config.address), ("--checkpoints", config.checkpoints)):
        command += [flag, value] if value else []
    command += ["--other-device"] if config.other_device else []
    return ("PGPASSWORD=... " if store.url.password else "") + shlex.join(command)


def _stored_settings(config: StudyConfig) -> Mapping[str, Any] | None:
    """The settings of the study if the store is there and holds it; creates nothing."""
    try:
        check_store(config.store)
        from hypernas.store import Reader  # brings SQLAlchemy: once the file is found

        with Reader(config.store, waits=True) as store:
            if all(row["name"] != config.study for row in store.studies()):
                return None
            row = store.study(config.study)
            return without_own_code({**row.settings.as_json(), "space": row.space.name})
    except StoreError as error:
        if not error.missing:
            raise
    return None
