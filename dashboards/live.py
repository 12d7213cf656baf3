"""Studies held in memory and kept up to date: each look reads only what changed since the last one. Never writes."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from threading import RLock
from typing import Any

import pandas as pd

from dashboards import frames
from nas.errors import StoreError, StudyError
from nas.records import Report, StudyRow, Trial
from nas.store import Store


class LiveStudy:
    """One study as its pages need it. `seq` grows whenever anything in it changed; `frame` is frames.trial_frame."""

    def __init__(self, row: StudyRow) -> None:
        self.row = row
        self.seq = 0
        self.frame = frames.frame_of_rows([], row.objectives)
        self._trials: dict[int, Trial] = {}
        self._reports: dict[int, list[Report]] = {}
        self._history: dict[int, tuple[int, datetime, float]] = {}
        self._volumes: tuple[int, pd.DataFrame] | None = None  # with the sequence they belong to

    def refresh(self, store: Store) -> None:
        """Takes in what changed in the store since the last call."""
        changed = store.trials(self.row, after=self.seq)
        if not changed:
            return
        fresh: dict[int, list[Report]] = {}
        for report in store.reports(self.row, after=self.seq):
            fresh.setdefault(report.trial, []).append(report)
        # New dictionaries each time: another tab's thread may be reading the old ones.
        self._reports = self._reports | fresh
        self._history = self._history | {e[0]: e for e in store.hypervolumes(self.row, after=self.seq)}
        self._trials = self._trials | {trial.number: trial for trial in changed}
        last = {number: curve[-1] for number, curve in self._reports.items()}
        rows = [frames.trial_row(trial, last.get(trial.number), self.row.objectives) for trial in changed]
        self.frame = frames.merge(self.frame, rows, self.row.objectives)
        self.seq = max(trial.seq for trial in changed)

    def curves(self, trials: Iterable[int]) -> pd.DataFrame:
        """`frames.curve_frame` of some trials."""
        return frames.curve_frame([report for number in trials for report in self._reports.get(number, ())])

    def hypervolumes(self) -> pd.DataFrame:
        """`frames.hypervolume_frame`."""
        held = self._volumes
        if held is None or held[0] != self.seq:
            history = sorted(self._history.values(), key=lambda entry: entry[1:])
            held = self._volumes = self.seq, frames.hypervolume_frame(history, self.frame)
        return held[1]

    def choices(self) -> pd.DataFrame:
        """`frames.choice_frame`."""
        return frames.choice_frame({number: trial.params for number, trial in sorted(self._trials.items())})

    def utilisation(self) -> float | None:
        """The share of the workers' time spent training and evaluating, as `nas status` has it."""
        from nas.summary import utilisation  # brings torch

        return utilisation(list(self._trials.values()))


class Watch:
    """One store being looked at, by any number of browser tabs. A SQLite file that is not there yet is waited for.

    Raises StoreError when the store can never be opened: a wrong URL, a missing folder, another program's tables.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._lock = RLock()
        self._store: Store | None = None
        self._studies: dict[str, LiveStudy] = {}
        try:
            self._store = Store(url)
        except StoreError:
            if not _is_missing_file(url):
                raise

    def store(self) -> Store | None:
        """The store, or None while its file does not exist."""
        with self._lock:
            if _is_missing_file(self.url):
                self.close()
            elif self._store is None:
                try:
                    self._store = Store(self.url)
                except StoreError:  # a search is creating it at this moment: the next look finds its tables
                    return None
            return self._store

    def close(self) -> None:
        with self._lock:
            if self._store is not None:
                self._store.close()
            self._store = None
            self._studies.clear()

    def names(self) -> list[str]:
        """Every study's name, the newest first."""
        store = self.store()
        return [] if store is None else [str(study["name"]) for study in reversed(store.studies())]

    def warm_up(self) -> None:
        """Takes in the newest study, which a page without a name shows: 10,000 trials take a second."""
        names = self.names()
        if names:
            self.study(names[0])

    def study(self, name: str) -> LiveStudy | None:
        """The study as it is now, or None when there is no such study."""
        with self._lock:
            store = self.store()
            if store is None:
                return None
            try:
                row = store.study(name)
            except StudyError:
                self._studies.pop(name, None)
                return None
            held = self._studies.get(name)
            if held is None or (held.row.id, held.row.created) != (row.id, row.created):  # deleted and made again
                held = self._studies[name] = LiveStudy(row)
            held.row = row
            held.refresh(store)
            return held


def scale_of(store: Store, study: str) -> Mapping[str, Any] | None:
    """What `nas scale` found of a study (or of a ladder itself), None before it ran."""
    names = {entry["name"] for entry in store.studies()}
    ladders = (name for name in (f"{study}-scale", study) if name in names)
    return next((found for name in ladders if (found := store.study(name).settings.get("scale"))), None)


def _is_missing_file(url: str) -> bool:
    path = url.removeprefix("sqlite:///")
    return "://" not in path and Path(path).parent.is_dir() and not Path(path).exists()
