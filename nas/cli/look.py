"""Commands that look at studies and spaces: status, front, show, describe, gallery, report, dashboard."""

import click

from hypernas.cli.base import (
    MAX_COUNT,
    format_value,
    json_option,
    new_store_option,
    own_space_option,
    print_json,
    set_option,
    store_option,
    study_option,
)
from hypernas.store.files import check_store


@click.command()
@study_option()
@store_option
@json_option
def status(study: str, store: str, as_json: bool) -> None:
    """How far a study is: states, rate, workers, utilisation, failures by cause."""
    from hypernas.show.status import status_of
    from hypernas.show.words import format_volume
    from hypernas.store import Reader

    with Reader(store) as opened:
        data = status_of(opened, opened.study(study))
    if as_json:
        print_json(data)
        return
    states = ", ".join(f"{count} {name}" for name, count in data["states"].items() if count) or "no trials yet"
    click.echo(f"study {data['study']}: {states}")
    for kind, count in data["failures"].items():
        click.echo(f"  failed, {kind}: {count}")
    for number in data.get("baselines_missing", ()):
        click.echo(f"  baseline missing: trial {number}")
    click.echo(f"workers {data['workers']}, utilisation {format_value(data['utilisation'], '{:.2f}')}")
    click.echo(
        f"trials per hour {format_value(data['trials_per_hour'], '{:.1f}')}, "
        f"ETA {format_value(data['eta_seconds'], '{:.0f} s')}"
    )
    click.echo(f"hypervolume {format_volume(data['hypervolume'])}")
    for name, value in data.get("spread", {}).items():
        click.echo(f"spread of {name} over seeds: {value:.4g} (median standard deviation on the front)")
    for rung, value in data["rank_correlation"].items():
        click.echo(f"rank correlation of rung {rung} with the end: {value:.2f} (trials that halving leaves alone)")


@click.command()
@study_option()
@store_option
@json_option
@click.option("--format", "form", type=click.Choice(["table", "csv"]), default="table", show_default=True)
def front(study: str, store: str, as_json: bool, form: str) -> None:
    """The Pareto front, best loss first."""
    from hypernas.show.json_shapes import front_rows
    from hypernas.show.status import missing_said, variants_said, verdict
    from hypernas.show.tables import front_table, print_table
    from hypernas.store import Reader

    with Reader(store) as opened:
        row = opened.study(study)
        trials = opened.front(row)
        rows = front_rows(row, trials)
        for_scripts = as_json or form == "csv"
        said = (missing_said if for_scripts else verdict)(opened, row)
    if for_scripts and said:
        click.echo(said, err=True)
    if as_json:
        print_json(rows)
    elif form == "csv":
        from hypernas.show.json_shapes import as_csv

        click.echo(as_csv(rows), nl=False)
    else:
        print_table(front_table(trials))
        click.echo("* baseline")
        click.echo("\n".join([said, *variants_said(row, trials)]))


@click.command()
@study_option()
@store_option
@click.option("--trial", type=click.IntRange(0, MAX_COUNT), required=True, metavar="N", help="Number of the trial.")
@own_space_option
@json_option
def show(study: str, store: str, trial: int, space: str | None, as_json: bool) -> None:
    """One trial: architecture, parameters and FLOPs by part, curve, timings, provenance."""
    from hypernas.search_spaces import name_space, stored_space
    from hypernas.show.json_shapes import cost_json, show_json
    from hypernas.show.tables import cost_table, print_table
    from hypernas.store import Reader

    with Reader(store) as opened:
        row = name_space(opened.study(study), space)
        found = opened.trial(row, trial)
        data = show_json(row, found, opened.reports(row, [trial]))
    if not row.settings.imported:
        searched = stored_space(row.space)
        data |= {"cost": cost_json(searched, searched.from_json(found.arch))}
    if as_json:
        print_json(data)
        return
    click.echo(f"trial {trial} of {study}: {found.state}")
    for name, value in found.arch.items():
        click.echo(f"  {name} = {value}")
    if data["training"]:
        click.echo("training: " + ", ".join(f"{name} {value}" for name, value in data["training"].items()))
    for name, value in found.values.items():
        click.echo(f"  {name} = {value:.6g}")
    if "cost" in data:
        print_table(cost_table(data["cost"]))
    for report in data["curve"]:
        if row.settings.imported:
            click.echo(f"  step {report['step']}: reported {report['loss']:.6g}")
        else:
            click.echo(f"  rung {report['rung']}: loss {report['loss']:.4f} after {report['tokens']:,} {data['unit']}s")
    click.echo(
        f"train {format_value(found.train_seconds, '{:.1f} s')}, "
        f"evaluate {format_value(found.evaluate_seconds, '{:.1f} s')}"
    )
    if found.provenance:
        click.echo("provenance: " + ", ".join(f"{name} {value}" for name, value in found.provenance.items()))
    if found.failure:
        click.echo(f"failed ({found.failure.kind}): {found.failure.message}\n{found.failure.traceback}")


