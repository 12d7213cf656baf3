"""Replays a finished search to its proposals, from what the store kept: who was told when, and how each was drawn.

An asynchronous search depends on the order in which its workers end. Every drawn trial notes what its driver was told
since the draw before (nas/strategy/proposals.py), so the same draws follow again, whatever the workers' speed was.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hypernas.config.plan import make_plan, with_data
from hypernas.config.study_config import HUB, StudyConfig
from hypernas.data.tasks import TASKS
from hypernas.errors import StudyError
from hypernas.records import State, StudyRow
from hypernas.search_spaces import stored_space
from hypernas.store import Reader
from hypernas.strategy.proposals import JOURNAL
from hypernas.study.search import by_trial, make_proposals


@dataclass(frozen=True, slots=True)
class Replayed:
    """A drawn trial: what its parameters were, and what they are when it is drawn again."""

    trial: int
    stored: Any
    drawn: Any


def replay(store: Reader, row: StudyRow, sampler: str | None = None) -> Iterator[Replayed]:
    """Draws every proposal of the study's sampler again, in its order.

    Exact for a search by one driver at a time, resumed or not. Drivers that search together lose proposals to each
    other, which no trial notes. Raises SpaceError for a space of one's own that nobody but the row named, StudyError
    for a sampler of OptunaHub other than the `sampler` that is given.
    """
    stored_space(row.space)
    settings = row.settings
    config = StudyConfig(
        seed=settings.seed,
        trials=settings.trials,
        objectives=row.objectives,
        space=row.space.name,
        preset=settings.preset,
        settings=settings.settings,
    )
    plan = make_plan(config)
    plan = with_data(plan, TASKS[plan.space.task].settings(TASKS[plan.space.task].load(settings.data_path)))
    trials = {trial.number: trial for trial in store.trials(row)}
    curves = by_trial(store.reports(row))
    session, proposals = None, None
    for trial in trials.values():
        journal = trial.sampler_attrs.get(JOURNAL)
        if journal is None:
            continue
        if proposals is None or journal["session"] != session:
            session = journal["session"]
            if journal["sampler"].startswith(HUB) and journal["sampler"] != sampler:
                raise StudyError(
                    f"study {row.name!r} was drawn with OptunaHub's code: give --sampler {journal['sampler']} if you "
                    "trust it, as no study names code for others to run"
                )
            then = replace(plan, trials=journal["trials"], memory=journal.get("memory"))
            proposals = make_proposals(row, then, journal["sampler"], "")
        for number, ended in journal["told"]:
            told = trials[number] if ended else replace(trials[number], state=State.RUNNING)
            proposals.observe(told, curves.get(number, ()))
        while proposals.take_given() is not None:
            pass  # trained before anything was drawn
        drawn = proposals.draw(journal["asked"])
        if drawn is not None:
            proposals.assign(trial.number, drawn)
        yield Replayed(trial.number, dict(trial.params), None if drawn is None else dict(drawn.params))
