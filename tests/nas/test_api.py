"""hypernas from Python: its exports, a search and what is taken from it, and trials that others train."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

import hypernas as nas
from hypernas.records import Failure, FailureKind, State
from hypernas.store import Reader, Store
from hypernas.store.folders import weights_file

MODULES = [
    found.name
    for name in ("hypernas", "hypernas.kernels", "hypernas.search_spaces", "hypernas.dashboards")
    for found in pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}.")
    if "__main__" not in found.name and ".migrations" not in found.name
]


@pytest.fixture(scope="module")
def flags(text: str) -> dict[str, Any]:
    """Of a search that takes seconds."""
    settings = {"depth": 1, "d_model": "16,32", "head_dim": 8, "context": 32, "data.path": text}
    settings |= {"train.tokens": 512, "train.batch_tokens": 256}
    return {"preset": "quick", "halving": False, "engine": "inline", "trials": 4, "settings": settings}


@pytest.fixture(scope="module")
def study(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> nas.Study:
    """A finished search."""
    return nas.search("first", store=str(tmp_path_factory.mktemp("api") / "nas.db"), **flags)


# ---- exports -------------------------------------------------------------------------------------------------------


def test_every_export_is_there_and_documented_after_every_module_was_imported() -> None:
    for module in MODULES:
        importlib.import_module(module)
    for name in set(nas.__all__) - {"__version__"}:
        found = getattr(nas, name)
        assert callable(found) and not inspect.ismodule(found), name
        assert found.__doc__ and not found.__doc__.startswith(f"{name}("), f"{name} says nothing of itself"
    assert nas.__version__[0].isdigit()
    assert set(nas.__all__) <= set(dir(nas))
    assert set(nas.__all__) == {"__version__", *nas._HOME_OF}


def test_what_is_not_exported_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        nas.serach  # noqa: B018


def test_importing_it_and_its_errors_brings_no_heavy_library() -> None:
    code = (
        "import sys, hypernas as nas; nas.UserError; nas.Space; nas.__version__; "
        "print([name for name in ('torch', 'ray', 'optuna', 'sqlalchemy', 'pandas', 'plotly') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- a search ------------------------------------------------------------------------------------------------------


def test_a_search_prints_nothing_and_gives_frames_figures_and_models(
    study: nas.Study, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert study.outcome is not None and study.outcome.finished == 4 and not study.outcome.interrupted
    assert list(study.trials()["trial"]) == [0, 1, 2, 3]
    front = study.front()
    assert list(front["bits_per_byte"]) == sorted(front["bits_per_byte"]) and len(front) >= 1
    assert study.status()["states"]["COMPLETE"] == 4
    for kind in ("front", "curves", "hypervolume", "importance"):
        assert study.figure(kind).data
    best = study.best("best")
    assert best.number == front["trial"][0] and best.values["bits_per_byte"] == front["bits_per_byte"][0]
    model = best.load()
    tokens = torch.randint(0, 256, (2, 16))
    assert sum(p.numel() for p in best.build().parameters()) == sum(p.numel() for p in model.parameters())
    best.export(str(tmp_path / "winner"))
    assert torch.equal(nas.load(tmp_path / "winner")(tokens), model(tokens))
    assert study.best(best.number) == best
    printed = capfd.readouterr()
    assert printed.out == "" and [line for line in printed.err.splitlines() if not line.startswith("USDT:")] == []


def test_a_trial_whose_weights_are_gone_is_trained_again_without_a_word(
    study: nas.Study, capfd: pytest.CaptureFixture[str]
) -> None:
    best = study.best("best")
    before = best.load().state_dict()
    with Store(study.store) as store:
        weights_file(store, store.study("first"), best.number).unlink()
    again = best.load().state_dict()
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert "training it again" not in capfd.readouterr().err


def test_progress_is_shown_where_it_is_asked_for_and_a_search_goes_on(
    study: nas.Study, flags: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    again = nas.search("first", store=study.store, resume=True, trials=5, progress=True)
    assert again.outcome is not None and again.outcome.finished == 5
    printed = capfd.readouterr()
    assert printed.out == "" and "resumed at 4 of 5" in printed.err and "trial 4 starts" in printed.err


def test_paths_and_mappings_are_taken_for_texts_and_dictionaries(flags: dict[str, Any], tmp_path: Path) -> None:
    given = {**flags, "settings": MappingProxyType(flags["settings"]), "checkpoints": tmp_path / "half"}
    with nas.create_study("mapped", store=tmp_path / "nas.db", **given) as made:
        assert made.store == str(tmp_path / "nas.db") and made.ask() is not None
    assert nas.open_study("mapped", store=tmp_path / "nas.db").trials().shape[0] == 1


def test_bad_input_is_raised_in_the_sentences_of_the_command(study: nas.Study, tmp_path: Path) -> None:
    store = study.store
    with pytest.raises(nas.StudyError, match="exists in"):
        nas.search("first", store=store)
    with pytest.raises(nas.UserError, match="--preset 'quik' is unknown"):
        nas.search("other", store=store, preset="quik")
    with pytest.raises(nas.UserError, match=r"unknown flag 'trails'.*trials"):
        nas.search("other", store=store, trails=3)
    with pytest.raises(nas.UserError, match="trials='x' is str; wanted int"):
        nas.search("other", store=store, trials="x")
    with pytest.raises(nas.UserError, match="resume='no' is str; wanted bool"):
        nas.search("other", store=store, resume="no")
    with pytest.raises(nas.UserError, match="settings='depth=2' is str; wanted dict"):
        nas.create_study("other", store=store, settings="depth=2")
    with pytest.raises(nas.UserError, match="--workers 0: wanted at least 1"):
        nas.search("other", store=store, workers=0)
    with pytest.raises(nas.SpaceError, match="depth"):
        nas.search("other", store=store, settings={"depth": "x"})
    with pytest.raises(nas.StudyError, match="no study 'secnod'"):
        nas.open_study("secnod", store=store)
    with pytest.raises(nas.StoreError, match="no such file"):
        nas.open_study("first", store=str(tmp_path / "none.db"))
    with pytest.raises(nas.UserError, match="--pick 'nicest'"):
        study.best("nicest")
    with pytest.raises(nas.UserError, match="figure 'fornt'"):
        study.figure("fornt")


def test_an_own_evaluation_is_named_for_workers_to_import(flags: dict[str, Any], tmp_path: Path) -> None:
    study = nas.search("own", store=str(tmp_path / "nas.db"), evaluate="hypernas.bench.trivial:evaluate", **flags)
    assert study.outcome is not None and study.outcome.finished == 4
    assert all(study.trials()["bits_per_byte"] < 2)
    with pytest.raises(nas.StudyError, match="give evaluate='module:function' again"):
        nas.search("own", store=study.store, resume=True, trials=5)
    with Reader(study.store) as reader:  # a store names no code for others to run
        assert "hypernas.bench" not in str(reader.study("own").settings.as_json())
    again = "hypernas.bench.trivial:evaluate"
    assert nas.search("own", store=study.store, resume=True, trials=5, evaluate=again).outcome.finished == 5
    with pytest.raises(nas.StudyError, match=r"weights of trial \d are not kept"):
        study.best("best").load()


# ---- ask and tell --------------------------------------------------------------------------------------------------


def trial(store: str, study: str, number: int) -> Any:
    with Reader(store) as reader:
        return reader.trial(reader.study(study), number)


def test_trials_are_asked_for_reported_and_told_by_whoever_trains_them(flags: dict[str, Any], tmp_path: Path) -> None:
    store = str(tmp_path / "nas.db")
    with nas.create_study("mine", store=store, **flags) as study:
        first = study.ask()
        assert first is not None and first.number == 0 and first.values == {}
        assert trial(store, "mine", 0).state == State.RUNNING
        assert sum(p.numel() for p in first.build().parameters()) > 0
        assert study.report(first, 0, 5.0) and study.report(first, 3, 4.0)
        study.tell(first, {"bits_per_byte": 4.0})
        found = trial(store, "mine", 0)
        space = study.space
        cost = space.cost(space.from_json(first.arch))
        assert found.state == State.COMPLETE and found.values["bits_per_byte"] == 4.0
        assert found.values["flops_per_token"] == cost.flops_total and found.parameters == cost.parameters_total
        second = study.ask()
        assert second is not None
        study.tell(second, failure="the disk was full")
        assert trial(store, "mine", 1).failure == Failure(FailureKind.ERROR, "the disk was full")
        third, fourth = study.ask(), study.ask()
        assert third is not None and fourth is not None and study.ask() is None  # four were asked for
        study.tell(third, {"bits_per_byte": float("nan")})
        assert trial(store, "mine", 2).failure.kind == FailureKind.DIVERGED
    assert trial(store, "mine", 3).state == State.WAITING  # handed back
    assert len(study.front()) == 1


def test_a_trial_that_was_told_or_never_asked_for_is_refused(flags: dict[str, Any], tmp_path: Path) -> None:
    with nas.create_study("mine", store=str(tmp_path / "nas.db"), **flags) as study:
        asked = study.ask()
        assert asked is not None
        with pytest.raises(nas.UserError, match="rung 4: wanted 0 to 3"):
            study.report(asked, 4, 1.0)
        with pytest.raises(nas.UserError, match="loss='low': wanted a number"):
            study.report(asked, 0, "low")  # type: ignore[arg-type]
        with pytest.raises(nas.UserError, match="either its values or the reason"):
            study.tell(asked)
        study.tell(asked, {"bits_per_byte": 4.0})
        with pytest.raises(nas.StudyError, match="trial 0 is not one that ask"):
            study.tell(asked, {"bits_per_byte": 4.0})


def test_halving_stops_a_trial_at_its_report(flags: dict[str, Any], tmp_path: Path) -> None:
    flags = flags | {"halving": True, "trials": 40}
    stopped = 0
    with nas.create_study("halved", store=str(tmp_path / "nas.db"), **flags) as study:
        for number in range(16):
            asked = study.ask()
            assert asked is not None
            loss = 3.0 + number  # each is worse than the one before
            if study.report(asked, 0, loss):
                study.tell(asked, {"bits_per_byte": loss})
            else:
                stopped += 1
                assert trial(study.store, "halved", asked.number).state == State.STOPPED
                with pytest.raises(nas.StudyError):
                    study.tell(asked, {"bits_per_byte": loss})
    assert stopped > 0


def test_two_processes_never_train_the_same_trial_and_a_silent_one_loses_it(
    flags: dict[str, Any], tmp_path: Path
) -> None:
    store = str(tmp_path / "nas.db")
    with nas.create_study("shared", store=store, **flags) as one, nas.open_study("shared", store=store) as other:
        mine, theirs = one.ask(), other.ask()
        assert mine is not None and theirs is not None and mine.number != theirs.number
        with Store(store) as opened:  # as if `one` had been silent for long
            opened.release(opened.study("shared"), mine.number, trial(store, "shared", mine.number).token, fault=False)
        taken = other.ask()
        assert taken is not None and taken.number == mine.number
        with pytest.raises(nas.StudyError, match="another driver's now"):
            one.tell(mine, {"bits_per_byte": 4.0})
        other.tell(taken, {"bits_per_byte": 3.0})
    assert trial(store, "shared", mine.number).values["bits_per_byte"] == 3.0
