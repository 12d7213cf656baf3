"""Ladders: how learning rates are found, what is taken apart, and what the command keeps."""

import json
import math
from pathlib import Path

import pytest

from hypernas.cli.main import main
from hypernas.config.study_config import StudyConfig
from hypernas.errors import StudyError, UserError
from hypernas.records import State
from hypernas.scaling.analysis import analyse, describe
from hypernas.scaling.baseline import BASELINE_SIZES
from hypernas.scaling.contenders import TOGETHER, Contender, ablation, contenders
from hypernas.scaling.fit import Measurement
from hypernas.scaling.ladder import Climbed, best_rate, extrapolated_rate
from hypernas.scaling.launch import launch_scale
from hypernas.scaling.shape import Ladder
from hypernas.search_spaces import load_space
from hypernas.search_spaces.base import SpaceError, arch_to_json
from hypernas.store import Store
from hypernas.study.search import open_search, prepare
from hypernas.yardstick import Law, Yardstick

# ---- learning rates ------------------------------------------------------------------------------------------


def test_the_best_rate_is_the_lowest_point_of_a_parabola_in_log_rate():
    losses = {rate: 3 + (math.log(rate) - math.log(4e-3)) ** 2 for rate in (1e-3, 3e-3, 9e-3)}
    assert best_rate(losses) == pytest.approx(4e-3)


def test_beside_a_rate_that_diverged_and_at_an_end_the_best_tried_is_taken():
    assert best_rate({1e-3: 3.0, 3e-3: 2.5, 9e-3: math.inf}) == 3e-3
    assert best_rate({1e-3: 2.0, 3e-3: 2.5, 9e-3: 3.0}) == 1e-3
    assert best_rate({1e-3: math.inf}) is None


def test_rates_go_on_log_linearly_but_never_rise_nor_fall_faster_than_the_bound():
    assert extrapolated_rate({1000: 8e-3, 8000: 4e-3}, 64_000) == pytest.approx(2e-3)
    assert extrapolated_rate({1000: 4e-3, 8000: 9e-3}, 64_000) == pytest.approx(6e-3)
    assert extrapolated_rate({1000: 9e-3, 2000: 1e-3}, 1_000_000) > 1e-5


# ---- taking apart --------------------------------------------------------------------------------------------

LM = load_space("lm")


def contender(name: str, **keys) -> Contender:
    return Contender(name, arch_to_json(LM.from_json({k.replace("__", "."): v for k, v in keys.items()})), {}, 3)


def test_an_ablation_changes_one_component_at_a_time_and_then_all():
    base = contender("baseline", depth=2)
    found = ablation(LM, base, contender("trial 3", depth=4, ffn__activation="gelu", norm__position="post"))
    assert [c.name for c in found] == ["baseline", "+ ffn", "+ norm", TOGETHER]
    differs = [{k for k in base.arch if c.arch[k] != base.arch[k]} for c in found]
    assert differs == [set(), {"ffn.activation"}, {"norm.position"}, {"ffn.activation", "norm.position"}]
    assert found[-1].trial == 3


def test_a_component_brings_the_keys_that_belong_to_it():
    found = ablation(LM, contender("baseline"), contender(
        "trial 3", ffn__shape="hourglass", ffn__ratio=0.5, ffn__sub_mlps=2, streams__n=2, streams__mixing="kromhc"
    ))  # fmt: skip
    assert found[1].arch["ffn.sub_mlps"] == 2 and "ffn.sub_mlps" not in found[2].arch
    assert found[2].arch["streams.factors"] == "2"


def test_what_cannot_be_taken_apart_is_said():
    base = contender("baseline")
    with pytest.raises(UserError, match="differ in size alone"):
        ablation(LM, base, contender("trial 3", depth=2))
    with pytest.raises(UserError, match="differ in ffn: an ablation wants two"):
        ablation(LM, base, contender("trial 3", ffn__activation="gelu"))
    with pytest.raises(UserError, match="different families"):
        ablation(LM, base, contender("trial 3", family="lstm"))
    post = contender("old", norm__position="post")
    with pytest.raises(SpaceError, match=r"streams of trial 3 in old: norm\.position=post"):
        ablation(LM, post, contender("trial 3", streams__n=2, streams__mixing="kromhc"))


