"""A study being searched: opened or resumed in the store, its proposals made and its results told.

The store holds the truth; the sampler's study in memory is refilled from it. A proposal becomes a row only when a
worker takes it, and an architecture that was trained before, with the same training settings, is never trained again.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nas import pareto
from nas.checkpoints import checkpoint_path
from nas.config import MEASURED, Plan, StudyConfig, make_plan, to_json, with_data
from nas.errors import StudyError
from nas.optuna_io import Proposer
from nas.records import FINISHED, POLICIES, Job, Policy, Recipe, Result, SpaceSpec, State, StudyRow, Trial
from nas.samplers import population_size
from nas.store import Proposal, Store
from nas.tasks import TASKS
from nas.train import measured_worst
from search_spaces.base import Cost, SpaceError, arch_to_json, digest

MAX_REPEATS = 200  # proposals in a row that were all seen before: the space is as good as exhausted


def config_hash(arch_hash: str, recipe: Recipe) -> str:
    """Names what a trial trains and how, its seed included."""
    return digest({"arch": arch_hash, **asdict(recipe)})


@dataclass(frozen=True, slots=True)
class _Pending:
    """A proposal not yet leased, and the sampler's handle on it (None for a baseline)."""

    proposal: Proposal
    handle: int | None


class Search:
    """The study's mind: what to train next, and what came of it.

    `cache_hits` counts proposals that needed no training, as their outcome was known.
    """

    def __init__(self, store: Store, row: StudyRow, config: StudyConfig, plan: Plan) -> None:
        self.store, self.row, self.config, self.plan = store, row, config, plan
        self.checkpoints = checkpoints_folder(row, config.checkpoints)
        self.cache_hits = 0
        self.exhausted = False
        self._proposer = Proposer(
            config.sampler,
            config.seed,
            population_size(plan.trials),
            objectives=len(row.objectives),
            suggest=plan.suggest,
        )
        self._ready: deque[_Pending] = deque()
        self._handles: dict[int, int] = {}  # trial number -> the sampler's handle
        self._known: dict[str, tuple[float, ...] | None] = {}  # config hash -> costs, None while unknown or failed
        self._seq = 0
        self._waiting: set[int] = set()  # trials that were handed back
        self._next = 0  # the number the next proposal is expected to get
        self.refresh()
        self._baselines = deque(self._baseline_proposals())

    @property
    def asked(self) -> int:
        return self.plan.trials

    # ---- telling ---------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Takes in what changed in the store since the last look: our own results, and other drivers'."""
        for trial in self.store.trials(self.row, after=self._seq):
            self._seq = max(self._seq, trial.seq)
            self._next = max(self._next, trial.number + 1)
            (self._waiting.add if trial.state == State.WAITING else self._waiting.discard)(trial.number)
            outcome = self._costs(trial)
            self._known[config_hash(trial.arch_hash, trial.recipe)] = outcome
            if trial.state in FINISHED:
                self._tell(trial, outcome)

    def saw(self, seq: int | None) -> bool:
        """Whether a change of ours, `seq`, was the first since the last look: then there is nothing to read."""
        if seq != self._seq + 1:
            return False
        self._seq = seq
        return True

    def ended(self, trial: Trial, result: Result, seq: int | None) -> None:
        """Takes in a result of ours, stored as change `seq`, and what other drivers changed before it."""
        if not self.saw(seq):
            self.refresh()
            return
        state = State.FAILED if result.failure else State.COMPLETE
        trial = replace(
            trial,
            state=state,
            values=result.values,
            failure=result.failure,
        )
        outcome = self._costs(trial)
        self._known[config_hash(trial.arch_hash, trial.recipe)] = outcome
        self._tell(trial, outcome)

    def _costs(self, trial: Trial) -> tuple[float, ...] | None:
        """The trial's point; the reference point where failing says that the architecture is bad; else None."""
        if trial.state == State.COMPLETE:
            return pareto.costs(self.row.objectives, trial.values)
        if trial.failure is not None and POLICIES[trial.failure.kind] in (Policy.TEACH, Policy.SHRINK):
            return tuple(self.row.reference[name] for name in self.row.objectives)
        return None

    def _tell(self, trial: Trial, costs: tuple[float, ...] | None) -> None:
        handle = self._handles.pop(trial.number, None)
        if handle is not None:
            self._proposer.tell(handle, costs)
        elif trial.params:  # another driver's, an earlier run's, or a baseline inside the searched space
            self._proposer.add(trial.params, trial.sampler_attrs, costs)

    # ---- proposing -------------------------------------------------------------------------------------------

    def prefetch(self, count: int) -> None:
        """Makes proposals until `count` are ready, so that no worker waits for the sampler."""
        while len(self._ready) < count and not self.exhausted:
            pending = self._propose()
            if pending is None:
                self.exhausted = True
            else:
                self._ready.append(pending)

    def lease(self, driver: int) -> Trial | None:
        """The next trial to run: one that waits in the store, else a new one; None when there is nothing to do."""
        trial = None
        while trial is None and self._waiting:
            trial = self.store.lease_waiting(self.row, driver)
            self.refresh()  # others may have taken them
        while trial is None:
            self.prefetch(1)
            if not self._ready:
                return None
            pending = self._ready.popleft()
            trial = self.store.lease_new(self.row, driver, pending.proposal, self.plan.trials)
            if trial is not None:
                if pending.handle is not None:
                    self._handles[trial.number] = pending.handle
                self.saw(trial.seq)
                break
            if sum(self.store.states(self.row).values()) >= self.plan.trials:
                self._ready.appendleft(pending)
                return None
            self.refresh()  # another driver had the same idea
            if pending.handle is not None:
                self._proposer.tell(pending.handle, self._known.get(pending.proposal.config_hash))
        self._next = max(self._next, trial.number + 1)
        return trial

    def _baseline_proposals(self) -> list[_Pending]:
        """Trials 0, 1 and 2, as far as they are not in the store yet."""
        made = [self._proposal(arch, recipe, "baseline", {}, None) for arch, recipe in self.plan.baselines()]
        return [_Pending(proposal, None) for proposal in made if proposal.config_hash not in self._known]

    def _proposal(
        self, arch: Any, recipe: Recipe, origin: str, attrs: Mapping[str, Any], params: Mapping[str, Any] | None
    ) -> Proposal:
        arch_hash = self.plan.space.arch_hash(arch)
        if params is None:
            try:
                params = self.plan.params(arch, recipe)
            except SpaceError:
                params = {}  # a baseline outside the searched space is measured, but cannot teach the sampler
        return Proposal(
            params=params,
            arch=arch_to_json(arch),
            arch_hash=arch_hash,
            config_hash=config_hash(arch_hash, recipe),
            recipe=recipe,
            origin=origin,
            sampler_attrs=attrs,
        )

    def _propose(self) -> _Pending | None:
        """A configuration nobody has trained or is training; None when the sampler finds no new one."""
        if self._baselines:
            pending = self._baselines.popleft()
            self._known[pending.proposal.config_hash] = None
            return pending
        number = self._next + len(self._ready)
        for attempt in range(MAX_REPEATS):
            explore = attempt >= MAX_REPEATS // 2  # the sampler only repeats itself: anything new will do
            handle, params, attrs, (arch, recipe) = self._proposer.ask(number, attempt, explore)
            proposal = self._proposal(arch, recipe, "sampler", attrs, params)
            if proposal.config_hash not in self._known:
                self._known[proposal.config_hash] = None
                return _Pending(proposal, handle)
            # A known outcome is told at once: evolution goes on from it, and nothing is trained twice.
            self.cache_hits += 1
            self._proposer.tell(handle, self._known[proposal.config_hash])
        return None

    def job(self, trial: Trial) -> Job:
        return replace(make_job(self.row, trial), checkpoint=checkpoint_path(self.checkpoints, trial.number))


