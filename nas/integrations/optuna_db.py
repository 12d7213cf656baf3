"""Studies in Optuna's own database schema, both ways: stock Optuna and optuna-dashboard open what is exported.

Objectives keep their names, values their units (FLOPs are FLOPs, not logarithms) and accuracy is maximised. What Optuna
has no place for travels in user attributes, so that a study comes back as it went. Studies that Optuna made itself are
imported to be looked at: parameters, values, states, curves and constraints.
"""

import sqlite3
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from hypernas import pareto
from hypernas.config.keys import LATENCY
from hypernas.errors import StoreError, StudyError, StudyExistsError, shown
from hypernas.records import (
    FINISHED,
    IMPORTED,
    Failure,
    FailureKind,
    Recipe,
    Report,
    SpaceSpec,
    State,
    StudyRow,
    StudySettings,
    Trial,
    check_type,
    make_record,
    shorten,
)
from hypernas.search_spaces import OF_OPTUNA
from hypernas.search_spaces.base import digest
from hypernas.store import Reader, Store
from hypernas.store.connection import POOLED
from hypernas.store.files import check_tables, file_of, is_url, url_of
from hypernas.store.liveness import is_alive, this_process
from hypernas.store.reader import HEARTBEAT_LAPSE
from hypernas.store.rows import study_of_row, trial_of_row
from hypernas.strategy.optuna_study import _Recorder
from hypernas.strategy.proposals import latency_excess

OURS = "hypernas"  # the user attribute that holds what Optuna has no place for
UNFINISHED = "unfinished"  # in it, until the export has come to its end: who writes it
CONSTRAINTS = "constraints"
STATES = {
    State.WAITING: TrialState.WAITING,
    State.RUNNING: TrialState.RUNNING,
    State.COMPLETE: TrialState.COMPLETE,
    State.STOPPED: TrialState.PRUNED,
    State.FAILED: TrialState.FAIL,
}
FROM_OPTUNA = {theirs: ours for ours, theirs in STATES.items()}
TABLES = (  # Optuna's
    *("alembic_version", "version_info", "studies", "study_directions", "study_user_attributes"),
    *("study_system_attributes", "trials", "trial_user_attributes", "trial_system_attributes", "trial_params"),
    *("trial_values", "trial_intermediate_values", "trial_heartbeats"),
)
PROGRESS_EVERY = 100
MAX_COUNT = 2**31  # what every database holds in an integer
LONGEST_NAME = 200  # characters, of a study
# What readers have names for already: an objective of Optuna's that is called so gets an ending.
TAKEN = {f.name for kind in (Trial, Report, Recipe) for f in fields(kind) if f.name != "loss"}
TAKEN |= {"architecture", "by_seed", "failure", "message", "on_front", "violation"}

Suggest = Callable[[Any], Any]  # draws one proposal from anything with Optuna's three methods


def export_study(store: Reader, study: StudyRow, url: str, suggest: Suggest, say: Callable[[str], None]) -> int:
    """Writes the study, under its name, into Optuna's database at `url`; the number of trials.

    Until its end the study there says that it is unfinished; one that was left so is written anew. `suggest` gives
    every parameter its distribution. Raises StudyError when a study of that name is there already, StoreError when the
    database cannot be opened.
    """
    storage = _storage(url)
    _remove_half(storage, study.name, url)
    maximised = [name in pareto.MAXIMIZED or name.startswith("-") for name in study.objectives]
    directions = [StudyDirection.MAXIMIZE if up else StudyDirection.MINIMIZE for up in maximised]
    try:
        theirs = optuna.create_study(storage=storage, study_name=study.name, directions=directions)
    except optuna.exceptions.DuplicatedStudyError as error:
        raise _is_whole(study.name, url) from error
    row = asdict(study) | {"created": study.created.isoformat(), "settings": study.settings.as_json()}
    theirs.set_user_attr(OURS, row | _being_written())
    try:
        count = _write_trials(theirs, store, study, suggest, say)
    except BaseException:
        optuna.delete_study(study_name=study.name, storage=storage)
        raise
    theirs.set_user_attr(OURS, row)
    return count


