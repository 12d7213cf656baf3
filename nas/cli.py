"""The command `nas`. Each command parses, calls one function and prints: results on stdout, progress on stderr.

Heavy libraries are imported inside the commands, so that `nas --help` answers at once. Exit codes: 0 done, 1 not
finished (interrupted, or a check failed), 2 bad input.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from hypernas.errors import UserError

MAX_COUNT = 2**31 - 1  # what every database holds in an integer
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
STORE_HELP = "Where studies are kept: a SQLite file, sqlite:///FILE or postgresql://USER@HOST/NAME."


class Commands(click.Group):
    """Lists commands in the order of work, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="hypernas", prog_name="nas")
def cli() -> None:
    """Search neural architectures for the best accuracy per FLOP.

    \b
    nas search --study first          trains candidates on this machine, results in nas.db
    nas front  --study first          the trade-off: loss against FLOPs
    nas export --study first --pick knee --out winner
    """


def _settings(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    out: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name.strip():
            raise click.BadParameter(f"{value!r}: wanted KEY=VALUE, like depth=2..8 or ffn.shape=hourglass")
        out[name.strip()] = text.strip()
    return out


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
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
    callback=_settings,
    help="Fix a key (depth=4) or restrict it (depth=2..8, ffn.shape=hourglass,conventional). Repeat for more.",
)


def _count(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
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
        callback=_count,
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


device_option = click.option(
    "--gpus-per-trial",
    "gpus",
    type=float,
    metavar="F",
    help="1: the GPU; 0: the CPU.  [default: 1, or 0 where there is none]",
)


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2))


# ---- search --------------------------------------------------------------------------------------------------


@cli.command()
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
    callback=_names,
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


# ---- looking -------------------------------------------------------------------------------------------------


@cli.command()
@study_option()
@store_option
@json_option
def status(study: str, store: str, as_json: bool) -> None:
    """How far a study is: states, rate, workers, utilisation, failures by cause."""
    from hypernas.show.status import status_of
    from hypernas.store import Store

    with Store(store) as opened:
        data = status_of(opened, opened.study(study))
    if as_json:
        _print_json(data)
        return
    states = ", ".join(f"{count} {name}" for name, count in data["states"].items() if count) or "no trials yet"
    click.echo(f"study {data['study']}: {states}")
    for kind, count in data["failures"].items():
        click.echo(f"  failed, {kind}: {count}")
    click.echo(f"workers {data['workers']}, utilisation {_shown(data['utilisation'], '{:.2f}')}")
    click.echo(
        f"trials per hour {_shown(data['trials_per_hour'], '{:.1f}')}, ETA {_shown(data['eta_seconds'], '{:.0f} s')}"
    )
    click.echo(f"hypervolume {data['hypervolume']:.4f}")
    for name, value in data.get("spread", {}).items():
        click.echo(f"spread of {name} over seeds: {value:.4g} (median standard deviation on the front)")
    for rung, value in data["rank_correlation"].items():
        click.echo(f"rank correlation of rung {rung} with the end: {value:.2f} (trials that halving leaves alone)")


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


@cli.command()
@study_option()
@store_option
@json_option
@click.option("--format", "form", type=click.Choice(["table", "csv"]), default="table", show_default=True)
def front(study: str, store: str, as_json: bool, form: str) -> None:
    """The Pareto front, best loss first."""
    from hypernas.show.json_shapes import front_rows
    from hypernas.show.status import variants_said, verdict
    from hypernas.show.tables import front_table, print_table
    from hypernas.store import Store

    with Store(store) as opened:
        row = opened.study(study)
        trials = opened.front(row)
        rows = front_rows(row, trials)
        said = verdict(opened, row)
    if as_json:
        _print_json(rows)
    elif form == "csv":
        from hypernas.show.json_shapes import as_csv

        click.echo(as_csv(rows), nl=False)
    else:
        print_table(front_table(trials))
        click.echo("* baseline")
        click.echo("\n".join([said, *variants_said(row, trials)]))


