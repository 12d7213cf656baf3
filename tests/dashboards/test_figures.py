import json

import pytest
from plotly.io.json import to_json_plotly

from hypernas.dashboards import figures, frames

OBJECTIVES = ("bits_per_byte", "flops_per_token")
X, Y = "flops_per_token", "bits_per_byte"


def load(writer):
    reports = writer.store.reports(writer.study)
    frame = frames.trial_frame(writer.store.trials(writer.study), reports, OBJECTIVES)
    history = frames.hypervolume_frame(writer.store.hypervolumes(writer.study), frame)
    return frame, frames.curve_frame(reports), history


def every_figure(writer):
    frame, curves, history = load(writer)
    front = frame.loc[frame["on_front"], "trial"].tolist()
    return [
        figures.pareto_figure(frame, X, Y),
        figures.curve_figure(curves, front, Y),
        *(figures.hypervolume_figure(history, over) for over in figures.HYPERVOLUME_AXES),
    ]


def trace(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


def says(figure):
    return figure.layout.annotations[0].text


def test_every_figure_of_an_empty_study_says_that_it_waits(writer):
    assert [says(figure).startswith("No trial") for figure in every_figure(writer)] == [True] * 5


def test_every_figure_of_a_study_with_failures_only_says_that_nothing_was_measured(writer):
    writer.fail()
    assert [says(figure).startswith("No trial") for figure in every_figure(writer)] == [True] * 5


def test_every_figure_of_one_trial_is_drawn(writer):
    writer.complete(3.0, 1e6, rungs=2)
    for figure in every_figure(writer):
        assert figure.data and not figure.layout.annotations
        json.loads(to_json_plotly(figure))


def test_every_figure_of_two_thousand_trials_is_drawn_and_the_cloud_is_webgl(large):
    drawn = every_figure(large)
    assert trace(drawn[0], "complete").type == "scattergl"
    assert len(trace(drawn[0], "complete").x) == 1800
    assert len(drawn[1].data) <= figures.HIGHLIGHTED + 1
    for figure in drawn:
        json.loads(to_json_plotly(figure))


def test_every_state_has_its_own_mark_and_the_front_is_a_staircase_of_completed_trials(small):
    figure = figures.pareto_figure(load(small)[0], X, Y)
    assert figure.layout.xaxis.type == "log"
    assert list(trace(figure, "complete").customdata) == [1, 2]
    assert list(trace(figure, "baseline").customdata) == [0]
    assert list(trace(figure, "running, at its last report").customdata) == [4]
    assert (list(trace(figure, "front").x), trace(figure, "front").line.shape) == ([1e6, 4e6], "hv")
    assert list(trace(figure, "on the front").customdata) == [0, 2]
    symbols = [data.marker.symbol for data in figure.data if data.mode == "markers"]
    assert len(set(symbols)) >= 3  # told apart without colour


def test_infeasible_trials_have_a_mark_of_their_own_and_stay_off_the_front(small):
    bad = small.complete(1.0, 1e3, attrs={"constraints:latency_ms": 0.5})
    figure = figures.pareto_figure(load(small)[0], X, Y)
    assert list(trace(figure, figures.INFEASIBLE.name).customdata) == [bad]
    assert "infeasible" in trace(figure, figures.INFEASIBLE.name).hovertext[0]
    assert list(trace(figure, "on the front").customdata) == [0, 2]


def test_seeds_of_one_configuration_span_a_bar_on_the_front(writer):
    for loss, seed in ((3.0, 0), (3.4, 1), (2.8, 2)):
        writer.complete(loss, 1e6, arch_hash="same", seed=seed)
    bars = trace(figures.pareto_figure(load(writer)[0], X, Y), "range over seeds")
    assert list(bars.y) == [2.8]
    assert list(bars.error_y.array) == pytest.approx([0.6]) and list(bars.error_y.arrayminus) == [0.0]
    assert "3 seeds" in bars.hovertext[0]


def test_mixing_matrices_stand_side_by_side_with_gaps_between():
    matrices = [[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]]] * 5
    figure = figures.mixing_figure(matrices, [f"layer {index}" for index in range(10)])
    heat = figure.data[0]
    assert heat.z.shape == (5, 23)  # eight across, two down
    assert heat.z[0][:5].tolist()[:2] == [1.0, 0.0] and heat.z[0][2] != heat.z[0][2] and heat.z[3][3] == 0.5
    assert [note.text for note in figure.layout.annotations] == [f"layer {index}" for index in range(10)]
    json.loads(to_json_plotly(figure))


def test_the_gain_is_drawn_forward_and_backward():
    figure = figures.gain_figure(frames.gain_frame([[[2.0, 0.0], [0.0, 1.0]]] * 2))
    assert list(trace(figure, "forward").y) == [2.0, 4.0] and list(trace(figure, "backward").y) == [2.0, 4.0]


