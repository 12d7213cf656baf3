"""A study being searched: opened or resumed in the store, its proposals made and its results told.

The store holds the truth; the study's mind (strategy/proposals.py) is told of it again on every start. A proposal
becomes a row only when a worker takes it, and an architecture that was trained before, with the same training settings,
is never trained again.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from uuid import uuid4

from hypernas import pareto
from hypernas.config.keys import MEASURED
from hypernas.config.plan import (
    Plan,
    check_evaluation,
    check_memory,
    make_plan,
    resolve_data_path,
    training_bytes,
    with_data,
)
from hypernas.config.study_config import Scope, StudyConfig, names_of, to_json, without_own_code
from hypernas.data.tasks import TASKS
from hypernas.engines.make import make_executor
from hypernas.engines.protocol import Executor
from hypernas.errors import StudyError, StudyExistsError
from hypernas.records import (
    EVALUATIONS,
    OWN,
    RUNGS,
    Inheritance,
    Job,
    Proposal,
    Recipe,
    Report,
    Result,
    Seen,
    SpaceSpec,
    State,
    StudyRow,
    StudySettings,
    Trial,
)
from hypernas.search_spaces.base import Cost, arch_to_json
from hypernas.store import Reader, Store
from hypernas.store.folders import checkpoints_folder
from hypernas.store.weights import find_weights
from hypernas.strategy.halving import stops_early
from hypernas.strategy.proposals import Proposals
from hypernas.strategy.samplers import choose_sampler
from hypernas.training.checkpoint_files import checkpoint_path
from hypernas.training.device import worker_device
from hypernas.training.inherit import INHERITED, PARENT
from hypernas.training.measure import measure_reference
from hypernas.training.model import check_data_path
from hypernas.yardstick import Yardstick

PAGE = 1000  # trials that are read at once


class Search:
    """The study's mind and its memory: what to train next, and what came of it."""

    def __init__(
        self, store: Store, row: StudyRow, config: StudyConfig, plan: Plan, evaluate: str | None = None
    ) -> None:
        self.evaluate = evaluate or row.settings.evaluate
        self.store, self.row, self.config, self.plan = store, row, config, plan
        self.checkpoints = str(checkpoints_folder(store, row, config.checkpoints))
        self.exhausted = False
        self.halving = stops_early(config.halving, plan.trials)
        # Only evolution's proposals have a parent.
        sampler = "evolution" if config.inherit else choose_sampler(config.sampler, self.halving)
        self.proposals = make_proposals(row, plan, sampler, session=uuid4().hex[:8])
        self._ready: deque[Proposal] = deque()
        self._seq = 0
        self._waiting: set[int] = set()  # trials that were handed back
        self._next = 0  # the number the next proposal is expected to get
        self._read_all()

    @property
    def asked(self) -> int:
        return self.plan.trials

    def _read_all(self) -> None:
        """Takes in the whole study, a page at a time: all trials of a long one at once would not fit into memory.

        What others change meanwhile comes with the next look.
        """
        count, seq = self.store.counters(self.row)
        for first in range(0, count, PAGE):
            page = range(first, first + PAGE)
            trials = [trial for trial in self.store.trials(self.row, within=page) if trial.seq <= seq]
            self._take_in(trials, self.store.reports(self.row, within=page))
        self._seq = seq

    def refresh(self) -> None:
        """Takes in what changed in the store since the last look: our own results, and other drivers'."""
        changed = self.store.trials(self.row, after=self._seq)
        self._take_in(changed, self.store.reports(self.row, after=self._seq))
        self._seq = max((trial.seq for trial in changed), default=self._seq)

    def _take_in(self, changed: Iterable[Trial], reports: Iterable[Report]) -> None:
        curves = by_trial(reports)
        for trial in changed:
            self._next = max(self._next, trial.number + 1)
            (self._waiting.add if trial.state == State.WAITING else self._waiting.discard)(trial.number)
            self.proposals.observe(trial, curves.get(trial.number, ()))

    def _advance(self, seq: int | None) -> bool:
        """Skips a change of ours, `seq`, if it is the only one since the last look; False if it is not."""
        if seq != self._seq + 1:
            return False
        self._seq = seq
        return True

    def _observe(self, trial: Trial, curve: Sequence[Report], seq: int | None) -> None:
        """Takes in a change of ours, stored as `seq`, and what other drivers changed before it."""
        if self._advance(seq):
            self.proposals.observe(trial, curve)
        else:
            self.refresh()

    def observe_report(self, trial: Trial, report: Report, seq: int) -> bool:
        """Takes in a report of ours; whether the trial goes on after it, or is stopped there."""
        self._observe(trial, [report], seq)
        last = report.rung == len(RUNGS) - 1
        if last or not self.halving:
            return True
        return self.proposals.should_continue(report.trial, report.rung)

    def observe_stop(self, trial: Trial, report: Report, seq: int | None) -> None:
        """Takes in that the trial was stopped at the report's rung."""
        self._observe(replace(trial, state=State.STOPPED), [report], seq)

    def observe_end(self, trial: Trial, result: Result, seq: int | None) -> None:
        """Takes in a result of ours."""
        state = State.FAILED if result.failure else State.COMPLETE
        ended = replace(trial, state=state, values=result.values, diagnostics=result.diagnostics)
        self._observe(replace(ended, failure=result.failure), (), seq)

    def prefetch(self, count: int) -> None:
        """Makes proposals until `count` are ready, so that no worker waits for the sampler."""
        while len(self._ready) < count and not self.exhausted:
            proposal = self.proposals.take_given() or self.proposals.draw(self._next + len(self._ready))
            if proposal is None:
                self.exhausted = True
            else:
                self._ready.append(proposal)

    def lease(self, driver: int) -> Trial | None:
        """The next trial to run: one that waits in the store, else a new one; None when there is nothing to do."""
        trial = None
        while trial is None and self._waiting:
            trial = self.store.lease_waiting(self.row, driver)
            self.refresh()  # others may have taken them
        while trial is None:
            if self._next >= self.plan.trials:  # every number is given out
                return None
            self.prefetch(1)
            if not self._ready:
                return None
            proposal = self._ready.popleft()
            trial = self.store.lease_new(self.row, driver, proposal, self.plan.trials)
            if trial is not None:
                self.proposals.assign(trial.number, proposal)
                self._advance(trial.seq)
                break
            self.refresh()
            if self._next >= self.plan.trials:
                self._ready.appendleft(proposal)
                return None
            self.proposals.withdraw_duplicate(proposal)
        self._next = max(self._next, trial.number + 1)
        return trial

    def job(self, trial: Trial) -> Job:
        path = checkpoint_path(self.checkpoints, trial.number)
        # A limit is the search's own: whoever trains the row again wants its numbers, not to weigh them once more.
        check_evaluation(self.row.name, self.row.settings.evaluate, self.evaluate)
        job = make_job(self.store, self.row, trial)
        return replace(job, checkpoint=path, max_latency_ms=self.plan.latency, evaluate=self.evaluate)


