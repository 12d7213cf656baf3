"""Laws, their intervals and compute-equivalent gain, on runs drawn from known laws; and the published arithmetic."""

import json
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hypernas.errors import UserError
from hypernas.scaling.fit import (
    Fit,
    Measurement,
    Surface,
    fit_laws,
    fit_surface,
    frontier,
    gains,
    growth,
    interaction,
    measured_range,
)
from hypernas.search_spaces import lm, load_space, lstm
from hypernas.yardstick import Law, Yardstick, law_gain

LAWS = {"base": Law(1.0, 60.0, 0.13), "cand": Law(1.0, 90.0, 0.155)}
SIZES = np.geomspace(1e11, 1e13, 6).tolist()


def drawn(seed: int, noise: float, laws=LAWS, sizes=SIZES) -> list[Measurement]:
    """Three seeds at the smaller half of the sizes, one above; log losses off by `noise`."""
    rng = np.random.default_rng(seed)
    return [
        Measurement(family, round(C**0.5), round(20 * C**0.5), C, law.loss(C) * np.exp(rng.normal(0, noise)), s)
        for family, law in laws.items()
        for k, C in enumerate(sizes)
        for s in range(3 if k < len(sizes) // 2 else 1)
    ]


@pytest.fixture(scope="module")
def noisy() -> Fit:
    return fit_laws(drawn(0, 0.005), seed=0, draws=200)


# ---- laws ----------------------------------------------------------------------------------------------------

laws = st.builds(Law, st.floats(0, 3), st.floats(1, 1e3), st.floats(0.05, 0.3))


@given(laws, st.floats(1e10, 1e20))
def test_the_compute_for_a_loss_is_the_inverse_of_the_loss_after_a_compute(law, C):
    if law.loss(C) > 1.001 * law.irreducible:  # above, the difference is not all rounding
        assert law.flops(law.loss(C)) == pytest.approx(C, rel=1e-6)


@given(laws, laws, st.floats(1e10, 1e16))
def test_gaining_on_oneself_is_nothing_and_gaining_back_undoes(one, other, C):
    one = replace(one, irreducible=other.irreducible)
    if one.loss(C) < 1.001 * one.irreducible:
        return
    assert law_gain(one, one, C) == pytest.approx(1, rel=1e-6)
    there = law_gain(one, other, C)
    assert law_gain(other, one, C * there) == pytest.approx(1 / there, rel=1e-6)


@given(laws, st.floats(1e10, 1e16))
@example(Law(0.0, 1.0, 0.25), 1801439850948199.0)  # 10 C / C is not 10 here
def test_a_baseline_gains_nothing_on_its_own_law_and_less_for_a_higher_loss(law, C):
    yardstick = Yardstick(law, reach=10 * C)
    loss = float(law.loss(C))
    if loss > 1.001 * law.irreducible:
        assert yardstick.gain(loss, C) == pytest.approx(1, rel=1e-6)
        assert yardstick.gain(1.01 * loss, C) < 1
    assert yardstick.gain(law.irreducible / 2, C) == yardstick.reach / C  # 10, to the last bit that the division has
    assert Yardstick.of(json.loads(json.dumps(asdict(yardstick)))) == yardstick


def test_below_what_is_irreducible_no_compute_is_enough():
    assert LAWS["base"].flops([1.0, 0.5]).tolist() == [np.inf, np.inf]


@settings(max_examples=15)
@given(st.floats(0.2, 1.5), st.floats(0.05, 0.3), st.floats(0.05, 0.3))
def test_runs_without_noise_give_their_laws_back(E, first, second):
    true = {"a": Law(E, 2.0 * 1e11**first, first), "b": Law(E, 1.5 * 1e11**second, second)}
    fit = fit_laws(drawn(0, 0.0, true, np.geomspace(1e11, 1e15, 8)), seed=0, draws=2)
    for family, law in true.items():
        found = fit.laws[family]
        assert found.irreducible == pytest.approx(E, abs=0.03)
        assert found.exponent == pytest.approx(law.exponent, rel=0.05)
        at = np.geomspace(1e11, 1e15, 20)
        assert found.loss(at) == pytest.approx(law.loss(at), rel=1e-3)


def test_a_run_gone_wrong_moves_the_laws_little():
    runs = drawn(1, 0.002)
    wrong = [replace(run, loss=1.05 * run.loss) if run.flops == SIZES[4] else run for run in runs]
    clean, spoilt = (fit_laws(some, seed=0, draws=50).laws["cand"].loss(1e12) for some in (runs, wrong))
    assert spoilt == pytest.approx(clean, rel=0.01)


def test_the_same_seed_draws_the_same_intervals(noisy):
    again = fit_laws(drawn(0, 0.005), seed=0, draws=200)
    assert gains(again, "cand", "base", [1e12, 1e15]) == gains(noisy, "cand", "base", [1e12, 1e15])
    assert gains(fit_laws(drawn(0, 0.005), seed=1, draws=200), "cand", "base", [1e12]) != gains(
        noisy, "cand", "base", [1e12]
    )


def test_the_band_of_a_law_holds_its_losses_and_widens_where_nothing_was_measured(noisy):
    at = np.array([1e12, 1e16])
    low, high = noisy.band("cand", at)
    assert (low < LAWS["cand"].loss(at)).all() and (LAWS["cand"].loss(at) < high).all()
    assert (high / low)[1] > 2 * (high / low)[0] - 1


def test_irreducible_loss_and_exponents_come_with_intervals_that_hold_the_truth(noisy):
    E, alpha = noisy.irreducible(), noisy.exponent("cand")
    assert E.low <= 1.0 <= E.high and alpha.low <= 0.155 <= alpha.high


def test_the_noise_of_one_run_is_found():
    found = [fit_laws(drawn(seed, 0.005), seed=0, draws=2).noise for seed in range(20)]
    assert np.mean(found) == pytest.approx(0.005, rel=0.2)


# ---- the frontier --------------------------------------------------------------------------------------------


def test_the_frontier_averages_seeds_and_leaves_out_what_a_cheaper_run_matches():
    runs = drawn(0, 0.0, {"base": LAWS["base"]})
    waste = Measurement("base", 10, 10, 3e12, 9.0)
    twin = replace(runs[0], loss=runs[0].loss * 1.21, seed=9)
    found = frontier("base", [*runs, waste, twin])
    assert found.flops.tolist() == pytest.approx(SIZES)
    assert found.seeds.tolist() == [4, 3, 3, 1, 1, 1]
    assert found.losses[0] == pytest.approx(runs[0].loss * 1.21**0.25)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: run.flops < 8e11, "base: 3 sizes were trained to the end, a law needs 4"),
        (lambda run: run.flops < 8e11 or run.family == "base", "cand: 3 sizes"),
        (lambda run: False, "no run was trained"),
        (lambda run: replace(run, loss=float("nan")), r"base: the loss .* is nan"),
        (lambda run: replace(run, loss=5 - run.loss), "base: loss does not fall with compute, only 1 of 6 sizes"),
        (lambda run: replace(run, flops=1e12 * (run.flops / 1e12) ** 0.1), "base: its sizes span 0.20 decades"),
    ],
)
def test_what_is_missing_for_a_law_is_named(spoil, said):
    spoilt = [(run, spoil(run)) for run in drawn(0, 0.0)]
    with pytest.raises(UserError, match=said):
        fit_laws([run if kept is True else kept for run, kept in spoilt if kept], seed=0, draws=5)