# ---- what came of it -----------------------------------------------------------------------------------------


def climbed(laws: dict[str, Law]) -> Climbed:
    sizes = [1000 * 2**k for k in range(6)]
    runs = [
        Measurement(family, N, 20 * N, 120.0 * N * N, float(law.loss(120.0 * N * N)), 0)
        for family, law in laws.items()
        for N in sizes
    ]
    return Climbed(tuple(runs), {family: dict.fromkeys(sizes, 3e-3) for family in laws}, (), ())


def faster(factor: float) -> Law:
    return Law(1.0, 60.0 * factor**-0.13, 0.13)


def test_the_analysis_gives_every_contender_its_gain_and_says_what_is_extrapolated():
    data = analyse(climbed({"baseline": faster(1), "trial 3": faster(2)}), [
        Contender("baseline", {}), Contender("trial 3", {}, {}, 3)
    ], seed=0)  # fmt: skip
    (entry,) = data["gains"]
    assert [point["measured"] for point in entry["points"]] == [True] * 5 + [False] * 3
    assert all(point["ceg"] == pytest.approx(2, rel=0.02) for point in entry["points"])
    assert entry["growth"]["value"] == pytest.approx(0, abs=0.01)
    assert json.loads(json.dumps(data)) == data
    text = "\n".join(describe(data))
    assert text.count("measured") - text.count("extrapolated") == 2 and "loss(N, D)" not in text
    assert "tokens varied beside size" in data["families"][0]["surface"]["missing"]


def test_an_ablation_is_analysed_with_its_interaction():
    laws = {"baseline": faster(1), "+ ffn": faster(1.5), "+ norm": faster(2), TOGETHER: faster(2)}
    data = analyse(climbed(laws), [Contender(name, {}) for name in laws], seed=0)
    found = data["interaction"]
    assert found["product"]["value"] == pytest.approx(3, rel=0.02)
    assert found["interaction"]["value"] == pytest.approx(2 / 3, rel=0.02)
    assert "together over product: 0.66" in "\n".join(describe(data))


def test_a_contender_that_never_meets_the_baseline_is_said_beside_the_others():
    laws = {"baseline": faster(1), "near": faster(2), "far": Law(1.0, 5.0, 0.13)}
    data = analyse(climbed(laws), [Contender(name, {}) for name in laws], seed=0)
    near, far = data["gains"]
    assert "points" in near and "never meet" in far["missing"]
    assert "not known: the losses of far and baseline never meet" in "\n".join(describe(data))


# ---- the command ---------------------------------------------------------------------------------------------

SMALL = {"context": "32", "depth": "1,2", "d_model": "16,32", "head_dim": "8", "train.batch_tokens": "256"}


@pytest.fixture(scope="module")
def searched(tmp_path_factory, text) -> Path:
    """A store with a search of three trials, the baselines, and one of the sampler's."""
    path = tmp_path_factory.mktemp("scale") / "nas.db"
    settings = {**SMALL, "train.tokens": "1024", "data.path": text}
    flags = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command = ["search", "--study", "s", "--store", str(path), "--engine", "inline", "--trials", "4"]
    assert main([*command, "--halving", "off", "--kernels", "reference", *flags]) == 0
    return path


LADDER = Ladder(sizes=(10_000, 16_000, 25_000, 40_000, 64_000), tokens_per_parameter=(0.25,), seeds=1, rates=(9e-3,))