def make_proposals(row: StudyRow, plan: Plan, sampler: str, session: str) -> Proposals:
    """The mind of a study that was told nothing yet, but for what is trained before its sampler is asked."""
    given = plan.first()
    for arch, recipe in row.settings.enqueued:
        given.append((plan.space.from_json(arch), Recipe(**recipe), "enqueued"))
    return Proposals(
        plan,
        sampler,
        row.settings.seed,
        reference=[row.reference[name] for name in row.objectives],
        given=given,
        session=session,
        inherit=row.settings.inherit,
        yardstick=Yardstick.of(row.settings.yardstick) if row.settings.yardstick else None,
    )


def by_trial(reports: Iterable[Report]) -> dict[int, list[Report]]:
    curves: dict[int, list[Report]] = {}
    for report in reports:
        curves.setdefault(report.trial, []).append(report)
    return curves


def make_job(store: Reader, row: StudyRow, trial: Trial) -> Job:
    """Everything a worker needs to train the trial, from its row and its study's alone; and its parent's, where it
    starts from that one's weights."""
    return Job(
        study=row.name,
        trial=trial.number,
        token=trial.token,
        space=row.space,
        arch=trial.arch,
        recipe=trial.recipe,
        data_path=row.settings.data_path,
        data_hash=row.data_hash,
        data_seed=row.settings.seed,
        kernels=row.settings.kernels,
        compile=row.settings.compile,
        device="cpu" if trial.provenance.get("device") == "cpu" else "auto",  # a trained row, as it was trained
        measured=tuple(name for name in row.objectives if name in MEASURED),
        repeats=row.settings.repeats,
        micro_batches=trial.provenance.get("micro_batches", 1),
        yardstick=row.settings.yardstick,
        inherits=_inheritance(store, row, trial),
        evaluate=row.settings.evaluate,
    )


def _inheritance(store: Reader, row: StudyRow, trial: Trial) -> Inheritance | None:
    """What the trial starts from, where its row says that it inherits. Raises StudyError where that cannot be."""
    change, number = trial.sampler_attrs.get(INHERITED), trial.sampler_attrs.get(PARENT)
    if change is None:
        return None
    if not isinstance(change, str) or not isinstance(number, int) or number >= trial.number:
        raise StudyError(f"trial {trial.number} cannot start from trial {number!r}: wanted one that came before it")
    parent = store.trial(row, number)
    weights = find_weights(store, row, parent.number)
    job = replace(make_job(store, row, parent), repeats=1) if weights is None else None
    return Inheritance(parent.number, parent.arch, change, weights, job)


