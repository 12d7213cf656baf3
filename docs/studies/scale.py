"""Does the gain of a found architecture survive scale? Four families on real text, from LSTM to the search's winner.

    make study-scale                                  results in runs/scale.db and docs/results/scale.*
    nas dashboard --store runs/scale.db               watch it

An LSTM, the Transformer of 2017 (post-norm, GELU, sinusoidal positions, inverse square root), the modern one that every
search starts from, and what a quick search finds; each at five sizes with 20 bytes a parameter, 1.9 decades of compute,
three seeds at the smaller sizes. Then the way from 2017 to the modern Transformer, one component at a time, at four
sizes with one seed. Says first how long it will take: less than an hour on two idle cores. Run again after an
interruption, it goes on; nothing is trained twice.
"""

import csv
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from hypernas.cli.base import cluster_options, given_flags
from hypernas.config.study_config import StudyConfig
from hypernas.data.tasks import TASKS
from hypernas.errors import UserError
from hypernas.launch import launch
from hypernas.records import State
from hypernas.scaling.analysis import analyse, describe
from hypernas.scaling.contenders import TOGETHER, Contender
from hypernas.scaling.ladder import climb
from hypernas.scaling.shape import Ladder
from hypernas.search_spaces import load_space
from hypernas.search_spaces.base import arch_to_json
from hypernas.store import Store
from hypernas.study.search import executor_of, ran_on

LADDER = Ladder(sizes=(20_000, 35_000, 60_000, 105_000, 180_000), rates=(1e-3, 3e-3, 9e-3))
TEXT = {"context": "128", "head_dim": "8"}
TRAINING = {"train.batch_tokens": 1024}
FAMILIES: Mapping[str, tuple[Mapping[str, str], Mapping[str, Any]]] = {
    "LSTM": ({"base": "lstm-2", "context": TEXT["context"]}, {}),
    "Transformer of 2017": ({"base": "transformer-2017", **TEXT}, {"optim.schedule": "inverse_sqrt"}),
    "modern Transformer": ({"depth": "4", "d_model": "64", **TEXT}, {}),
}
FOUND = "found"
ABLATION = Ladder(sizes=(20_000, 35_000, 60_000, 105_000), seeds=1, rates=LADDER.rates)
OLD = "Transformer of 2017"
# What the modern Transformer changes: in the architecture, in the training, and by how much 2511.21622 found each to
# multiply compute (its code's constants; together, by its two ways of estimating).
COMPONENTS: Mapping[str, tuple[Mapping[str, str], Mapping[str, str], str]] = {
    "pre-norm": ({"norm.position": "pre"}, {}, "1.87"),
    "RMSNorm": ({"norm.kind": "rmsnorm"}, {}, "1.09"),
    "rotary positions": ({"position": "rope"}, {}, "1.44"),
    "SwiGLU": ({"ffn.activation": "swiglu"}, {}, "1.17"),
    "cosine schedule": ({}, {"optim.schedule": "cosine"}, "1.04"),
}
PAPER_TOGETHER = "1.33 or 1.97"


def families(store: str, runs_on: Mapping[str, Any]) -> list[Contender]:
    """The baseline first. The winner is what the sampler of a quick search found with the lowest loss; the ladder takes
    its shape, not its size."""
    space = load_space("lm")
    named = [Contender(name, arch_to_json(space.from_json(arch)), {**TRAINING, **training})
             for name, (arch, training) in FAMILIES.items()]  # fmt: skip
    given = {"study": FOUND, "store": store, "preset": "quick", "settings": TEXT, "halving": False}
    if launch({**given, **runs_on, "resume": True}):
        raise KeyboardInterrupt
    with Store(store) as opened:
        complete = opened.trials(opened.study(FOUND), states=(State.COMPLETE,))
    winner = min((t for t in complete if t.origin != "baseline"), key=lambda t: t.values[TASKS["text"].loss])
    return [*named, Contender("found winner", winner.arch, TRAINING, winner.number)]


def components() -> list[Contender]:
    """The Transformer of 2017, the same with each component by itself, and with all."""
    space = load_space("lm")
    arch, training = FAMILIES[OLD]

    def contender(name: str, parts: Sequence[str]) -> Contender:
        changed, trained = dict(arch), {**TRAINING, **training}
        for part in parts:
            changed |= COMPONENTS[part][0]
            trained |= COMPONENTS[part][1]
        return Contender(name, arch_to_json(space.from_json(changed)), trained)

    return [
        contender(OLD, ()),
        *(contender(name, [name]) for name in COMPONENTS),
        contender(TOGETHER, list(COMPONENTS)),
    ]


