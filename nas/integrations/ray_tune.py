"""Our sampler, our halving and our store as parts of anybody's Ray Tune experiment, each of use without the others.

    config = StudyConfig(study="mine", store="nas.db", trials=50, settings={"depth": "2..6"})
    search = ArchSearch(config)
    tune.Tuner(
        train,  # its config has "space", "arch", "recipe" and "cost"; `build` makes the network of it
        tune_config=tune.TuneConfig(
            search_alg=search, num_samples=50,
            scheduler=ParetoHalving({"bits_per_byte": "min", "flops_per_token": "min"}, rungs=(1e5, 3e5)),
        ),
        run_config=tune.RunConfig(callbacks=[StudyCallback(config)]),
    ).fit()

The trainable is the user's: it trains as it likes and reports "tokens" (or images) and every objective of the study;
those that need no training stand in config["cost"]. Tune calls a trial done whoever ended it: here it is complete once
it has reported the tokens of its recipe, and was stopped before. A report without an objective is an error by name.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from torch import nn

from hypernas.config.keys import LATENCY
from hypernas.config.study_config import StudyConfig
from hypernas.data.tasks import TASKS
from hypernas.engines.tune_pool import why_failed
from hypernas.errors import UserError
from hypernas.records import Failure, FailureKind, Proposal, Recipe, Report, Result, State, StudyRow, Trial
from hypernas.search_spaces import load_space
from hypernas.search_spaces.base import Space, arch_to_json
from hypernas.store import Store
from hypernas.strategy import halving
from hypernas.strategy.proposals import Proposals, config_hash
from hypernas.strategy.samplers import choose_sampler
from hypernas.study.driver import validate_result
from hypernas.study.search import open_study, prepare, reference_point
from hypernas.training.step import training_flops

UNITS = "tokens"  # what a report counts its training in, images too


def build(config: Mapping[str, Any]) -> nn.Module:
    """The untrained network of a configuration that ArchSearch suggested. Raises SpaceError for a foreign one."""
    space = load_space(config["space"])
    return space.build(space.from_json(config["arch"]))


class ArchSearch(Searcher):
    """Proposes architectures of a study's space, as `nas search` does: the baselines first, nothing twice.

    Raises UserError and SpaceError as the flags of `nas search` do. Stopped trials teach with what they last reported,
    failed ones as the worst.
    """

    def __init__(self, config: StudyConfig) -> None:
        super().__init__()
        prepared = prepare(config)
        self._plan = plan = prepared.plan
        if "ceg" in plan.objectives:
            raise UserError(
                "ceg is measured against a baseline's ladder, which nas search trains: wanted other objectives"
            )
        reference = reference_point(prepared, plan.space.cost(plan.space.largest()))
        if config.inherit:
            raise UserError("--inherit needs the engine to train: here the trainable is yours; wanted inherit=False")
        if plan.latency is not None:
            raise UserError(f"{LATENCY} is measured by the engine: here the trainable is yours; wanted no such limit")
        self._proposals = Proposals(
            plan,
            choose_sampler(config.sampler, halving.stops_early(config.halving, plan.trials)),
            config.seed,
            reference=[reference[name] for name in plan.objectives],
            given=plan.first(),
        )
        self._numbers: dict[str, int] = {}
        self._running: dict[int, Proposal] = {}
        self._next = 0

    def suggest(self, trial_id: str) -> Any:
        proposal = self._proposals.take_given() or self._proposals.draw(self._next)
        if proposal is None:
            return Searcher.FINISHED  # every architecture was proposed
        number = self._numbers[trial_id] = self._next
        self._next += 1
        self._running[number] = proposal
        self._proposals.assign(number, proposal)
        self._proposals.observe(_trial(number, State.RUNNING, proposal), ())
        return {
            "space": self._plan.space.name,
            "arch": dict(proposal.arch),
            "recipe": asdict(proposal.recipe),
            "cost": known_costs(self._plan.space, self._plan.space.from_json(proposal.arch)),
        }

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        number = self._numbers.pop(trial_id, None)
        if number is None:
            return
        proposal = self._running.pop(number)
        if error or result is None:
            # Without a last word it was interrupted: its architecture is not to blame.
            kind = FailureKind.ERROR if error else FailureKind.PREEMPTED
            self._proposals.observe(_trial(number, State.FAILED, proposal, failure=Failure(kind, "")), ())
            return
        if _is_complete(result, proposal.recipe):
            values = _values(result, self._plan.objectives)
            self._proposals.observe(_trial(number, State.COMPLETE, proposal, values), ())
        else:
            report = _report(number, 0, result, self._plan.space, proposal.arch)
            self._proposals.observe(_trial(number, State.STOPPED, proposal), [report])

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_bytes(cloudpickle.dumps(vars(self)))

    def restore(self, checkpoint_path: str) -> None:
        vars(self).update(cloudpickle.loads(Path(checkpoint_path).read_bytes()))


class ParetoHalving(FIFOScheduler):
    """Stops trials at rungs by several metrics at once (nas/strategy/halving.py). Knows nothing of architectures.

    `metrics` says of each whether to "min" or "max" it, `rungs` at which values of `unit` trials are compared (their
    end is none), `log_axis` names the cost inside whose octaves hypervolume is compared.
    """

    def __init__(
        self,
        metrics: Mapping[str, str],
        rungs: Sequence[float],
        *,
        unit: str = UNITS,
        keep: float = halving.KEEP,
        log_axis: str | None = None,
    ) -> None:
        super().__init__()
        if wrong := {name: mode for name, mode in metrics.items() if mode not in ("min", "max")}:
            raise UserError(f"metrics {wrong}: wanted 'min' or 'max'")
        if list(rungs) != sorted(set(rungs)):
            raise UserError(f"rungs {list(rungs)}: wanted growing values of {unit!r}")
        if log_axis is not None and log_axis not in metrics:
            raise UserError(f"log_axis {log_axis!r} is none of the metrics {', '.join(metrics)}")
        if not 0 < keep <= 1:
            raise UserError(f"keep {keep:g}: wanted a share above 0 and at most 1")
        self._metrics, self._rungs, self._unit, self._keep = dict(metrics), tuple(rungs), unit, keep
        self._log_axis = log_axis
        self._axis = None if log_axis is None else list(metrics).index(log_axis)
        self._points: list[list[halving.Costs]] = [[] for _ in rungs]  # of all that reached the rung
        self._passed: dict[str, int] = {}  # rungs, by trial
        self._numbers: dict[str, int] = {}

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        self._numbers.setdefault(trial.trial_id, len(self._numbers))

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict) -> str:
        reached = sum(_value(result, self._unit) >= rung for rung in self._rungs)
        if reached <= self._passed.get(trial.trial_id, 0):
            return str(TrialScheduler.CONTINUE)
        self._passed[trial.trial_id] = reached
        mine = tuple(self._cost(name, _value(result, name)) for name in self._metrics)
        peers = self._points[reached - 1]
        # Whoever goes on whatever its rungs say is compared with all the same.
        exempt = halving.is_exempt(self._numbers[trial.trial_id])
        on = exempt or halving.should_continue(mine, peers, self._axis, self._keep)
        peers.append(mine)
        return str(TrialScheduler.CONTINUE if on else TrialScheduler.STOP)

    def _cost(self, name: str, value: float) -> float:
        if name == self._log_axis:
            return math.log10(value) if value > 0 else math.inf
        return value if self._metrics[name] == "min" else -value


class StudyCallback(tune.Callback):
    """Writes an experiment's trials into a study, for `nas status`, `nas dashboard` and `nas report` to show.

    Their configurations have "arch" and "recipe" as ArchSearch suggests them, from whatever searcher. What the study
    has already (the same architecture, recipe and seed) is not written again. Raises StudyError when there is a study
    of that name and `config.resume` is not set.
    """

    def __init__(self, config: StudyConfig) -> None:
        self._config = config
        self._store: Store | None = None  # opened where the experiment runs

    def setup(self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any) -> None:
        prepared = prepare(self._config)
        self._space = space = prepared.plan.space
        self._limit = prepared.plan.trials
        self._store = Store(self._config.store, create=True)
        self._row: StudyRow = open_study(self._store, prepared, space.cost(space.largest()))
        self._driver = self._store.start_driver(self._row, workers=self._config.workers or 1)
        self._leased: dict[str, Trial] = {}
        self._reports: dict[str, Report] = {}

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        if self._store is not None:
            self._store.heartbeat(self._driver)

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        if self._store is None or trial.trial_id in self._leased:
            return
        arch, recipe = self._space.from_json(trial.config["arch"]), Recipe(**trial.config["recipe"])
        arch_hash = self._space.arch_hash(arch)
        key = config_hash(arch_hash, recipe)
        proposal = Proposal({}, arch_to_json(arch), arch_hash, key, recipe, "sampler", {"tune": trial.trial_id})
        leased = self._store.lease_new(self._row, self._driver, proposal, self._limit)
        if leased is not None:
            self._leased[trial.trial_id] = leased

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict, **info: Any
    ) -> None:
        leased = self._leased.get(trial.trial_id)
        if self._store is None or leased is None:
            return
        before = self._reports.get(trial.trial_id)
        report = _report(leased.number, before.rung + 1 if before else 0, result, self._space, leased.arch)
        self._reports[trial.trial_id] = report
        self._store.report(self._row, report, leased.token)

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        leased, report = self._leased.pop(trial.trial_id, None), self._reports.pop(trial.trial_id, None)
        if self._store is None or leased is None:
            return
        last = trial.last_result
        if report is not None and not _is_complete(last, leased.recipe):
            self._store.stop(self._row, report, leased.token)
            return
        values = _values(last, self._row.objectives)
        parameters = self._space.cost(self._space.from_json(leased.arch)).parameters_total
        seconds = float(last.get("time_total_s", 0.0))
        result = Result(leased.number, leased.token, values, parameters=parameters, train_seconds=seconds)
        self._store.finish(self._row, validate_result(result, self._row.objectives))

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        leased = self._leased.pop(trial.trial_id, None)
        if self._store is not None and leased is not None:
            traceback = why_failed(trial)
            failure = Failure(FailureKind.ERROR, traceback.strip().splitlines()[-1], traceback)
            self._store.finish(self._row, Result(leased.number, leased.token, failure=failure))

    def on_experiment_end(self, trials: list[TuneTrial], **info: Any) -> None:
        if self._store is not None:
            for leased in self._leased.values():
                self._store.release(self._row, leased.number, leased.token, fault=False)
            self._store.stop_driver(self._driver)
            self._store.close()
            self._store = None


def known_costs(space: Space, arch: Any) -> dict[str, float]:
    """The objectives that need no training: parameters, and FLOPs with every gate open."""
    cost = space.cost(arch)
    flops = f"flops_per_{TASKS[space.task].unit}"
    return {"parameters": float(cost.parameters_total), flops: float(cost.flops_total)}


def _value(result: Mapping[str, Any], name: str) -> float:
    if name not in result:
        raise UserError(f"the trainable reports no {name!r}: it reports {', '.join(sorted(result))}")
    return float(result[name])


def _is_complete(result: Mapping[str, Any], recipe: Recipe) -> bool:
    return _value(result, UNITS) > recipe.tokens - recipe.batch_tokens  # only whole batches are trained


def _values(result: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    return {name: _value(result, name) for name in names}


def _report(number: int, rung: int, result: Mapping[str, Any], space: Space, arch: Any) -> Report:
    tokens = int(_value(result, UNITS))
    flops = training_flops(space.cost(space.from_json(arch)).flops_total, tokens)
    return Report(
        trial=number,
        rung=rung,
        step=int(result["training_iteration"]),
        tokens=tokens,
        training_flops=float(flops),
        loss=_value(result, TASKS[space.task].loss),
        seconds=float(result.get("time_total_s", 0.0)),
    )


def _trial(
    number: int,
    state: State,
    proposal: Proposal,
    values: Mapping[str, float] | None = None,
    failure: Failure | None = None,
) -> Trial:
    """A trial as the study's mind is told of it; what a row has beside is of no meaning to it."""
    running = proposal.running(number, number, None, datetime.now(UTC))
    return replace(running, state=state, values=values or {}, failure=failure)
