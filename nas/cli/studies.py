"""`nas study`: list, delete, replay, export, import."""

import sys

import click

from hypernas.cli.base import Commands, json_option, new_store_option, own_space_option, print_json, store_option
from hypernas.errors import UserError


@click.group(name="study", cls=Commands)
def study_group() -> None:
    """List, delete, export and import studies."""


@study_group.command(name="list")
@store_option
@json_option
def study_list(store: str, as_json: bool) -> None:
    """Every study in the store."""
    from hypernas.store import Reader

    with Reader(store) as opened:
        rows = opened.studies()
    if as_json:
        print_json(rows)
    for row in [] if as_json else rows:
        click.echo(f"{row['name']}: space {row['space']}, {row['trials']} trials, created {row['created'][:19]}")


@study_group.command(name="delete")
@click.argument("name")
@store_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def study_delete(name: str, store: str, yes: bool) -> None:
    """Delete a study, its trials and its weights."""
    from hypernas.store import Store
    from hypernas.study.delete import delete_study

    with Store(store) as opened:
        row = opened.study(name)
        if not yes:
            click.confirm(f"delete study {name!r} with {sum(opened.states(row).values())} trials?", abort=True)
        delete_study(opened, name)
    click.echo(f"deleted study {name}")


@study_group.command(name="replay")
@click.argument("name")
@store_option
@own_space_option
@click.option("--sampler", metavar="NAME", help="Its sampler, if that is OptunaHub's code: hub:NAME.")
def study_replay(name: str, store: str, space: str | None, sampler: str | None) -> None:
    """Draw every proposal of a study again, from what was told when, and compare."""
    from hypernas.search_spaces import name_space
    from hypernas.store import Reader

    with Reader(store) as opened:
        row = name_space(opened.study(name), space)
        from hypernas.study.replay import replay  # brings torch: once the study is found

        found = list(replay(opened, row, sampler))
    other = [entry for entry in found if entry.stored != entry.drawn]
    for entry in other:
        click.echo(f"trial {entry.trial} was {entry.stored}, and is drawn as {entry.drawn}")
    click.echo(f"{len(found) - len(other)} of {len(found)} proposals of study {name} are drawn again as they were")
    sys.exit(1 if other else 0)


@study_group.command(name="export")
@click.argument("name")
@store_option
@click.option("--to", required=True, metavar="URL", help="Optuna's database: a SQLite file or postgresql://...")
@own_space_option
def study_export(name: str, store: str, to: str, space: str | None) -> None:
    """Write a study into a database that Optuna and optuna-dashboard open.

    \b
    nas study export first --to optuna.db
    optuna-dashboard sqlite:///optuna.db
    """
    from hypernas.config.plan import make_plan
    from hypernas.config.study_config import resume_settings
    from hypernas.search_spaces import name_space, stored_space
    from hypernas.store import Reader

    with Reader(store) as opened:
        row = name_space(opened.study(name), space)
        if row.settings.imported:
            raise UserError(f"study {name!r} came from Optuna: its space is not known here")
        from hypernas.integrations.optuna_db import export_study  # brings Optuna: once the study is found

        stored_space(row.space)
        stored = {**row.settings.as_json(), "space": row.space.name, "sampler": None}  # nothing is proposed
        plan = make_plan(resume_settings(stored, {"study": name}))
        count = export_study(opened, row, to, plan.suggest, lambda text: click.echo(text, err=True))
    click.echo(f"exported {count} trials of {name}")


@study_group.command(name="import")
@click.argument("name", required=False)
@new_store_option
@click.option("--from", "source", required=True, metavar="URL", help="Optuna's database: a SQLite file or a URL.")
def study_import(name: str | None, store: str, source: str) -> None:
    """Read a study from Optuna's database: one that was exported goes on, one of Optuna's own can be looked at."""
    from hypernas.integrations.optuna_db import import_study
    from hypernas.store import Store

    with Store(store, create=True) as opened:
        row, count = import_study(opened, source, name, lambda line: click.echo(line, err=True))
    click.echo(f"imported {count} trials of {row.name}")
