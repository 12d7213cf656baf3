"""`nas search` and `nas scale`."""

import sys
from dataclasses import replace
from typing import Any

import click

from hypernas.cli.base import (
    cluster_options,
    flag_options,
    given_flags,
    json_option,
    own_space_option,
    print_json,
    store_option,
    study_option,
)
from hypernas.config.study_config import FLAGS, StudyConfig, read_toml
from hypernas.errors import UserError


@click.command()
@click.option("--config", metavar="FILE.toml", help="[search] holds these flags with underscores, [set] the keys.")
@flag_options(*FLAGS)
def search(config: str | None, settings: dict[str, str], **flags: Any) -> None:
    """Train candidate architectures and keep the front of loss against FLOPs.

    Trial 0 is the plain baseline, trials 1 and 2 the same at three times and a third of its learning rate. Ctrl-C
    once lets running trials finish; twice hands them back. Either way --resume continues.

    \b
    nas search --study first --preset quick
    nas search --study mine --set data.path=book.txt --set depth=4..8 --trials 100
    nas search --study first --resume --trials 200
    """
    given = read_toml(config) if config else {}
    given |= given_flags(flags)
    merged = {**given.get("settings", {}), **settings}
    if merged:
        given["settings"] = merged
    from hypernas.launch import launch

    sys.exit(launch(given))


@click.command()
@study_option()
@store_option
@click.option(
    "--trials",
    default="front",
    show_default=True,
    metavar="N,M",
    help='Trials to compare: numbers, or "front" for all on the front.',
)
@click.option(
    "--baseline", default="baseline", show_default=True, metavar="NAME", help="The study's own, or one of nas gallery."
)
@click.option(
    "--ladder", metavar="SIZES", help="Parameters: 20k,50k,100k, or 20k..160k.  [default: 20k,35k,60k,105k,180k]"
)
@click.option(
    "--tokens-per-parameter", default="20", show_default=True, metavar="R[,R]", help="Several also fit loss(N, D)."
)
@click.option(
    "--budget",
    type=click.Choice(["chinchilla", "kaplan"]),
    default="chinchilla",
    show_default=True,
    help="Tokens in proportion to parameters, or as their power 0.37.",
)
@click.option(
    "--seeds",
    type=int,
    default=3,
    show_default=True,
    help="Seeds per size in the smaller half of the ladder (larger sizes: one).",
)
@click.option("--ablate", is_flag=True, help="One trial against the baseline, a component at a time.")
@own_space_option
@cluster_options
@json_option
def scale(
    study: str,
    store: str,
    trials: str,
    baseline: str,
    ladder: str | None,
    tokens_per_parameter: str,
    budget: str,
    seeds: int,
    ablate: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Does the gain survive scale? Trains a ladder of sizes and fits scaling laws: compute-equivalent gain by compute.

    The ladder is a study of its own, NAME-scale. Run the same command again to continue after Ctrl-C.

    \b
    nas scale --study first --trials 14
    nas scale --study first --trials 14 --ablate --ladder 20k..320k
    """
    from hypernas.scaling.shape import Ladder, parse_sizes

    try:
        ratios = tuple(float(part) for part in tokens_per_parameter.split(","))
    except ValueError as error:
        raise UserError(f"--tokens-per-parameter {tokens_per_parameter}: wanted numbers, like 10,20,40") from error
    given = {"study": study, "store": store, **given_flags(flags)}
    StudyConfig(**given)
    shape = Ladder(tokens_per_parameter=ratios, budget=budget, seeds=seeds)
    if ladder is not None:
        shape = replace(shape, sizes=parse_sizes(ladder))
    from hypernas.store import Reader

    with Reader(store, waits=True) as opened:
        opened.study(study)
    from hypernas.scaling.analysis import describe  # brings torch: once the study is found
    from hypernas.scaling.launch import launch_scale

    data = launch_scale(given, trials, baseline, shape, ablate)
    if as_json:
        print_json(data)
    else:
        click.echo("\n".join(describe(data)))
