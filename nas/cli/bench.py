"""`nas bench`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from hypernas.cli.base import Commands, cluster_options, given_flags, json_option, print_json
from hypernas.errors import UserError


@click.group(cls=Commands)
def bench() -> None:
    """Measure hypernas itself, side by side with its peers."""


def _print_rows(data: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(data)
        return
    from hypernas.show.tables import bench_table, print_table

    print_table(bench_table(data))


@bench.command(name="search")
@click.option(
    "--part",
    type=click.Choice(["overhead", "growth", "fleet", "long", "quality", "inheritance"]),
    default="overhead",
    show_default=True,
)
@click.option(
    "--trials", type=click.IntRange(min=10), help="[default: 200; 10,000 for growth, 100,000 for fleet, 3,000 for long]"
)
@click.option("--seeds", type=click.IntRange(min=1), default=20, show_default=True, help="Seeds of --part quality.")
@click.option("--figure", metavar="FILE", help="Draw --part quality: hypervolume against compute, as HTML, PNG or SVG.")
@click.option("--record", is_flag=True, help="Train the table that --part quality replays: short trainings, resumable.")
@click.option("--store", default="table.db", show_default=True, metavar="URL", help="Where --record keeps its study.")
@click.option("--out", default="lm.json", show_default=True, metavar="FILE", help="The table that --record writes.")
@cluster_options
@json_option
def bench_search(
    part: str,
    trials: int | None,
    seeds: int,
    figure: str | None,
    record: bool,
    store: str,
    out: str,
    as_json: bool,
    **flags: Any,
) -> None:
    """What a trial costs beyond its training, and how good a front the same compute finds.

    overhead: our engines and Ray Tune with its own OptunaSearch, in one run. growth: the first trials of a long study
    and its last. fleet: one driver of 2,000 simulated workers. long: memory and files of one driver of many trials.
    quality: our defaults and the peers, on recorded trainings and a simulated clock. inheritance: what children gain
    that start from their parents' weights, in ten minutes.
    """
    if record:
        from hypernas.bench.table import record as record_table

        sys.exit(record_table(store, Path(out), given_flags(flags)))
    if given := given_flags(flags):
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UserError(f"{names}: a flag of --record alone; the other parts measure workers of their own")
    if part == "quality":
        from hypernas.bench.quality import compare

        data, curves = compare(seeds)
        if figure:
            from hypernas.dashboards.paper import write_figure
            from hypernas.dashboards.quality import figure as drawn

            write_figure(drawn(curves), figure)
    elif part == "inheritance":
        from hypernas.bench.inheritance import measure

        data = measure()
    elif part == "fleet":
        from hypernas.bench.fleet import measure as measure_fleet

        data = measure_fleet(trials or 100_000)
    elif part == "long":
        from hypernas.bench.long_run import measure as measure_long

        data = measure_long(trials or 3000)
    else:
        from hypernas.bench.search import growth, overhead

        data = growth(trials or 10_000) if part == "growth" else overhead(trials or 200)
    _print_rows(data, as_json)


@bench.command(name="store")
@click.option("--store", metavar="URL", help="An empty PostgreSQL database.  [default: a throw-away server]")
@click.option("--seconds", type=click.FloatRange(min=1.0), default=10.0, show_default=True, help="For each writer.")
@json_option
def bench_store(store: str | None, seconds: float, as_json: bool) -> None:
    """Statements a trial takes, four drivers on one PostgreSQL beside Optuna's storage, and opening a large study."""
    from hypernas.bench.store import measure

    data = measure(store, seconds)
    _print_rows(data, as_json)


@bench.command(name="kernels")
@click.option(
    "--op",
    default="stream_boundary",
    show_default=True,
    metavar="NAME",
    help="The op to time; docs/kernels.md names them.",
)
@click.option("--n", type=click.IntRange(min=1), default=4, show_default=True, help="Residual streams.")
@click.option("--C", "channels", type=click.IntRange(min=1), default=256, show_default=True, help="Channels a stream.")
@click.option("--tokens", default="4096", show_default=True, metavar="LIST", help="One number or several: 4096,65536.")
@click.option("--dtype", default="float32", show_default=True, metavar="LIST", help="float32, bfloat16 or both.")
@click.option("--backend", metavar="NAME", help="Only this one beside naive and floor: compile, cpu or triton.")
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="cpu or cuda.")
@json_option
def bench_kernels(
    op: str, n: int, channels: int, tokens: str, dtype: str, backend: str | None, device: str, as_json: bool
) -> None:
    """Time an op against eager PyTorch, torch.compile and a copy of the bytes it must move; correctness comes first.

    On a GPU by replaying CUDA graphs over data that does not fit its cache.
    """
    from hypernas.bench.request import check_kernels

    try:
        check_kernels(op, tokens, dtype, device)
        from hypernas.bench.kernels import run_all  # brings torch

        data = run_all(op, n, channels, tokens, dtype, backend, device)
    except ValueError as error:
        raise UserError(str(error)) from error
    _print_rows(data, as_json)


@bench.command(name="train")
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="cpu or cuda.")
@json_option
def bench_train(device: str, as_json: bool) -> None:
    """Time whole training steps, on a CPU against eager PyTorch, a plain Transformer and the package hyper-connections.

    There also what skipping saves in time, and what the first step of a new architecture costs. About three minutes.
    On a GPU: single launches, CUDA graphs and compiled parts, at two sizes, with the share of the device that is used.
    """
    from hypernas.bench.request import check_device

    try:
        check_device(device)
        from hypernas.bench.device import device_of  # brings torch

        where = device_of(device)
    except ValueError as error:
        raise UserError(str(error)) from error
    from hypernas.bench.device_steps import run_on
    from hypernas.bench.train import run

    data = run() if where.type == "cpu" else run_on(where)
    _print_rows(data, as_json)
