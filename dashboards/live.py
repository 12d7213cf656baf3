"""Studies held in memory and kept up to date: each look reads only what changed since the last one. Never writes."""

from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from threading import RLock
from typing import Any

import pandas as pd

from hypernas.dashboards import frames
from hypernas.errors import StoreError, StudyError
from hypernas.records import Report, StudyRow, Trial
from hypernas.store import Reader
from hypernas.store.files import file_of

MOST_NAMED = 1000  # trials in one query; databases limit the parameters of a statement


class LiveStudy:
    """One study as its pages need it. `seq` grows whenever anything in it changed; `frame` is frames.trial_frame."""

    def __init__(self, row: StudyRow) -> None:
        self.row = row
        self.seq = 0
        self.frame = frames.frame_of_rows([], row.objectives)
        self._trials: dict[int, Trial] = {}
        self._curves: dict[int, list[Report]] = {}  # of the trials that were drawn
        self._history: dict[int, tuple[int, datetime, float]] = {}
        self._volumes: tuple[int, pd.DataFrame] | None = None  # with the sequence they belong to

    def refresh(self, store: Reader) -> None:
        """Takes in what changed in the store since the last call."""
        changed = store.trials(self.row, after=self.seq)
        if not changed:
            return
        last = {report.trial: report for report in store.reports(self.row, after=self.seq, last=True)}
        # New dictionaries each time: another tab's thread may be reading the old ones.
        stale = {trial.number for trial in changed}
        self._curves = {number: curve for number, curve in self._curves.items() if number not in stale}
        self._history = self._history | {e[0]: e for e in store.hypervolumes(self.row, after=self.seq)}
        self._trials = self._trials | {trial.number: trial for trial in changed}
        rows = [frames.trial_row(trial, last.get(trial.number), self.row.objectives) for trial in changed]
        self.frame = frames.merge(self.frame, rows, self.row.objectives)
        self.seq = max(trial.seq for trial in changed)

    def curves(self, store: Reader, trials: Collection[int]) -> pd.DataFrame:
        """`frames.curve_frame` of some trials; only those are read, each once until it changes."""
        curves = self._curves
        missing = [number for number in trials if number not in curves]
        if missing:
            read: dict[int, list[Report]] = {number: [] for number in missing}
            for report in store.reports(self.row, missing if len(missing) <= MOST_NAMED else None):
                if report.trial in read:
                    read[report.trial].append(report)
            self._curves = curves = curves | read
        return frames.curve_frame([report for number in trials for report in curves[number]])

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
        from hypernas.show.status import utilisation  # brings torch

        return utilisation(list(self._trials.values()))


class Watch:
    """One store being looked at, by any number of browser tabs. A SQLite file that is not there yet is waited for.

    Raises StoreError when the store can never be opened: a wrong URL, a missing folder, another program's tables.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._lock = RLock()
        self._store: Reader | None = None
        self._studies: dict[str, LiveStudy] = {}
        try:
            self._store = Reader(url)
        except StoreError:
            if not _is_missing_file(url):
                raise

    def store(self) -> Reader | None:
        """The store, or None while its file does not exist."""
        with self._lock:
            if _is_missing_file(self.url):
                self.close()
            elif self._store is None:
                try:
                    self._store = Reader(self.url)
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

    def curves(self, study: LiveStudy, trials: Collection[int]) -> pd.DataFrame:
        """`frames.curve_frame` of some trials of a study that `study` gave; none when its store has gone since."""
        with self._lock:  # a refresh between reading and keeping would leave old curves behind
            store = self.store()
            return frames.curve_frame([]) if store is None else study.curves(store, trials)


def scale_of(store: Reader, study: str) -> Mapping[str, Any] | None:
    """What `nas scale` found of a study (or of a ladder itself), None before it ran."""
    names = {entry["name"] for entry in store.studies()}
    ladders = (name for name in (f"{study}-scale", study) if name in names)
    return next((found for name in ladders if (found := store.study(name).settings.scale)), None)


def _is_missing_file(url: str) -> bool:
    path = file_of(url)
    return path is not None and Path(path).parent.is_dir() and not Path(path).exists()