# ---- gains ---------------------------------------------------------------------------------------------------


def test_every_gain_says_whether_it_was_measured(noisy):
    low, high = measured_range(noisy, "cand", "base")
    assert SIZES[0] <= low < high <= SIZES[-1]
    found = gains(noisy, "cand", "base", [low / 2, low, high, high * 2])
    assert [gain.measured for gain in found] == [False, True, True, False]


def test_inside_the_measured_range_a_gain_is_interpolated_between_measurements():
    runs = drawn(0, 0.0)
    bent = [
        replace(run, loss=run.loss * 0.97) if run.flops == SIZES[2] and run.family == "cand" else run for run in runs
    ]
    fit = fit_laws(bent, seed=0, draws=20)
    (gain,) = gains(fit, "cand", "base", [SIZES[2]])
    loss = np.log(next(run.loss for run in bent if run.flops == SIZES[2] and run.family == "cand"))
    y = np.log(LAWS["base"].loss(SIZES))
    assert gain.measured
    assert gain.gain.value == pytest.approx(np.exp(np.interp(-loss, -y, np.log(SIZES))) / SIZES[2])


def test_the_gain_of_a_family_on_itself_is_one_and_does_not_grow(noisy):
    (gain,) = gains(noisy, "base", "base", [1e12])
    assert gain.gain.value == pytest.approx(1) and gain.gain.low <= 1 <= gain.gain.high
    assert growth(noisy, "base", "base").value == 0


