"""One contract over every sampler, halving on and off: searches whose objective takes no training."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from hypernas.bench.table import configurations
from hypernas.cli.main import main
from hypernas.config.plan import make_plan
from hypernas.config.study_config import SAMPLERS, StudyConfig
from hypernas.engines.inline import Inline
from hypernas.errors import UserError
from hypernas.integrations.warm_start import warm_start
from hypernas.records import Failure, FailureKind, Job, Report, Result, State, Trial
from hypernas.search_spaces.base import Uniform
from hypernas.show.views import Silent
from hypernas.store import Store
from hypernas.strategy.halving import ENOUGH, is_exempt
from hypernas.strategy.proposals import Proposals
from hypernas.study.driver import run
from hypernas.study.replay import replay
from hypernas.study.search import Search, open_search, prepare

HERE = "tests.nas.strategy.test_proposals"


def curved(job: Job) -> Iterator[Report | Result]:
    """A loss that falls over four rungs, lower for larger nets and for learning rates near 3e-3."""
    size = float(job.arch["depth"] * job.arch["d_model"])
    final = 8 / size**0.5 + abs(math.log10(job.recipe.learning_rate / 3e-3))
    for rung, share in enumerate((1 / 8, 1 / 4, 1 / 2, 1)):
        tokens = round(share * job.recipe.tokens)
        yield Report(job.trial, rung, rung, tokens, share * size, final + 0.5 * (1 - share), float(rung))
    yield Result(job.trial, job.token, values={"bits_per_byte": final, "flops_per_token": 1000 * size})


def searched(
    folder: Path, evaluate: object = curved, memory: float | None = None, **config: object
) -> tuple[Store, list[Trial]]:
    settings = StudyConfig(study="s", preset="quick", **{"engine": "inline", **config})  # type: ignore[arg-type]
    store = Store(str(folder / "nas.db"), create=True)
    prepared = prepare(settings)
    prepared = replace(prepared, plan=replace(prepared.plan, memory=memory))
    search = open_search(store, prepared, evaluate=f"{HERE}:{evaluate.__name__}")  # type: ignore[attr-defined]
    run(search, Inline(), Silent())
    return store, store.trials(search.row)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker finds this module under its own name."""
    import sys
    import types

    for name in ("tests", "tests.nas", "tests.nas.strategy"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])


def test_a_search_of_few_trials_finishes_all_and_extended_to_many_it_stops_some(
    tmp_path: Path,
) -> None:
    _, trials = searched(tmp_path, trials=12)
    assert {trial.state for trial in trials} == {State.COMPLETE}
    _, trials = searched(tmp_path, trials=ENOUGH, resume=True)
    assert sum(trial.state == State.STOPPED for trial in trials) > ENOUGH / 3


def bad_now_and_then(job: Job) -> Iterator[Report | Result]:
    """`curved`, but one result in five is no number."""
    *curve, result = curved(job)
    assert isinstance(result, Result)
    yield from curve
    bad = {0: math.nan, 5: math.inf}.get(job.trial % 10)
    yield result if bad is None else replace(result, values={**result.values, "bits_per_byte": bad})


def heard(search: Search) -> dict[str, tuple]:
    """What the study's sampler was told: costs and constraints, by parameters."""
    told = search.proposals._proposer._study.get_trials()
    return {repr(t.params): (t.values, t.constraints) for t in told if t.state == TrialState.COMPLETE}


# The two whose proposals take longest, a second with the Gaussian process, run once in `make test`.
SLOW = {("gp", False), ("tpe", False)}
CASES = [
    pytest.param(sampler, halving, marks=[pytest.mark.slow] if (sampler, halving) in SLOW else [])
    for sampler in SAMPLERS
    for halving in (True, False)
]


