import os
import pwd
import random
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import psycopg
import pytest
from plotly.io.json import to_json_plotly

from hypernas.dashboards import figures, frames
from hypernas.dashboards.live import LiveStudy, Watch
from hypernas.errors import StoreError
from hypernas.records import Recipe, Report, State, Trial
from hypernas.store import Reader, Store

OBJECTIVES = ("bits_per_byte", "flops_per_token")


def from_scratch(writer) -> pd.DataFrame:
    return frames.trial_frame(writer.store.trials(writer.study), writer.store.reports(writer.study), OBJECTIVES)


def watch(writer) -> Watch:
    return Watch(writer.store.url.database)


def test_a_study_taken_in_bit_by_bit_equals_one_read_at_once(writer):
    looking = watch(writer)
    for step in range(12):
        if step % 4 == 3:
            writer.fail()
        else:
            writer.complete(5 - (step * 7 % 5) * 0.3, 1e6 * (1 + step % 3), rungs=step % 3)
        number, token = writer.lease()
        writer.report(number, token, 0, 4.0)
        if step % 2:
            pd.testing.assert_frame_equal(looking.study("first").frame, from_scratch(writer), check_like=True)
    live = looking.study("first")
    expected = frames.hypervolume_frame(writer.store.hypervolumes(writer.study), live.frame)
    pd.testing.assert_frame_equal(live.hypervolumes(), expected)
    expected = frames.curve_frame(writer.store.reports(writer.study))
    pd.testing.assert_frame_equal(looking.curves(live, live.frame["trial"].tolist()), expected)


def test_a_look_reads_only_what_changed_since_the_last(small, monkeypatch):
    read = []
    for name in ("trials", "reports", "hypervolumes"):
        original = getattr(Reader, name)

        def counted(self, *args, original=original, **kwargs):
            rows = original(self, *args, **kwargs)
            read.append(len(rows))
            return rows

        monkeypatch.setattr(Reader, name, counted)
    looking = watch(small)
    looking.study("first")
    assert read == [5, 4, 3]  # four trials reported something
    read.clear()
    looking.study("first")
    assert read == [0]
    small.complete(2.0, 1e6, rungs=2)
    read.clear()
    looking.study("first")
    assert read == [1, 1, 1]
    live, number = looking.study("first"), small.store.front(small.study)[0].number
    read.clear()
    assert len(looking.curves(live, [number])) == len(looking.curves(live, [number])) == 2
    assert read == [2]


def test_a_missing_file_is_waited_for_and_never_created(tmp_path: Path, write_in):
    path = tmp_path / "later.db"
    looking = Watch(str(path))
    assert (looking.store(), looking.names(), looking.study("first")) == (None, [], None)
    assert list(tmp_path.iterdir()) == []
    with Store(str(path), create=True) as store:
        write_in(store, "first").complete(3.0, 1e6)
        assert looking.names() == ["first"]
        assert len(looking.study("first").frame) == 1
    looking.close()


def test_a_folder_that_cannot_be_written_to_is_looked_at_while_a_search_writes_and_after(tmp_path: Path, write_in):
    folder = Path(tempfile.mkdtemp())  # tmp_path's parents are closed to others
    try:
        folder.chmod(0o755)
        with Store(str(folder / "nas.db"), create=True) as store:
            writer = write_in(store, "first")
            writer.complete(3.0, 1e6, rungs=1)
            assert looked_at_by_nobody(folder) == 1
            writer.complete(2.0, 2e6)
            assert looked_at_by_nobody(folder) == 2
        assert looked_at_by_nobody(folder) == 2
        assert [path.name for path in folder.iterdir()] == ["nas.db"]
    finally:
        shutil.rmtree(folder)


def looked_at_by_nobody(folder: Path) -> int:
    """How many trials a process sees that may only read; 255 when it sees an error."""
    child = os.fork()
    if child == 0:
        seen = 255
        try:
            if os.geteuid() == 0:
                nobody = pwd.getpwnam("nobody")
                os.setgroups([])
                os.setgid(nobody.pw_gid)
                os.setuid(nobody.pw_uid)
            else:
                folder.chmod(0o555)
            seen = len(Watch(str(folder / "nas.db")).study("first").frame)
        finally:
            os._exit(seen)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_database_user_who_may_only_read_sees_everything(postgres: str, write_in):
    with Store(postgres, create=True) as store:
        writer = write_in(store, "shared")
        writer.complete(3.0, 1e6, rungs=2)
        with psycopg.connect(postgres) as owner:
            owner.execute("CREATE ROLE reader LOGIN")
            owner.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
        looking = Watch(postgres.replace("postgres@", "reader@"))
        try:
            live = looking.study("shared")
            assert looking.names() == ["shared"] and live.frame["bits_per_byte"].tolist() == [3.0]
            writer.complete(2.0, 2e6)
            assert len(looking.study("shared").frame) == 2 and len(live.hypervolumes()) == 2
            assert looking.store().live_drivers(live.row) == {writer.driver: 2}
        finally:
            looking.close()
            store.stop_driver(writer.driver)
            store.delete_study("shared")


