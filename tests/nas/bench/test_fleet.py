"""A fleet of simulated workers is searched for by the real driver, and its time is all counted."""

from pathlib import Path

from hypernas.bench.fleet import PARTS, Fleet, drive
from hypernas.records import FINISHED, State
from hypernas.store import Reader
from hypernas.study import search


def test_a_checkpoint_that_is_written_as_its_worker_is_stopped_does_not_stay(tmp_path: Path, monkeypatch) -> None:
    late: list[Path] = []
    stop, abandon = Fleet.stop, Fleet.abandon

    def stop_late(fleet: Fleet, trial: int) -> None:
        late.append(Path(str(fleet._running[trial].job.checkpoint)))
        stop(fleet, trial)

    def write_and_abandon(fleet: Fleet) -> None:
        for path in late:
            path.write_bytes(b"late")
        abandon(fleet)

    monkeypatch.setattr(Fleet, "stop", stop_late)
    monkeypatch.setattr(Fleet, "abandon", write_and_abandon)
    monkeypatch.chdir(tmp_path)
    drive(str(tmp_path / "nas.db"), str(tmp_path), trials=70, workers=20)
    assert late and not any(path.exists() for path in late)


def test_a_fleet_trains_what_is_asked_and_every_report_and_trial_is_counted_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = str(tmp_path / "nas.db")
    found = drive(url, str(tmp_path), trials=80, workers=20)
    monkeypatch.setattr(search, "PAGE", 7)  # as if the study were a long one
    resumed = drive(url, str(tmp_path), trials=81, workers=1)
    with Reader(url) as store:
        study = store.study("fleet")
        trials, reports = store.trials(study), store.reports(study)
        on_front = {trial.number for trial in store.front(study)}
        kept = set(store.artifacts(study, "weights"))
    assert len(trials) == 81 and all(trial.state in FINISHED for trial in trials)
    assert {State.COMPLETE, State.STOPPED} <= {trial.state for trial in trials}  # halving is on
    assert kept == on_front
    parts = [*found.parts, found.end, *resumed.parts, resumed.end]
    assert sum(part.trials for part in parts) == 81
    assert sum(part.reports for part in parts) == len(reports)
    assert sum(part.trials for part in found.parts) == 60 and len(found.parts) == PARTS
    assert all(part.took.wall > 0 and part.memory > 0 for part in found.parts)
    assert resumed.first_submit > 0
