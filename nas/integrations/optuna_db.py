"""Studies in Optuna's own database schema, both ways: stock Optuna and optuna-dashboard open what is exported.

Objectives keep their names, values their units (FLOPs are FLOPs, not logarithms) and accuracy is maximised. What Optuna
has no place for travels in user attributes, so that a study comes back as it went. Studies that Optuna made itself are
imported to be looked at: parameters, values, states, curves and constraints.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
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
from hypernas.errors import StoreError, StudyError, shown
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
)
from hypernas.search_spaces import OF_OPTUNA
from hypernas.search_spaces.base import digest
from hypernas.store import Reader, Store
from hypernas.store.connection import POOLED
from hypernas.store.files import file_of, is_url, url_of
from hypernas.strategy.optuna_study import _Recorder
from hypernas.strategy.proposals import latency_excess

OURS = "hypernas"  # the user attribute that holds what Optuna has no place for
CONSTRAINTS = "constraints"
STATES = {
    State.WAITING: TrialState.WAITING,
    State.RUNNING: TrialState.RUNNING,
    State.COMPLETE: TrialState.COMPLETE,
    State.STOPPED: TrialState.PRUNED,
    State.FAILED: TrialState.FAIL,
}
FROM_OPTUNA = {theirs: ours for ours, theirs in STATES.items()}
PROGRESS_EVERY = 100
LONGEST_NAME = 200  # characters, of a study
# What readers have names for already: an objective of Optuna's that is called so gets an ending.
TAKEN = {f.name for kind in (Trial, Report, Recipe) for f in fields(kind) if f.name != "loss"}
TAKEN |= {"architecture", "by_seed", "failure", "message", "on_front", "violation"}

Suggest = Callable[[Any], Any]  # draws one proposal from anything with Optuna's three methods


def export_study(store: Reader, study: StudyRow, url: str, suggest: Suggest, say: Callable[[str], None]) -> int:
    """Writes the study, under its name, into Optuna's database at `url`; the number of trials.

    `suggest` gives every parameter its distribution. Raises StudyError when a study of that name is there already,
    StoreError when the database cannot be opened.
    """
    storage = _storage(url)
    maximised = [name in pareto.MAXIMIZED or name.startswith("-") for name in study.objectives]
    directions = [StudyDirection.MAXIMIZE if up else StudyDirection.MINIMIZE for up in maximised]
    try:
        theirs = optuna.create_study(storage=storage, study_name=study.name, directions=directions)
    except optuna.exceptions.DuplicatedStudyError as error:
        raise StudyError(f"study {study.name!r} is in {shown(url)} already: name another database") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        theirs.set_metric_names([name.removeprefix("-") for name in study.objectives])
    row = asdict(study) | {"created": study.created.isoformat(), "settings": study.settings.as_json()}
    theirs.set_user_attr(OURS, row)
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
            say(f"{count} of {len(trials)} trials")
    return len(trials)


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
    if any(study["name"] == theirs.study_name for study in store.studies()):
        raise StudyError(
            f"study {theirs.study_name!r} is in {store.shown} already: delete it there, or import into another store"
        )
    described, trials = _restore_study(theirs) if theirs.user_attrs.get(OURS) else _foreign(theirs, say)
    row = store.create_study(**described)
    store.fill(row, trials)
    return row, len(trials)


def best_params(url: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    """Number and parameters of the best trials of a study in Optuna's database at `url`. Raises as `import_study`."""
    return [(trial.number, dict(trial.params)) for trial in _study(url, name).best_trials]


def _study(url: str, name: str | None) -> optuna.Study:
    """The study of that name, or the only one there is. Raises StudyError and StoreError."""
    storage = _storage(url, there=True)
    names = optuna.get_all_study_names(storage)
    if name is None and len(names) != 1:
        raise StudyError(f"{shown(url)} holds {', '.join(names) or 'no studies'}: name one")
    if name is not None and name not in names:
        raise StudyError(f"no study {name!r} in {shown(url)}; it has: {', '.join(names) or 'none'}")
    return optuna.load_study(storage=storage, study_name=name or names[0])