def component_table(data: Mapping[str, Any]) -> list[str]:
    """What each component multiplies compute by, beside the paper's figure, as Markdown."""
    found = data["interaction"]
    if "missing" in found:
        return [f"Not known: {found['missing']}"]
    shown = {name: (found["single"][name], COMPONENTS[name][2]) for name in COMPONENTS}
    shown |= {"their product": (found["product"], "3.57"), "all together": (found["joint"], PAPER_TOGETHER)}
    lines = ["| component | gain | 95 % interval | 2511.21622 |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {gain['value']:.3g} | {gain['low']:.3g} to {gain['high']:.3g} | {paper} |"
        for name, (gain, paper) in shown.items()
    ]
    kind = "measured" if found["measured"] else "extrapolated"
    return [f"Over the {OLD} at {found['flops']:.2e} FLOPs ({kind}).", "", *lines]


def table(data: Mapping[str, Any]) -> list[str]:
    """Gains over the baseline, with their intervals, as Markdown."""
    lines = ["| family | FLOPs | loss | gain | 95 % interval | |", "|---|---|---|---|---|---|"]
    for entry in data["gains"]:
        if "missing" in entry:
            lines.append(f"| {entry['candidate']} | | | | | {entry['missing']} |")
        for point in entry.get("points", ()):
            kind = "measured" if point["measured"] else "extrapolated"
            lines.append(
                f"| {entry['candidate']} | {point['flops']:.2e} | {point['loss']:.3f} | {point['ceg']:.3g} | "
                f"{point['low']:.3g} to {point['high']:.3g} | {kind} |"
            )
    return lines


INTRODUCTION = """# Does the gain survive scale?

Written by `make study-scale` on {date}. Each family at {sizes} parameters with {ratio:g} bytes of Python's standard
library a parameter, scored in bits per byte; {seeds} seeds at the smaller sizes; learning rates found alike for all at
the two smallest sizes. Gains are in compute over {baseline}, at equal loss: interpolated where both were measured, by
the fitted laws beyond. Every run is in scale.csv. Nets this small say little of large ones.

![Loss and gains over compute](../images/scale.png)

Where this differs from 2511.21622, and why: [scaling.md](../scaling.md#what-came-out-here).
"""


SECOND = """
## One component at a time

The way from the Transformer of 2017 to the modern one at {sizes} parameters, one seed; learning rates found alike for
each at the two smallest sizes. The paper's figures are of models of 3.5 million parameters on C4, nine tenths of them
embedding, at the loss of one training each, with one learning rate for all but post-norm.
"""


def report(data: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """docs/results/scale.md."""
    head = INTRODUCTION.format(
        date=time.strftime("%Y-%m-%d"),
        sizes=", ".join(f"{size:,}" for size in LADDER.sizes),
        ratio=LADDER.tokens_per_parameter[0],
        seeds=LADDER.seeds,
        baseline=data["baseline"],
    )
    second = SECOND.format(sizes=", ".join(f"{size:,}" for size in ABLATION.sizes))
    first = [head, *table(data), "", "```", *describe(data), "```", second]
    return "\n".join([*first, *component_table(parts), "", "```", *describe(parts), "```", ""])


def write(data: Mapping[str, Any], parts: Mapping[str, Any], folder: Path) -> None:
    """scale.md, the analyses as scale.json, and every run in scale.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scale.md").write_text(report(data, parts))
    (folder / "scale.json").write_text(json.dumps({**data, "ablation": parts}, indent=1) + "\n")
    studies = {"families": data, "components": parts}
    rows = [
        {"study": study, **run}
        for study, found in studies.items()
        for family in found["families"]
        for run in family["runs"]
    ]
    with (folder / "scale.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--store", default="runs/scale.db", show_default=True, metavar="URL", help="Where the studies are kept.")
@click.option("--out", type=Path, default=Path("docs/results"), show_default=True, help="Of scale.md and scale.csv.")
@cluster_options
def command(store: str, out: Path, **flags: Any) -> None:
    Path(store).parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    climbers = families(store, given_flags(flags))
    with Store(store) as opened:
        given = ran_on(opened, FOUND) | given_flags(flags)  # all that follows runs on what the search ran on
        config = StudyConfig(study=f"{FOUND}-scale", halving=False, **given)
        with closing(executor_of(config)) as executor:
            climbed = climb(opened, executor, config, climbers, LADDER, lambda text: print(text, file=sys.stderr))
            data = analyse(climbed, climbers, seed=config.seed)
            row = opened.study(config.study)
            opened.update_settings(row, replace(row.settings, scale=data))
            taken = components()
            single = StudyConfig(study="components", halving=False, **given)
            climbed = climb(opened, executor, single, taken, ABLATION, lambda text: print(text, file=sys.stderr))
            parts = analyse(climbed, taken, seed=single.seed)
            row = opened.study(single.study)
            opened.update_settings(row, replace(row.settings, scale=parts))
    write(data, parts, out)
    print(report(data, parts))
    print(f"written to {out} after {time.monotonic() - start:.0f} seconds", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        command.main(argv, standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        print("interrupted; nothing is lost: the same command continues", file=sys.stderr)
        return 1
    except (UserError, click.ClickException) as error:
        print(error if isinstance(error, UserError) else error.format_message(), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
