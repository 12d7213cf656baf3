"""`nas search` and `nas scale`."""

import sys
from dataclasses import replace
from typing import Any

import click

from hypernas.cli.base import (
    STORE_HELP,
    cluster_options,
    given_flags,
    json_option,
    parse_names,
    print_json,
    set_option,
    store_option,
    study_option,
)
from hypernas.errors import UserError


@click.command()
@click.option("--study", metavar="NAME", help="Name of the study.  [default: default]")
@click.option("--store", metavar="URL", help=STORE_HELP + "  [default: nas.db]")
@click.option("--space", metavar="NAME", help="lm, vision, pkg.module:Space or FILE.py:Space.  [default: lm]")
@click.option("--config", metavar="FILE.toml", help="[search] holds these flags with underscores, [set] the keys.")
@set_option
@click.option("--preset", metavar="NAME", help="quick, small or full: trials and tokens.  [default: small]")
@click.option(
    "--objectives",
    "--objective",
    metavar="A,B[,C]",
    callback=parse_names,
    help="What to trade off; a quality alone against flops.  [default: loss and flops]",
)
@click.option("--trials", type=int, metavar="N", help="Trials in the study when it is done.  [default: the preset's]")
@click.option("--time", type=float, metavar="SECONDS", help="Start no trial after so long.")
@click.option("--device-hours", type=float, metavar="H", help="Start no trial once all have used so much of a device.")
@cluster_options
@click.option(
    "--sampler",
    metavar="NAME",
    help="evolution, tpe, nsgaii, nsgaiii, gp, random, qmc or hub:NAME.  [default: evolution with halving, else tpe]",
)
@click.option(
    "--halving",
    type=click.Choice(["on", "off"]),
    help="Stop trials early that promise no place on the front.  [default: on from 64 trials on]",
)
@click.option(
    "--repeats", type=int, metavar="N", help="Seeds each trial is trained with; values are means.  [default: 1]"
)
@click.option(
    "--inherit",
    is_flag=True,
    default=None,
    help="Children of evolution start from their parents' weights; measured in docs/search.md.  [default: off]",
)
@click.option("--warm-start", metavar="SOURCE", help="Train these first: FILE.json, [STORE#]STUDY or optuna:URL#STUDY.")
@click.option("--trial-timeout", type=float, metavar="S", help="Kill a trial that runs longer.")
@click.option("--checkpoints", metavar="DIR", help="Where half-trained trials are kept.  [default: beside the store]")
@click.option("--kernels", metavar="NAME", help="auto, reference, triton or cpu.  [default: auto]")
@click.option("--compile", is_flag=True, default=None, help="torch.compile each net: only long trials win it back.")
@click.option("--seed", type=int, metavar="N", help="Seed of the study: data order and proposals.  [default: 0]")
@click.option("--resume", is_flag=True, default=None, help="Continue the study up to --trials; create it if unknown.")
def search(config: str | None, settings: dict[str, str], **flags: Any) -> None:
    """Train candidate architectures and keep the front of loss against FLOPs.

    Trial 0 is the plain baseline, trials 1 and 2 the same at three times and a third of its learning rate. Ctrl-C
    once lets running trials finish; twice hands them back. Either way --resume continues.

    \b
    nas search --study first --preset quick
    nas search --study mine --set data.path=book.txt --set depth=4..8 --trials 100
    nas search --study first --resume --trials 200
    """
    from hypernas.config.study_config import read_toml

    given = read_toml(config) if config else {}
    given |= given_flags(flags)
    merged = {**given.get("settings", {}), **settings}
    if merged:
        given["settings"] = merged
    if "halving" in flags and flags["halving"] is not None:
        given["halving"] = flags["halving"] == "on"
    for flag in ("trials", "workers"):
        if given.get(flag) is not None and given[flag] < 1:
            raise UserError(f"--{flag} {given[flag]}: wanted at least 1")
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
    from hypernas.config.study_config import StudyConfig
    from hypernas.store import Reader

    try:
        ratios = tuple(float(part) for part in tokens_per_parameter.split(","))
    except ValueError as error:
        raise UserError(f"--tokens-per-parameter {tokens_per_parameter}: wanted numbers, like 10,20,40") from error
    given = {"study": study, "store": store, **given_flags(flags)}
    StudyConfig(**given)
    with Reader(store) as opened:  # whether it has the study, before torch is imported
        opened.study(study)
    from hypernas.scaling.analysis import describe
    from hypernas.scaling.ladder import Ladder, parse_sizes
    from hypernas.scaling.launch import launch_scale

    shape = Ladder(tokens_per_parameter=ratios, budget=budget, seeds=seeds)
    if ladder is not None:
        shape = replace(shape, sizes=parse_sizes(ladder))
    data = launch_scale(given, trials, baseline, shape, ablate)
    if as_json:
        print_json(data)
    else:
        click.echo("\n".join(describe(data)))
