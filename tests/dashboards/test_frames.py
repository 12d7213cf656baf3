from dataclasses import replace
from datetime import timedelta

import numpy as np
import pandas as pd
import pytest

from hypernas.dashboards import frames
from hypernas.records import State

OBJECTIVES = ("bits_per_byte", "flops_per_token")


def load(writer):
    reports = writer.store.reports(writer.study)
    trials = writer.store.trials(writer.study)
    return trials, reports, frames.trial_frame(trials, reports, OBJECTIVES)


def test_a_trial_frame_has_a_row_a_trial_with_its_values_and_state(small):
    _, _, frame = load(small)
    assert frame["trial"].tolist() == [0, 1, 2, 3, 4]
    assert frame["state"].tolist() == ["COMPLETE", "COMPLETE", "COMPLETE", "FAILED", "RUNNING"]
    assert frame["bits_per_byte"].tolist()[:3] == [3.0, 3.5, 2.5]
    assert frame["flops_per_token"].tolist()[:3] == [1e6, 2e6, 4e6]
    assert frame["accuracy"].tolist()[:3] == [0.5] * 3
    assert frame.loc[3, "failure"] == "out_of_memory" and frame.loc[3, "message"] == "no memory"
    assert frame["origin"].tolist() == ["baseline"] + ["sampler"] * 4


def test_a_running_trial_shows_the_loss_and_flops_of_its_last_report(small):
    _, _, frame = load(small)
    running = frame.loc[4]
    assert (running["bits_per_byte"], running["rung"]) == (1.0, 0)
    assert running["flops_per_token"] == pytest.approx(1e5)


def test_the_front_is_made_of_completed_trials_alone(small):
    _, _, frame = load(small)
    assert frame.loc[frame["on_front"], "trial"].tolist() == [0, 2]  # 4 is better and cheaper, but not done


def test_stopped_trials_never_stand_on_the_front(small):
    trials, reports, _ = load(small)
    stopped = replace(trials[4], state=State.STOPPED, values={"bits_per_byte": 0.1, "flops_per_token": 10.0})
    frame = frames.trial_frame([*trials[:4], stopped], reports, OBJECTIVES)
    assert frame.loc[4, "bits_per_byte"] == 1.0  # its last report, whatever its values say
    assert frame.loc[frame["on_front"], "trial"].tolist() == [0, 2]


def test_infeasible_trials_never_stand_on_the_front(small):
    small.complete(1.0, 1e3, attrs={"constraints:latency_ms": 0.5, "constraints:parameters": -2.0})
    small.complete(2.9, 1e6, attrs={"constraints:latency_ms": 0.0})
    _, _, frame = load(small)
    assert frame["violation"].tolist()[5:] == [0.5, 0.0]
    assert frame.loc[frame["on_front"], "trial"].tolist() == [2, 6]


def test_the_spread_over_seeds_is_that_of_the_same_architecture_and_recipe(writer):
    for loss, seed in ((3.0, 0), (3.4, 1), (2.8, 2)):
        writer.complete(loss, 1e6, arch_hash="same", seed=seed)
    writer.complete(2.0, 4e6, arch_hash="other")
    writer.fail(arch_hash="same", seed=3)
    _, _, frame = load(writer)
    spread = frames.seed_frame(frames.front_frame(frame, OBJECTIVES), frame, "bits_per_byte")
    assert spread.to_dict("records") == [{"trial": 2, "seeds": 3, "low": 2.8, "high": 3.4}]


def test_the_spread_of_a_trial_of_several_seeds_is_over_its_own(writer):
    by_seed = {"seed": [0, 1, 2], "bits_per_byte": [3.0, 3.4, 2.8]}
    number = writer.complete(3.07, 1e6, diagnostics={"by_seed": by_seed})
    _, _, frame = load(writer)
    spread = frames.seed_frame(frames.front_frame(frame, OBJECTIVES), frame, "bits_per_byte")
    assert spread.to_dict("records") == [{"trial": number, "seeds": 3, "low": 2.8, "high": 3.4}]


def test_the_front_frame_agrees_with_the_stores_front_best_loss_first(large):
    _, _, frame = load(large)
    expected = [trial.number for trial in large.store.front(large.study)]
    assert frames.front_frame(frame, OBJECTIVES)["trial"].tolist() == expected
    assert set(frame.loc[frame["on_front"], "trial"]) == set(expected)


def test_the_front_of_a_past_moment_knows_nothing_of_later_trials(small):
    _, _, frame = load(small)
    moment = frame.loc[1, "finished"]
    assert frames.front_frame(frame, OBJECTIVES, until=moment)["trial"].tolist() == [0]
    assert frames.front_frame(frame, OBJECTIVES, until=moment - timedelta(days=1)).empty