def test_a_deleted_study_is_gone_and_its_successor_of_the_same_name_is_new(small, write_in):
    looking = watch(small)
    assert len(looking.study("first").frame) == 5
    small.store.stop_driver(small.driver)
    small.store.delete_study("first")
    assert looking.study("first") is None
    write_in(small.store, "first").complete(3.0, 1e6)
    assert len(looking.study("first").frame) == 1


def test_a_store_that_can_never_be_opened_is_an_error(tmp_path: Path):
    (tmp_path / "text.db").write_text("not a database, but long enough to be looked at" * 10)
    for url in (str(tmp_path / "no" / "nas.db"), "mysql://x/y", str(tmp_path / "text.db")):
        with pytest.raises(StoreError):
            Watch(url)


def many_trials(count: int) -> tuple[list[Trial], list[Report], list[tuple[int, datetime, float]]]:
    """Trials with ten reports each, every fifth failed."""
    start, drawn = datetime(2026, 1, 1, tzinfo=UTC), random.Random(0)
    trials, reports = [], []
    for number in range(count):
        flops = 10 ** drawn.uniform(5, 8)
        loss = 6 - flops**0.07 + drawn.random()
        failed = number % 5 == 4
        finished = start + timedelta(seconds=number + 5)
        values = {} if failed else {"bits_per_byte": loss, "flops_per_token": flops}
        trials.append(
            Trial(
                number=number, state=State.FAILED if failed else State.COMPLETE, params={"depth": number % 4},
                arch={"depth": 1}, arch_hash=str(number), recipe=Recipe(3e-3), origin="sampler", sampler_attrs={},
                token=1, attempts=1, values=values, parameters=1000, driver=1, worker="w", created=start,
                started=start, finished=finished, train_seconds=4.0, evaluate_seconds=1.0, provenance={},
                diagnostics={}, failure=None, seq=number + 1,
            )
        )  # fmt: skip
        reports += [
            Report(number, rung, rung, 1000 << rung, 3 * flops * (1000 << rung), loss, 1.0) for rung in range(10)
        ]
    history = [(trial.number, trial.finished, float(trial.number)) for trial in trials if trial.values]
    return trials, reports, history


class Frozen:
    """A store that holds 10,000 trials, of which a look sees those up to `shown`."""

    def __init__(self, count: int) -> None:
        self.shown = count
        self._trials, self._reports, self._history = many_trials(count)

    def trials(self, row, *, after=0):
        return [trial for trial in self._trials[: self.shown] if trial.seq > after]

    def reports(self, row, numbers=None, *, after=0, last=False):
        return self._reports[10 * after : 10 * self.shown][9 if last else 0 :: 10 if last else 1]

    def hypervolumes(self, row, *, after=0):
        return [entry for entry in self._history if after <= entry[0] < self.shown]


def test_ten_thousand_trials_are_drawn_while_they_arrive(writer):
    store, count = Frozen(10_000), 10_000
    live = LiveStudy(writer.study)
    store.shown = count - 25
    live.refresh(store)
    for shown in range(count - 20, count + 1, 5):
        store.shown = shown
        live.refresh(store)
        front = figures.pareto_figure(live.frame, "flops_per_token", "bits_per_byte")
        volume = figures.hypervolume_figure(live.hypervolumes())
        assert to_json_plotly(front) and to_json_plotly(volume)
        assert len(live.frame) == shown
    assert next(trace for trace in front.data if trace.name == "complete").type == "scattergl"
    curves = live.curves(store, range(count))
    assert len(curves) == 10 * count and figures.curve_figure(curves, [0]).data[0].type == "scattergl"
    frame, names = frames.space_frame(live.frame, live.choices())
    assert figures.parallel_figure(frame, names, OBJECTIVES).data and figures.tried_figure(frame, "depth").data
    assert figures.marginal_figure(frame, "depth", "bits_per_byte").data
    pairs = frames.pair_frame(frame.assign(half=frame["trial"] % 2), "depth", "half", "bits_per_byte")
    assert pairs["trials"].sum() == len(frame) and figures.pair_figure(pairs, "depth", "half", "bits_per_byte").data