def ran_on(store: Reader, study: str) -> dict[str, Any]:
    """On what the study ran last, by the names of the flags: engine, GPUs a trial, workers. Nothing if it is unknown.

    A study older than that was noted goes on on CPUs if all of it was trained there.
    """
    if all(row["name"] != study for row in store.studies()):
        return {}
    row = store.study(study)
    found = {name: value for name in names_of(Scope.MACHINE) if (value := getattr(row.settings, name)) is not None}
    if "gpus_per_trial" not in found and {device for device, _ in devices_and_precisions(store, row)} == {"cpu"}:
        found["gpus_per_trial"] = 0.0
    return found


def devices_and_precisions(store: Reader, row: StudyRow) -> set[tuple[str, str]]:
    """The kinds of device, cpu or cuda, and the precisions that the study's trials were trained in."""
    return {kind_of(device, precision or _older_precision(device)) for device, precision in store.trained_on(row)}


def _older_precision(device: str) -> str:
    """Of a row that was written before rows said so: a CPU computed in float32 alone then."""
    return "float32" if device == "cpu" else "bfloat16 products: cuda"


def kind_of(device: str, precision: str) -> tuple[str, str]:
    """Of a device by the name that rows have of it: cpu or cuda; and the precision."""
    return "cpu" if device == "cpu" else "cuda", precision


def check_device(row: StudyRow, before: Collection[tuple[str, str]], seen: Iterable[Seen]) -> None:
    """Raises StudyError when a worker would train in none of the ways that the study's trials `before` were."""
    for found in seen:
        kind = kind_of(found.device, found.precision)
        if before and kind not in before:
            was = " and ".join(" in ".join(some) for some in sorted(before))
            raise StudyError(
                f"study {row.name!r} was trained on {was}, and here it would be on {' in '.join(kind)}: numbers would "
                "differ for that alone; --other-device goes on all the same, or go on where it was"
            )


def executor_of(config: StudyConfig, evaluate: str = "training") -> Executor:
    """What runs a study's trials, each of them an `evaluate`. Raises UserError as `make_executor` does."""
    return make_executor(
        config.engine,
        config.workers,
        address=config.address,
        gpus_per_trial=config.gpus_per_trial,
        timeout=config.trial_timeout,
        evaluate=evaluate,
    )


