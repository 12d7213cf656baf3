"""What commands share: the group, its options, and how they print."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import click

MAX_COUNT = 2**31 - 1  # what every database holds in an integer
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
STORE_HELP = "Where studies are kept: a SQLite file, sqlite:///FILE or postgresql://USER@HOST/NAME."


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


def parse_names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(part.strip() for part in value.split(","))


def study_option(required: bool = True) -> Callable:
    return click.option("--study", required=required, metavar="NAME", help="Name of the study.")


store_option = click.option("--store", default="nas.db", show_default=True, metavar="URL", help=STORE_HELP)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    callback=parse_settings,
    help="Fix a key (depth=4) or restrict it (depth=2..8, ffn.shape=hourglass,conventional). Repeat for more.",
)


def require_positive(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise click.BadParameter(f"{value}: wanted at least 1")
    return value


CLUSTER_OPTIONS = (
    click.option(
        "--engine",
        metavar="NAME",
        help="ray (warm worker processes), tune (Ray Tune) or inline (this process).  [default: ray]",
    ),
    click.option("--address", metavar="HOST:PORT", help="Join this Ray cluster: auto or HOST:PORT."),
    click.option(
        "--workers",
        type=int,
        metavar="N",
        callback=require_positive,
        help="Trainings at once.  [default: as many as there are GPUs or cores for]",
    ),
    click.option(
        "--gpus-per-trial",
        type=float,
        metavar="F",
        help="GPUs a training takes; a fraction shares one, 0 is CPUs.  [default: 1, or 0 where there is none]",
    ),
    click.option(
        "--other-device",
        is_flag=True,
        default=None,
        help="Go on with a study in another precision, or on the other of GPUs and CPUs (name it: --gpus-per-trial).",
    ),
)


def cluster_options(command: Callable) -> Callable:
    """What trainings run on: the flags, by their names in StudyConfig, of all commands that start some."""
    for option in reversed(CLUSTER_OPTIONS):
        command = option(command)
    return command


def given_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that stood on the command line."""
    return {name: value for name, value in flags.items() if value is not None}


def require_gpus(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    from hypernas.config.study_config import check_gpus

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
