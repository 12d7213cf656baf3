"""`nas search --inherit`: what a row says of its parent, that it re-trains from it bit for bit, and who is refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hypernas.cli.main import main
from hypernas.config.study_config import StudyConfig
from hypernas.engines.inline import Inline
from hypernas.engines.ray_pool import RayPool
from hypernas.errors import UserError
from hypernas.integrations.ray_tune import ArchSearch
from hypernas.records import Job, Progress, Report, State, Trial
from hypernas.search_spaces import load_space
from hypernas.show.views import Silent
from hypernas.store import Store
from hypernas.store.folders import weights_file
from hypernas.store.weights import WEIGHTS, find_weights
from hypernas.study.driver import retrain, run
from hypernas.study.replay import replay
from hypernas.study.search import make_job, open_search, prepare
from hypernas.training.checkpoint_files import checkpoint_path, identity
from hypernas.training.inherit import INHERITED, PARENT, change, obstacle
from hypernas.training.worker import run as run_job

TINY = {"depth": "1..2", "d_model": "16,24", "head_dim": "8", "context": "16", "train.tokens": "1024"}
TINY |= {"train.batch_tokens": "128", "attention.ratio": "1", "ffn.ratio": "2", "streams.n": "1", "gates.rate": "0.5"}
SPACE = {name: text for name, text in TINY.items() if not name.startswith("train.")}
TRIALS = 20


class Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def config(text: str, **other: Any) -> StudyConfig:
    given = {"trials": TRIALS, "halving": False, "kernels": "reference", "inherit": True, "engine": "inline", **other}
    return StudyConfig(study="s", preset="quick", settings=TINY | {"data.path": text}, **given)


def searched(store: Store, settings: StudyConfig, executor: Any = None) -> list[Trial]:
    search = open_search(store, prepare(settings))
    pool = executor or Inline()
    try:
        run(search, pool, Silent())
    finally:
        pool.close()
    return store.trials(search.row)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, text: str) -> Iterator[tuple[Store, list[Trial]]]:
    """A search of twenty trials whose children inherit, resumed in between."""
    with Store(str(tmp_path_factory.mktemp("inherit") / "nas.db"), create=True) as store:
        searched(store, config(text, trials=12))
        yield store, searched(store, config(text, resume=True))


def heirs(trials: list[Trial]) -> list[Trial]:
    return [trial for trial in trials if INHERITED in trial.sampler_attrs]


def test_a_child_names_its_parent_and_what_is_new_in_it(study: tuple[Store, list[Trial]]) -> None:
    _, trials = study
    children = [trial for trial in trials if PARENT in trial.sampler_attrs]
    assert len(children) > 5
    assert {trial.sampler_attrs.get(INHERITED) for trial in children} >= {None, "recipe"}
    space = load_space("lm", SPACE)
    for child in children:
        parent = trials[child.sampler_attrs[PARENT]]
        assert parent.number < child.number
        assert sum(child.params[name] != parent.params[name] for name in child.params) == 1
        can = obstacle(space, space.from_json(parent.arch), space.from_json(child.arch)) is None
        assert child.sampler_attrs.get(INHERITED) == (change(parent.arch, child.arch) if can else None)
        said = child.provenance.get(INHERITED)
        assert said == (f"trial {parent.number}: {change(parent.arch, child.arch)}" if can else None)


def test_every_finished_trial_keeps_its_weights(study: tuple[Store, list[Trial]]) -> None:
    store, trials = study
    row = store.study("s")
    assert {trial.state for trial in trials} == {State.COMPLETE}
    assert all(find_weights(store, row, trial.number) for trial in trials)


def test_an_heir_trains_again_from_its_row_to_the_same_numbers(study: tuple[Store, list[Trial]]) -> None:
    store, trials = study
    row = store.study("s")
    for trial in heirs(trials)[:3]:
        job = make_job(store, row, trial)
        again = retrain(job, Silent())
        assert dict(again.values) == dict(trial.values)
        assert again.weights == find_weights(store, row, trial.number)
        drawn = retrain(_without_parent(job), Silent())
        assert drawn.values != again.values


def _without_parent(job: Job) -> Job:
    return replace(job, inherits=None)


def test_a_parent_whose_weights_are_lost_is_trained_again_first(study: tuple[Store, list[Trial]]) -> None:
    store, trials = study
    row = store.study("s")
    grandchild = next(t for t in heirs(trials) if INHERITED in trials[t.sampler_attrs[PARENT]].sampler_attrs)
    parent = trials[grandchild.sampler_attrs[PARENT]]
    lost = {n: store.artifacts(row, WEIGHTS)[n] for n in (parent.number, parent.sampler_attrs[PARENT])}
    for number in lost:
        store.drop_artifact(row, number, WEIGHTS)
    try:
        heard = Heard()
        assert dict(retrain(make_job(store, row, grandchild), heard).values) == dict(grandchild.values)
    finally:
        for number, (uri, digest) in lost.items():
            store.add_artifact(row, number, WEIGHTS, uri, digest, weights_file(store, row, number).stat().st_size)
    said = [f"trains its parent, trial {number}, first: its weights are not kept" for number in lost]
    assert heard.said == [f"trial {grandchild.number} {text}" for text in said]


def test_an_heir_goes_on_from_a_checkpoint_and_not_from_its_parent(
    study: tuple[Store, list[Trial]], tmp_path: Path
) -> None:
    store, trials = study
    job = make_job(store, store.study("s"), heirs(trials)[0])
    job = replace(job, checkpoint=checkpoint_path(str(tmp_path), job.trial))
    events = run_job(job)
    assert isinstance(next(event for event in events if not isinstance(event, Progress)), Report)
    events.close()  # at its first rung
    assert job.inherits is not None
    unread = replace(job, inherits=replace(job.inherits, weights=b""))
    assert dict(retrain(unread, Silent()).values) == dict(heirs(trials)[0].values)
    assert identity(job) != identity(_without_parent(job))


def test_a_search_that_inherits_replays_to_its_proposals(study: tuple[Store, list[Trial]]) -> None:
    store, _ = study
    found = list(replay(store, store.study("s")))
    assert found and all(entry.stored == entry.drawn for entry in found)


def test_an_export_is_the_heir_and_says_so(
    study: tuple[Store, list[Trial]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, trials = study
    number, out = str(heirs(trials)[0].number), str(tmp_path / "out")
    at = ["--study", "s", "--store", store.to_type, "--trial", number]
    assert main(["train", *at, "--out", out, "--json"]) == 0
    assert f'"bits_per_byte": {heirs(trials)[0].values["bits_per_byte"]!r}' in capsys.readouterr().out
    assert main(["show", *at]) == 0
    assert heirs(trials)[0].provenance[INHERITED] in capsys.readouterr().out
    assert main(["decompose", out, "--out", f"{out}-blocks"]) == 2
    assert "started from another model's weights (trial " in capsys.readouterr().err


def test_a_stopped_parent_leaves_nothing(tmp_path: Path, text: str) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        trials = searched(store, config(text, halving=True, trials=24))
        row = store.study("s")
        parents = {t.number: trials[t.sampler_attrs[PARENT]] for t in trials if PARENT in t.sampler_attrs}
        assert {parent.state for parent in parents.values()} >= {State.COMPLETE}
        assert all(parents[trial.number].state == State.COMPLETE for trial in heirs(trials))
        assert any(trial.state == State.STOPPED for trial in trials)
        for trial in [trial for trial in heirs(trials) if trial.state == State.COMPLETE][:1]:
            assert dict(retrain(make_job(store, row, trial), Silent()).values) == dict(trial.values)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "tune"])
def test_workers_elsewhere_inherit_too(engine: str, tmp_path: Path, text: str) -> None:
    from hypernas.engines.tune_pool import TunePool

    pool = RayPool(1) if engine == "ray" else TunePool(1)
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        trials = searched(store, config(text, engine=engine), pool)
        heir = heirs(trials)[0]
        assert heir.provenance[INHERITED].endswith(heir.sampler_attrs[INHERITED])
        assert dict(retrain(make_job(store, store.study("s"), heir), Silent()).values) == dict(heir.values)


def test_without_the_flag_a_child_names_its_parent_and_draws_its_weights(tmp_path: Path, text: str) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        trials = searched(store, config(text, inherit=False, sampler="evolution", trials=14))
        children = [trial for trial in trials if PARENT in trial.sampler_attrs]
        assert children and not heirs(trials)
        row = store.study("s")
        assert set(store.artifacts(row, WEIGHTS)) == {trial.number for trial in store.front(row)}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--sampler", "tpe"], "--inherit with --sampler tpe: only evolution's proposals have a parent"),
        (["--repeats", "2"], "--inherit with --repeats 2: seeds draw the initial weights"),
        (["--objectives", "ceg"], "--inherit with the objective ceg"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "nas.db"
    assert main(["search", "--inherit", "--store", str(store), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not store.exists()


def test_a_trainable_of_ones_own_is_refused() -> None:
    with pytest.raises(UserError, match="here the trainable is yours"):
        ArchSearch(StudyConfig(inherit=True))


def test_a_study_that_did_not_inherit_is_not_resumed_with_it(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        open_search(store, prepare(config(text, inherit=False)))
    command = ["search", "--study", "s", "--store", str(tmp_path / "nas.db"), "--resume"]
    assert main([*command, "--inherit"]) == 2
    assert "was created with inherit False, not True" in capsys.readouterr().err