def _restore_study(theirs: optuna.Study) -> tuple[dict[str, Any], list[tuple[Trial, str, list[Report]]]]:
    """A study that was ours before."""
    kept = theirs.user_attrs[OURS]
    described = {name: kept[name] for name in ("name", "objectives", "reference", "data_name", "data_hash")}
    space = SpaceSpec(kept["space"]["name"], kept["space"]["settings"])
    described |= {"space": space, "settings": StudySettings.of(kept["settings"])}
    return described, [_restore_trial(frozen) for frozen in theirs.get_trials(deepcopy=False)]


def _restore_trial(frozen: FrozenTrial) -> tuple[Trial, str, list[Report]]:
    kept = dict(frozen.user_attrs[OURS])
    curve = [Report(**report) for report in kept.pop("curve")]
    for name in ("created", "started", "finished"):
        kept[name] = datetime.fromisoformat(kept[name]) if kept[name] else None
    failure = kept["failure"] and Failure(**kept["failure"] | {"kind": FailureKind(kept["failure"]["kind"])})
    state = State.WAITING if kept["state"] == State.RUNNING else State(kept["state"])
    recipe = Recipe(**kept["recipe"])
    trial = Trial(**kept | {"state": state, "recipe": recipe, "failure": failure, "driver": None})
    return trial, digest({"arch": trial.arch_hash, **asdict(recipe)}), curve


def _foreign(
    theirs: optuna.Study, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[tuple[Trial, str, list[Report]]]]:
    """A study of Optuna's own: to be looked at, not to be searched on. A maximised value is kept as a cost, negated."""
    if len(theirs.study_name) > LONGEST_NAME:
        raise StudyError(f"the study's name has {len(theirs.study_name)} characters: wanted at most {LONGEST_NAME}")
    maximised = [direction == StudyDirection.MAXIMIZE for direction in theirs.directions]
    objectives = _objectives(theirs, maximised)
    kept_as = zip(objectives, maximised, strict=True)
    signs = {name: -1.0 if up and name not in pareto.MAXIMIZED else 1.0 for name, up in kept_as}
    told = theirs.get_trials(deepcopy=False)
    trials = [_foreign_trial(frozen, signs) for frozen in told]
    if dropped := sum(len(frozen.intermediate_values) for frozen in told) - sum(len(curve) for _, _, curve in trials):
        say(f"left out {dropped} reports that are no finite numbers (NaN or infinite)")
    if failed := sum(
        trial.failure is not None and trial.failure.kind == FailureKind.DIVERGED for trial, _, _ in trials
    ):
        say(f"{failed} trials count as failed, as their values are no finite numbers")
    points = [pareto.costs(objectives, trial.values) for trial, _, _ in trials if trial.state == State.COMPLETE]
    described = {
        "name": theirs.study_name,
        "space": SpaceSpec(OF_OPTUNA),
        "objectives": objectives,
        "settings": StudySettings.of({"trials": len(trials), "task": "text", "imported": True}),
        "reference": {n: max((p[i] for p in points), default=0.0) for i, n in enumerate(objectives)},
        "data_name": "unknown",
        "data_hash": "",
    }
    return described, trials


def _objectives(theirs: optuna.Study, maximised: Sequence[bool]) -> list[str]:
    """A name for each objective: different ones, and none that readers have for something else."""
    given = theirs.metric_names or [""] * len(maximised)
    found: list[str] = []
    for place, (name, up) in enumerate(zip(given, maximised, strict=True)):
        if name in pareto.MAXIMIZED and not up:
            raise StudyError(f"study {theirs.study_name!r} minimises {name}, which is maximised here")
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
    if not all(map(isfinite, told)):
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


def _storage(url: str, *, there: bool = False) -> RDBStorage:
    """Optuna's storage at a URL or in a file. With `there` it is read, and nothing is created in it or beside it.

    Raises StoreError.
    """
    full = url if is_url(url) else url_of(url)
    if there and (path := file_of(url)) is not None and not Path(path).exists():
        raise StoreError(f"{url}: there is no such file")
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