@click.command()
@click.option(
    "--space", default="lm", show_default=True, metavar="NAME", help="lm, vision, pkg.module:Space or FILE.py:Space."
)
@set_option
@json_option
@click.option("--keys", is_flag=True, help="List the space's keys with their legal values instead.")
def describe(space: str, settings: dict[str, str], as_json: bool, keys: bool) -> None:
    """Parameters and FLOPs by part of an architecture, without training it.

    Unset keys are as in the baseline: nas describe --set depth=12 --set streams.n=4
    """
    from hypernas.search_spaces import load_space
    from hypernas.show.json_shapes import cost_json
    from hypernas.show.tables import cost_table, keys_table, print_table

    loaded = load_space(space)
    if keys and as_json:
        print_json([{"key": key.name, "baseline": key.default, "meaning": key.help} for key in loaded.keys.values()])
        return
    if keys:
        print_table(keys_table(loaded))
        return
    data = cost_json(loaded, loaded.from_json(settings))
    if as_json:
        print_json(data)
    else:
        for name, value in data["arch"].items():
            click.echo(f"{name} = {value}")
        print_table(cost_table(data))


@click.command()
@json_option
def gallery(as_json: bool) -> None:
    """Named architectures to start from: --set base=NAME pins one, keys given beside it are searched.

    \b
    nas describe --set base=llama-like
    nas search --study around --set base=llama-like --set depth=4..12
    """
    from hypernas.search_spaces.gallery import gallery as entries

    listed = entries()
    if as_json:
        print_json(
            [
                {"name": entry.name, "space": entry.space, "settings": dict(entry.settings), "note": entry.note}
                for entry in listed
            ]
        )
        return
    for entry in listed:
        click.echo(f"{entry.name} (space {entry.space}): {entry.note}")
        click.echo("    " + " ".join(f"--set {name}={text}" for name, text in entry.settings.items()))


@click.command()
@study_option()
@store_option
@click.option("--out", default="report.html", show_default=True, metavar="FILE.html", help="File to write.")
@click.option("--figures", metavar="DIR", help="Also write every figure here: PNG, SVG, and its numbers as CSV.")
def report(study: str, store: str, out: str, figures: str | None) -> None:
    """One HTML file with front, trials, curves and hypervolume; it opens without a network."""
    from hypernas.store import Reader

    with Reader(store) as opened:
        opened.study(study)
        from hypernas.dashboards.report import write_report  # brings pandas and Plotly: once the study is found

        path = write_report(opened, study, out)
        click.echo(f"report written to {path}")
        if figures is not None:
            from hypernas.dashboards.paper import write_figures

            written = write_figures(opened, study, figures)
            click.echo(f"{len(written)} figure files written to {figures}: {', '.join(path.name for path in written)}")


@click.command()
@new_store_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8050, show_default=True, help="0 takes a free one.")
@click.option(
    "--allow-host",
    "names",
    multiple=True,
    metavar="NAME",
    help="Another name that browsers ask for it by, as behind a proxy. Repeat for more.",
)
def dashboard(store: str, host: str, port: int, names: tuple[str, ...]) -> None:
    """Serve the studies of a store as a web app, live while searches run. It writes nothing to the store."""
    check_store(store, create=True)  # a file that is not there yet is waited for
    from hypernas.dashboards.app import serve

    serve(store, host, port, names)
