"""The command `nas`. Each command parses, calls one function and prints: results on stdout, progress on stderr.

Heavy libraries are imported inside the commands, so that `nas --help` answers at once. Exit codes: 0 done, 1 not
finished (interrupted, or a check failed), 2 bad input.
"""

import sys

import click

from hypernas.cli import bench, doctor, look, models, search, studies
from hypernas.cli.base import CONTEXT, Commands
from hypernas.errors import UserError
from hypernas.show.terminal import Visible, visible_streams


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="hypernas", prog_name="nas")
def cli() -> None:
    """Search neural architectures for the best accuracy per FLOP.

    \b
    nas search --study first          trains candidates on this machine, results in nas.db
    nas front  --study first          the trade-off: loss against FLOPs
    nas export --study first --pick knee --out winner
    """


# In the order of work, which is that of the help.
for command in (
    *(search.search, look.status, look.front, look.show, look.describe, look.gallery),
    *(models.export, models.train, models.generate, models.evaluate, models.decompose),
    *(search.scale, look.report, look.dashboard, doctor.doctor, studies.study_group, bench.bench),
):
    cli.add_command(command)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code. What it prints is visible text alone, wherever that comes from."""
    with visible_streams():
        return _run(argv)


def _run(argv: list[str] | None) -> int:
    try:
        cli.main(args=argv, prog_name="nas", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("aborted", err=True)
        return 1
    except click.ClickException as error:
        error.show()
        return 2
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        return 1
    except UserError as error:
        click.echo(f"nas: {error}", err=True)
        return 2
    return 0


def entry() -> None:
    """The installed command."""
    sys.stdout, sys.stderr = Visible(sys.stdout), Visible(sys.stderr)  # tracebacks, too
    sys.exit(_run(None))