def test_a_maximised_objective_counts_upwards_on_the_front():
    points = [(0.9, 10), (0.8, 9), (0.7, 11)]
    rows = [
        {"trial": number, "state": "COMPLETE", "accuracy": accuracy, "parameters": parameters}
        for number, (accuracy, parameters) in enumerate(points)
    ]
    frame = frames.frame_of_rows(rows, ("accuracy", "parameters"))
    assert frame.loc[frame["on_front"], "trial"].tolist() == [0, 1]


def test_a_curve_frame_lists_every_report(small):
    _, reports, _ = load(small)
    curves = frames.curve_frame(reports)
    assert curves.groupby("trial")["loss"].apply(list).to_dict() == {
        0: [4.0, 3.0],
        1: [3.5],
        2: [4.5, 3.5, 2.5],
        4: [1.0],
    }
    assert curves["tokens"].tolist()[:2] == [1000, 2000]


def test_hypervolume_grows_over_trials_seconds_and_compute(small):
    _, _, frame = load(small)
    history = frames.hypervolume_frame(small.store.hypervolumes(small.study), frame)
    assert history["trial"].tolist() == [0, 1, 2]
    assert history["completed"].tolist() == [1, 2, 3]
    # (8 - 3)(9 - 6) = 15; trial 1 is dominated; trial 2 adds (3 - 2.5)(9 - log10 4e6)
    assert history["hypervolume"].tolist() == pytest.approx([15.0, 15.0, 15.0 + 0.5 * (9 - np.log10(4e6))])
    assert history["training_flops"].tolist() == pytest.approx([3e10, 9e10, 21e10])
    assert history["seconds"].is_monotonic_increasing and history["seconds"].iloc[0] >= 0


def test_the_hypervolume_of_all_trials_selected_is_the_studys_own(large):
    _, _, frame = load(large)
    whole = frames.hypervolume_frame(large.store.hypervolumes(large.study), frame)
    chosen = frames.selected_hypervolume_frame(frame, frame, OBJECTIVES, large.study.reference)
    pd.testing.assert_frame_equal(chosen, whole)


def test_the_hypervolume_of_a_selection_counts_its_trials_alone(small):
    small.complete(0.5, 1e3, attrs={"constraints:latency_ms": 1.0})
    _, _, frame = load(small)
    chosen = frames.selected_hypervolume_frame(frame.iloc[1:], frame, OBJECTIVES, small.study.reference)
    assert chosen["trial"].tolist() == [1, 2] and chosen["completed"].tolist() == [1, 2]
    first, second = 4.5 * (9 - np.log10(2e6)), 5.5 * (9 - np.log10(4e6))
    assert chosen["hypervolume"].tolist() == pytest.approx([first, second + 4.5 * np.log10(2)])
    assert frames.selected_hypervolume_frame(frame.iloc[3:], frame, OBJECTIVES, small.study.reference).empty


def test_pairs_of_choices_count_their_trials_those_on_the_front_and_their_best(writer):
    for loss, flops, depth, shape in ((3.0, 1e6, 2, "a"), (2.5, 4e6, 2, "a"), (2.0, 9e6, 4, "b"), (2.6, 9e6, 2, "a")):
        writer.complete(loss, flops, params={"depth": depth, "shape": shape})
    trials, _, frame = load(writer)
    space, _ = frames.space_frame(frame, frames.choice_frame({trial.number: trial.params for trial in trials}))
    pairs = frames.pair_frame(space, "depth", "shape", "bits_per_byte").set_index(["across", "down"])
    assert pairs.loc[(2, "a")].to_dict() == {"trials": 3, "on_front": 2, "best": 2.5, "trial": 1}
    assert pairs.loc[(4, "b")].to_dict() == {"trials": 1, "on_front": 1, "best": 2.0, "trial": 2}


def test_the_composite_gain_is_one_for_doubly_stochastic_matrices_and_that_of_the_product_for_others():
    swap, half = [[0.0, 1.0], [1.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]]
    assert frames.gain_frame([swap, half, swap])[["forward", "backward"]].to_numpy().ravel().tolist() == [1.0] * 6
    gains = frames.gain_frame([[[2.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, -3.0]]])
    assert gains["connection"].tolist() == [1, 2]
    # product [[2, 1], [0, -3]]: row sums 3, -3; column sums 2, -2
    assert gains["forward"].tolist() == [2.0, 3.0] and gains["backward"].tolist() == [2.0, 2.0]