@pytest.mark.parametrize(("sampler", "halving"), CASES)
def test_every_sampler_repeats_nothing_learns_of_every_end_and_can_be_replayed(
    sampler: str, halving: bool, tmp_path: Path
) -> None:
    count = 13 if sampler == "gp" else 30  # its proposals take long
    store, trials = searched(tmp_path, bad_now_and_then, sampler=sampler, halving=halving, trials=count)
    row = store.study("s")
    assert [trial.number for trial in trials] == list(range(count))
    assert len({(trial.arch_hash, trial.recipe) for trial in trials}) == count
    stopped = [trial for trial in trials if trial.state == State.STOPPED]
    assert len(stopped) >= count / 4 if halving else not stopped
    assert not any(is_exempt(trial.number) for trial in stopped)
    failed = [trial for trial in trials if trial.failure]
    assert failed == [t for t in trials if t.number % 5 == 0 and t not in stopped] != []
    assert {str(trial.failure.kind) for trial in failed if trial.failure} == {"diverged"}
    assert all(trial.state == State.COMPLETE for trial in store.front(row))
    config = StudyConfig(study="s", preset="quick", sampler=sampler, halving=halving, trials=count, resume=True)
    told = heard(open_search(store, prepare(config)))
    for trial in trials[3:]:  # after the baselines
        costs, constraints = told[repr(dict(trial.params))]
        assert all(map(math.isfinite, costs))
        curve = store.reports(row, [trial.number])
        if trial in stopped:
            assert 1 <= len(curve) <= 3 and trial.values == {} and costs[0] == curve[-1].loss
            assert constraints == {"unfinished": 1 - curve[-1].tokens / trial.recipe.tokens}
        else:
            assert constraints == {"unfinished": 2.0 if trial in failed else 0.0}
    entries = list(replay(store, row))
    assert len(entries) == count - 3 and all(entry.drawn == entry.stored for entry in entries)


@pytest.mark.parametrize("sampler", ["evolution", "tpe"])
def test_a_finished_search_replays_to_the_same_proposals(sampler: str, tmp_path: Path) -> None:
    store, _ = searched(tmp_path, sampler=sampler, halving=True, trials=16)
    resumed = StudyConfig(study="s", preset="quick", sampler=sampler, halving=True, trials=26, resume=True)
    run(open_search(store, prepare(resumed), evaluate=f"{HERE}:curved"), Inline(), Silent())
    entries = list(replay(store, store.study("s")))
    assert len(entries) == 23  # three are the baselines
    assert [entry.drawn for entry in entries] == [entry.stored for entry in entries]


@pytest.mark.parametrize(
    ("sampler", "halving"), [("evolution", True), ("tpe", False), ("nsgaii", True), ("random", False)]
)
def test_the_first_hundred_proposals_on_192_points_are_a_hundred_architectures(
    sampler: str, halving: bool, tmp_path: Path
) -> None:
    settings = {
        "depth": "2..5",
        "d_model": "32,64",
        "attention.ratio": "0.5,1",
        "streams.n": "1,2",
        "optim.lr": "0.003",
    }
    settings |= {"ffn.ratio": "2,4,0.5", "ffn.sub_mlps": "4", "gates.layers": "all", "gates.placement": "none,ffn"}
    settings |= {"gates.rate": "0.5"}
    assert len(configurations(make_plan(StudyConfig(preset="quick", settings=settings)))) == 192
    _, trials = searched(tmp_path, sampler=sampler, halving=halving, trials=100, settings=settings)
    assert len({trial.arch_hash for trial in trials}) == 100


# ---- limits ----------------------------------------------------------------------------------------------------


def test_no_trial_exceeds_a_limit_and_the_small_are_not_preferred(tmp_path: Path) -> None:
    plan = make_plan(StudyConfig(preset="quick"))
    limit = plan.space.cost(plan.space.baseline()).flops_total
    _, trials = searched(tmp_path, sampler="random", trials=40, settings={"max.flops": str(limit)})
    spent = [plan.space.cost(plan.space.from_json(trial.arch)).flops_total for trial in trials]
    assert max(spent) <= limit
    assert sum(flops > limit / 2 for flops in spent) > 8


def test_what_no_worker_can_hold_is_never_proposed_and_a_replay_knows_how_much_there_was(tmp_path: Path) -> None:
    plan = make_plan(StudyConfig(preset="quick"))

    def kept(arch: object) -> float:
        return 16.0 * plan.space.cost(arch).parameters_total

    most = sorted(kept(plan.space.suggest(Uniform(np.random.default_rng(seed)))) for seed in range(30))[20]
    store, trials = searched(tmp_path, sampler="random", trials=20, memory=most)
    drawn = [trial for trial in trials if trial.origin == "sampler"]
    assert drawn and all(kept(plan.space.from_json(trial.arch)) < most for trial in drawn)
    assert all(entry.drawn == entry.stored for entry in replay(store, store.study("s")))


