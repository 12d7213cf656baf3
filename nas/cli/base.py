"""What commands share: the group, its options, and how they print."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import click

from hypernas.config.study_config import (
    DATA_PATH,
    DEFAULTS,
    FLAGS,
    KINDS,
    check_gpus,
    check_least,
    option_of,
    split_names,
)
from hypernas.store.files import check_store

MAX_COUNT = 2**31 - 1  # what every database holds in an integer
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Commands(click.Group):
    """Lists commands in the order of work, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def parse_settings(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    out: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name.strip():
            raise click.BadParameter(f"{value!r}: wanted KEY=VALUE, like depth=2..8 or ffn.shape=hourglass")
        out[name.strip()] = text.strip()
    return out


def study_option(required: bool = True) -> Callable:
    return click.option("--study", required=required, metavar="NAME", help=FLAGS["study"].help)


def require_store(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Refuses a file that is not there before whatever would read it is imported. Raises StoreError."""
    check_store(value)
    return value


_store = partial(
    click.option, "--store", default=DEFAULTS["store"], show_default=True, metavar="URL", help=FLAGS["store"].help
)
new_store_option = _store()
store_option = _store(callback=require_store)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
# No study and no export names code for others to run: who has a space of their own names it again.
own_space_option = click.option(
    "--space", metavar="NAME", help="Its space, if that is your own code: FILE.py:Class or pkg.module:Class."
)
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar=FLAGS["settings"].metavar,
    callback=parse_settings,
    help=FLAGS["settings"].help,
)


def parse_data_path(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> str | None:
    given = parse_settings(ctx, param, values)
    if other := next((name for name in given if name != DATA_PATH), None):
        raise click.BadParameter(f"{other}: wanted {DATA_PATH}=PATH alone; all else is as the trial was trained")
    return given.get(DATA_PATH)


data_option = click.option(
    "--set",
    "data",
    multiple=True,
    metavar=f"{DATA_PATH}=PATH",
    callback=parse_data_path,
    help="Where the study's data lies now, if it was moved.",
)


def parse_flag(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """A flag's value as StudyConfig has it; None for one that was not given."""
    name = str(param.name)
    if value is None:
        return None
    if name == "objectives":
        return split_names(value)
    check_least(name, value)
    return value == "on" if isinstance(param.type, click.Choice) else value


def flag_option(name: str) -> Callable:
    """The option of a field of StudyConfig, by its type, its default and its words; not given, it is None."""
    if name == "settings":
        return set_option
    flag, default = FLAGS[name], DEFAULTS[name]
    shown = flag.shown or ("" if default is None or isinstance(default, bool) else str(default))
    given: dict[str, Any] = {"metavar": flag.metavar, "type": KINDS[name][-1]}
    if KINDS[name] == (bool,):  # where None is a third value, on and off are said
        given = {"is_flag": True, "default": None} if default is not None else {"type": click.Choice(["on", "off"])}
    return click.option(
        option_of(name),
        *flag.aliases,
        name,
        callback=parse_flag,
        help=flag.help + (f"  [default: {shown}]" if shown else ""),
        **given,
    )


def flag_options(*names: str) -> Callable:
    """The options of these fields of StudyConfig, in this order."""

    def add(command: Callable) -> Callable:
        for name in reversed(names):
            command = flag_option(name)(command)
        return command

    return add


# What trainings run on: for all commands that start some.
cluster_options = flag_options("engine", "address", "workers", "gpus_per_trial", "other_device")


def given_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that stood on the command line."""
    return {name: value for name, value in flags.items() if value is not None}


def require_gpus(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    check_gpus(value)  # here, before a command imports torch
    return value


device_option = click.option(
    "--gpus-per-trial",
    "gpus",
    type=float,
    metavar="F",
    callback=require_gpus,
    help="1: the GPU; 0: the CPU.  [default: 1, or 0 where there is none]",
)


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2))


def format_value(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