def make_job(row: StudyRow, trial: Trial) -> Job:
    """Everything a worker needs to train the trial, from its row and its study's alone."""
    return Job(
        study=row.name,
        trial=trial.number,
        token=trial.token,
        space=row.space,
        arch=trial.arch,
        recipe=trial.recipe,
        data_path=row.settings["data_path"],
        data_hash=row.data_hash,
        data_seed=row.settings["seed"],
        kernels=row.settings["kernels"],
        measured=tuple(name for name in row.objectives if name in MEASURED),
        micro_batches=trial.provenance.get("micro_batches", 1),
        evaluate=row.settings["evaluate"],
    )


def artifacts_folder(store: Store, study: str) -> str:
    """Where the study keeps weights: beside a SQLite file, in the working directory otherwise."""
    path = store.url.database if store.url.get_backend_name() == "sqlite" else None
    base = Path(path) if path and path != ":memory:" else Path("nas")
    return str((base.parent / f"{base.stem}-artifacts" / digest({"store": store.shown, "study": study})).resolve())


def checkpoints_folder(row: StudyRow, shared: str | None) -> str:
    """Where half-trained trials are kept: beside the weights, or in a folder that several studies may share."""
    study = Path(row.artifacts)
    return str((Path(shared) / study.name if shared else study).resolve() / "checkpoints")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A configuration that was checked against its space and its data, before any store is touched."""

    config: StudyConfig
    plan: Plan
    data_name: str
    data_hash: str
    scaling: Mapping[str, list[float]]  # how inputs are normalised
    worst: Mapping[str, float]  # scores of a model that learned nothing


def prepare(config: StudyConfig) -> Prepared:
    """Raises UserError (of the flags or the data) and SpaceError; writes nothing but the cache of prepared text."""
    plan = make_plan(config)
    task = TASKS[plan.space.task]
    data = task.load(plan.data_path)
    plan = with_data(plan, task.settings(data))
    for arch in (plan.space.baseline(), plan.space.largest()):
        task.batch(data, arch, config.seed, 0, 1)
        next(task.validation(data, arch, plan.recipe, 1))
    return Prepared(config, plan, data.name, data.hash, task.scaling(data), task.worst(data))


def open_search(store: Store, prepared: Prepared, evaluate: str = "nas.train:evaluate") -> Search:
    """Creates the study, or continues it when `config.resume`. Raises StudyError."""
    space = prepared.plan.space
    row = open_study(store, prepared, space.cost(space.largest()), evaluate)
    return Search(store, row, prepared.config, prepared.plan)


def open_study(store: Store, prepared: Prepared, largest: Cost, evaluate: str = "nas.train:evaluate") -> StudyRow:
    """The study, new or, when `config.resume`, as stored; `largest` bounds the hypervolume. Raises StudyError."""
    config, plan = prepared.config, prepared.plan
    if config.resume and any(study["name"] == config.study for study in store.studies()):
        row = store.study(config.study)
        _check_same(row, plan.space_spec, prepared.data_hash, prepared.data_name)
        # The same data may lie elsewhere by now.
        settings = dict(row.settings) | to_json(config) | {"trials": plan.trials, "data_path": plan.data_path}
        store.update_settings(row, settings)
        return replace(row, settings=settings)
    worst = {
        **prepared.worst,
        "parameters": float(largest.parameters_total),
        f"flops_per_{TASKS[plan.space.task].unit}": float(largest.flops_total),
        **measured_worst(
            [name for name in plan.objectives if name in MEASURED],
            plan.space,
            plan.space.largest(),
            plan.recipe,
            plan.data_path,
        ),
    }
    return store.create_study(
        config.study,
        space=plan.space_spec,
        objectives=plan.objectives,
        settings=to_json(config)
        | {"trials": plan.trials, "data_path": plan.data_path, "evaluate": evaluate}
        | {"task": plan.space.task, "scaling": dict(prepared.scaling)},
        reference={name: pareto.cost(name, worst[name]) for name in plan.objectives},
        data_name=prepared.data_name,
        data_hash=prepared.data_hash,
        artifacts=artifacts_folder(store, config.study),
    )


def _check_same(row: StudyRow, space: SpaceSpec, data_hash: str, data_name: str) -> None:
    if (row.space.name, dict(row.space.settings)) != (space.name, dict(space.settings)):
        raise StudyError(f"study {row.name!r} searches space {row.space.name}; it cannot be resumed with {space.name}")
    if row.data_hash != data_hash:
        raise StudyError(
            f"study {row.name!r} was trained on {row.data_name} with hash {row.data_hash[:12]}, and {data_name} here "
            f"has {data_hash[:12]}: losses would not compare. Resume where the same data is, or start another study"
        )