def test_choices_are_a_column_for_each_searched_parameter(writer):
    writer.complete(3.0, 1e6, params={"depth": 2, "shape": "a"})
    writer.complete(3.0, 2e6, params={"depth": 4})
    choices = frames.choice_frame({trial.number: trial.params for trial in writer.store.trials(writer.study)})
    assert choices["depth"].tolist() == [2, 4]
    assert choices["shape"].tolist()[0] == "a" and pd.isna(choices["shape"][1])


def test_an_empty_study_gives_empty_frames_with_their_columns(writer):
    _, reports, frame = load(writer)
    assert frame.empty and {"trial", "state", *OBJECTIVES, "on_front"} <= set(frame.columns)
    assert frames.curve_frame(reports).empty
    assert frames.hypervolume_frame([], frame).empty
    assert frames.state_counts(frame)["COMPLETE"] == 0 and frames.failure_counts(frame) == {}


def test_states_and_failures_are_counted(small):
    _, _, frame = load(small)
    assert frames.state_counts(frame) == {"WAITING": 0, "RUNNING": 1, "COMPLETE": 3, "STOPPED": 0, "FAILED": 1}
    assert frames.failure_counts(frame) == {"out_of_memory": 1}


def test_merged_rows_replace_their_trials_and_the_front_follows(small):
    trials, _, frame = load(small)
    done = replace(trials[4], state=State.COMPLETE, values={"bits_per_byte": 1.0, "flops_per_token": 1e5})
    row = frames.trial_row(done, None, OBJECTIVES)
    merged = frames.merge(frame, [row], OBJECTIVES)
    assert merged["trial"].tolist() == [0, 1, 2, 3, 4]
    assert merged.loc[merged["on_front"], "trial"].tolist() == [4]


def test_choices_that_never_varied_and_trials_outside_the_space_are_left_out(writer):
    writer.complete(3.0, 1e6, origin="baseline")
    writer.complete(2.5, 1e6, params={"depth": 2, "shape": "a"})
    writer.complete(2.0, 2e6, params={"depth": 4, "shape": "a"})
    writer.fail(params={"depth": 6, "shape": "a"})
    trials, _, frame = load(writer)
    space, names = frames.space_frame(frame, frames.choice_frame({trial.number: trial.params for trial in trials}))
    assert space["trial"].tolist() == [1, 2] and space["depth"].tolist() == [2, 4] and names == ["depth"]


def test_importance_is_the_share_of_variance_a_choice_explains():
    # y = 10 a + b: by hand, SS(a) = 800, SS(b) = 8, total 808, so omega squared of a is
    # (800 - 8 / 6) / (808 + 8 / 6); b explains less than chance would.
    pairs = [(a, b) for a in (0, 1) for b in (0, 1)] * 2
    frame = pd.DataFrame({"a": [a for a, _ in pairs], "b": [b for _, b in pairs]})
    frame["loss"] = 20.0 * frame["a"] + 2.0 * frame["b"]
    shares = frames.importance_frame(frame, ["b", "a"], "loss").set_index("choice")["share"]
    assert shares["a"] == pytest.approx((800 - 8 / 6) / (808 + 8 / 6))
    assert shares["b"] == 0.0
    assert list(shares.index) == ["a", "b"]


def test_importance_of_too_few_trials_is_left_unsaid():
    frame = pd.DataFrame({"a": [0, 1], "loss": [1.0, 2.0]})
    assert frames.importance_frame(frame, ["a"], "loss").empty


def test_rank_correlation_says_how_well_a_rung_foretells_the_end():
    finals = {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}
    early = {0: 8.0, 1: 7.0, 2: 6.0, 3: 5.0}
    middle = {0: 3.0, 1: 4.0, 2: 6.0, 3: 5.0}
    rows = [
        {"trial": trial, "rung": rung, "loss": losses[trial]}
        for rung, losses in enumerate((early, middle, finals))
        for trial in finals
    ]
    ranks = frames.rank_frame(pd.DataFrame(rows), finals)
    assert ranks["correlation"].tolist() == pytest.approx([-1.0, 0.8])
    assert ranks["trials"].tolist() == [4, 4]
    assert frames.rank_frame(pd.DataFrame(rows), [0, 1]).empty  # two trials say nothing
    assert frames.rank_frame(frames.curve_frame([]), []).empty


def test_the_pace_is_finished_trials_over_the_time_since_the_first_start():
    start = pd.Timestamp("2026-01-01", tz="UTC")
    rows = [{"trial": n, "started": start, "finished": start + timedelta(minutes=30 * (n + 1))} for n in range(2)]
    frame = frames.frame_of_rows([*rows, {"trial": 2, "started": start}], OBJECTIVES)
    assert frames.pace(frame, asked=6) == (2.0, 7200.0)
    assert frames.pace(frames.frame_of_rows([], OBJECTIVES), 6) == (None, None)
