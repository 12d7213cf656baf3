"""The command `nas`. Each command parses, calls one function and prints: results on stdout, progress on stderr.

Heavy libraries are imported inside the commands, so that `nas --help` answers at once. Exit codes: 0 done, 1 not
finished (interrupted, or a check failed), 2 bad input.
"""

import os
import signal
import sys

import click

from hypernas.cli import bench, borders, doctor, look, models, search, studies
from hypernas.cli.base import CONTEXT, Commands
from hypernas.errors import UserError
from hypernas.show.terminal import Visible, visible_streams

LONGEST_SENTENCE = 4000  # characters


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
        _check_utf8(sys.argv[1:] if argv is None else argv)
        cli.main(args=argv, prog_name="nas", standalone_mode=False)
        sys.stdout.flush()  # what cannot be written is known here, not when Python ends
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
        _say(str(error))
        return 2
    except Exception as error:
        said = borders.explain(error)
        if said is None:
            raise
        _say(said)
        return 2
    return 0


def _say(message: str) -> None:
    """Prints one sentence, in a line, whatever is named in it: names and values may be anybody's."""
    line = message if len(message) <= LONGEST_SENTENCE else f"{message[:LONGEST_SENTENCE]}..."
    click.echo("nas: " + line.replace("\n", r"\u000a"), err=True)


def _check_utf8(arguments: list[str]) -> None:
    """Raises UserError for an argument that no database and no JSON can hold."""
    for argument in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise UserError(f"{argument!r} is not UTF-8: studies, stores and files are named in UTF-8")


def entry() -> None:
    """The installed command."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was started is ended in order
    sys.stdout, sys.stderr = Visible(sys.stdout), Visible(sys.stderr)  # tracebacks, too
    code = _run(None)
    try:
        sys.stdout.flush()
    except OSError:  # _run has said so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try once more, and say it its way
    sys.exit(code)
