"""Trials for trainers outside: asked for, reported on and told, under leases of the store as a search's own are."""

import time
import weakref
from collections.abc import Mapping

from hypernas.data.tasks import TASKS, steps_of
from hypernas.errors import StudyError, UserError
from hypernas.records import RUNGS, Failure, FailureKind, Result, StudyRow, Trial
from hypernas.store import Store
from hypernas.study.driver import HEARTBEAT_SECONDS, Heart, validate_result
from hypernas.study.search import Search
from hypernas.training.model import name_prices
from hypernas.training.run import report_at, rung_step
from hypernas.training.step import training_flops


class Asking:
    """One process that trains a study's trials by itself.

    It is a driver of the study: while it lives, nobody else takes its trials; once it is closed or dead, they wait for
    a worker again.
    """

    def __init__(self, store: Store, search: Search) -> None:
        self._store, self._search, self._row = store, search, search.row
        self._driver = store.start_driver(self._row, workers=1)
        self._asked: dict[int, tuple[Trial, float]] = {}  # and when
        self._heart = Heart(store, self._driver, HEARTBEAT_SECONDS)
        self.close = weakref.finalize(self, _hand_back, store, self._row, self._driver, self._asked, self._heart)

    def ask(self) -> Trial | None:
        """The next trial to train, leased to this process; None when the study has nothing left to hand out now."""
        self._heart.check()
        self._store.reclaim(self._row)
        self._search.refresh()  # others may have handed trials back
        trial = self._search.lease(self._driver)
        if trial is not None:
            self._asked[trial.number] = (trial, time.monotonic())
        return trial

    def report(self, number: int, rung: int, loss: float, seconds: float | None = None) -> bool:
        """Notes the validation loss of a trial at a rung, 0 to 3, after 1/8, 1/4, 1/2 and all of its training.

        False when halving stops the trial there: it has ended, and wants no `tell`. `seconds` of training so far are
        those since it was asked for unless given.
        """
        trial, since = self._mine(number)
        if rung not in range(len(RUNGS)):
            shares = ", ".join(f"{share:g}" for share in RUNGS)
            raise UserError(f"rung {rung}: wanted 0 to {len(RUNGS) - 1}, after shares {shares} of the training")
        space = self._search.plan.space
        arch = space.from_json(trial.arch)
        steps = steps_of(TASKS[space.task], arch, trial.recipe)
        spent = time.monotonic() - since if seconds is None else seconds
        step, value = rung_step(rung, steps.count), as_number(loss, "loss")
        report = report_at(step, steps, space.cost(arch), number, rung, value, spent)
        seq = self._store.report(self._row, report, trial.token)
        if seq is None:
            raise self._taken_over(number)
        if self._search.observe_report(trial, report, seq):
            return True
        del self._asked[number]
        self._search.observe_stop(trial, report, self._store.stop(self._row, report, trial.token))
        return False

    def tell(
        self,
        number: int,
        values: Mapping[str, float] | None = None,
        *,
        failure: str | None = None,
        seconds: float | None = None,
    ) -> None:
        """Ends a trial: with what it came to, by the names of the study's objectives, or with why it failed.

        Its price (FLOPs with every gate open, parameters) follows from the architecture where `values` leave it out.
        """
        trial, since = self._mine(number)
        if (values is None) == (failure is None):
            raise UserError(f"trial {number}: wanted either its values or the reason of its failure")
        spent = time.monotonic() - since if seconds is None else seconds
        prices = self._prices(trial)
        result = Result(
            number,
            trial.token,
            values={} if values is None else prices | {name: as_number(value, name) for name, value in values.items()},
            parameters=int(prices["parameters"]),
            train_seconds=spent,
            failure=None if failure is None else Failure(FailureKind.ERROR, failure),
        )
        result = validate_result(result, self._row.objectives)
        seq = self._store.finish(self._row, result)
        del self._asked[number]
        self._search.observe_end(trial, result, seq)
        if seq is None:
            raise self._taken_over(number)

    def _prices(self, trial: Trial) -> dict[str, float]:
        space = self._search.plan.space
        arch = space.from_json(trial.arch)
        cost, task = space.cost(arch), TASKS[space.task]
        spent = steps_of(task, arch, trial.recipe)
        prices = name_prices(task, float(cost.flops_total), float(cost.parameters_total))
        return prices | {"training_flops": training_flops(float(cost.flops_total), spent.count * spent.units)}

    def _mine(self, number: int) -> tuple[Trial, float]:
        if number not in self._asked:
            raise StudyError(f"trial {number} is not one that ask() gave out here and that has not ended yet")
        return self._asked[number]

    def _taken_over(self, number: int) -> StudyError:
        self._asked.pop(number, None)
        return StudyError(f"trial {number} was silent for too long and is another driver's now: ask for another")


def as_number(value: object, name: str) -> float:
    """Raises UserError for what is no number; one that is not finite fails its trial."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}={value!r}: wanted a number") from error


def _hand_back(store: Store, row: StudyRow, driver: int, asked: dict[int, tuple[Trial, float]], heart: Heart) -> None:
    heart.stop()
    for trial, _ in asked.values():
        store.release(row, trial.number, trial.token, fault=False)
    asked.clear()
    store.stop_driver(driver)
    store.close()
