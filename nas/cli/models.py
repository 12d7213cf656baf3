"""Commands about trained models: export, train, generate, evaluate, decompose."""

from collections.abc import Mapping
from typing import Any

import click

from hypernas.cli.base import (
    MAX_COUNT,
    data_option,
    device_option,
    json_option,
    own_space_option,
    print_json,
    store_option,
    study_option,
)
from hypernas.decompose import request as decompose_request
from hypernas.export.card import read_card


@click.command()
@study_option()
@store_option
@click.option("--trial", type=click.IntRange(0, MAX_COUNT), metavar="N", help="Number of the trial.")
@click.option("--pick", metavar="RULE", help="knee, best, cheapest or max-flops=X, of the front.")
@click.option("--out", required=True, metavar="DIR", help="Folder to write; it must not exist or be an older export.")
@click.option(
    "--formats", default="py", show_default=True, metavar="LIST", help="py, pt2 and onnx: the source, and graphs of it."
)
@own_space_option
@data_option
@json_option
def export(
    study: str,
    store: str,
    trial: int | None,
    pick: str | None,
    out: str,
    formats: str,
    space: str | None,
    data: str | None,
    as_json: bool,
) -> None:
    """Write a trained model as a folder that needs only torch and safetensors.

    \b
    nas export --study first --pick knee --out winner
    nas export --study first --trial 7 --out seven
    """
    from hypernas.export.request import check_request, choose

    check_request(trial, pick, formats, out)
    from hypernas.search_spaces import name_space, stored_space
    from hypernas.store import Store

    with Store(store) as opened:
        row = name_space(opened.study(study), space)
        stored_space(row.space)
        chosen = choose(opened, row, trial, pick)
        from hypernas.export.write import export_trial  # brings torch: once the trial is found
        from hypernas.study.search import with_data_at

        done = export_trial(opened, with_data_at(row, data), chosen, out=out, formats=formats)
    if as_json:
        print_json(done)
    else:
        click.echo(f"trial {done['trial']} of {study} is in {done['folder']}: {', '.join(done['files'])}")
        click.echo(f"checked: loaded without hypernas; largest difference from the trained model: {done['checked']}")