@pytest.mark.parametrize("key", ["max.flops", "max.parameters", "max.memory"])
def test_limits_that_nothing_meets_are_bad_input(key: str) -> None:
    with pytest.raises(UserError, match=f"{key}=10.*the least was"):
        make_plan(StudyConfig(preset="quick", settings={key: "10"}))


def timed(job: Job) -> Iterator[Report | Result]:
    """`curved`, but what takes longer than the search allows fails before its first rung."""
    *curve, result = curved(job)
    taken = job.arch["depth"] * job.arch["d_model"] / 100
    assert job.max_latency_ms == 3 and isinstance(result, Result)
    if taken > job.max_latency_ms:
        failure = Failure(FailureKind.OVER_LIMIT, f"latency {taken:g} ms, over max.latency_ms=3")
        yield replace(result, values={}, diagnostics={"latency_ms": taken}, failure=failure)
        return
    yield from curve
    yield replace(result, values={**result.values, "latency_ms": taken})


@pytest.mark.parametrize("sampler", [pytest.param("gp", marks=pytest.mark.slow), *(s for s in SAMPLERS if s != "gp")])
def test_the_sampler_hears_how_far_over_its_limit_a_latency_is_also_after_a_refill(
    sampler: str, tmp_path: Path
) -> None:
    count = 12 if sampler == "gp" else 24  # its proposals take a second each
    config = StudyConfig(
        study="s", preset="quick", sampler=sampler, trials=count, halving=True, resume=True,
        settings={"max.latency_ms": "3"},
    )  # fmt: skip
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        search = open_search(store, prepare(config), evaluate=f"{HERE}:timed")
        run(search, Inline(), Silent())
        trials = store.trials(search.row)
        again = open_search(store, prepare(config))
        entries = list(replay(store, search.row))
    over = [trial for trial in trials if trial.failure]
    assert 0 < len(over) < count and {str(trial.failure.kind) for trial in over if trial.failure} == {"over_limit"}
    assert heard(again) == heard(search)
    assert len(entries) == count - 3 and all(entry.drawn == entry.stored for entry in entries)
    told = [heard(search)[repr(dict(trial.params))][1] for trial in trials if trial.origin == "sampler"]
    for trial, constraints in zip(trials[3:], told, strict=True):
        taken = trial.arch["depth"] * trial.arch["d_model"] / 100
        assert constraints["latency_ms"] == (0.0 if trial.state == State.STOPPED else taken / 3 - 1)
        assert (constraints["latency_ms"] > 0) == (constraints["unfinished"] == 2.0) == (trial.failure is not None)


# ---- bad numbers -----------------------------------------------------------------------------------------------


def forgetful(job: Job) -> Iterator[Result]:
    yield Result(job.trial, job.token, values={"bits_per_byte": 1.0})


def test_an_objective_that_nobody_measured_fails_the_trial_with_its_name(tmp_path: Path) -> None:
    _, trials = searched(tmp_path, forgetful, trials=3)
    assert all(trial.failure and "flops_per_token" in trial.failure.message for trial in trials)


# ---- warm start ------------------------------------------------------------------------------------------------


def test_a_front_is_trained_first_from_a_study_and_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store, _ = searched(tmp_path, trials=12)
    front = [(trial.arch_hash, trial.recipe.learning_rate) for trial in store.front(store.study("s"))]
    assert main(["front", "--study", "s", "--store", str(tmp_path / "nas.db"), "--json"]) == 0
    (tmp_path / "front.json").write_text(capsys.readouterr().out)
    plan = make_plan(StudyConfig(preset="quick"))
    for source in ("s", f"{tmp_path / 'nas.db'}#s", str(tmp_path / "front.json")):
        found = warm_start(source, str(tmp_path / "nas.db"), plan)
        assert [(plan.space.arch_hash(arch), recipe.learning_rate) for arch, recipe in found] == front
    with pytest.raises(UserError, match="searches space lm, this one vision"):
        warm_start("s", str(tmp_path / "nas.db"), make_plan(StudyConfig(space="vision", preset="quick")))
    search = open_search(store, prepare(StudyConfig(study="t", preset="quick", trials=9)), f"{HERE}:curved", found)
    run(search, Inline(), Silent())
    given = [trial for trial in store.trials(search.row) if trial.origin == "enqueued"]
    known = {(trial.arch_hash, trial.recipe) for trial in store.trials(search.row) if trial.origin == "baseline"}
    fresh = [(plan.space.arch_hash(arch), r.learning_rate) for arch, r in found]
    fresh = [pair for pair, (_, r) in zip(fresh, found, strict=True) if (pair[0], r) not in known]
    assert [(trial.arch_hash, trial.recipe.learning_rate) for trial in given] == fresh[: 9 - 3]


