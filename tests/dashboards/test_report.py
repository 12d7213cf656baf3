"""The report: one file, offline, with the database's texts as texts."""

import re
from pathlib import Path

import pytest
from _pytest.fixtures import FixtureRequest

from dashboards import figures, frames
from dashboards.report import write_report
from nas.errors import StudyError, UserError
from nas.records import State

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"


def trial_frame(writer):
    store, study = writer.store, writer.study
    return frames.trial_frame(store.trials(study), store.reports(study), study.objectives)


def test_frames_hold_the_numbers_of_the_store(small) -> None:
    frame = trial_frame(small)
    assert frame["trial"].tolist() == [0, 1, 2, 3, 4]
    assert frame["state"].tolist() == ["COMPLETE"] * 3 + ["FAILED", "RUNNING"]
    assert frame["bits_per_byte"].tolist()[:3] == [3.0, 3.5, 2.5]
    assert frame["bits_per_byte"].isna().tolist() == [False, False, False, True, False]
    assert frame["rung"].tolist()[0] == 1


def test_only_completed_trials_stand_on_the_front(small) -> None:
    frame = trial_frame(small)
    front = frames.front_frame(frame, small.study.objectives)
    assert front["trial"].tolist() == [2, 0]  # best loss first; the running trial's better report does not count
    assert set(front["state"]) == {str(State.COMPLETE)}
    assert [trial.number for trial in small.store.front(small.study)] == front["trial"].tolist()


def test_hypervolume_frame_follows_the_stored_history(small) -> None:
    history = frames.hypervolume_frame(small.store.hypervolumes(small.study), trial_frame(small))
    assert history["hypervolume"].tolist() == [volume for _, _, volume in small.store.hypervolumes(small.study)]
    assert history["completed"].tolist() == [1, 2, 3]
    assert history["seconds"].is_monotonic_increasing


@pytest.mark.parametrize("name", ["writer", "small", "large"])
def test_every_figure_is_drawn_for_empty_small_and_large_studies(name: str, request: FixtureRequest) -> None:
    writer = request.getfixturevalue(name)
    frame = trial_frame(writer)
    curves = frames.curve_frame(writer.store.reports(writer.study))
    history = frames.hypervolume_frame(writer.store.hypervolumes(writer.study), frame)
    drawn = [
        figures.pareto_figure(frame, "flops_per_token", "bits_per_byte"),
        figures.curve_figure(curves, frame.loc[frame["on_front"], "trial"].tolist(), "bits_per_byte"),
        figures.hypervolume_figure(history),
    ]
    for figure in drawn:
        assert len(figure.data) + len(figure.layout.annotations) > 0  # an empty study says so in words


def test_the_report_is_one_file_that_asks_nothing_of_the_network(small, tmp_path: Path) -> None:
    path = write_report(small.store, "first", str(tmp_path / "report.html"))
    page = path.read_text()
    assert list(tmp_path.glob("*.html")) == [path]
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert "Plotly" in page and "bits per byte" in page


def test_texts_of_the_database_are_shown_as_text(store, writer, tmp_path: Path) -> None:
    hostile = writer.__class__(store, make_hostile(store))
    hostile.complete(3.0, 1e6)
    hostile.fail(message=HOSTILE)
    page = write_report(store, HOSTILE[:200], str(tmp_path / "report.html")).read_text()
    assert HOSTILE not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def make_hostile(store):
    from nas.records import SpaceSpec

    return store.create_study(
        HOSTILE,
        space=SpaceSpec("lm"),
        objectives=("bits_per_byte", "flops_per_token"),
        settings={"trials": 10, "seed": 0},
        reference={"bits_per_byte": 8.0, "flops_per_token": 9.0},
        data_name=HOSTILE,
        data_hash="0" * 64,
        artifacts="nowhere",
    )


def test_a_report_that_cannot_be_written_says_where(small, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        write_report(small.store, "first", str(tmp_path / "no" / "report.html"))
    with pytest.raises(UserError, match="is a folder"):
        write_report(small.store, "first", str(tmp_path))
    with pytest.raises(StudyError, match="it has: first"):
        write_report(small.store, "second", str(tmp_path / "report.html"))


@pytest.mark.browser
def test_the_report_draws_its_figures_in_a_browser(small, chromium: str, tmp_path: Path) -> None:
    import subprocess

    path = write_report(small.store, "first", str(tmp_path / "report.html"))
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    quiet += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [chromium, *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.count('class="main-svg"') >= 3
    assert ">baseline<" in done.stdout