def test_two_choices_show_how_many_of_each_pair_stand_on_the_front(writer):
    for loss, flops, depth, shape in ((3.0, 1e6, 10, "a"), (2.5, 4e6, 2, "a"), (2.0, 9e6, 2, "b")):
        writer.complete(loss, flops, params={"depth": depth, "shape": shape})
    trials = writer.store.trials(writer.study)
    space, _ = frames.space_frame(load(writer)[0], frames.choice_frame({t.number: t.params for t in trials}))
    heat = figures.pair_figure(frames.pair_frame(space, "depth", "shape", Y), "depth", "shape", Y).data[0]
    assert (list(heat.x), list(heat.y)) == (["2", "10"], ["a", "b"])
    assert heat.z[0].tolist() == [1.0, 1.0] and heat.z[1][0] == 1.0 and heat.z[1][1] != heat.z[1][1]
    assert heat.text[1][0] == "1 of 1<br>best 2.0000"
    assert says(figures.pair_figure(frames.pair_frame(space.iloc[:0], "depth", "shape", Y), "a", "b", Y)) == (
        "No trial has completed yet."
    )


def test_zero_flops_have_no_place_on_a_logarithmic_axis(writer):
    writer.complete(3.0, 0.0)
    assert says(figures.pareto_figure(load(writer)[0], X, Y)) == "No trial has a result to show."


def test_front_trials_have_their_own_curves_and_the_rest_are_one_trace_with_gaps(small):
    _, curves, _ = load(small)
    figure = figures.curve_figure(curves, [0, 2], Y)
    assert [data.name for data in figure.data] == ["other trials", "trial 0", "trial 2"]
    assert list(trace(figure, "trial 2").y) == [4.5, 3.5, 2.5]
    others = trace(figure, "other trials").y
    assert [others[0], others[2]] == [3.5, 1.0] and others[1] != others[1]


@pytest.mark.parametrize("over", figures.HYPERVOLUME_AXES)
def test_the_hypervolume_is_drawn_over_trials_time_and_compute(small, over):
    history = load(small)[2]
    figure = figures.hypervolume_figure(history, over)
    steps = history[history["trial"] != 1]  # trial 1 is dominated: the line stays level there
    assert list(figure.data[0].x) == steps[over].tolist()
    assert list(figure.data[0].y) == steps["hypervolume"].tolist()


def test_hostile_text_is_no_markup_in_any_hover(writer, hostile):
    writer.complete(3.0, 1e6, arch={"family": hostile})
    hover = every_figure(writer)[0].data[0].hovertext[0]
    assert "<script" not in hover and "<img" not in hover and "&lt;script&gt;" in hover
    assert "\u202e" not in hover


def test_the_space_figures_of_nothing_say_so_and_of_trials_are_drawn(writer):
    def all_figures():
        trials = writer.store.trials(writer.study)
        choices = frames.choice_frame({trial.number: trial.params for trial in trials})
        frame, names = frames.space_frame(load(writer)[0], choices)
        return [
            figures.importance_figure(frames.importance_frame(frame, names, Y), Y),
            figures.marginal_figure(frame, "depth", Y),
            figures.tried_figure(frame, "depth"),
            figures.parallel_figure(frame, names, OBJECTIVES),
        ]

    assert [says(figure).split()[0] for figure in all_figures()] == ["Importance", "No", "No", "No"]
    for index in range(6):
        writer.complete(3.0 - index % 3, 1e6, params={"depth": (2, 10, 4)[index % 3], "shape": "ab"[index % 2]})
    importance, marginal, tried, parallel = all_figures()
    assert list(importance.data[0].y) == ["depth", "shape"] and importance.data[0].x[0] == pytest.approx(1.0)
    assert [box.name for box in marginal.data] == ["2", "4", "10"]  # numbers by size
    assert tried.layout.yaxis.categoryarray == ("2", "4", "10")
    assert [axis.label for axis in parallel.data[0].dimensions] == ["depth", "shape", Y, f"log10 {X}"]


def test_variants_of_a_trial_are_a_curve_of_their_own_over_axes_that_they_know(small):
    variants = frames.variant_frame({"2": [{"kept": 1.0, X: 3e6, Y: 2.6}, {"kept": 0.5, X: 2e6, Y: 2.9}]})
    figure = figures.pareto_figure(load(small)[0], X, Y)
    figures.add_variants(figure, variants, X, Y)
    curve = figure.data[-1]
    assert (curve.name, list(curve.x), list(curve.y)) == ("trial 2 in blocks", [3e6, 2e6], [2.6, 2.9])
    assert list(curve.customdata) == [2, 2]  # a click opens the trial
    drawn = len(figure.data)
    figures.add_variants(figure, variants, "latency_ms", Y)
    figures.add_variants(figure, frames.variant_frame({}), X, Y)
    assert len(figure.data) == drawn


def test_another_studys_front_and_a_budget_are_lines_over_the_same_axes(small):
    frame = load(small)[0]
    figure = figures.pareto_figure(frame, X, Y)
    figures.add_front(figure, frame, X, Y, "<b>other</b>", 0)
    figures.add_budget(figure, 2e6)
    assert figure.data[-1].name == "&lt;b&gt;other&lt;/b&gt;" and list(figure.data[-1].y) == [3.0, 2.5]
    assert figure.layout.shapes[0].x0 == 2e6
