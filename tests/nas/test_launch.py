"""What a search started from flags remembers of what it ran on, how it says to go on, and where it will not."""

import re
import shlex
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hypernas.cli.main import main
from hypernas.launch import launch
from hypernas.store import Store

OWN = Path(__file__).parent / "faulty_space.py"
TRIVIAL = "trivial"
Flags = Callable[..., dict[str, Any]]


@pytest.fixture
def flags(tmp_path: Path, text: str) -> Flags:
    """The flags of a search of the study s, and more."""
    settings = {"depth": "1", "d_model": "16,32", "head_dim": "8", "context": "32", "data.path": text}
    settings |= {"train.tokens": "512", "train.batch_tokens": "256"}
    common = {"study": "s", "store": str(tmp_path / "nas.db"), "preset": "quick", "halving": False}
    return lambda **more: {**common, "settings": settings, **more}


def resumed(flags: Flags, **more: Any) -> dict[str, Any]:
    return {name: flags()[name] for name in ("study", "store")} | {"resume": True, **more}


def said_one_worker(capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether a search began with one worker on a CPU: there, or, on a busy machine, still starting."""
    return bool(re.search(r"^1 worker (on a CPU core|yet to come, on CPUs)$", capsys.readouterr().err, re.MULTILINE))


def settings_of(store: str) -> dict[str, Any]:
    with Store(store) as opened:
        return opened.study("s").settings.as_json()


def trained_on(store: str, device: str, precision: str) -> None:
    """Every row of the store says so now."""
    with sqlite3.connect(store) as connection:
        changed = "json_set(provenance, '$.device', ?, '$.precision', ?)"
        connection.execute(f"UPDATE trials SET provenance = {changed}", (device, precision))
    connection.close()


def test_a_resumed_search_runs_on_what_it_ran_on_unless_flags_say_otherwise(
    flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    store = flags()["store"]
    assert launch(flags(trials=3, engine="inline", workers=1), TRIVIAL) == 0
    assert launch(resumed(flags, trials=4), TRIVIAL) == 0
    assert settings_of(store)["engine"] == "inline"
    with sqlite3.connect(store) as connection:
        connection.execute("UPDATE studies SET settings = json_set(settings, '$.engine', 'ray')")
    connection.close()
    capsys.readouterr()
    assert launch(resumed(flags, trials=5), TRIVIAL) == 0
    assert said_one_worker(capsys)
    kept = settings_of(store)
    assert (kept["engine"], kept["workers"], kept["gpus_per_trial"]) == ("ray", 1, 0.0)
    assert launch(resumed(flags, trials=6, engine="inline"), TRIVIAL) == 0
    kept = settings_of(store)
    assert (kept["engine"], kept["workers"], kept["gpus_per_trial"]) == ("inline", 1, 0.0)


def test_a_search_says_first_what_it_reads_and_what_it_leaves_out(
    flags: Flags, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "words.txt").write_bytes(words := Path(text).read_bytes())
    (folder / "scan.pdf").write_bytes(b"%PDF")
    given = flags(trials=3, engine="inline")
    given["settings"] = {**given["settings"], "data.path": str(folder)}
    assert launch(given, TRIVIAL) == 0
    said = capsys.readouterr()
    line = f"data books: 1 file, {len(words):,} bytes read; left out: 1 of type .pdf"
    assert said.err.splitlines()[0] == line and line not in said.out


@pytest.mark.slow
def test_a_study_older_than_these_settings_goes_on_on_cpus_if_all_of_it_was_trained_there(
    flags: Flags, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = flags()["store"]
    assert launch(flags(trials=3, engine="inline")) == 0
    with sqlite3.connect(store) as connection:
        for name in ("engine", "workers", "gpus_per_trial"):
            connection.execute(f"UPDATE studies SET settings = json_remove(settings, '$.{name}')")
    connection.close()
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 1}')
    assert launch(resumed(flags, trials=4, workers=1)) == 0
    assert said_one_worker(capsys)
    assert settings_of(store)["gpus_per_trial"] == 0


def test_a_row_names_no_machine_no_folder_and_no_code_for_others_to_use(flags: Flags, tmp_path: Path) -> None:
    given = flags(trials=3, engine="inline", space=f"{OWN}:Slow", checkpoints=str(tmp_path / "half trained"))
    assert launch(given, TRIVIAL) == 0
    kept = settings_of(given["store"])
    assert kept.keys().isdisjoint({"address", "checkpoints", "space", "store"})
    assert str(OWN) not in str(kept) and "half trained" not in str(kept)


def test_the_printed_command_can_be_pasted_and_goes_on(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "my spaces.py"
    own.write_text(OWN.read_text())
    given = flags(trials=500, engine="inline", space=f"{own}:Slow", checkpoints=str(tmp_path / "half trained"))
    assert launch({**given, "time": 0.01}) == 1
    printed = capsys.readouterr().err.strip().splitlines()[-1].partition("Continue with: ")[2]
    command = shlex.split(printed)
    assert command[:2] == ["nas", "search"]
    with Store(given["store"]) as store:
        before = store.finished(store.study("s"))
    assert main([*command[1:], "--trials", str(before + 2)]) == 0
    with Store(given["store"]) as store:
        assert store.finished(store.study("s")) == before + 2
    assert list((tmp_path / "half trained").iterdir())


def test_a_space_of_ones_own_is_named_again(flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    own = f"{OWN}:Slow"
    assert launch(flags(trials=3, engine="inline", space=own), TRIVIAL) == 0
    store = ["--store", flags()["store"]]
    base = ["search", "--study", "s", *store, "--resume", "--trials", "4"]
    assert main(base) == 2
    assert "--resume wants its --space FILE.py:Class again" in capsys.readouterr().err
    assert main([*base, "--space", f"{OWN}:Space"]) == 2
    assert "it cannot be resumed with" in capsys.readouterr().err
    assert launch(resumed(flags, trials=4, space=own), TRIVIAL) == 0
    assert main(["study", "export", "s", *store, "--to", f"{store[1]}.optuna"]) == 2
    assert main(["study", "export", "s", *store, "--to", f"{store[1]}.optuna", "--space", own]) == 0


@pytest.mark.parametrize(
    ("device", "precision", "elsewhere"),
    [
        pytest.param(
            *("NVIDIA H100 80GB HBM3", "bfloat16 products: cuda", ["--engine", "ray", "--workers", "1"]),
            marks=pytest.mark.slow,
        ),
        ("cpu", "float16", []),
    ],
    ids=["device", "precision"],
)
def test_a_study_that_would_go_on_in_other_numbers_wants_a_flag(
    device: str, precision: str, elsewhere: list[str], flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    store = flags()["store"]
    assert launch(flags(trials=3, engine="inline")) == 0
    trained_on(store, device, precision)
    before = settings_of(store)
    base = ["search", "--study", "s", "--store", store, "--resume", "--trials", "4"]
    capsys.readouterr()
    assert main([*base, *elsewhere]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    kind = "cpu" if device == "cpu" else "cuda"
    assert f"study 's' was trained on {kind} in {precision}, and here it would be on cpu in " in said
    assert "--other-device goes on all the same" in said
    assert settings_of(store) == before  # what it ran on is what it ran on
    with Store(store) as opened:
        assert len(opened.trials(opened.study("s"))) == 3  # none was leased
    assert main([*base, "--other-device"]) == 0
    assert main([*base[:-1], "5"]) == 0  # it has trials of both now


def test_a_study_whose_gpus_are_not_here_says_what_to_do(flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    store = flags()["store"]
    assert launch(flags(trials=3, engine="inline")) == 0
    with sqlite3.connect(store) as connection:
        connection.execute("UPDATE studies SET settings = json_set(settings, '$.gpus_per_trial', 1.0)")
    connection.close()
    assert main(["search", "--study", "s", "--store", store, "--resume", "--trials", "4"]) == 2
    assert "--gpus-per-trial 1: torch sees no GPU here; --gpus-per-trial 0 asks" in capsys.readouterr().err
