"""What `nas scale` found, as frames, figures, in the report and on its page."""

from dataclasses import replace

import pytest

from hypernas.dashboards import figures, frames, pages
from hypernas.dashboards.live import LiveStudy, scale_of
from hypernas.dashboards.paper import study_figures
from hypernas.dashboards.report import render
from hypernas.dashboards.texts import number
from hypernas.scaling.analysis import analyse
from hypernas.scaling.contenders import Contender
from hypernas.scaling.fit import Measurement
from hypernas.scaling.ladder import Climbed
from hypernas.yardstick import Law

SIZES = [1000 * 2**k for k in range(6)]
LAWS = {"baseline": Law(1.0, 60.0, 0.13), "trial 0 <b>": Law(1.0, 55.0, 0.13), "far": Law(1.0, 3.0, 0.13)}


@pytest.fixture(scope="module")
def found() -> dict:
    runs = [
        Measurement(family, N, 20 * N, 120.0 * N * N, float(law.loss(120.0 * N * N)))
        for family, law in LAWS.items()
        for N in SIZES
    ]
    rates = {family: dict.fromkeys(SIZES, 3e-3) for family in LAWS}
    return analyse(Climbed(tuple(runs), rates, (), ()), [Contender(name, {}) for name in LAWS], seed=0)


def test_frames_hold_every_run_and_mark_what_is_extrapolated(found):
    runs, laws, gains = (
        make(found) for make in (frames.scale_run_frame, frames.scale_law_frame, frames.scale_gain_frame)
    )
    assert len(runs) == 18
    last = runs["flops"].max()
    assert (laws["measured"] == (laws["flops"] <= last * 1.001)).all() and not laws["measured"].all()
    assert set(gains["candidate"]) == {"trial 0 <b>"}  # far never meets the baseline
    assert gains["measured"].tolist() == [True] * 5 + [False] * 3
    assert ((gains["low"] <= gains["ceg"]) & (gains["ceg"] <= gains["high"])).all()


def test_laws_are_solid_where_measured_and_dotted_beyond_and_names_are_no_markup(found):
    figure = figures.scale_figure(frames.scale_run_frame(found), frames.scale_law_frame(found))
    lines = [trace for trace in figure.data if trace.mode == "lines" and trace.fill is None]
    assert [trace.line.dash for trace in lines] == ["solid", "dot"] * 3
    assert max(x for x, y in zip(lines[0].x, lines[0].y, strict=True) if y == y) < max(lines[1].x)
    assert "trial 0 &lt;b&gt;" in {trace.name for trace in figure.data}


def test_gains_that_were_measured_are_filled_and_others_open(found):
    figure = figures.ceg_figure(frames.scale_gain_frame(found))
    assert [(trace.marker.symbol, len(trace.x)) for trace in figure.data] == [("circle", 5), ("circle-open", 3)]
    assert figure.layout.yaxis.type == "log"
    nothing = figures.ceg_figure(frames.scale_gain_frame({**found, "gains": [found["gains"][1]]}))
    assert "never meet" in nothing.layout.annotations[0].text


def test_the_ladders_findings_are_found_from_both_studies_and_join_the_report(writer, write_in, found):
    store, study = writer.store, writer.study
    assert scale_of(store, "first") is None
    assert "Compute-equivalent gain" not in render(store, study)
    ladder = write_in(store, "first-scale").study
    store.update_settings(ladder, replace(ladder.settings, scale=found))
    assert scale_of(store, "first") == scale_of(store, "first-scale") == found
    page = render(store, study)
    assert "Compute-equivalent gain" in page and "compute-equivalent gain of trial 0 &lt;b&gt; over baseline" in page
    assert set(study_figures(store, "first")) == {"front", "curves", "hypervolume", "scale-laws", "scale-gains"}


def test_a_trials_gain_is_a_column_of_the_report_and_an_axis_of_the_front(writer):
    writer.complete(3.0, 1e6)
    assert "compute-equivalent gain" not in render(writer.store, writer.study)
    writer.store.add_values(writer.study, 0, {"ceg": 1.2345, "ceg_flops": 3.4e12})
    page = render(writer.store, writer.study)
    assert 'title="compute-equivalent gain"' in page and "1.2345" in page
    study = LiveStudy(writer.study)
    study.refresh(writer.store)
    assert "ceg" in {option["value"] for option in pages.axis_choices(study)[1]}
    assert number("ceg_flops", 3.4e12) == "3.4T"


def test_the_page_says_what_was_found_or_how_to_find_it(found):
    assert "nas scale --study first" in str(pages.scale_said(None, "first"))
    assert "compute-equivalent gain of trial 0" in str(pages.scale_said(found, "first"))
