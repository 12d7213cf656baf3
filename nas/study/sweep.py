"""A fixed list of configurations trained as a study, by the engines and the store of a search.

For comparisons that were thought out beforehand: `sweep` trains what the study does not hold yet, at once or after an
interruption, and returns a trial for every configuration of the list. Its trials have the origin "sweep".
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hypernas.config.keys import recipe_with, split_settings
from hypernas.config.plan import Plan, check_memory, make_plan, training_bytes, with_data
from hypernas.config.study_config import StudyConfig
from hypernas.data.tasks import TASKS
from hypernas.engines.devices import on_what
from hypernas.engines.protocol import Executor
from hypernas.errors import StudyError, UserError
from hypernas.records import Job, Proposal, Recipe, Report, Result, SpaceSpec, StudyRow, Trial, is_lost, name_trials
from hypernas.search_spaces import load_space
from hypernas.search_spaces.base import arch_to_json
from hypernas.show.views import make_view
from hypernas.show.words import describe_arch
from hypernas.store import Store
from hypernas.store.folders import checkpoints_folder
from hypernas.strategy.proposals import config_hash
from hypernas.study.driver import run
from hypernas.study.search import Prepared, check_resumed, make_job, open_study
from hypernas.training.checkpoint_files import checkpoint_path

Settings = Mapping[str, Any]  # keys of architecture and training, as `--set` has them, with one value each
MAX_TRIALS = 2**31 - 1


def sweep(store: Store, executor: Executor, config: StudyConfig, configurations: Sequence[Settings]) -> list[Trial]:
    """The finished trial of every configuration, in their order; those that are equal share one.

    `config.settings` holds for all of them, where they do not say otherwise; what neither says is as in the space's
    baseline and in the preset's training. The study is created, or continued if it is there: what it has trained is
    not trained again. A trial that failed stays failed, with its failure.

    Raises SpaceError and UserError for bad input before anything is trained, KeyboardInterrupt when interrupted and
    StudyError where a trial's workers were lost; the same call then continues. Trials that another process has in hand
    are waited for.
    """
    config = replace(config, resume=True, gpus_per_trial=executor.gpus)
    check_resumed(store, config, executor)
    prepared, proposals = _prepare(config, configurations)
    space = prepared.plan.space
    dearest = max((space.cost(space.from_json(p.arch)) for p in proposals), key=lambda cost: cost.flops_total)
    row = open_study(store, prepared, dearest)
    known = {config_hash(trial.arch_hash, trial.recipe) for trial in store.trials(row)}
    missing = {p.config_hash: p for p in proposals if p.config_hash not in known}
    for proposal in missing.values():
        needs = training_bytes(space, space.from_json(proposal.arch))
        check_memory(needs, executor.memory, f"study {config.study!r}: {describe_arch(dict(proposal.arch))}")
    row = replace(row, settings=replace(row.settings, trials=len(known) + len(missing)))
    store.update_settings(row, row.settings)
    work, finished = FixedList(store, row, missing.values()), store.finished(row)
    with make_view(work.asked, finished, TASKS[space.task].unit, lambda: store.front(row)) as view:
        view.message(
            f"study {row.name}: {finished} of {work.asked} trials are finished, {on_what(executor)}, "
            f"results in {store.shown}"
        )
        outcome = run(work, executor, view, other_device=config.other_device)
    if outcome.interrupted:
        raise KeyboardInterrupt
    trials = {config_hash(trial.arch_hash, trial.recipe): trial for trial in store.trials(row)}
    found = [trials[proposal.config_hash] for proposal in proposals]
    if lost := sorted({trial.number for trial in found if is_lost(trial)}):
        raise StudyError(
            f"{name_trials(lost)} of study {row.name!r} lost their workers again and again: nothing is concluded "
            "without them; the same command tries them again"
        )
    return found


class FixedList:
    """What `driver.run` asks for its trials: those that wait in the study, then the proposals in their order."""

    exhausted = False

    def __init__(self, store: Store, row: StudyRow, proposals: Iterable[Proposal]) -> None:
        self.store, self.row = store, row
        self.checkpoints = str(checkpoints_folder(store, row, None))
        self._left = deque(proposals)

    @property
    def asked(self) -> int:
        return self.row.settings.trials

    def prefetch(self, count: int) -> None:
        """Nothing: the list is there already."""

    def lease(self, driver: int) -> Trial | None:
        trial = self.store.lease_waiting(self.row, driver)
        while trial is None and self._left:  # None also where another process has just taken the proposal
            trial = self.store.lease_new(self.row, driver, self._left.popleft(), MAX_TRIALS)
        return trial

    def job(self, trial: Trial) -> Job:
        path = checkpoint_path(self.checkpoints, trial.number)
        return replace(make_job(self.store, self.row, trial), checkpoint=path)

    def refresh(self) -> None:
        """Nothing: what is trained does not depend on results."""

    def observe_report(self, trial: Trial, report: Report, seq: int) -> bool:
        """Always on: every configuration of the list is trained to its end."""
        return True

    def observe_stop(self, trial: Trial, report: Report, seq: int | None) -> None:
        """Never, as above."""

    def observe_end(self, trial: Trial, result: Result, seq: int | None) -> None:
        """Nothing: what is trained does not depend on results."""


def _prepare(config: StudyConfig, configurations: Sequence[Settings]) -> tuple[Prepared, list[Proposal]]:
    """Everything checked against the space and the data, before any store is touched."""
    if not configurations:
        raise UserError(f"study {config.study!r}: the list of configurations is empty")
    bare = load_space(config.space)
    common, training = split_settings(config.settings, bare)
    path = {name: text for name, text in training.items() if name == "data.path"}
    plan = make_plan(replace(config, settings=path))
    # A list names its architectures one by one: the preset restricts nothing.
    plan = replace(plan, space=bare, space_spec=SpaceSpec(config.space, own=True), trials=len(configurations))
    task = TASKS[bare.task]
    data = task.load(plan.data_path)
    plan = with_data(plan, task.settings(data))
    proposals = []
    for configuration in configurations:
        own, given = split_settings({name: str(value) for name, value in configuration.items()}, bare)
        if "data.path" in given:
            raise UserError(
                f"data.path={given['data.path']}: one sweep has one set of data; give it in config.settings"
            )
        arch = plan.space.from_json({**common, **own})
        recipe = recipe_with(plan.recipe, {**training, **given}, bare.task)
        task.batch(data, arch, config.seed, 0, 1)
        next(task.validation(data, arch, recipe, 1))
        proposals.append(_proposal(plan, arch, recipe))
    return Prepared(config, plan, data.name, data.hash, task.scaling(data), task.worst(data)), proposals


def _proposal(plan: Plan, arch: Any, recipe: Recipe) -> Proposal:
    arch_hash = plan.space.arch_hash(arch)
    return Proposal(
        params={},  # no sampler was asked
        arch=arch_to_json(arch),
        arch_hash=arch_hash,
        config_hash=config_hash(arch_hash, recipe),
        recipe=recipe,
        origin="sweep",
        sampler_attrs={},
    )