@cli.command()
@study_option()
@store_option
@click.option("--trial", type=click.IntRange(0, MAX_COUNT), required=True, metavar="N", help="Number of the trial.")
@json_option
def show(study: str, store: str, trial: int, as_json: bool) -> None:
    """One trial: architecture, parameters and FLOPs by part, curve, timings, provenance."""
    from hypernas.search_spaces import load_space
    from hypernas.show.json_shapes import cost_json, show_json
    from hypernas.show.tables import cost_table, print_table
    from hypernas.store import Store

    with Store(store) as opened:
        row = opened.study(study)
        found = opened.trial(row, trial)
        data = show_json(row, found, opened.reports(row, [trial]))
    space = load_space(row.space.name, row.space.settings)
    data |= {"cost": cost_json(space, space.from_json(found.arch))}
    if as_json:
        _print_json(data)
        return
    click.echo(f"trial {trial} of {study}: {found.state}")
    for name, value in found.arch.items():
        click.echo(f"  {name} = {value}")
    click.echo("training: " + ", ".join(f"{name} {value}" for name, value in data["training"].items()))
    for name, value in found.values.items():
        click.echo(f"  {name} = {value:.6g}")
    print_table(cost_table(data["cost"]))
    for report in data["curve"]:
        click.echo(f"  rung {report['rung']}: loss {report['loss']:.4f} after {report['tokens']:,} {data['unit']}s")
    click.echo(
        f"train {_shown(found.train_seconds, '{:.1f} s')}, evaluate {_shown(found.evaluate_seconds, '{:.1f} s')}"
    )
    click.echo("provenance: " + ", ".join(f"{name} {value}" for name, value in found.provenance.items()))
    if found.failure:
        click.echo(f"failed ({found.failure.kind}): {found.failure.message}\n{found.failure.traceback}")


@cli.command()
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
        _print_json([{"key": key.name, "baseline": key.default, "meaning": key.help} for key in loaded.keys.values()])
        return
    if keys:
        print_table(keys_table(loaded))
        return
    data = cost_json(loaded, loaded.from_json(settings))
    if as_json:
        _print_json(data)
    else:
        for name, value in data["arch"].items():
            click.echo(f"{name} = {value}")
        print_table(cost_table(data))


@cli.command()
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
        _print_json(
            [
                {"name": entry.name, "space": entry.space, "settings": dict(entry.settings), "note": entry.note}
                for entry in listed
            ]
        )
        return
    for entry in listed:
        click.echo(f"{entry.name} (space {entry.space}): {entry.note}")
        click.echo("    " + " ".join(f"--set {name}={text}" for name, text in entry.settings.items()))


# ---- taking home ---------------------------------------------------------------------------------------------


@cli.command()
@study_option()
@store_option
@click.option("--trial", type=click.IntRange(0, MAX_COUNT), metavar="N", help="Number of the trial.")
@click.option("--pick", metavar="RULE", help="knee, best, cheapest or max-flops=X, of the front.")
@click.option("--out", required=True, metavar="DIR", help="Folder to write; it must not exist or be an older export.")
@click.option(
    "--formats", default="py", show_default=True, metavar="LIST", help="py, pt2 and onnx: the source, and graphs of it."
)
@json_option
def export(study: str, store: str, trial: int | None, pick: str | None, out: str, formats: str, as_json: bool) -> None:
    """Write a trained model as a folder that needs only torch and safetensors.

    \b
    nas export --study first --pick knee --out winner
    nas export --study first --trial 7 --out seven
    """
    from hypernas.export.write import export_trial
    from hypernas.store import Store

    with Store(store) as opened:
        data = export_trial(opened, opened.study(study), trial=trial, pick=pick, out=out, formats=formats)
    if as_json:
        _print_json(data)
    else:
        click.echo(f"trial {data['trial']} of {study} is in {data['folder']}: {', '.join(data['files'])}")
        click.echo(f"checked: loaded without hypernas; largest difference from the trained model: {data['checked']}")


