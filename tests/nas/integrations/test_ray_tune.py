"""Our parts in experiments that are not ours: real clusters, networks that are built and trained a little."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hypernas.config.study_config import StudyConfig
from hypernas.engines.cluster import join_cluster
from hypernas.engines.tune_pool import TUNE_ENVIRONMENT
from hypernas.errors import StudyError, UserError
from hypernas.integrations.ray_tune import ArchSearch, ParetoHalving, StudyCallback, build
from hypernas.records import State
from hypernas.store import Store

OBJECTIVES = ("bits_per_byte", "flops_per_token")
SETTINGS = {
    "depth": "1,2", "d_model": "32", "head_dim": "16", "context": "16", "ffn.shape": "conventional", "streams.n": "1",
    "gates.placement": "none", "optim.name": "adamw", "optim.lr": "0.001..0.01", "train.tokens": "4096",
    "train.batch_tokens": "1024",
}  # fmt: skip


@pytest.fixture(scope="module")
def tune() -> Iterator[Any]:
    patch = pytest.MonkeyPatch()
    for name, value in TUNE_ENVIRONMENT.items():
        patch.setenv(name, value)
    ray = join_cluster(2, None, 0.0).ray
    from ray import tune

    yield tune
    ray.shutdown()
    patch.undo()


def config(folder: Path, **changes: Any) -> StudyConfig:
    return StudyConfig(study="mine", store=str(folder / "nas.db"), **{"settings": SETTINGS, "trials": 8} | changes)


def train(config: dict[str, Any]) -> None:
    """Someone's own training: three steps on noise, and one architecture that fails."""
    from ray import tune

    torch.manual_seed(config["recipe"]["seed"])
    torch.set_num_threads(1)
    model = build(config)
    if config["recipe"]["learning_rate"] > 0.005:
        raise ValueError("someone's own mistake")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["recipe"]["learning_rate"])
    tokens = torch.randint(0, 256, (4, 17))
    for step in range(3):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tune.report(
            {
                "tokens": config["recipe"]["tokens"] * (step + 1) // 3,
                "bits_per_byte": loss.item() / math.log(2),
                **config["cost"],
            }
        )


@pytest.mark.slow
def test_an_experiment_of_someone_elses_is_proposed_halved_and_stored_by_ours(tune: Any, tmp_path: Path):
    ours = config(tmp_path)
    results = tune.Tuner(
        train,
        tune_config=tune.TuneConfig(
            search_alg=ArchSearch(ours),
            scheduler=ParetoHalving(dict.fromkeys(OBJECTIVES, "min"), rungs=(1300, 2700), log_axis="flops_per_token"),
            num_samples=8,
            max_concurrent_trials=2,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path / "tune"), verbose=0, callbacks=[StudyCallback(ours)]),
    ).fit()
    with Store(str(tmp_path / "nas.db")) as store:
        row = store.study("mine")
        trials = store.trials(row)
        curves = {trial.number: store.reports(row, [trial.number]) for trial in trials}
        front = store.front(row)
    assert len(results) == len(trials) == len({(t.arch_hash, t.recipe) for t in trials})
    states = [trial.state for trial in trials]
    assert {State.COMPLETE, State.STOPPED, State.FAILED} == set(states)
    for trial in trials:
        steps = len(curves[trial.number])
        if trial.state == State.COMPLETE:
            assert steps == 3 and trial.values["bits_per_byte"] == curves[trial.number][-1].loss
        elif trial.state == State.STOPPED:
            assert steps in (1, 2)
        else:
            assert trial.failure and "someone's own mistake" in trial.failure.message
    assert front and all(trial.state == State.COMPLETE for trial in front)
    with pytest.raises(StudyError, match="mine"):
        StudyCallback(ours).setup()


def test_a_searcher_that_was_saved_goes_on_with_what_it_knew(tmp_path: Path):
    def result(suggested: dict[str, Any], loss: float) -> dict[str, Any]:
        report = {"done": True, "training_iteration": 1, "tokens": 4096, "bits_per_byte": loss}
        return report | suggested["cost"]

    search = ArchSearch(config(tmp_path))
    for n in range(4):
        search.on_trial_complete(f"t{n}", result(search.suggest(f"t{n}"), 5.0 - n))
    search.save(str(tmp_path / "searcher"))
    again = ArchSearch(config(tmp_path))
    again.restore(str(tmp_path / "searcher"))
    for n in range(4, 8):
        one, two = search.suggest(f"t{n}"), again.suggest(f"t{n}")
        assert one == two
        search.on_trial_complete(f"t{n}", result(one, 1.0))
        again.on_trial_complete(f"t{n}", result(two, 1.0))


def test_a_space_that_is_used_up_ends_the_experiment(tmp_path: Path):
    ours = config(tmp_path)
    single = {"optim.lr": "0.003", "attention.ratio": "1", "ffn.ratio": "4"}
    search = ArchSearch(replace(ours, settings=SETTINGS | single))
    suggested = [search.suggest(f"t{n}") for n in range(4)]
    assert suggested[-1] == "FINISHED"
    found = [repr((s["arch"], s["recipe"])) for s in suggested if s != "FINISHED"]
    assert len(found) == len(set(found)) == 2  # the depths


def test_wrong_arguments_are_named():
    with pytest.raises(UserError, match="'best'"):
        ParetoHalving({"loss": "best"}, rungs=(1,))
    with pytest.raises(UserError, match="growing"):
        ParetoHalving({"loss": "min"}, rungs=(2, 1))
    with pytest.raises(UserError, match="'cost' is none of"):
        ParetoHalving({"loss": "min"}, rungs=(1, 2), log_axis="cost")
    with pytest.raises(UserError, match="keep 0"):
        ParetoHalving({"loss": "min"}, rungs=(1, 2), keep=0)


def test_gains_are_left_to_nas_search(tmp_path: Path):
    with pytest.raises(UserError, match="ceg"):
        ArchSearch(config(tmp_path, objectives=("ceg", "flops_per_token")))


def test_a_limit_on_latency_is_left_to_nas_search(tmp_path: Path):
    with pytest.raises(UserError, match=r"max\.latency_ms is measured by the engine"):
        ArchSearch(config(tmp_path, settings={"max.latency_ms": "10"}))


def test_a_report_without_an_objective_names_it():
    halving = ParetoHalving({"loss": "min"}, rungs=(1,))
    with pytest.raises(UserError, match="reports no 'tokens': it reports loss, step"):
        halving.on_trial_result(None, type("Trial", (), {"trial_id": "one"}), {"loss": 1.0, "step": 2})
