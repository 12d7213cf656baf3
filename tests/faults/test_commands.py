"""Commands other than a search, killed at random moments: run again, they end as if nobody had killed them."""

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hypernas.store import Reader
from tests.faults.searches import command, rounds

KILLS = 5  # a test


@dataclass(frozen=True, slots=True)
class Killed:
    """A command that is killed: its flags, what it writes, and how it is gone on with."""

    flags: Callable[[Path], list[str]]
    result: Callable[[Path], Any]
    resumed: tuple[str, ...] = ()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def model(folder: Path) -> Any:
    return digest(folder / "winner" / "model.safetensors")


def ladder(folder: Path) -> Any:
    with Reader(str(folder / "nas.db")) as reader:
        trials = reader.trials(reader.study("s-scale"))
        return sorted((trial.arch_hash, str(trial.recipe), str(dict(trial.values))) for trial in trials)


def evidence(folder: Path) -> Any:
    files = sorted(path.relative_to(folder) for path in (folder / "blocks").rglob("*") if path.is_file())
    return files, digest(folder / "blocks" / "model.safetensors")


def imported(folder: Path) -> Any:
    with Reader(str(folder / "copy.db")) as reader:
        trials = reader.trials(reader.study("s"))
        return [(trial.number, trial.state, trial.arch_hash, dict(trial.values)) for trial in trials]


def exported(folder: Path) -> Any:
    """What Optuna finds in its database."""
    import optuna

    study = optuna.load_study(study_name="s", storage=f"sqlite:///{folder / 'optuna-out.db'}")
    return [(trial.number, trial.state, trial.values, trial.params) for trial in study.trials]


COMMANDS = {
    "export": Killed(lambda at: ["export", *of(at), "--trial", "1", "--out", str(at / "winner")], model),
    "train": Killed(
        lambda at: ["train", *of(at), "--trial", "1", "--tokens", "120000", "--out", str(at / "winner")],
        model,
        ("--resume",),
    ),
    "scale": Killed(
        lambda at: [
            *("scale", *of(at), "--trials", "3", "--ladder", "10k,16k,25k,40k,64k", "--seeds", "1"),
            *("--tokens-per-parameter", "0.25", "--engine", "inline"),
        ],
        ladder,
    ),
    "decompose": Killed(lambda at: ["decompose", str(at / "model"), "--out", str(at / "blocks")], evidence),
    "study import": Killed(
        lambda at: ["study", "import", "s", "--from", str(at / "optuna.db"), "--store", str(at / "copy.db")], imported
    ),
    "study export": Killed(
        lambda at: ["study", "export", "s", *of(at)[2:], "--to", str(at / "optuna-out.db")], exported
    ),
}


def of(folder: Path) -> list[str]:
    return ["--study", "s", "--store", str(folder / "nas.db")]


def nas(*flags: str) -> list[str]:
    return [sys.executable, "-m", "hypernas", *flags]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """A folder with a finished study, one of its models exported, and the study in Optuna's database."""
    folder = tmp_path_factory.mktemp("finished")
    study = ["--engine", "inline", "--trials", "5"]
    for line in (
        [*command(str(folder / "nas.db"), text), *study],
        nas("export", *of(folder), "--trial", "0", "--out", str(folder / "model")),
        nas("study", "export", "s", "--store", str(folder / "nas.db"), "--to", str(folder / "optuna.db")),
    ):
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder


def is_done(code: int, said: str) -> bool:
    """An import or export that was killed after its end finds that it is done already."""
    return code == 0 or (code == 2 and " already: " in said)


def names(folder: Path) -> list[str]:
    """All that lies there but SQLite's logs, which the last to close a store removes."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(("-wal", "-shm")))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", rounds(3))
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_was_killed_ends_when_run_again_as_if_nobody_had_killed_it(
    name: str, number: int, finished: Path, tmp_path: Path, faults: Counter[str]
) -> None:
    killed, rng = COMMANDS[name], random.Random(f"{name} {number}")
    calm, hit = (Path(shutil.copytree(finished, tmp_path / folder)) for folder in ("calm", "hit"))
    began = time.monotonic()
    done = subprocess.run(nas(*killed.flags(calm)), capture_output=True, text=True, check=False)
    length = time.monotonic() - began
    assert done.returncode == 0, done.stderr

    resumed: tuple[str, ...] = ()
    for _ in range(KILLS):
        line = nas(*killed.flags(hit), *resumed)
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(length * rng.random())
            process.send_signal(signal.SIGKILL)
            said = process.communicate()[1]
        if process.returncode != -signal.SIGKILL:
            assert is_done(process.returncode, said), said
            break
        faults[f"{name} killed"] += 1
        resumed = killed.resumed
    else:
        done = subprocess.run(nas(*killed.flags(hit), *resumed), capture_output=True, text=True, check=False)
        assert is_done(done.returncode, done.stderr), done.stderr
    assert killed.result(hit) == killed.result(calm)
    assert names(hit) == names(calm)