def _write_trials(
    theirs: optuna.Study, store: Reader, study: StudyRow, suggest: Suggest, say: Callable[[str], None]
) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        theirs.set_metric_names([name.removeprefix("-") for name in study.objectives])
    curves: dict[int, list[Report]] = {}
    for report in store.reports(study):
        curves.setdefault(report.trial, []).append(report)
    trials = store.trials(study)
    limit = study.settings.settings.get(LATENCY)
    for count, trial in enumerate(trials, start=1):
        attrs = dict(trial.sampler_attrs)
        if limit is not None and trial.state in FINISHED:
            attrs[f"{CONSTRAINTS}:latency_ms"] = latency_excess(trial, float(limit))
        theirs.add_trial(_freeze(study, trial, curves.get(trial.number, []), suggest, attrs))
        if count % PROGRESS_EVERY == 0:
            theirs.set_user_attr(OURS, theirs.user_attrs[OURS] | _being_written())
            say(f"{count} of {len(trials)} trials")
    return len(trials)


def _being_written() -> dict[str, Any]:
    """The mark of a study that is not whole yet: who writes it, and that it lived at this moment."""
    return {UNFINISHED: this_process() | {"heartbeat": datetime.now(UTC).isoformat()}}


def _remove_half(storage: RDBStorage, name: str, url: str) -> None:
    """Deletes what an export that was killed left under this name. Raises StudyError for any other study."""
    if name not in optuna.get_all_study_names(storage):
        return
    theirs = optuna.load_study(storage=storage, study_name=name)
    writer = _writer_of(theirs)
    if writer is None:
        if theirs.user_attrs or theirs.get_trials(deepcopy=False):  # else it was killed before its first word
            raise _is_whole(name, url)
    elif {**writer, **this_process(), "uptime": None} != {**writer, "uptime": None}:  # not this process
        try:
            seen = datetime.fromisoformat(writer["heartbeat"])
            lives = is_alive({**writer, "heartbeat": seen}, datetime.now(UTC), HEARTBEAT_LAPSE)
        except (KeyError, TypeError, ValueError, OverflowError) as error:  # nobody of ours wrote that
            raise _is_whole(name, url) from error
        if lives:
            raise StudyError(f"study {name!r} is being written to {shown(url)} right now: wait for it")
    optuna.delete_study(study_name=name, storage=storage)


def _writer_of(theirs: optuna.Study) -> dict[str, Any] | None:
    """Who writes, or wrote, a study that is not whole; None for any other."""
    kept = theirs.user_attrs.get(OURS)
    writer = kept.get(UNFINISHED) if isinstance(kept, Mapping) else None
    return writer if isinstance(writer, dict) else None


def _is_whole(name: str, url: str) -> StudyError:
    return StudyError(f"study {name!r} is in {shown(url)} already: name another database")


def _freeze(
    study: StudyRow, trial: Trial, curve: Sequence[Report], suggest: Suggest, attrs: Mapping[str, Any]
) -> FrozenTrial:
    recorder = _Recorder(trial.params)
    if trial.params:
        suggest(recorder)
    values = None
    if trial.state == State.COMPLETE:
        values = [-trial.values[n] if n.startswith("-") else trial.values[n] for n in study.objectives]
    made = create_trial(
        state=STATES[trial.state],
        values=values,
        params=dict(trial.params),
        distributions=recorder.distributions,
        user_attrs={
            "arch": dict(trial.arch),
            **{name: value for name, value in trial.values.items() if name not in study.objectives},
            OURS: _plain(trial) | {"curve": [asdict(report) for report in curve]},
        },
        system_attrs=_both_forms(attrs),
        intermediate_values={report.rung: report.loss for report in curve},
    )
    if trial.state != State.WAITING:
        made.datetime_start = _naive(trial.started or trial.created)
    if trial.finished is not None:
        made.datetime_complete = _naive(trial.finished)
    return made


def _plain(trial: Trial) -> dict[str, Any]:
    """A trial's row as JSON."""
    times = {name: at.isoformat() for name in ("created", "started", "finished") if (at := getattr(trial, name))}
    return asdict(trial) | {"created": None, "started": None, "finished": None} | times