@click.command()
@study_option()
@store_option
@click.option("--trial", type=click.IntRange(0, MAX_COUNT), required=True, metavar="N", help="Number of the trial.")
@click.option(
    "--tokens", type=click.IntRange(1), metavar="T", help="Tokens or images to train on.  [default: as it did]"
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted training.")
@click.option("--out", required=True, metavar="DIR", help="Folder to write; it must not exist or be an older export.")
@own_space_option
@data_option
@device_option
@json_option
def train(
    study: str,
    store: str,
    trial: int,
    tokens: int | None,
    resume: bool,
    out: str,
    space: str | None,
    data: str | None,
    gpus: float | None,
    as_json: bool,
) -> None:
    """Train a trial's architecture again, longer if you like, and export it.

    On several processes or GPUs: torchrun --nproc_per_node=2 -m hypernas train ... (each process takes a GPU)

    \b
    nas train --study first --trial 7 --tokens 100000000 --out seven-long
    """
    from hypernas.export.request import free_folder

    free_folder(out)
    from hypernas.search_spaces import name_space, stored_space
    from hypernas.store import Store

    with Store(store) as opened:
        row = name_space(opened.study(study), space)
        stored_space(row.space)
        opened.trial(row, trial)
        from hypernas.export.retrain import train as run_training  # brings torch: once the study is found
        from hypernas.study.search import with_data_at

        done = run_training(opened, with_data_at(row, data), trial, tokens=tokens, resume=resume, out=out, gpus=gpus)
    if done is None:  # another process says it
        return
    if as_json:
        print_json(done)
    else:
        for name, value in done["values"].items():
            click.echo(f"{name} = {value:.6g}")
        click.echo(f"trial {trial} of {study}, trained on {done['tokens']:,}, is in {out}")


@click.command()
@click.argument("folder", metavar="DIR")
@click.option("--prompt", required=True, metavar="TEXT", help="Text to continue.")
@click.option("--count", type=click.IntRange(1), default=200, show_default=True, metavar="N", help="Bytes to add.")
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.8, show_default=True, metavar="X", help="0: the likeliest."
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the sampling.")
@own_space_option
@device_option
def generate(
    folder: str, prompt: str, count: int, temperature: float, seed: int, space: str | None, gpus: float | None
) -> None:
    """Continue a text with an exported language model."""
    read_card(folder)
    from hypernas.engines.devices import asked_device  # brings torch: once the folder is found
    from hypernas.export.read import generate as continued

    device = asked_device(gpus)
    text = continued(folder, prompt, count=count, temperature=temperature, seed=seed, device=device, space=space)
    click.echo(text)


@click.command()
@click.argument("folder", metavar="DIR")
@click.option("--data", metavar="PATH", help="Text or images.  [default: what it was trained on]")
@own_space_option
@device_option
@json_option
def evaluate(folder: str, data: str | None, space: str | None, gpus: float | None, as_json: bool) -> None:
    """Loss and accuracy of an exported model on the validation part of some data."""
    read_card(folder)
    from hypernas.engines.devices import asked_device  # brings torch: once the folder is found
    from hypernas.export.read import evaluate as scored

    found = scored(folder, data, asked_device(gpus), lambda line: click.echo(line, err=True), own=space)
    if as_json:
        print_json(found)
    else:
        for name, value in found.items():
            click.echo(f"{name} = {value:.6g}" if isinstance(value, float) else f"{name} = {value}")


@click.command()
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
    help="Keep this share of the confirmed edges, strongest first; the model runs their blocks.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    metavar="N",
    help="Remove the other weights in N equal steps.",
)
@click.option(
    "--retrain",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="T",
    help="Train on T tokens or images in all, spread over the steps.",
)
@click.option(
    "--store",
    metavar="URL",
    help="Store of the model's study: the variants are added to its front.  [default: nas.db if it is there]",
)
@click.option("--figure", metavar="FILE", help="The evidence, permuted into the blocks, as HTML, PNG or SVG.")
@own_space_option
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
    space: str | None,
    gpus: float | None,
    as_json: bool,
) -> None:
    """Take a trained model apart into blocks that run independently, with the evidence for them.

    DIR is an export. Evidence is what learning changed, beside controls: the untrained model, and the same training on
    shuffled targets, which takes --controls times as long as the model's own. Where blocks are found, the same training
    in 2, 4 and 8 blocks from the start stands beside them. Run the same command again to continue after Ctrl-C.

    \b
    nas decompose winner --out winner-blocks
    nas decompose winner --out winner-blocks --keep 0.25 --retrain 100000
    """
    decompose_request.check_request(folder, out, controls)
    if figure is not None:
        from hypernas.dashboards.paper import check_file

        check_file(figure)
    from hypernas.decompose.command import decompose as take_apart
    from hypernas.decompose.report import read_evidence
    from hypernas.engines.devices import asked_device

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
        space=space,
    )
    if figure is not None:
        from hypernas.dashboards.blocks import figure as drawn
        from hypernas.dashboards.paper import write_figure

        write_figure(drawn(report["nets"], read_evidence(out)), figure)
    if as_json:
        print_json(report)
    else:
        _print_verdict(report, out)


def _print_verdict(report: Mapping[str, Any], out: str) -> None:
    """Prints what was found, and what the model in blocks lost by it."""
    for line in report["verdict"]:
        click.echo(line)
    loss, result = report["loss"], report["result"]
    click.echo(
        f"{loss} {report['losses']['trained']:.4f} -> {result[loss]:.4f}, KL {result['kl']:.4f}, "
        f"agreement {result['agreement']:.3f}, {result['flops']:.0f} FLOPs; the model is in {out}"
    )
