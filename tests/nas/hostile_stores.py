"""Stores that somebody else made or edited."""

import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

from hypernas.store.liveness import this_process
from tests.nas.hostile import Command, Given, row

ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"
ESCAPES = "\x1b]52;c;cm0=\x07<script>alert(1)</script>\u202e"


def look(store: Path | str, study: str = "s") -> list[Command]:
    """Every command that only looks."""
    commands = (
        ["study", "list"],
        ["status", "--study", study],
        ["front", "--study", study],
        ["front", "--study", study, "--json"],
        ["show", "--study", study, "--trial", "0"],
        ["report", "--study", study, "--out", f"{store}.html"],
    )
    return [[*command, "--store", str(store)] for command in commands]


def trial_reads(store: Path) -> list[Command]:
    """The commands that read a trial's row and more."""
    return [command for command in look(store) if command[:2] != ["study", "list"]]


def write(store: Path) -> list[Command]:
    """Commands that open the store to write to it."""
    return [
        ["export", "--study", "s", "--trial", "0", "--out", str(store.parent / "out"), "--store", str(store)],
        ["study", "delete", "s", "--yes", "--store", str(store)],
    ]


# ---- files that are no store ---------------------------------------------------------------------------------------


@row("not a database")
def text(given: Given) -> list[Command]:
    """a text named .db"""
    path = given.folder / "nas.db"
    path.write_text("SELECT evil FROM studies;\n" * 100)
    return look(path)


@row("unable to open|no regular file|Is a directory")
def folder(given: Given) -> list[Command]:
    """a folder"""
    path = given.folder / "nas.db"
    path.mkdir()
    return look(path)


@row("no regular file")
def pipe(given: Given) -> list[Command]:
    """a pipe that nobody writes to"""
    os.mkfifo(given.folder / "nas.db")
    return look(given.folder / "nas.db")


@row("no regular file")
def device(given: Given) -> list[Command]:
    """a link to /dev/zero"""
    (given.folder / "nas.db").symlink_to("/dev/zero")
    return look(given.folder / "nas.db")


@row("malformed|not a database|holds no")
def cut(given: Given) -> list[Command]:
    """the first half of a store"""
    path = given.store()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return look(path)


@row("malformed|not a database|holds")
def damaged_pages(given: Given) -> list[Command]:
    """pages of other bytes, the schema whole"""
    path = given.store("PRAGMA wal_checkpoint(TRUNCATE)")
    pages = bytearray(path.read_bytes())
    pages[4096:] = os.urandom(1) * (len(pages) - 4096)
    path.write_bytes(pages)
    return trial_reads(path)


@row("is empty")
def nothing(given: Given) -> list[Command]:
    """a database without tables"""
    path = given.folder / "nas.db"
    sqlite3.connect(path).close()
    path.touch()
    return look(path)


@row("tables of another program")
def another_program(given: Given) -> list[Command]:
    """a table of another program's"""
    path = given.folder / "nas.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE studies (name)")
    connection.commit()
    connection.close()
    return look(path)


@row("newer than this version")
def newer(given: Given) -> list[Command]:
    """a schema of the future, named like an escape sequence"""
    return look(given.store(("UPDATE alembic_version SET version_num = ?", (f"9{ESCAPES}",))))


@row("which no hypernas wrote")
def unknown_version(given: Given) -> list[Command]:
    """a schema that never was, to be brought up to date"""
    path = given.store("UPDATE alembic_version SET version_num = '0001; DROP TABLE studies'")
    return [*look(path), *write(path)]


