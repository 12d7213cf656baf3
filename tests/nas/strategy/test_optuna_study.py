"""One contract over every sampler."""

from collections import deque
from pathlib import Path
from typing import Any

import pytest

from hypernas import pareto
from hypernas.config.plan import make_plan
from hypernas.config.study_config import SAMPLERS, StudyConfig
from hypernas.engines.inline import Inline
from hypernas.show.views import Silent
from hypernas.store import Store
from hypernas.strategy.optuna_study import ENDED, GONE, LATEST, Outcome, Proposer
from hypernas.strategy.samplers import PARENT, population_size
from hypernas.study.driver import run
from hypernas.study.search import open_search, prepare

TRIVIAL = "trivial"
EACH_SAMPLER = [pytest.param(name, marks=pytest.mark.slow) if name == "gp" else name for name in SAMPLERS]


def searched(folder: Path, sampler: str, trials: int, **config: object) -> tuple[list, int]:
    """Trials of a search whose objective takes no training, and its cache hits."""
    with Store(str(folder / "nas.db"), create=True) as store:
        settings = StudyConfig(study="s", sampler=sampler, trials=trials, preset="quick", **config)  # type: ignore[arg-type]
        search = open_search(store, prepare(settings), evaluate=TRIVIAL)
        run(search, Inline(), Silent())
        return store.trials(search.row), search.proposals.cache_hits


@pytest.mark.parametrize("sampler", EACH_SAMPLER)
def test_a_sampler_proposes_different_configurations_and_the_same_ones_for_the_same_seed(
    sampler: str, tmp_path: Path
) -> None:
    count = 16 if sampler == "gp" else 40  # its proposals take a second each
    runs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        runs.append(searched(tmp_path / name, sampler, count)[0])
    first, second = runs
    assert len(first) == count
    assert len({(trial.arch_hash, trial.recipe) for trial in first}) == count
    assert [(t.arch_hash, t.recipe) for t in first] == [(t.arch_hash, t.recipe) for t in second]


@pytest.mark.parametrize("sampler", EACH_SAMPLER)
def test_a_small_space_is_searched_to_its_last_point(sampler: str, tmp_path: Path) -> None:
    settings = {"depth": "2..3", "d_model": "32,64", "attention.ratio": "1", "ffn.shape": "conventional"}
    settings |= {"ffn.ratio": "2,4", "streams.n": "1", "gates.placement": "none", "optim.lr": "0.001,0.003,0.009"}
    trials, hits = searched(tmp_path, sampler, 24, settings=settings)
    assert len(trials) == 24  # 2 x 2 x 2 architectures at 3 rates: every one, once
    assert len({(trial.arch_hash, trial.recipe) for trial in trials}) == 24
    assert hits > 0


def test_a_refilled_study_goes_on_with_the_next_generation(tmp_path: Path) -> None:
    trials, _ = searched(tmp_path, "nsgaii", 30)
    with Store(str(tmp_path / "nas.db")) as store:
        resumed = StudyConfig(study="s", sampler="nsgaii", trials=40, preset="quick", resume=True)
        search = open_search(store, prepare(resumed), evaluate=TRIVIAL)
        run(search, Inline(), Silent())
        later = store.trials(search.row)[30:]
    generations = [trial.sampler_attrs.get("NSGAIISampler:generation", -1) for trial in [*trials, *later]]
    assert max(generations[:30]) >= 2
    assert min(generations[30:]) >= max(generations[:30]) - 1  # not from 0 again


def front_volume(sampler: str, seed: int, trials: int) -> float:
    """Hypervolume on a discrete problem of six parameters whose two costs pull apart along one of them."""

    def suggest(trial: Any) -> tuple[float, float]:
        x = trial.suggest_int("x", 0, 20) / 20
        waste = sum(trial.suggest_int(f"y{i}", 0, 9) for i in range(5)) / 45
        return x + waste, (1 - x) ** 2 + waste

    proposer = Proposer(sampler, seed, 20, 2, suggest)
    points = []
    for number in range(trials):
        handle, _, _, costs = proposer.ask(number, 0)
        proposer.tell(handle, Outcome(costs))
        points.append(costs)
    return pareto.hypervolume(points, (2.0, 2.0))


@pytest.mark.parametrize("sampler", ["nsgaii", "tpe", "evolution"])
def test_a_sampler_that_is_told_outcomes_beats_chance(sampler: str) -> None:
    ahead = [front_volume(sampler, seed, 120) > front_volume("random", seed, 120) for seed in range(5)]
    assert sum(ahead) >= 4


