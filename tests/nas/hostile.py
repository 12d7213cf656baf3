"""What the rows of tests/nas/test_hostile_inputs.py are made of: whole inputs to spoil, and the table they stand in.

A row is a function that writes one hostile input into a folder and returns the commands that are given it. Its
docstring says what the input tries.
"""

import json
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hypernas.export.card import CARD, list_files
from hypernas.records import Proposal, Recipe, Report, Result, SpaceSpec, StudySettings
from hypernas.store import Store

Command = list[str] | Callable[[], object]  # of the command line, or a call of Python's that gives what it should


@dataclass(frozen=True)
class Given:
    """One row's folder, and whole inputs to spoil copies of."""

    folder: Path
    canary: Path  # code that runs writes it
    whole: Path

    @property
    def payload(self) -> str:
        """Python that writes the canary."""
        return f"open({str(self.canary)!r}, 'w').close()"

    def export(self, **config: Any) -> Path:
        """An exported folder whose config.json says so, its card made again to fit."""
        folder = Path(shutil.copytree(self.whole / "winner", self.folder / "winner"))
        if config:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return sign(folder)

    def store(self, *statements: str | tuple[str, tuple[Any, ...]]) -> Path:
        """A store of two complete trials, and what these statements make of it."""
        path = Path(shutil.copy(self.whole / "nas.db", self.folder / "nas.db"))
        run_sql(path, *statements)
        return path

    def optuna(self, *statements: str | tuple[str, tuple[Any, ...]]) -> Path:
        """A database of stock Optuna's with a study of two complete trials, and what these statements make of it."""
        path = Path(shutil.copy(self.whole / "optuna.db", self.folder / "optuna.db"))
        run_sql(path, *statements)
        return path


@dataclass(frozen=True)
class Row:
    """One hostile input. `answer` is a part of the one sentence; None: nothing is wrong with it, or all is read as
    data, and every command ends with 0."""

    make: Callable[[Given], list[Command]]
    answer: str | None
    slow: bool = False

    @property
    def name(self) -> str:
        return f"{self.make.__module__.rpartition('_')[2]}: {(self.make.__doc__ or '').strip()}"


TABLE: list[Row] = []


Maker = Callable[[Given], list[Command]]


def row(answer: str | None, *, slow: bool = False) -> Callable[[Maker], Maker]:
    """Puts a maker into the table, with a part of the sentence that its input is answered with."""

    def add(make: Maker) -> Maker:
        TABLE.append(Row(make, answer, slow))
        return make

    return add


def sign(folder: Path) -> Path:
    """Makes an export's card again, as whoever changed its files can."""
    card = (folder / CARD).read_text().split("- `config.json`")[0]
    (folder / CARD).write_text(card + list_files(folder))
    return folder


def run_sql(path: Path, *statements: str | tuple[str, tuple[Any, ...]]) -> None:
    """Edits a database as its owner may, past all that hypernas would check."""
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(*((statement,) if isinstance(statement, str) else statement))
    connection.close()


# ---- whole inputs --------------------------------------------------------------------------------------------------

SMALL = {"depth": 1, "d_model": 16, "head_dim": 8, "context": 16}
MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


def make_whole(folder: Path) -> None:
    """Writes winner/ (an export), nas.db (a store) and optuna.db (of stock Optuna)."""
    from hypernas.export.write import write_folder
    from hypernas.search_spaces import load_space
    from hypernas.search_spaces.base import arch_to_json

    space = load_space("lm")
    arch = space.from_json(SMALL)
    flat = arch_to_json(arch)
    values = {"bits_per_byte": 4.0, "flops_per_token": 1e6}
    with Store(str(folder / "nas.db"), create=True) as store:
        row = store.create_study(
            "s", space=SpaceSpec("lm"), objectives=tuple(values), data_name="d", data_hash="0" * 64,
            reference={"bits_per_byte": 8.0, "flops_per_token": 9.0},
            settings=StudySettings.of(asdict(StudySettings(trials=9)) | {"stored": {}}),
        )  # fmt: skip
        driver = store.start_driver(row, 1)
        for number in range(2):
            proposal = Proposal({}, flat, f"a{number}", f"c{number}", Recipe(1e-3), "sampler", {})
            assert store.lease_new(row, driver, proposal, 9) is not None
            store.report(row, Report(number, 0, 5, 640, 1e9, 2.5, 0.1), 1)
            store.finish(
                row,
                Result(
                    number, 1, values | {"bits_per_byte": 4.0 - number, "flops_per_token": 1e6 + number}, parameters=1
                ),
            )
        store.stop_driver(driver)
        trial = store.trial(row, 0)
    (folder / "winner").mkdir()
    write_folder(folder / "winner", row, trial, space, space.build(arch).eval(), ("py",))
    make_optuna(folder / "optuna.db")


def make_optuna(path: Path) -> None:
    """A database of stock Optuna's: a study `theirs` of two complete trials with a float and a choice."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(study_name="theirs", storage=f"sqlite:///{path}", directions=["minimize"])
    for number in range(2):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        trial.suggest_categorical("kind", ["a", "b"])
        trial.report(1.0, 0)
        study.tell(trial, float(number))