def test_growth_is_the_exponent_by_which_the_laws_gain_rises(noisy):
    one, two = gains(noisy, "cand", "base", [1e17, 1e18])
    slope = np.log10(two.gain.value / one.gain.value)
    assert slope == pytest.approx(growth(noisy, "cand", "base").value, rel=1e-6)


def test_families_whose_losses_never_meet_are_named_with_what_to_train():
    apart = {"base": Law(1.0, 60.0, 0.1), "cand": Law(1.0, 10.0, 0.1)}
    fit = fit_laws(drawn(0, 0.0, apart), seed=0, draws=5)
    with pytest.raises(UserError, match=r"never meet.*train smaller sizes of cand or larger ones of base"):
        gains(fit, "cand", "base", [1e12])
    with pytest.raises(UserError, match="no runs of 'lstm'; there are runs of base, cand"):
        gains(fit, "lstm", "base", [1e12])


def test_components_that_do_not_mind_each_other_interact_by_one_and_those_that_do_by_less():
    base = Law(1.0, 60.0, 0.13)

    def faster(factor: float) -> Law:
        return Law(1.0, 60.0 * factor**-0.13, 0.13)

    parts = {"base": base, "a": faster(1.5), "b": faster(2.0)}
    for joint, wanted in ((3.0, 1.0), (2.0, 2 / 3)):
        fit = fit_laws(drawn(0, 0.002, {**parts, "both": faster(joint)}), seed=0, draws=100)
        found = interaction(fit, "base", ("a", "b"), "both", 1e12)
        assert found.measured
        assert found.product.value == pytest.approx(found.single["a"].value * found.single["b"].value)
        assert found.interaction.low < wanted < found.interaction.high
        assert (found.interaction.high < 1) == (wanted < 1)


# ---- how far to trust the intervals --------------------------------------------------------------------------

AT = (4e11, 1e12, 1e14, 1e16)  # two where both were measured, one and three decades beyond


def hits(draw: int, noise: float) -> list[bool]:
    found = gains(fit_laws(drawn(draw, noise), seed=draw, draws=300), "cand", "base", AT)
    true = law_gain(LAWS["cand"], LAWS["base"], AT)
    return [gain.gain.low <= wanted <= gain.gain.high for gain, wanted in zip(found, true, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.002, 0.01])
def test_the_true_gain_lies_in_its_interval_in_at_least_88_of_100_draws(noise):
    found = np.mean([hits(draw, noise) for draw in range(200)], axis=0)
    assert (found >= 0.88).all(), dict(zip(AT, found, strict=True))


def test_an_interval_is_as_narrow_as_the_noise_allows():
    at = AT[1]
    narrow, wide = (gains(fit_laws(drawn(3, s), seed=0, draws=200), "cand", "base", [at])[0] for s in (0.001, 0.01))
    assert narrow.gain.high / narrow.gain.low < 1.2
    assert wide.gain.high / wide.gain.low > 1.5


def test_a_ladder_of_60_runs_with_1000_bootstraps_is_fitted_in_five_seconds():
    four = {**LAWS, "c": Law(1.0, 70.0, 0.14), "d": Law(1.0, 65.0, 0.13)}
    runs = drawn(0, 0.005, four, np.geomspace(1e11, 1e13, 8))[:60]
    start = time.process_time()
    fit_laws(runs, seed=0, draws=1000)
    assert time.process_time() - start < 5


# ---- loss(N, D) ----------------------------------------------------------------------------------------------

HOFFMANN = Surface(1.69, 406.4, 410.7, 0.34, 0.28)


def on_surface(ratios: tuple[int, ...]) -> list[Measurement]:
    return [
        Measurement("a", N, N * ratio, 6.0 * N * N * ratio, float(HOFFMANN.loss(N, N * ratio)))
        for N in (10**6, 4 * 10**6, 10**7, 4 * 10**7)
        for ratio in ratios
    ]


def test_loss_of_size_and_tokens_is_found_where_both_vary():
    found = fit_surface(on_surface((5, 20, 80)))
    assert found.loss(2e7, 1e9) == pytest.approx(HOFFMANN.loss(2e7, 1e9), rel=2e-3)
    assert (found.a, found.b) == pytest.approx((HOFFMANN.a, HOFFMANN.b), rel=0.15)


def test_size_and_tokens_that_vary_together_are_not_told_apart():
    with pytest.raises(UserError, match="tokens varied beside size"):
        fit_surface(on_surface((20,)))