@pytest.mark.parametrize("sampler", ["nsgaii", "tpe", pytest.param("evolution", marks=pytest.mark.slow)])
def test_of_a_long_study_a_sampler_sees_the_latest_trials_and_the_best_of_all(sampler: str) -> None:
    proposer = Proposer(sampler, 0, 20, 2, lambda trial: trial.suggest_int("x", 0, 10**6))
    proposer.add({"x": 7}, {}, Outcome((0.0, 0.0)))
    for n in range(2 * LATEST):
        proposer.add({"x": 10 + n}, {}, Outcome((1.0 + n, 2.0), unfinished=0.5 * (n % 2)) if n % 5 else None)
    for n in range(50):
        handle, *_ = proposer.ask(n, 0)
        if n % 3:
            proposer.tell(handle, Outcome((5.0, 5.0)))
    seen = proposer._study.get_trials()
    assert len(seen) == LATEST + 1 and seen[0].params == {"x": 7}
    assert seen[-1].number == 2 * LATEST + 50


def test_on_a_large_cluster_evolution_goes_on_from_what_has_ended_though_the_latest_are_all_running() -> None:
    proposer = Proposer("evolution", 0, 20, 2, lambda trial: trial.suggest_float("x", 0.0, 1.0))
    running = deque(proposer.ask(n, 0)[0] for n in range(2 * LATEST))
    children = 0
    for n in range(40):
        proposer.tell(running.popleft(), Outcome((1.0 + n, 2.0)))  # of these, one is on the front
        handle, _, attrs, _ = proposer.ask(2 * LATEST + n, 0)
        running.append(handle)
        children += PARENT in attrs
    assert children == 21  # from the proposal on that follows the twentieth end


def test_on_a_large_cluster_no_child_of_evolution_is_what_a_worker_trains() -> None:
    proposer = Proposer("evolution", 0, 20, 2, lambda trial: trial.suggest_int("x", 0, 4 * LATEST))
    running = {}
    for n in range(2 * LATEST + 40):  # the first of them are shown to nobody any more
        handle, params, attrs, _ = proposer.ask(n, 0)
        assert PARENT not in attrs or params["x"] not in running.values()
        running[handle] = params["x"]
        if n >= 2 * LATEST - 40:
            first = next(iter(running))
            proposer.tell(first, Outcome((float(running.pop(first)), 2.0)))


def test_of_a_long_study_no_more_is_kept_or_made_than_its_sampler_sees() -> None:
    asked = 0

    def suggest(trial: Any) -> float:
        nonlocal asked
        asked += 1
        return float(trial.suggest_float("x", 0.0, 1e6))

    proposer = Proposer("evolution", 0, 20, 2, suggest)
    for n in range(4 * LATEST):
        proposer.add({"x": float(n)}, {}, Outcome((float(n), 2.0)))
    asked = 0
    for n in range(LATEST):
        handle, *_ = proposer.ask(4 * LATEST + n, 0)
        proposer.tell(handle, Outcome((float(n), 2.0)) if n % 3 else None)
    assert asked <= LATEST + LATEST + 1  # once for each proposal, and for each trial that was added and is seen
    kept = [trial for trial in proposer._storage._studies[0].trials if trial is not GONE]
    assert len(kept) <= LATEST + ENDED + 1


@pytest.mark.parametrize("sampler", ["evolution", "nsgaii", "nsgaiii"])
def test_of_a_long_study_no_child_was_tried_before_what_its_sampler_sees(sampler: str) -> None:
    count = 2 * LATEST

    def suggest(trial):
        return trial.suggest_int("x", 0, 2 * count - 1), *(
            trial.suggest_categorical(name, ["a", "b"]) for name in "yzw"
        )

    proposer = Proposer(sampler, 0, 20, 2, suggest)
    tried = {(2 * (7 * n % count), "a", "a", "b") for n in range(count)}  # in an order that leaves old ones anywhere
    for n in range(count):
        proposer.add({"x": 2 * (7 * n % count), "y": "a", "z": "a", "w": "b"}, {}, Outcome((1.0 + n, 2.0)))
    children = 0
    for n in range(60):
        handle, _, attrs, drawn = proposer.ask(n, 0)
        generation = max((attrs[name] for name in attrs if name.endswith(":generation")), default=0)
        if PARENT in attrs or generation > 0:
            children += 1
            assert drawn not in tried
        tried.add(drawn)
        proposer.tell(handle, Outcome((5.0, 5.0)))
    assert children > 20


def test_a_space_with_conditional_parameters_is_left_to_optuna() -> None:
    def suggest(trial):
        wide = trial.suggest_categorical("wide", [True, False])
        return trial.suggest_int("width", 1, 64) if wide else trial.suggest_int("depth", 1, 8)

    proposer = Proposer("tpe", 0, 8, 2, suggest)
    for number in range(30):
        handle, params, _, value = proposer.ask(number, 0)
        assert set(params) in ({"wide", "width"}, {"wide", "depth"})
        proposer.tell(handle, Outcome((float(value), 1.0)))


def test_short_searches_evolve_too() -> None:
    assert population_size(16) == 8
    assert population_size(40) == 10
    assert population_size(400) == 100


def test_the_baseline_teaches_the_sampler_when_it_is_inside_the_searched_space() -> None:
    plan = make_plan(StudyConfig(preset="quick"))
    arch, recipe = plan.baselines()[0]
    params = plan.params(arch, recipe)
    assert {"depth", "d_model", "ffn", "streams", "gates", "optim.lr"} <= params.keys()