def _both_forms(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Constraints as Optuna 5 writes them (a key each) and as Optuna 4 and optuna-dashboard 0.21 read them (a list)."""
    out = dict(attrs)
    named = {key: value for key, value in attrs.items() if key.startswith(f"{CONSTRAINTS}:")}
    if named and CONSTRAINTS not in out:
        out[CONSTRAINTS] = list(named.values())
    elif not named and CONSTRAINTS in out:
        out |= {f"{CONSTRAINTS}:{i}": value for i, value in enumerate(out[CONSTRAINTS])}
    return out


def import_study(
    store: Store, url: str, name: str | None, say: Callable[[str], None] = lambda line: None
) -> tuple[StudyRow, int]:
    """Reads one study of Optuna's database at `url` into the store; its row, and the number of its trials.

    `name` may be left out where the database holds one. A trial that was RUNNING waits for a worker again. `say` takes
    a line for whatever is not as it was. Raises StudyError when there is no such study or the store has one of that
    name, StoreError for a bad database.
    """
    theirs = _study(url, name)
    with _reading(url):
        told, kept = theirs.get_trials(deepcopy=False), theirs.user_attrs.get(OURS)
        names, directions = theirs.metric_names, theirs.directions
    study, maximised = theirs.study_name, [direction == StudyDirection.MAXIMIZE for direction in directions]
    if any(row["name"] == study for row in store.studies()):
        raise _is_there(store, study)
    _check_foreign(study, told)
    if kept:
        described, trials = _restore_study(url, kept, told)
    else:
        described, trials = _foreign(study, _objectives(study, names, maximised), maximised, told, say)
    try:
        return store.create_study(**described, trials=trials), len(trials)
    except StudyExistsError as error:  # since we looked
        raise _is_there(store, study) from error


def _is_there(store: Store, name: str) -> StudyError:
    return StudyError(f"study {name!r} is in {store.shown} already: delete it there, or import into another store")


def best_params(url: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    """Number and parameters of the best trials of a study in Optuna's database at `url`. Raises as `import_study`."""
    theirs = _study(url, name)
    with _reading(url):
        return [(trial.number, dict(trial.params)) for trial in theirs.best_trials]


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """Whatever Optuna raises where a database is damaged, or was edited, is one StoreError."""
    try:
        yield
    except Exception as error:  # of SQLAlchemy, json and Optuna itself, which takes every row at its word
        said = shorten(f"{type(error).__name__}: {error}".splitlines()[0], 200)
        raise StoreError(f"{shown(url)}: Optuna cannot read it ({said}): use a copy") from error


def _check_foreign(name: str, told: Sequence[FrozenTrial]) -> None:
    """Raises StudyError for a name or numbers that a store cannot keep."""
    if len(name) > LONGEST_NAME:
        raise StudyError(f"the study's name has {len(name)} characters: wanted at most {LONGEST_NAME}")
    if numbers := [frozen.number for frozen in told if not 0 <= frozen.number < len(told)]:
        raise StudyError(f"study {name!r} numbers its trials up to {max(numbers)}, and has {len(told)}: use a copy")


def _study(url: str, name: str | None) -> optuna.Study:
    """The study of that name, or the only one there is. Raises StudyError and StoreError."""
    storage = _storage(url, there=True)
    with _reading(url):
        names = optuna.get_all_study_names(storage)
    if name is None and len(names) != 1:
        raise StudyError(f"{shown(url)} holds {', '.join(names) or 'no studies'}: name one")
    if name is not None and name not in names:
        raise StudyError(f"no study {name!r} in {shown(url)}; it has: {', '.join(names) or 'none'}")
    with _reading(url):
        theirs = optuna.load_study(storage=storage, study_name=name or names[0])
        unfinished = _writer_of(theirs) is not None
    if unfinished:
        raise StudyError(
            f"study {theirs.study_name!r} in {shown(url)} is not whole: its export is at work or was interrupted; nas "
            "study export again writes it anew"
        )
    return theirs


def _restore_study(
    url: str, kept: Any, told: Sequence[FrozenTrial]
) -> tuple[dict[str, Any], list[tuple[Trial, str, list[Report]]]]:
    """A study that was ours before, as its attribute `kept` describes it. Raises StoreError where that was edited."""
    try:
        check_type("study", kept, Mapping[str, Any])
        now = {"id": 0, "created": datetime.now(UTC)}
        space = {"space": kept["space"]["name"], "space_settings": kept["space"]["settings"]}
        row = study_of_row({**kept, **now, **space})
        described = {f.name: getattr(row, f.name) for f in fields(row) if f.name not in now}
        trials = [_restore_trial(frozen, row.objectives) for frozen in told]
        numbers = {trial.number for trial, _, _ in trials}
        if len(numbers) < len(trials) or not all(0 <= number < MAX_COUNT for number in numbers):
            raise ValueError(f"{len(trials)} trials have the numbers {shorten(str(sorted(numbers)))}")
        return described, trials
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        said = f"nothing of {error}" if isinstance(error, KeyError) else shorten(str(error), 200)
        raise StoreError(f"{shown(url)} holds what hypernas did not write: {said}; use a copy") from error


def _restore_trial(frozen: FrozenTrial, objectives: Sequence[str]) -> tuple[Trial, str, list[Report]]:
    kept = dict(frozen.user_attrs[OURS])
    curve = [make_record(Report, report) for report in kept.pop("curve")]
    failure = kept.pop("failure") or {}
    times = {name: kept[name] and datetime.fromisoformat(kept[name]) for name in ("created", "started", "finished")}
    state = State.WAITING if kept["state"] == State.RUNNING else kept["state"]
    row = kept | times | {"state": state, "driver_id": None}
    row |= {f"failure_{name}": failure.get(name) for name in ("kind", "message", "traceback")}
    trial = trial_of_row(row, kept["values"], objectives)
    if trial.state in FINISHED and trial.finished is None:
        raise ValueError(f"trial {trial.number} is {trial.state} and was never finished")
    return trial, digest({"arch": trial.arch_hash, **asdict(trial.recipe)}), curve


def _foreign(
    name: str,
    objectives: Sequence[str],
    maximised: Sequence[bool],
    told: Sequence[FrozenTrial],
    say: Callable[[str], None],
) -> tuple[dict[str, Any], list[tuple[Trial, str, list[Report]]]]:
    """A study of Optuna's own: to be looked at, not to be searched on. A maximised value is kept as a cost, negated."""
    kept_as = zip(objectives, maximised, strict=True)
    signs = {name: -1.0 if up and name not in pareto.MAXIMIZED else 1.0 for name, up in kept_as}
    trials = [_foreign_trial(frozen, signs) for frozen in told]
    if dropped := sum(len(frozen.intermediate_values) for frozen in told) - sum(len(curve) for _, _, curve in trials):
        say(f"left out {dropped} reports that are no finite numbers (NaN or infinite)")
    if failed := sum(
        trial.failure is not None and trial.failure.kind == FailureKind.DIVERGED for trial, _, _ in trials
    ):
        say(f"{failed} trials count as failed, as their values are no finite numbers")
    points = [pareto.costs(objectives, trial.values) for trial, _, _ in trials if trial.state == State.COMPLETE]
    described = {
        "name": name,
        "space": SpaceSpec(OF_OPTUNA),
        "objectives": list(objectives),
        "settings": StudySettings.of({"trials": len(trials), "task": "text", "imported": True}),
        "reference": {n: max((p[i] for p in points), default=0.0) for i, n in enumerate(objectives)},
        "data_name": "unknown",
        "data_hash": "",
    }
    return described, trials


def _objectives(study: str, names: Any, maximised: Sequence[bool]) -> list[str]:
    """A name for each objective: different ones, and none that readers have for something else. Raises StudyError."""
    given = names or [""] * len(maximised)
    if not isinstance(given, list) or [type(name) for name in given] != [str] * len(maximised):
        raise StudyError(f"study {study!r} has the metric names {names!r}: wanted {len(maximised)}")
    found: list[str] = []
    for place, (name, up) in enumerate(zip(given, maximised, strict=True)):
        if name in pareto.MAXIMIZED and not up:
            raise StudyError(f"study {study!r} minimises {name}, which is maximised here")
        own = f"value_{place}" if not name.strip() else f"{name}_value" if name in TAKEN else name
        if name.strip() and name in given[:place]:
            own += f"_{place}"
        own = f"-{own}" if up and own not in pareto.MAXIMIZED else own
        found.append(f"{own}_{place}" if own in found else own)
    return found


def _foreign_trial(frozen: FrozenTrial, signs: Mapping[str, float]) -> tuple[Trial, str, list[Report]]:
    """A trial of Optuna's own; `signs` by objective are -1 where a value is kept negated."""
    state = FROM_OPTUNA[frozen.state]
    told = list(frozen.values or ()) if state == State.COMPLETE else []
    failure = Failure(FailureKind.ERROR, "it failed in Optuna") if state == State.FAILED else None
    if state == State.COMPLETE and not (len(told) == len(signs) and all(map(isfinite, told))):
        state, failure = State.FAILED, Failure(FailureKind.DIVERGED, f"Optuna was told {told}: no finite numbers")
        told = []
    started, finished = (_aware(frozen.datetime_start), _aware(frozen.datetime_complete))
    created = started or datetime.now(UTC)
    params = _plain_json(frozen.params)
    trial = Trial(
        number=frozen.number,
        state=State.WAITING if state == State.RUNNING else state,
        params=params,
        arch=params,
        arch_hash=digest(params),
        recipe=Recipe(learning_rate=0.0, tokens=0, batch_tokens=0),
        origin=IMPORTED,
        sampler_attrs=_plain_json(_both_forms(frozen.system_attrs)),
        token=1,
        attempts=1,
        values={name: sign * value for (name, sign), value in zip(signs.items(), told, strict=bool(told))},
        parameters=None,
        driver=None,
        worker=None,
        created=created,
        started=started,
        finished=(finished or created) if state in FINISHED else None,
        train_seconds=frozen.duration.total_seconds() if frozen.duration else None,
        evaluate_seconds=None,
        provenance={},
        diagnostics={"user_attrs": _plain_json(frozen.user_attrs)} if frozen.user_attrs else {},
        failure=failure,
        seq=0,
    )
    reported = [(step, value) for step, value in sorted(frozen.intermediate_values.items()) if isfinite(value)]
    curve = [Report(frozen.number, rung, step, 0, 0.0, value, 0.0) for rung, (step, value) in enumerate(reported)]
    return trial, digest({"number": frozen.number}), curve


def _plain_json(value: Any) -> Any:
    """What every database takes as JSON: a number that is not finite becomes its name."""
    if isinstance(value, Mapping):
        return {name: _plain_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_json(part) for part in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _check_file(path: str, url: str) -> None:
    """Raises StoreError for a file that is not there, is none, or holds tables that run something."""
    if not Path(path).exists():
        raise StoreError(f"{url}: there is no such file")
    if not Path(path).is_file():
        raise StoreError(f"{url}: this is no regular file (a folder, pipe, socket or device): name another")
    try:
        with closing(sqlite3.connect(Path(path).resolve().as_uri() + "?mode=ro", uri=True)) as connection:
            check_tables(connection.execute, url, TABLES)
    except sqlite3.Error as error:
        raise StoreError(f"{url}: Optuna cannot open it: {error}") from error


def _storage(url: str, *, there: bool = False) -> RDBStorage:
    """Optuna's storage at a URL or in a file. With `there` it is read, and nothing is created in it or beside it.

    Raises StoreError.
    """
    full = url if is_url(url) else url_of(url)
    if there and (path := file_of(url)) is not None:
        _check_file(path, url)
    how = {}
    for prefix in ("postgresql://", "postgres://"):  # the driver of PostgreSQL that is installed
        if full.startswith(prefix):
            full = "postgresql+psycopg://" + full.removeprefix(prefix)
            how = {"connect_args": POOLED}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return RDBStorage(full, how, skip_table_creation=there)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise StoreError(f"{shown(url)}: Optuna cannot open it: {reason}") from error


def _naive(at: datetime) -> datetime:
    """As Optuna keeps times: local, without a zone."""
    return at.astimezone().replace(tzinfo=None)


def _aware(at: datetime | None) -> datetime | None:
    return None if at is None else at.astimezone(UTC)