def test_a_ladder_is_trained_once_kept_and_joins_the_trials_values(searched, capsys):
    given = {"study": "s", "store": str(searched), "engine": "inline"}
    data = launch_scale(given, "3", "baseline", LADDER)
    with Store(str(searched)) as store:
        row = store.study("s-scale")
        trials = store.trials(row)
        assert row.settings.scale == json.loads(json.dumps(data))
        assert {(trial.origin, trial.state) for trial in trials} == {("sweep", State.COMPLETE)}
        assert len(trials) == 10  # with one rate, the two smallest sizes were the ladder's already
        for trial in trials:
            size = min(LADDER.sizes, key=lambda size: abs(size - trial.parameters))
            assert trial.recipe.tokens == round(0.25 * size) and trial.arch["context"] == 32
        values = store.trial(store.study("s"), 3).values
        top = [point for point in data["gains"][0].get("points", []) if point["measured"]]
        assert top, data["gains"]
        assert (values["ceg"], values["ceg_flops"]) == (top[-1]["ceg"], top[-1]["flops"])
    assert launch_scale(given, "3", "baseline", LADDER) == data
    assert "10 of 10 trials are finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trials", "99"], "has no trial 99"),
        (["--trials", "x"], "wanted front, or numbers"),
        (["--baseline", "gpt3"], "base=gpt3 is no architecture"),
        (["--trials", "0,3", "--ablate"], "give --trials N"),
        (["--ladder", "5k"], "two rising sizes"),
        (["--ladder", "20k,40k,80k,900000M"], "with about 900,000,000,000 parameters (--ladder) needs"),
        (["--tokens-per-parameter", "many"], "wanted numbers, like 10,20,40"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(searched, flags, said, capsys):
    assert main(["scale", "--study", "s", "--store", str(searched), "--engine", "inline", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_named_baseline_takes_the_studys_context(searched):
    with Store(str(searched)) as store:
        base, *others = contenders(store, store.study("s"), "3", "transformer-2017")
    assert base.arch["norm.position"] == "post" and base.arch["context"] == 32
    assert [(other.name, other.trial) for other in others] == [("trial 3", 3)]


# ---- as an objective -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gaining(tmp_path_factory, text) -> list[str]:
    """A search for gain, by the flags that name it."""
    path = tmp_path_factory.mktemp("gain") / "nas.db"
    settings = {**SMALL, "train.tokens": "16384", "data.path": text}
    flags = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    study = ["--study", "g", "--store", str(path)]
    assert main(["search", *study, "--engine", "inline", "--trials", "6", "--objective", "ceg", *flags]) == 0
    return study


def test_a_search_for_gain_measures_its_baseline_first_and_every_trial_against_it(gaining):
    with Store(gaining[-1]) as store:
        row, ladder = store.study("g"), store.trials(store.study("g-baseline"))
        trials = store.trials(row, states=(State.COMPLETE,))
    assert row.objectives == ("ceg", "flops_per_token")
    yardstick = Yardstick.of(row.settings.yardstick)
    assert len(ladder) == len(BASELINE_SIZES) and yardstick.reach > max(t.values["training_flops"] for t in ladder)
    for trial in trials:
        assert trial.values["ceg"] == yardstick.gain(trial.values["bits_per_byte"], trial.values["training_flops"])
    (usual,) = (trial for trial in trials if trial.number == 0)
    assert usual.values["ceg"] == pytest.approx(1, rel=0.3)  # it lies on its own law, but for noise


def test_a_search_for_gain_goes_on_without_measuring_again_and_is_replayed_exactly(gaining, capsys):
    capsys.readouterr()
    assert main(["search", *gaining, "--engine", "inline", "--trials", "8", "--resume"]) == 0
    assert "first the baseline" not in capsys.readouterr().err
    assert main(["study", "replay", "g", *gaining[2:]]) == 0
    assert main(["front", *gaining, "--json"]) == 0
    out = capsys.readouterr().out
    front = json.loads(out[out.index("[") :])
    gains = [row["values"]["ceg"] for row in front]
    assert gains == sorted(gains, reverse=True)


def test_gain_is_no_objective_without_a_law_to_measure_it_with(tmp_path, text):
    config = StudyConfig(study="g", objectives=("ceg",), settings={**SMALL, "data.path": text})
    with Store(str(tmp_path / "nas.db"), create=True) as store, pytest.raises(StudyError, match="no law of its base"):
        open_search(store, prepare(config))


def test_a_trial_that_was_measured_at_scale_is_trained_again_to_its_values(gaining, tmp_path):
    with Store(gaining[-1]) as store:
        row = store.study("g")
        on_front = {trial.number for trial in store.front(row)}
        other = next(t for t in store.trials(row, states=(State.COMPLETE,)) if t.number not in on_front)
        store.add_values(row, other.number, {"ceg_low": 0.5})
    out = str(tmp_path / "model")
    assert main(["export", *gaining, "--trial", str(other.number), "--out", out]) == 0