def check_resumed(store: Reader, config: StudyConfig, executor: Executor) -> None:
    """`check_device` for the workers there are, if there is such a study: before a word of it is changed."""
    if not config.other_device and any(row["name"] == config.study for row in store.studies()):
        row = store.study(config.study)
        check_device(row, devices_and_precisions(store, row), executor.seen)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A configuration that was checked against its space and its data, before any store is touched."""

    config: StudyConfig
    plan: Plan
    data_name: str
    data_hash: str
    scaling: Mapping[str, list[float]]  # how inputs are normalised
    worst: Mapping[str, float]  # scores of a model that learned nothing
    read: str = ""  # which data was read, and what was left out of it, in a line


def prepare(config: StudyConfig, plan: Plan | None = None) -> Prepared:
    """The configuration checked against its data, and its plan made unless the caller has it.

    Raises UserError (of the flags or the data) and SpaceError; writes nothing but the cache of prepared text.
    """
    plan = plan or make_plan(config)
    task = TASKS[plan.space.task]
    if config.resume:
        check_data_path(plan.data_path)
    data = task.load(plan.data_path)
    plan = with_data(plan, task.settings(data))
    for arch in (plan.space.baseline(), plan.space.largest()):
        task.batch(data, arch, config.seed, 0, 1)
        next(task.validation(data, arch, plan.recipe, 1))
    read = data.reading.describe(data.name)
    return Prepared(config, plan, data.name, data.hash, task.scaling(data), task.worst(data), read)


def open_search(
    store: Store,
    prepared: Prepared,
    evaluate: str = "training",
    enqueued: Sequence[tuple[Any, Recipe]] = (),
    yardstick: Yardstick | None = None,
) -> Search:
    """Creates the study, or continues it when `config.resume`. Raises StudyError.

    `evaluate` is one of EVALUATIONS or module:function; of the latter a study keeps no name, so it is given again.
    `enqueued`, architectures and how to train them, come before what the sampler draws from now on. `yardstick` is
    what a new study with the objective `ceg` measures its trials with.
    """
    space = prepared.plan.space
    row = open_study(store, prepared, space.cost(space.largest()), evaluate, yardstick)
    if enqueued:
        waiting = [[arch_to_json(arch), asdict(recipe)] for arch, recipe in enqueued]
        row = replace(row, settings=replace(row.settings, enqueued=[*row.settings.enqueued, *waiting]))
        store.update_settings(row, row.settings)
    own = row.settings.evaluate == OWN and evaluate not in EVALUATIONS
    return Search(store, row, prepared.config, prepared.plan, evaluate if own else None)


def open_study(
    store: Store,
    prepared: Prepared,
    largest: Cost,
    evaluate: str = "training",
    yardstick: Yardstick | None = None,
) -> StudyRow:
    """The study, new or, when `config.resume`, as stored; `largest` bounds the hypervolume. Raises StudyError."""
    config, plan = prepared.config, prepared.plan
    if config.resume and any(study["name"] == config.study for study in store.studies()):
        return _resume_study(store, prepared)
    if "ceg" in plan.objectives and yardstick is None:
        raise StudyError(
            f"study {config.study!r} has the objective ceg, and no law of its baseline to measure gains with: "
            "nas search measures one first; start it there"
        )
    try:
        row = store.create_study(
            config.study,
            space=plan.space_spec,
            objectives=plan.objectives,
            settings=StudySettings.of(
                to_json(config)
                | {
                    "trials": plan.trials,
                    "data_path": plan.data_path,
                    "evaluate": evaluate if evaluate in EVALUATIONS else OWN,
                }
                | {"task": plan.space.task, "scaling": dict(prepared.scaling)}
                | ({"yardstick": asdict(yardstick)} if yardstick else {})
            ),
            reference=reference_point(prepared, largest),
            data_name=prepared.data_name,
            data_hash=prepared.data_hash,
        )
    except StudyExistsError:  # another driver was a moment faster
        if not config.resume:
            raise
        return _resume_study(store, prepared)
    return replace(row, space=plan.space_spec)


def _resume_study(store: Store, prepared: Prepared) -> StudyRow:
    """The study as stored, with what this search changes of it. Raises StudyError where it is another one."""
    config, plan = prepared.config, prepared.plan
    row = store.study(config.study)
    _check_same(row, plan.space_spec, prepared.data_hash, prepared.data_name)
    # The same data may lie elsewhere by now.
    before = without_own_code(row.settings.as_json())
    settings = StudySettings.of(before | to_json(config) | {"trials": plan.trials, "data_path": plan.data_path})
    store.update_settings(row, settings)
    store.retry_lost(row)
    return replace(row, settings=settings, space=plan.space_spec)


def reference_point(prepared: Prepared, largest: Cost) -> dict[str, float]:
    """Of each objective, the cost of a model that learned nothing, or of the `largest` there is."""
    config, plan = prepared.config, prepared.plan
    measured = [name for name in plan.objectives if name in MEASURED]
    if measured:
        needs = training_bytes(plan.space, plan.space.largest())
        check_memory(
            needs, plan.memory, f"{', '.join(measured)} is compared with that of the largest architecture, which"
        )
    worst = {
        **prepared.worst,
        "ceg": 0.0,
        "parameters": float(largest.parameters_total),
        f"flops_per_{TASKS[plan.space.task].unit}": float(largest.flops_total),
        **measure_reference(
            measured,
            plan.space,
            plan.space.largest(),
            plan.recipe,
            plan.data_path,
            device=worker_device("auto" if config.gpus_per_trial else "cpu"),
            kernels=config.kernels,
            compile=config.compile,
        ),
    }
    return {name: pareto.cost(name, worst[name]) for name in plan.objectives}


def _check_same(row: StudyRow, space: SpaceSpec, data_hash: str, data_name: str) -> None:
    if (row.space.name, dict(row.space.settings)) != (space.name, dict(space.settings)):
        raise StudyError(f"study {row.name!r} searches space {row.space.name}; it cannot be resumed with {space.name}")
    _check_data(row, data_hash, data_name)


def _check_data(row: StudyRow, data_hash: str, data_name: str) -> None:
    if row.data_hash != data_hash:
        raise StudyError(
            f"study {row.name!r} was trained on {row.data_name} with hash {row.data_hash[:12]}, and {data_name} here "
            f"has {data_hash[:12]}: losses would not compare; say where the same data lies with --set data.path=, or "
            "start another study"
        )


def with_data_at(row: StudyRow, path: str | None) -> StudyRow:
    """The study with its data at `path`, or where it lay last when that is None.

    Data is known by its hash. Raises DataError for a path that cannot be read, StudyError where other data lies.
    """
    if path is None:
        return row
    path = resolve_data_path(path)
    data = TASKS[row.settings.task].load(path)
    _check_data(row, data.hash, data.name)
    return replace(row, settings=replace(row.settings, data_path=path))
