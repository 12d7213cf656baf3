"""hypernas from Python: search, look, take models home, and train trials of a study by one's own code.

Nothing is printed unless `progress` asks for it; what is wrong is raised as one of `hypernas.errors`, in the sentence
that the command `nas` would print.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypernas.config.study_config import FLAGS, check_least, split_names, wrong_type
from hypernas.errors import StudyError, UserError, nearest
from hypernas.launch import check_search, run_search
from hypernas.search_spaces import name_space, stored_space
from hypernas.search_spaces.base import Space

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from torch import nn

    from hypernas.records import Recipe, StudyRow, Trial
    from hypernas.store import Reader
    from hypernas.study.asking import Asking
    from hypernas.study.driver import Outcome

# By kind, the function of hypernas.dashboards that draws it.
FIGURES = {
    "front": "pareto_figure",
    "curves": "curve_figure",
    "hypervolume": "hypervolume_figure",
    "importance": "importance_figure",
}


def search(
    study: str = "default",
    *,
    store: str | os.PathLike[str] = "nas.db",
    resume: bool = False,
    evaluate: str = "training",
    progress: bool = False,
    **flags: Any,
) -> "Study":
    """Runs a search to its end, as `nas search` does, and returns the study.

    `flags` are those of `nas search --help` with underscores: `preset="quick"`, `trials=20`, `workers=2`,
    `space="vision"`, `settings={"depth": "2..4"}`. Ctrl-C (a notebook's stop button) lets running trials finish, a
    second hands them back; `study.outcome` says how it ended, and the same call with `resume=True` goes on.
    `evaluate` may be "module:function", which workers import (a resumed search wants it again): it takes a
    `hypernas.records.Job` and yields its Progress, Report and, last, its Result.

    Raises UserError and its kinds as `nas search` refuses, before anything is trained.
    """
    given = _flags(study, store, {"resume": resume, **flags})
    _, outcome = run_search(given, evaluate, progress=progress)
    return Study(study, given["store"], outcome, **_own_space(given))


def create_study(study: str, *, store: str | os.PathLike[str] = "nas.db", **flags: Any) -> "Study":
    """A new study, of which nothing is trained yet: for `ask` and `tell`. Raises UserError as `search`."""
    from hypernas.store import Store
    from hypernas.study.search import open_search, prepare

    given = _flags(study, store, flags)
    config, plan, _ = check_search(given)
    prepared = prepare(config, plan)
    with Store(given["store"], create=True) as opened:
        open_search(opened, prepared)
    return Study(study, given["store"], **_own_space(given))


def open_study(study: str, *, store: str | os.PathLike[str] = "nas.db", **flags: Any) -> "Study":
    """A study that is there. `flags` are for `ask` alone; a study of one's own space wants its `space` again.

    Raises StoreError where there is no such store, StudyError where it has no such study.
    """
    from hypernas.store import Reader

    given = _flags(study, store, flags)
    with Reader(given["store"]) as reader:
        reader.study(study)
    return Study(study, given["store"], **_own_space(given))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A trial of a study: an architecture, how it is trained, and what it came to."""

    study: "Study"
    number: int
    arch: Mapping[str, Any]  # by the keys of the space
    recipe: "Recipe"
    values: Mapping[str, float]  # by objective; empty before its end

    def build(self) -> "nn.Module":
        """The network with the initial weights that its seed draws."""
        from hypernas.training.model import seeded_build

        space = self.study.space
        return seeded_build(space, space.from_json(self.arch), self.recipe.seed)

    def load(self, *, progress: bool = False) -> "nn.Module":
        """The trained network, in evaluation mode: from kept weights, or trained again from its row.

        Raises StudyError for a trial that did not complete, or that trains to other values here.
        """
        from hypernas.export.request import choose
        from hypernas.export.write import load_trained
        from hypernas.store import Store

        with Store(self.study.store) as store:
            row = self.study._row(store)
            return load_trained(store, row, choose(store, row, self.number, None), progress=progress)

    def export(self, out: str, *, formats: str = "py", progress: bool = False) -> dict[str, Any]:
        """Writes the trained network as a folder that needs only torch, and checks it; what `nas export --json` says.

        `formats` are some of py, pt2 and onnx. Raises UserError before anything is written.
        """
        from hypernas.export.request import choose
        from hypernas.export.write import export_trial
        from hypernas.store import Store

        with Store(self.study.store) as store:
            row = self.study._row(store)
            trial = choose(store, row, self.number, None)
            return export_trial(store, row, trial, out=out, formats=formats, progress=progress)


class Study:
    """A study in a store. Each call reads the store as it is at that moment."""

    def __init__(self, name: str, store: str = "nas.db", outcome: "Outcome | None" = None, **flags: Any) -> None:
        self.name, self.store = name, store
        self.outcome = outcome  # of the search that returned this, otherwise None
        self._flags = flags
        self._asking: Asking | None = None

    def __repr__(self) -> str:
        return f"Study({self.name!r}, store={self.store!r})"

    def __enter__(self) -> "Study":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- looking ---------------------------------------------------------------------------------------------

    def trials(self) -> "pd.DataFrame":
        """A row a trial: its state, values and timings, and what the sampler chose."""
        from hypernas.dashboards import notebook

        return notebook.frame(self.name, self.store)

    def front(self) -> "pd.DataFrame":
        """The rows of `trials` on the Pareto front, best in the first objective first."""
        from hypernas.dashboards import notebook

        return notebook.front_frame(self.name, self.store)

    def status(self) -> dict[str, Any]:
        """How far it is; what `nas status --json` says."""
        from hypernas.show.status import status_of
        from hypernas.store import Reader

        with Reader(self.store) as reader:
            return status_of(reader, reader.study(self.name))

    def figure(self, kind: str = "front", **options: Any) -> "go.Figure":
        """A Plotly figure: front, curves, hypervolume or importance, with the options of `hypernas.dashboards`."""
        from hypernas.dashboards import notebook

        if kind not in FIGURES:
            raise UserError(f"figure {kind!r}; {nearest(kind, tuple(FIGURES))}")
        figure: go.Figure = getattr(notebook, FIGURES[kind])(self.name, self.store, **options)
        return figure

    # ---- taking home -----------------------------------------------------------------------------------------

    def best(self, pick: "str | int" = "knee") -> Candidate:
        """One of the front by a rule, knee, best, cheapest or max-flops=N, or a complete trial by its number.

        Raises UserError for another rule, StudyError where nothing is complete.
        """
        from hypernas.export.request import choose
        from hypernas.store import Reader

        number, rule = (pick, None) if isinstance(pick, int) else (None, pick)
        with Reader(self.store) as reader:
            return self._candidate(choose(reader, reader.study(self.name), number, rule))

    @property
    def space(self) -> Space:
        """The space it searches. Raises SpaceError for one that is not here, or whose code the store alone names."""
        from hypernas.store import Reader

        with Reader(self.store) as reader:
            return stored_space(self._row(reader).space)

    def _row(self, store: "Reader") -> "StudyRow":
        """The study as stored, its space as it was named here."""
        return name_space(store.study(self.name), self._flags.get("space"))

    def _candidate(self, trial: "Trial") -> Candidate:
        return Candidate(self, trial.number, trial.arch, trial.recipe, trial.values)

    # ---- training by one's own code --------------------------------------------------------------------------

    def ask(self) -> Candidate | None:
        """The next trial to train, by whatever trains it; None when the study has no more to hand out now.

        It is leased to this process until `tell`, a `report` that stops it, or `close`.
        """
        trial = self._session().ask()
        return None if trial is None else self._candidate(trial)

    def report(self, trial: Candidate, rung: int, loss: float, *, seconds: float | None = None) -> bool:
        """Notes a validation loss after 1/8, 1/4, 1/2 or all of a trial's training (`rung` 0 to 3).

        False when the trial is stopped there: it has ended. Raises UserError for another rung, StudyError for a trial
        that is not this process's.
        """
        return self._session().report(trial.number, rung, loss, seconds)

    def tell(
        self,
        trial: Candidate,
        values: Mapping[str, float] | None = None,
        *,
        failure: str | None = None,
        seconds: float | None = None,
    ) -> None:
        """Ends a trial with its values by objective, or with the reason of its failure.

        FLOPs and parameters are the architecture's where `values` leave them out. Raises UserError for neither or
        both, StudyError for a trial that is not this process's.
        """
        self._session().tell(trial.number, values, failure=failure, seconds=seconds)

    def close(self) -> None:
        """Hands back what was asked for and not told."""
        if self._asking is not None:
            self._asking.close()
            self._asking = None

    def _session(self) -> "Asking":
        if self._asking is None:
            self._asking = _open_asking(self.name, self.store, self._flags)
        return self._asking


def _open_asking(study: str, store: str, flags: Mapping[str, Any]) -> "Asking":
    from hypernas.records import OWN
    from hypernas.store import Store
    from hypernas.study.asking import Asking
    from hypernas.study.search import open_search, prepare

    config, plan, stored = check_search({"study": study, "store": store, "resume": True, **flags})
    if stored is None:
        raise StudyError(f"no study {study!r} in {store}: create_study makes one")
    prepared = prepare(config, plan)
    opened = Store(store)
    return Asking(opened, open_search(opened, prepared, OWN))


def _flags(study: str, store: str | os.PathLike[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of StudyConfig. Raises UserError for a flag that there is not and a value of another type."""
    given = {"study": study, "store": store, **{name: value for name, value in flags.items() if value is not None}}
    given = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in given.items()}
    if isinstance(given.get("settings"), Mapping):
        given["settings"] = dict(given["settings"])
    for name, value in given.items():
        if name not in FLAGS:
            raise UserError(f"unknown flag {name!r}; {nearest(name, tuple(FLAGS))}")
        if wrong := wrong_type(name, value):
            raise UserError(f"{name}={value!r} {wrong}")
        check_least(name, value)
    if "settings" in given:
        given["settings"] = {key: str(value) for key, value in given["settings"].items()}
    if "objectives" in given:
        given["objectives"] = split_names(given["objectives"])
    return given


def _own_space(given: Mapping[str, Any]) -> dict[str, Any]:
    """The space as it was given: no study names code for others to run, so its own has to be named again."""
    return {name: given[name] for name in ("space",) if name in given}