def test_the_best_of_an_optuna_database_is_trained_first(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'old.db'}"
    plan = make_plan(StudyConfig(preset="quick"))
    old = optuna.create_study(storage=url, study_name="old", directions=["minimize", "minimize"])
    for loss in (1.0, 2.0):
        trial = old.ask()
        plan.suggest(trial)
        old.tell(trial, [loss, loss])
    (found,) = warm_start(f"optuna:{url}#old", "nas.db", plan)
    assert plan.params(*found) == old.best_trials[0].params
    with pytest.raises(UserError, match=r"trial 0 .* is not in this search"):
        warm_start(f"optuna:{url}#old", "nas.db", make_plan(StudyConfig(space="vision", preset="quick")))
    with pytest.raises(UserError, match="it has: old"):
        warm_start(f"optuna:{url}#new", "nas.db", plan)
    with pytest.raises(UserError, match="no such file"):
        warm_start(f"optuna:sqlite:///{tmp_path / 'none.db'}#old", "nas.db", plan)
    assert [path.name for path in tmp_path.iterdir()] == ["old.db"]


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("{", "not JSON"),
        ("{}", "wanted a list"),
        ("[]", "no architecture"),
        ('[{"depth": 99}]', "entry 0 is not in this"),
    ],
)
def test_a_file_that_cannot_start_a_search_says_why(text: str, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "archs.json"
    path.write_text(text)
    with pytest.raises(UserError, match=wanted):
        warm_start(str(path), "nas.db", make_plan(StudyConfig(preset="quick")))


def test_status_shows_how_well_rungs_foretell_the_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    searched(tmp_path, halving=True, trials=64)
    assert main(["status", "--study", "s", "--store", str(tmp_path / "nas.db"), "--json"]) == 0
    correlation = json.loads(capsys.readouterr().out)["rank_correlation"]
    assert set(correlation) == {"0", "1", "2"}
    assert all(value == pytest.approx(1) for value in correlation.values())  # these curves never cross


@pytest.mark.parametrize(("sampler", "shifted"), [("evolution", True), ("tpe", True), ("random", False)])
def test_what_learns_begins_with_cheap_nets_and_random_draws_stay_even(sampler: str, shifted: bool) -> None:
    plan = make_plan(StudyConfig(study="s", preset="small", trials=64))
    even = Uniform(np.random.default_rng(0))
    middle = float(np.median([plan.space.cost(plan.suggest(even)[0]).flops_total for _ in range(300)]))
    below = 0
    for seed in range(8):
        proposals = Proposals(plan, sampler, seed, (10.0, 12.0))
        drawn = [proposals.draw(number) for number in range(16)]
        below += sum(plan.space.cost(plan.space.from_json(p.arch)).flops_total < middle for p in drawn if p is not None)
    share = below / (8 * 16)  # the cheapest of four is below the median in fifteen cases of sixteen
    assert share > 0.85 if shifted else 0.3 < share < 0.7


@pytest.mark.parametrize(("halving", "sampler"), [(None, "tpe"), (True, "evolution")])
def test_without_a_named_sampler_halving_decides_and_each_trial_notes_it(
    halving: bool | None, sampler: str, tmp_path: Path
) -> None:
    _, trials = searched(tmp_path, halving=halving, trials=12)
    assert {trial.sampler_attrs["journal"]["sampler"] for trial in trials if trial.origin == "sampler"} == {sampler}