@row("tables of another program|malformed|not a database")
def other_log(given: Given) -> list[Command]:
    """the write-ahead log of another database beside it"""
    path, other = given.store(), given.folder / "other.db"
    connection = sqlite3.connect(other, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE studies (name)")
    shutil.copy(f"{other}-wal", f"{path}-wal")
    connection.close()
    return look(path)


# ---- schemas that do something -------------------------------------------------------------------------------------


@row("wanted tables alone")
def endless_view(given: Given) -> list[Command]:
    """a view that never ends in place of a table"""
    return look(
        given.store(
            "PRAGMA foreign_keys = OFF",
            "ALTER TABLE trials RENAME TO before",
            f"CREATE VIEW trials AS {ENDLESS} SELECT before.* FROM c, before",
        )
    )


@row("wanted tables alone")
def trigger(given: Given) -> list[Command]:
    """a trigger that never ends when a study is deleted"""
    body = f"INSERT INTO artifacts SELECT x, 'weights', 'x', 'x', 1 FROM ({ENDLESS} SELECT x FROM c)"
    return write(given.store(f"CREATE TRIGGER t BEFORE DELETE ON studies BEGIN {body}; END"))


@row("wanted tables alone")
def virtual_table(given: Given) -> list[Command]:
    """a virtual table in place of reports"""
    return look(given.store("DROP TABLE reports", "CREATE VIRTUAL TABLE reports USING fts5(trial_id, rung, step)"))


@row("wanted tables alone")
def computed_column(given: Given) -> list[Command]:
    """a column that is computed, a gigabyte in each row"""
    return look(
        given.store(
            "ALTER TABLE trials DROP COLUMN worker",
            "ALTER TABLE trials ADD COLUMN worker TEXT AS (hex(zeroblob(500000000))) VIRTUAL",
        )
    )


@row("no such (table|column)")
def missing_column(given: Given) -> list[Command]:
    """a table without one of its columns"""
    return trial_reads(given.store("ALTER TABLE trials DROP COLUMN recipe"))


# ---- rows ----------------------------------------------------------------------------------------------------------


def with_trial(given: Given, column: str, value: Any) -> list[Command]:
    return trial_reads(given.store((f"UPDATE trials SET {column} = ?", (value,))))


def with_study(given: Given, column: str, value: Any) -> list[Command]:
    return trial_reads(given.store((f"UPDATE studies SET {column} = ?", (value,))))


@row("did not write")
def text_for_json(given: Given) -> list[Command]:
    """settings that are no JSON"""
    return with_study(given, "settings", "{evil")


@row("did not write")
def deep_json(given: Given) -> list[Command]:
    """settings of 100,000 brackets"""
    return with_study(given, "settings", "[" * 100_000 + "]" * 100_000)


@row("did not write")
def list_of_settings(given: Given) -> list[Command]:
    """settings that are a list"""
    return with_study(given, "settings", "[1]")


@row("did not write")
def kinds_of_settings(given: Given) -> list[Command]:
    """settings of other kinds"""
    return with_study(given, "settings", json.dumps({"trials": "many", "variants": [[]], "task": "text"}))


@row("did not write")
def unknown_task(given: Given) -> list[Command]:
    """a task that there is not"""
    return with_study(given, "settings", json.dumps({"trials": 9, "task": "__import__"}))


@row("did not write")
def no_objectives(given: Given) -> list[Command]:
    """a study without objectives"""
    return with_study(given, "objectives", "[]")


@row("did not write")
def other_objectives(given: Given) -> list[Command]:
    """an objective that no trial was measured by"""
    return with_study(given, "objectives", '["bits_per_byte", "evil"]')


@row("did not write")
def other_date(given: Given) -> list[Command]:
    """a date that is none"""
    return with_study(given, "created", "yesterday")


@row("did not write")
def unknown_state(given: Given) -> list[Command]:
    """a state that there is not"""
    return with_trial(given, "state", "EVIL")


@row("did not write")
def unknown_failure(given: Given) -> list[Command]:
    """a failure of an unknown kind"""
    return with_trial(given, "failure_kind", "EVIL")


@row("did not write")
def other_recipe(given: Given) -> list[Command]:
    """a recipe with a key of Python's"""
    return with_trial(given, "recipe", '{"learning_rate": 0.1, "__class__": "os.system"}')


@row("did not write")
def kinds_of_recipe(given: Given) -> list[Command]:
    """a recipe whose numbers are texts"""
    return with_trial(given, "recipe", '{"learning_rate": "fast", "tokens": []}')


@row("did not write")
def blob(given: Given) -> list[Command]:
    """a name that is bytes"""
    return with_trial(given, "arch_hash", b"\xff\x00")


@row("did not write")
def infinite_loss(given: Given) -> list[Command]:
    """a loss that is infinite, on the front"""
    return trial_reads(given.store("UPDATE trial_values SET value = 9e999"))


@row("did not write")
def text_for_a_loss(given: Given) -> list[Command]:
    """a loss that is a text"""
    return trial_reads(given.store("UPDATE trial_values SET value = 'evil'"))


@row(None)
def negative_rungs(given: Given) -> list[Command]:
    """a curve that begins before its beginning"""
    reads = trial_reads(given.store("UPDATE reports SET rung = -5"))
    return [command for command in reads if command[0] in ("status", "show", "report")]


@row(None)
def huge_rung(given: Given) -> list[Command]:
    """a curve of 2**62 rungs, and a loss that is infinite"""
    reads = trial_reads(given.store(f"UPDATE reports SET rung = {2**62}, loss = -9e999"))
    return [command for command in reads if command[0] in ("status", "show", "report")]


@row(None)
def odd_architecture(given: Given) -> list[Command]:
    """an architecture of texts for numbers, HTML and escape sequences"""
    arch = {"family": "transformer", "ffn.shape": ESCAPES, "ffn.ratio": "x", ESCAPES: [ESCAPES, {ESCAPES: None}]}
    reads = with_trial(given, "arch", json.dumps(arch))
    return [command for command in reads if command[0] != "show"]


@row("unknown key|wanted")
def odd_architecture_shown(given: Given) -> list[Command]:
    """the same, to be built"""
    path = given.store(("UPDATE trials SET arch = ?", (json.dumps({"family": "transformer", ESCAPES: 1}),)))
    return [look(path)[4]]


@row("did not write")
def odd_seeds(given: Given) -> list[Command]:
    """values by seed that are a text"""
    return with_trial(given, "diagnostics", '{"by_seed": "x"}')


@row(None)
def odd_notes(given: Given) -> list[Command]:
    """diagnostics, provenance and the sampler's notes of other kinds"""
    notes = json.dumps({"kernels": ESCAPES, "mean_mixing": 3, "device": []})
    changed = ", ".join(f"{name} = ?" for name in ("diagnostics", "provenance", "sampler_attrs"))
    return trial_reads(given.store((f"UPDATE trials SET {changed}", (notes,) * 3)))


@row(None)
def markup(given: Given) -> list[Command]:
    """HTML and escape sequences for names, values and messages"""
    path = given.store(
        ("UPDATE studies SET data_name = ?", (ESCAPES,)),
        (
            "UPDATE trials SET worker = ?, origin = ?, failure_message = ?, params = ?",
            (*[ESCAPES] * 3, json.dumps({ESCAPES: ESCAPES})),
        ),
    )
    return trial_reads(path)


@row("names code for others to run")
def own_space(given: Given) -> list[Command]:
    """a space that is a file beside the store"""
    (given.folder / "evil.py").write_text(given.payload)
    path = given.store("UPDATE studies SET space = 'evil.py:Space'")
    return [look(path)[4], write(path)[0]]


@row("no study names the code")
def own_evaluation(given: Given) -> list[Command]:
    """an evaluation that is a file beside the store"""
    (given.folder / "evil.py").write_text(given.payload)
    path = given.store("UPDATE studies SET settings = json_set(settings, '$.evaluate', 'evil:run')")
    return [write(path)[0]]


@row("cannot start from trial")
def own_parent(given: Given) -> list[Command]:
    """a trial that is its own grandparent, whose weights are to be trained again"""
    attrs = [json.dumps({"inherited": "deeper", "parent": parent}) for parent in (1, 0)]
    path = given.store(
        *(("UPDATE trials SET sampler_attrs = ? WHERE number = ?", (attr, n)) for n, attr in enumerate(attrs))
    )
    return [write(path)[0]]


@row("cannot start from trial")
def odd_parent(given: Given) -> list[Command]:
    """a trial whose parent is a text"""
    return [write(given.store(("UPDATE trials SET sampler_attrs = ?", ('{"inherited": 3, "parent": "../x"}',))))[0]]


@row(None)
def driver_of_no_process(given: Given) -> list[Command]:
    """drivers of processes -1, 0 and 2**62, here and now"""
    mine = this_process()
    columns = "study_id, workers, started, heartbeat, " + ", ".join(mine)
    now = "2026-01-01 00:00:00.000000"
    return look(
        given.store(
            *(
                (
                    f"INSERT INTO drivers ({columns}) VALUES (1, 1, '{now}', '{now}'{', ?' * len(mine)})",
                    tuple((mine | {"pid": pid}).values()),
                )
                for pid in (-1, 0, 2**62)
            )
        )
    )


@row(None)
def artifacts_outside(given: Given) -> list[Command]:
    """weights that are files outside, to be deleted with the study"""
    secret = given.folder.parent / "outside" / "secret"
    path = given.store(
        ("UPDATE studies SET artifacts = ?", (str(secret.parent),)),
        ("INSERT INTO artifacts VALUES (1, 'weights', ?, ?, 1)", (str(secret), "0" * 64)),
        ("INSERT INTO artifacts VALUES (1, '../../outside/secret', '../../outside/secret', ?, 1)", ("0" * 64,)),
        ("INSERT INTO artifacts VALUES (2, 'weights', '../outside/secret', ?, 1)", ("0" * 64,)),
    )
    return [write(path)[1]]


@row("is a link")
def linked_folder(given: Given) -> list[Command]:
    """a folder of weights that is a link out of the store's"""
    from hypernas.store import Store
    from hypernas.store.folders import artifacts_folder

    path = given.store()
    with Store(str(path)) as store:
        there = artifacts_folder(store, "s")
    there.parent.mkdir()
    there.symlink_to(given.folder.parent / "outside")
    return write(path)