def test_the_efficient_frontier_is_the_least_loss_of_each_compute():
    law = HOFFMANN.efficient()
    for C in (1e18, 1e21):
        N = np.geomspace(1e6, 1e12, 20_000)
        assert law.loss(C) == pytest.approx(HOFFMANN.loss(N, C / 6 / N).min(), rel=1e-6)


# ---- the arithmetic of 2511.21622, from its published constants ----------------------------------------------

LSTM, RETRO, MODERN = Law(1.9, 36.3, 0.065), Law(1.9, 81.7, 0.091), Law(1.9, 88.0, 0.094)


def compute_of(year: float) -> float:
    """FLOPs of the largest training of a year."""
    return 1e16 * 4.1 ** (year - 2013)


def test_from_lstm_to_modern_transformer():
    found = law_gain(MODERN, LSTM, [1e15, 1e16, 1e18])
    assert found == pytest.approx([5.97, 16.7, 130], rel=3e-3)


def kaplan_to_chinchilla(C: float) -> float:
    """Gain of spending C FLOPs by 2203.15556 and not by Kaplan et al. 2020, whose models grow as C^0.73."""
    k_N, k_D = 3.63e-6, 4.59e4
    assert 6 * k_N * k_D == pytest.approx(1, abs=1e-3)
    law = HOFFMANN.efficient()
    assert (law.scale, law.exponent) == pytest.approx((1071.4, 0.15355), rel=1e-4)
    # The paper's own rounding of C / law.flops(loss of the Kaplan allocation).
    published = 1.85e-20 * C * (28737.9 * C**-0.2482 + 20.337 * C**-0.0756) ** 6.512
    assert C / law.flops(HOFFMANN.loss(k_N * C**0.73, k_D * C**0.27)) == pytest.approx(published, rel=2e-3)
    return published


def scale_invariant() -> float:
    """Five of the six ablated components, shrunk so that all six multiply to what they gave together; and mixtures."""
    learned, rotary, pre_norm, cosine, rms_norm, swiglu = 1.44 / 1.26, 1.26, 1.87, 1.04, 1.09, 1.17
    counted = learned * rotary * pre_norm * cosine * rms_norm
    return 2.0 * counted ** (np.log(1.33) / np.log(counted * swiglu))


@pytest.mark.parametrize(
    ("year", "transformer", "allocation", "total"),
    [(2023, 726.15, 3.714, 6926.35), (2025, 847.8, 9.836, 21415.66)],
)
def test_the_published_total_is_transformer_times_allocation_times_the_rest(year, transformer, allocation, total):
    C = compute_of(year)
    both = law_gain(RETRO, LSTM, C)
    assert kaplan_to_chinchilla(C) == pytest.approx(allocation, abs=5e-4)
    assert both / kaplan_to_chinchilla(C) == pytest.approx(transformer, rel=1e-4)
    assert scale_invariant() == pytest.approx(2.568, abs=5e-4)
    assert both * scale_invariant() == pytest.approx(total, abs=0.005)


def test_the_published_steps_before_the_total():
    assert compute_of(2023) == pytest.approx(1.342e22, rel=3e-4)
    assert law_gain(RETRO, LSTM, compute_of(2023)) == pytest.approx(2697.1, abs=0.05)
    early = compute_of(2017.01)
    assert law_gain(RETRO, LSTM, early) / kaplan_to_chinchilla(early) == pytest.approx(90.87, abs=0.005)


VOCAB = 50_257


@pytest.mark.parametrize(("d", "wanted"), [(32, 1_691_249), (64, 3_528_849), (128, 8_580_305), (256, 29_693_265)])
def test_reference_transformers_count_what_ours_do_but_norms_and_an_output_bias(d, wanted):
    arch = load_space("lm").from_json({"d_model": d, "depth": d // 16, "ffn.ratio": 4, "context": 128})
    counted = lm.cost(replace(arch, vocab=VOCAB)).parameters
    assert sum(counted.values()) - counted["norms"] + VOCAB == wanted


@pytest.mark.parametrize(("d", "wanted"), [(64, 3_299_729), (256, 13_441_361)])
def test_reference_lstms_count_what_ours_do_but_an_output_bias(d, wanted):
    arch = load_space("lm").from_json({"family": "lstm", "d_model": d, "depth": 1, "context": 128})
    assert lstm.cost(replace(arch, vocab=VOCAB)).parameters_total + VOCAB == wanted
