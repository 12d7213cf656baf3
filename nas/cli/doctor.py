"""`nas doctor`."""

import sys

import click

from hypernas.cli.base import json_option, new_store_option, print_json


@click.command()
@new_store_option
@click.option("--study", metavar="NAME", help="Also check this study's data and space.")
@click.option("--space", default="lm", show_default=True, metavar="NAME", help="Try architectures of this space.")
@click.option("--address", metavar="HOST:PORT", help="The Ray cluster to try: auto or HOST:PORT.")
@json_option
def doctor(store: str, study: str | None, space: str, address: str | None, as_json: bool) -> None:
    """Check what a search needs here: store, disk, device, compiler, data, Ray, one training step."""
    from hypernas.doctor import examine

    lines = examine(store, study, space, address)
    if as_json:
        print_json([{"check": line.check, "ok": line.ok, "found": line.found, "do": line.do} for line in lines])
    else:
        for line in lines:
            click.echo(
                f"{'ok  ' if line.ok else 'FAIL'} {line.check}: {line.found}" + (f"; {line.do}" if line.do else "")
            )
    sys.exit(0 if all(line.ok for line in lines) else 1)
