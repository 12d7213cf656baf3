"""Databases of stock Optuna's that somebody else made or edited."""

import json
import shutil
from pathlib import Path
from typing import Any

from tests.nas.hostile import Command, Given, row
from tests.nas.hostile_stores import ENDLESS, ESCAPES, look


def read(given: Given, source: Path) -> list[Command]:
    """The commands that read the database."""
    store = str(given.folder / "nas.db")
    warm = ["search", "--study", "new", "--store", store, "--engine", "inline", "--trials", "1", "--preset", "quick"]
    return [
        ["study", "import", "--from", str(source), "--store", store],
        [*warm, "--warm-start", f"optuna:{source}#theirs"],
    ]


def imported(given: Given, source: Path, study: str = "theirs") -> list[Command]:
    """The import, and every command that looks at what came of it."""
    store = given.folder / "nas.db"
    return [read(given, source)[0], *look(store, study)]


def with_parameter(given: Given, **columns: Any) -> list[Command]:
    changed = ", ".join(f"{name} = ?" for name in columns)
    return read(given, given.optuna((f"UPDATE trial_params SET {changed}", tuple(columns.values()))))


def ours(given: Given, study: Any, trial: Any = None) -> Path:
    """Their study, said to have been ours."""
    return given.optuna(
        (
            "INSERT INTO study_user_attributes (study_id, key, value_json) VALUES (1, 'hypernas', ?)",
            (json.dumps(study),),
        ),
        *(
            (
                "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (?, 'hypernas', ?)",
                (n, json.dumps(trial)),
            )
            for n in (1, 2)
        ),
    )


@row("cannot open|cannot read|no regular file")
def text(given: Given) -> list[Command]:
    """a text named .db"""
    path = given.folder / "optuna.db"
    path.write_text("evil " * 1000)
    return read(given, path)


@row("cannot read|cannot open|no such table")
def missing_tables(given: Given) -> list[Command]:
    """a database without trials"""
    return read(given, given.optuna("DROP TABLE trials"))


@row("wanted tables alone")
def endless_view(given: Given) -> list[Command]:
    """a view that never ends in place of a table"""
    return read(
        given,
        given.optuna(
            "PRAGMA legacy_alter_table = ON",
            "ALTER TABLE trial_params RENAME TO before",
            f"CREATE VIEW trial_params AS {ENDLESS} SELECT before.* FROM c, before",
        ),
    )


@row("cannot read")
def unknown_distribution(given: Given) -> list[Command]:
    """a distribution that is any class"""
    return with_parameter(given, distribution_json=json.dumps({"name": "os.system", "attributes": {"command": "ls"}}))


@row("cannot read")
def odd_distribution(given: Given) -> list[Command]:
    """a distribution that is no JSON"""
    return with_parameter(given, distribution_json="__import__('os').system('ls')")


@row("cannot read")
def deep_distribution(given: Given) -> list[Command]:
    """a distribution of 100,000 brackets"""
    return with_parameter(given, distribution_json="[" * 100_000)


@row("cannot read")
def choice_that_is_not(given: Given) -> list[Command]:
    """a choice that is the 10**9th of two"""
    return read(given, given.optuna("UPDATE trial_params SET param_value = 1e9 WHERE param_name = 'kind'"))


@row(None)
def code_as_a_choice(given: Given) -> list[Command]:
    """choices that are Python, HTML and escape sequences"""
    choices = json.dumps({"name": "CategoricalDistribution", "attributes": {"choices": [given.payload, ESCAPES]}})
    path = given.optuna(("UPDATE trial_params SET distribution_json = ? WHERE param_name = 'kind'", (choices,)))
    return imported(given, path)


@row("cannot read")
def unknown_state(given: Given) -> list[Command]:
    """a state that there is not"""
    return read(given, given.optuna("UPDATE trials SET state = 'EVIL'"))


@row("cannot read|numbers? its trials")
def huge_number(given: Given) -> list[Command]:
    """trials numbered 10**18"""
    return read(given, given.optuna("UPDATE trials SET number = 1000000000000000000 + trial_id"))[:1]


@row(None)
def endless_values(given: Given) -> list[Command]:
    """values and reports that are infinite or NaN"""
    path = given.optuna(
        "UPDATE trial_values SET value = NULL, value_type = 'INF_POS'",
        "UPDATE trial_intermediate_values SET intermediate_value = NULL, intermediate_value_type = 'NAN'",
    )
    return imported(given, path)


@row("cannot read")
def deep_attribute(given: Given) -> list[Command]:
    """an attribute of 100,000 brackets"""
    path = given.optuna(
        ("INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (1, 'a', ?)", ("[" * 100_000,))
    )
    return read(given, path)[:1]


@row(None)
def path_as_a_name(given: Given) -> list[Command]:
    """a study named like a path out of the folder"""
    path = given.optuna("UPDATE studies SET study_name = '../../outside/secret'")
    return [
        *imported(given, path, "../../outside/secret"),
        ["study", "delete", "../../outside/secret", "--yes", "--store", str(given.folder / "nas.db")],
    ]


@row("wanted at most 200")
def long_name(given: Given) -> list[Command]:
    """a name of a million letters"""
    return read(given, given.optuna(f"UPDATE studies SET study_name = '{'a' * 1_000_000}'"))[:1]


@row("did not write")
def ours_as_a_list(given: Given) -> list[Command]:
    """a study said to be ours, that is a list"""
    return read(given, ours(given, [1, 2]))[:1]


@row("did not write")
def ours_of_other_kinds(given: Given) -> list[Command]:
    """a study said to be ours, of other kinds"""
    study = {
        "name": "s",
        "objectives": 3,
        "reference": [],
        "data_name": 1,
        "data_hash": {},
        "space": "lm",
        "settings": [],
    }
    return read(given, ours(given, study))[:1]


@row("did not write")
def trial_of_other_kinds(given: Given) -> list[Command]:
    """a study that was ours, its trials of other kinds"""
    study = {
        "name": "s", "objectives": ["a"], "reference": {"a": 1}, "data_name": "d", "data_hash": "",
        "space": {"name": "evil.py:Space", "settings": {}},
        "settings": {"trials": 2, "task": "text", "evaluate": "evil:run"},
    }  # fmt: skip
    return read(given, ours(given, study, {"curve": "x", "failure": 1, "state": "EVIL", "recipe": []}))[:1]


@row("cannot open")
def newer(given: Given) -> list[Command]:
    """a schema of the future"""
    return read(given, given.optuna("UPDATE alembic_version SET version_num = 'v99.0.0.a'"))


@row("Optuna cannot open|no regular file")
def our_store(given: Given) -> list[Command]:
    """one of our stores, for one of Optuna's"""
    return read(given, Path(shutil.copy(given.whole / "nas.db", given.folder / "other.db")))