@cli.command()
@study_option()
@store_option
@click.option("--trial", type=click.IntRange(0, MAX_COUNT), required=True, metavar="N", help="Number of the trial.")
@click.option(
    "--tokens", type=click.IntRange(1), metavar="T", help="Tokens or images to train on.  [default: as it did]"
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted training.")
@click.option("--out", required=True, metavar="DIR", help="Folder to write; it must not exist or be an older export.")
@device_option
@json_option
def train(
    study: str, store: str, trial: int, tokens: int | None, resume: bool, out: str, gpus: float | None, as_json: bool
) -> None:
    """Train a trial's architecture again, longer if you like, and export it.

    On several processes or GPUs: torchrun --nproc_per_node=2 -m nas train ... (each process takes a GPU)

    \b
    nas train --study first --trial 7 --tokens 100000000 --out seven-long
    """
    from hypernas.export.retrain import train as run_training
    from hypernas.store import Store

    with Store(store) as opened:
        row = opened.study(study)
        data = run_training(opened, row, trial, tokens=tokens, resume=resume, out=out, gpus=gpus)
    if data is None:  # another process says it
        return
    if as_json:
        _print_json(data)
    else:
        for name, value in data["values"].items():
            click.echo(f"{name} = {value:.6g}")
        click.echo(f"trial {trial} of {study}, trained on {data['tokens']:,}, is in {out}")


@cli.command()
@click.argument("folder", metavar="DIR")
@click.option("--prompt", required=True, metavar="TEXT", help="What to continue.")
@click.option("--count", type=click.IntRange(1), default=200, show_default=True, metavar="N", help="Bytes to add.")
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.8, show_default=True, metavar="X", help="0: the likeliest."
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the sampling.")
@device_option
def generate(folder: str, prompt: str, count: int, temperature: float, seed: int, gpus: float | None) -> None:
    """Continue a text with an exported language model."""
    from hypernas.engines.devices import asked_device
    from hypernas.export.read import generate as continued

    device = asked_device(gpus)
    click.echo(continued(folder, prompt, count=count, temperature=temperature, seed=seed, device=device))


@cli.command()
@click.argument("folder", metavar="DIR")
@click.option("--data", metavar="PATH", help="Text or images.  [default: what it was trained on]")
@device_option
@json_option
def evaluate(folder: str, data: str | None, gpus: float | None, as_json: bool) -> None:
    """Loss and accuracy of an exported model on the validation part of some data."""
    from hypernas.engines.devices import asked_device
    from hypernas.export.read import evaluate as scored

    found = scored(folder, data, asked_device(gpus))
    if as_json:
        _print_json(found)
    else:
        for name, value in found.items():
            click.echo(f"{name} = {value:.6g}" if isinstance(value, float) else f"{name} = {value}")


@cli.command()
@click.argument("folder", metavar="DIR")
@click.option("--out", required=True, metavar="DIR2", help="Folder to write; it must not exist.")
@click.option("--data", metavar="PATH", help="The data it was trained on, if it is elsewhere now.")
@click.option(
    "--controls", type=int, default=3, show_default=True, metavar="N", help="Trainings on shuffled targets; 3 or more."
)
@click.option(
    "--keep",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    metavar="SHARE",
    help="Of the confirmed edges, the strongest, whose blocks the model runs.",
)
@click.option(
    "--steps", type=click.IntRange(1), default=4, show_default=True, metavar="N", help="In which the rest is taken out."
)
@click.option(
    "--retrain",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="T",
    help="Tokens or images, over all steps.",
)
@click.option("--store", metavar="URL", help="Whose study's front the variants join.  [default: nas.db if it is there]")
@click.option("--figure", metavar="FILE", help="The evidence, permuted into the blocks, as HTML, PNG or SVG.")
@device_option
@json_option
def decompose(
    folder: str,
    out: str,
    data: str | None,
    controls: int,
    keep: float,
    steps: int,
    retrain: int,
    store: str | None,
    figure: str | None,
    gpus: float | None,
    as_json: bool,
) -> None:
    """Take a trained model apart into blocks that run independently, with the evidence for them.

    DIR is an export. Evidence is what learning changed, beside controls: the untrained model, and the same training on
    shuffled targets, which takes --controls times as long as the model's own. Where blocks are found, the same training
    in 2, 4 and 8 blocks from the start stands beside them. After Ctrl-C the same command goes on.

    \b
    nas decompose winner --out winner-blocks
    nas decompose winner --out winner-blocks --keep 0.25 --retrain 100000
    """
    from hypernas.decompose.command import decompose as take_apart
    from hypernas.decompose.report import read_evidence
    from hypernas.engines.devices import asked_device

    if figure is not None:
        from hypernas.dashboards.paper import check_file

        check_file(figure)
    report = take_apart(
        folder,
        out,
        data_path=data,
        controls=controls,
        keep=keep,
        steps=steps,
        retrain=retrain,
        store=store,
        say=lambda text: click.echo(text, err=True),
        device=asked_device(gpus),
    )
    if figure is not None:
        from hypernas.dashboards.blocks import figure as drawn
        from hypernas.dashboards.paper import write_figure

        write_figure(drawn(report["nets"], read_evidence(out)), figure)
    if as_json:
        _print_json(report)
        return
    for line in report["verdict"]:
        click.echo(line)
    loss, result = report["loss"], report["result"]
    click.echo(
        f"{loss} {report['losses']['trained']:.4f} -> {result[loss]:.4f}, KL {result['kl']:.4f}, "
        f"agreement {result['agreement']:.3f}, {result['flops']:.0f} FLOPs; the model is in {out}"
    )


@cli.command()
@study_option()
@store_option
@click.option("--trials", default="front", show_default=True, metavar="N,M", help="Which; front: all of it.")
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
@click.option("--seeds", type=int, default=3, show_default=True, help="Of the smaller half of the sizes.")
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

    The ladder is a study of its own, NAME-scale; Ctrl-C loses nothing, the same command goes on.

    \b
    nas scale --study first --trials 14
    nas scale --study first --trials 14 --ablate --ladder 20k..320k
    """
    from hypernas.scaling.analysis import describe
    from hypernas.scaling.ladder import Ladder, parse_sizes
    from hypernas.scaling.launch import launch_scale

    try:
        ratios = tuple(float(part) for part in tokens_per_parameter.split(","))
    except ValueError as error:
        raise UserError(f"--tokens-per-parameter {tokens_per_parameter}: wanted numbers, like 10,20,40") from error
    shape = Ladder(tokens_per_parameter=ratios, budget=budget, seeds=seeds)
    if ladder is not None:
        shape = replace(shape, sizes=parse_sizes(ladder))
    given = {"study": study, "store": store, **given_flags(flags)}
    data = launch_scale(given, trials, baseline, shape, ablate)
    if as_json:
        _print_json(data)
    else:
        click.echo("\n".join(describe(data)))


@cli.command()
@study_option()
@store_option
@click.option("--out", default="report.html", show_default=True, metavar="FILE.html", help="File to write.")
@click.option("--figures", metavar="DIR", help="Also write every figure here: PNG, SVG, and its numbers as CSV.")
def report(study: str, store: str, out: str, figures: str | None) -> None:
    """One HTML file with front, trials, curves and hypervolume; it opens without a network."""
    from hypernas.dashboards.report import write_report
    from hypernas.store import Store

    with Store(store) as opened:
        path = write_report(opened, study, out)
        click.echo(f"report written to {path}")
        if figures is not None:
            from hypernas.dashboards.paper import write_figures

            written = write_figures(opened, study, figures)
            click.echo(f"{len(written)} figure files written to {figures}: {', '.join(path.name for path in written)}")


@cli.command()
@click.option("--store", default="nas.db", show_default=True, metavar="URL", help=STORE_HELP)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8050, show_default=True, help="0 takes a free one.")
def dashboard(store: str, host: str, port: int) -> None:
    """Serve the studies of a store as a web app, live while searches run. It writes nothing to the store."""
    from hypernas.dashboards.app import serve

    serve(store, host, port)


# ---- keeping house -------------------------------------------------------------------------------------------


@cli.command()
@store_option
@click.option("--study", metavar="NAME", help="Also check this study's data and space.")
@click.option("--space", default="lm", show_default=True, metavar="NAME", help="Whose architectures to try.")
@click.option("--address", metavar="HOST:PORT", help="The Ray cluster to try: auto or HOST:PORT.")
@json_option
def doctor(store: str, study: str | None, space: str, address: str | None, as_json: bool) -> None:
    """Check what a search needs here: store, disk, device, compiler, data, Ray, one training step."""
    from hypernas.doctor import examine

    lines = examine(store, study, space, address)
    if as_json:
        _print_json([{"check": line.check, "ok": line.ok, "found": line.found, "do": line.do} for line in lines])
    else:
        for line in lines:
            click.echo(
                f"{'ok  ' if line.ok else 'FAIL'} {line.check}: {line.found}" + (f"; {line.do}" if line.do else "")
            )
    sys.exit(0 if all(line.ok for line in lines) else 1)


@cli.group(name="study", cls=Commands)
def study_group() -> None:
    """List, delete, export and import studies."""


@study_group.command(name="list")
@store_option
@json_option
def study_list(store: str, as_json: bool) -> None:
    """Every study in the store."""
    from hypernas.store import Store

    with Store(store) as opened:
        rows = opened.studies()
    if as_json:
        _print_json(rows)
    for row in [] if as_json else rows:
        click.echo(f"{row['name']}: space {row['space']}, {row['trials']} trials, created {row['created'][:19]}")


@study_group.command(name="delete")
@click.argument("name")
@store_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def study_delete(name: str, store: str, yes: bool) -> None:
    """Delete a study, its trials and its weights."""
    import shutil

    from hypernas.store import Store

    with Store(store) as opened:
        row = opened.study(name)
        if not yes:
            click.confirm(f"delete study {name!r} with {sum(opened.states(row).values())} trials?", abort=True)
        opened.delete_study(name)
    shutil.rmtree(row.artifacts, ignore_errors=True)
    click.echo(f"deleted study {name}")


@study_group.command(name="replay")
@click.argument("name")
@store_option
def study_replay(name: str, store: str) -> None:
    """Draw every proposal of a study again, from what was told when, and compare."""
    from hypernas.store import Store
    from hypernas.study.replay import replayed

    with Store(store) as opened:
        found = list(replayed(opened, opened.study(name)))
    other = [entry for entry in found if entry.stored != entry.drawn]
    for entry in other:
        click.echo(f"trial {entry.trial} was {entry.stored}, and is drawn as {entry.drawn}")
    click.echo(f"{len(found) - len(other)} of {len(found)} proposals of study {name} are drawn again as they were")
    sys.exit(1 if other else 0)


@study_group.command(name="export")
@click.argument("name")
@store_option
@click.option("--to", required=True, metavar="URL", help="Optuna's database: a SQLite file or postgresql://...")
def study_export(name: str, store: str, to: str) -> None:
    """Write a study into a database that Optuna and optuna-dashboard open.

    \b
    nas study export first --to optuna.db
    optuna-dashboard sqlite:///optuna.db
    """
    from hypernas.config.plan import make_plan
    from hypernas.config.study_config import resumed
    from hypernas.integrations.optuna_db import export_study
    from hypernas.store import Store

    with Store(store) as opened:
        row = opened.study(name)
        if row.settings.get("imported"):
            raise UserError(f"study {name!r} came from Optuna: its space is not known here")
        plan = make_plan(resumed({**row.settings, "space": row.space.name}, {"study": name}))
        count = export_study(opened, row, to, plan.suggest, lambda text: click.echo(text, err=True))
    click.echo(f"exported {count} trials of {name}")


@study_group.command(name="import")
@click.argument("name", required=False)
@store_option
@click.option("--from", "source", required=True, metavar="URL", help="Optuna's database: a SQLite file or a URL.")
def study_import(name: str | None, store: str, source: str) -> None:
    """Read a study from Optuna's database: one that was exported goes on, one of Optuna's own can be looked at."""
    from hypernas.integrations.optuna_db import import_study
    from hypernas.store import Store

    with Store(store, create=True) as opened:
        row, count = import_study(opened, source, name)
    click.echo(f"imported {count} trials of {row.name}")


@cli.group(cls=Commands)
def bench() -> None:
    """Measure hypernas itself, side by side with its peers."""


@bench.command(name="search")
@click.option(
    "--part", type=click.Choice(["overhead", "growth", "quality", "inheritance"]), default="overhead", show_default=True
)
@click.option("--trials", type=click.IntRange(min=10), help="[default: 200; 10,000 for growth]")
@click.option("--seeds", type=click.IntRange(min=1), default=20, show_default=True, help="Of --part quality.")
@click.option("--figure", metavar="FILE", help="Of --part quality: hypervolume against compute, as HTML, PNG or SVG.")
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
    and its last. quality: our defaults and the peers, on recorded trainings and a simulated clock. inheritance: what
    children gain that start from their parents' weights, in ten minutes.
    """
    from hypernas.show.tables import bench_table, print_table

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
    else:
        from hypernas.bench.search import growth, overhead

        data = growth(trials or 10_000) if part == "growth" else overhead(trials or 200)
    if as_json:
        _print_json(data)
    else:
        print_table(bench_table(data))


@bench.command(name="store")
@click.option("--store", metavar="URL", help="An empty PostgreSQL database.  [default: a throw-away server]")
@click.option("--seconds", type=click.FloatRange(min=1.0), default=10.0, show_default=True, help="For each writer.")
@json_option
def bench_store(store: str | None, seconds: float, as_json: bool) -> None:
    """Statements a trial takes, four drivers on one PostgreSQL beside Optuna's storage, and opening a large study."""
    from hypernas.bench.store import measure
    from hypernas.show.tables import bench_table, print_table

    data = measure(store, seconds)
    if as_json:
        _print_json(data)
    else:
        print_table(bench_table(data))


@bench.command(name="kernels")
@click.option(
    "--op", default="stream_boundary", show_default=True, metavar="NAME", help="Which op; see docs/kernels.md."
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
    from hypernas.bench.kernels import run_all
    from hypernas.show.tables import bench_table, print_table

    try:
        data = run_all(op, n, channels, tokens, dtype, backend, device)
    except ValueError as error:
        raise UserError(str(error)) from error
    if as_json:
        _print_json(data)
    else:
        print_table(bench_table(data))


@bench.command(name="train")
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="cpu or cuda.")
@json_option
def bench_train(device: str, as_json: bool) -> None:
    """Time whole training steps, on a CPU against eager PyTorch, a plain Transformer and the package hyper-connections.

    There also what skipping saves in time, and what the first step of a new architecture costs. About three minutes.
    On a GPU: single launches, CUDA graphs and compiled parts, at two sizes, with the share of the device that is used.
    """
    from hypernas.bench.kernels import device_of
    from hypernas.bench.train import run, run_on
    from hypernas.show.tables import bench_table, print_table

    try:
        where = device_of(device)
    except ValueError as error:
        raise UserError(str(error)) from error
    data = run() if where.type == "cpu" else run_on(where)
    if as_json:
        _print_json(data)
    else:
        print_table(bench_table(data))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
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
    except Exception as error:
        if not _is_bad_input(error):
            raise
        click.echo(f"nas: {error}", err=True)
        return 2
    return 0


def _is_bad_input(error: Exception) -> bool:
    # SpaceError lives in a module that imports torch; it is only looked at when something loaded it.
    base = sys.modules.get("hypernas.search_spaces.base")
    return isinstance(error, UserError) or (base is not None and isinstance(error, base.SpaceError))


def entry() -> None:
    """The installed command."""
    sys.exit(main())
