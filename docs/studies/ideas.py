"""What the four ideas are worth, measured: small nets on real text and real digits, every arm treated alike.

    make study-ideas                                  all parts; results in runs/ideas.db and docs/results/ideas.*
    python docs/studies/ideas.py --part streams       one part
    nas dashboard --store runs/ideas.db               watch it

Every arm is trained at each learning rate of one grid with the first seed, then at its best rate with all seeds. Text
and images come with the installation. Run again after an interruption, it goes on; nothing is trained twice. To ask
something else, edit the arms.
"""

import csv
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load

from hypernas.cli.base import cluster_options, given_flags
from hypernas.config.study_config import StudyConfig
from hypernas.data.tasks import TASKS
from hypernas.engines.protocol import Executor
from hypernas.errors import UserError
from hypernas.export.write import trained_weights
from hypernas.records import State, Trial
from hypernas.search_spaces import load_space, name_space
from hypernas.search_spaces.gates import gates_of
from hypernas.store import Store
from hypernas.study.search import executor_of, ran_on
from hypernas.study.sweep import sweep
from hypernas.training.device import deterministic

RATES = (3e-3, 6e-3, 1.2e-2)
SEEDS = (0, 1, 2)
TEXT = {"context": 128, "head_dim": 16, "depth": 4, "train.tokens": 250_000, "train.batch_tokens": 1024}
IMAGES = {"train.images": 12_000, "train.batch_images": 64, "depth": 2}
BUDGET = {"match.parameters": 400_000}  # the width follows
GATED = {"d_model": 96, "gates.placement": "ffn", "gates.layers": "all"}
TARGETS = (0.25, 0.5, 0.75)
RANDOM_GATES = f"{Path(__file__).with_name('random_gates.py').resolve()}:Space"

FFN: dict[str, dict[str, Any]] = {
    "conventional, 4 layers": BUDGET,
    "conventional, 2 layers": {**BUDGET, "depth": 2},
    "hourglass 4 x 0.5, 4 layers": {**BUDGET, "ffn.shape": "hourglass", "ffn.ratio": 0.5, "ffn.sub_mlps": 4},
    "hourglass 2 x 0.5, 4 layers": {**BUDGET, "ffn.shape": "hourglass", "ffn.ratio": 0.5, "ffn.sub_mlps": 2},
}  # fmt: skip
FFN["hourglass 4 x 0.5, 2 layers"] = {**FFN["hourglass 4 x 0.5, 4 layers"], "depth": 2}
STREAMS = {"none, n = 1": BUDGET} | {
    f"{mixing}, n = {n}": {**BUDGET, "streams.mixing": mixing, "streams.n": n}
    for mixing, widths in {
        "hc": (1, 2, 4, 8),
        "mhc": (2, 4, 8),
        "mhc_lite": (2, 4),
        "kromhc": (2, 4, 8),
    }.items()
    for n in widths
}  # kromhc takes its first factors: 2, 2x2, 2x2x2
GATES = {f"cosine gates, target {rate:g}": {**GATED, "gates.rate": rate} for rate in TARGETS}
STEADY = {"steady gates, target 0.5": {**GATED, "gates.rate": 0.5, "gates.consistency": "perturbation"}}
PLAIN = {"no gates": {"d_model": GATED["d_model"]}}
IMAGE_PLAIN = {"no gates": {"width": 8}}
IMAGE_GATES = {
    f"cosine gates, target {rate:g}": {
        "width": 8,
        "gates.placement": "blocks",
        "gates.layers": "all",
        "gates.rate": rate,
    }
    for rate in (0.5, 0.75)
}


# ---- training every arm alike --------------------------------------------------------------------------------

Arms = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Arm:
    """What one arm came to: the trials of its best learning rate, one a seed, and those the rate was chosen from."""

    name: str
    study: str
    rate: float
    trials: tuple[Trial, ...]  # without those that failed
    failed: tuple[Trial, ...]
    tuning: tuple[Trial, ...]

    def all(self, name: str) -> list[float]:
        return [trial.values[name] for trial in self.trials]

    def mean(self, name: str) -> float:
        return statistics.mean(self.all(name))


@dataclass(frozen=True, slots=True)
class Bench:
    """Where arms are trained: the store, the workers and how long."""

    store: Store
    executor: Executor
    runs_on: Mapping[str, Any]  # the flags that the executor was made by
    tokens: int
    images: int

    def train(self, study: str, space: str, arms: Arms) -> list[Arm]:
        images = space == "vision"
        common = {**IMAGES, "train.images": self.images} if images else {**TEXT, "train.tokens": self.tokens}
        loss = TASKS["images" if images else "text"].loss
        config = StudyConfig(study=study, space=space, **self.runs_on)

        def run(settings: Sequence[Mapping[str, Any]]) -> list[Trial]:
            return sweep(self.store, self.executor, config, [{**common, **own} for own in settings])

        grid = run([{**arm, "optim.lr": rate, "train.seed": SEEDS[0]} for arm in arms.values() for rate in RATES])
        tuned = {name: grid[i * len(RATES) : (i + 1) * len(RATES)] for i, name in enumerate(arms)}
        best = {
            name: min(trials, key=lambda trial: trial.values.get(loss, math.inf)).recipe.learning_rate
            for name, trials in tuned.items()
        }
        runs = run([{**arms[n], "optim.lr": best[n], "train.seed": seed} for n in arms for seed in SEEDS])
        out = []
        for i, name in enumerate(arms):
            trials = runs[i * len(SEEDS) : (i + 1) * len(SEEDS)]
            complete = tuple(trial for trial in trials if trial.state == State.COMPLETE)
            failed = tuple(trial for trial in trials if trial.state != State.COMPLETE)
            out.append(Arm(name, study, best[name], complete, failed, tuple(tuned[name])))
        return out


# ---- the parts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """One table of the results: arms against the first of them."""

    title: str
    question: str
    unit: str  # what FLOPs are per
    loss: str
    arms: tuple[Arm, ...]
    timings: tuple["Timing", ...] = ()


@dataclass(frozen=True, slots=True)
class Timing:
    """One forward of a gated net on validation inputs: milliseconds (one thread, medians), and what its gates saw."""

    arm: str
    executed: float  # share of the FLOPs of the same net without skipping
    skipping: float
    forced: float  # the same net, every gate held open
    ungated: float  # the same shape without gates
    within: float  # standard deviation of predicted CIR over the inputs of a gate, mean over gates
    between: float  # standard deviation over gates of their mean predicted CIR


def ffn(bench: Bench) -> Finding:
    question = "Hourglass against conventional feed-forward nets, at equal parameters (embedding included, within 7 %)."
    return _text("Shape of the feed-forward net", question, bench.train("ideas-text", "lm", FFN))


def streams(bench: Bench) -> Finding:
    question = (
        "Width of the residual stream and its mixing, at equal parameters (within 7 %): mixing costs width. "
        "At n = 2 mhc_lite and kromhc are one function, trained once."
    )
    return _text("Residual streams", question, bench.train("ideas-text", "lm", STREAMS))


def gates(bench: Bench) -> Finding:
    question = (
        "Cosine gates on every feed-forward net, against random gates that let through the share of tokens that the "
        "cosine gates came to, and against ungated nets of the FLOPs that they came to (narrower ones)."
    )
    wanted: Arms = {**PLAIN, **GATES, **STEADY}
    cosine = bench.train("ideas-text", "lm", wanted)
    gated = cosine[1 : 1 + len(GATES)]
    random = bench.train(
        "ideas-random-gates",
        RANDOM_GATES,
        {f"random gates, rate {_rate(arm)}": {**GATED, "gates.rate": _rate(arm)} for arm in gated},
    )
    narrow = bench.train("ideas-text", "lm", _of_equal_flops(gated, "flops_per_token"))
    return _text("Cosine gates on text", question, [*cosine, *random, *narrow], _timings(bench, "ideas-text", gated))


def images(bench: Bench) -> Finding:
    question = (
        "Cosine gates on every block of a residual net that reads digits, against ungated nets of equal parameters "
        "and of the FLOPs that the gated ones came to."
    )
    study = "ideas-images"
    arms = bench.train(study, "vision", {**IMAGE_PLAIN, **IMAGE_GATES})
    gated = arms[1:]
    parameters = round(gated[0].mean("parameters"))
    controls = {f"no gates, {parameters:,} parameters": {"match.parameters": parameters}}
    arms += bench.train(study, "vision", controls | _of_equal_flops(gated, "flops_per_image"))
    return Finding(
        "Cosine gates on images", question, "image", "loss", tuple(arms), tuple(_timings(bench, study, gated))
    )


def _text(title: str, question: str, arms: Sequence[Arm], timings: Sequence[Timing] = ()) -> Finding:
    return Finding(title, question, "token", "bits_per_byte", tuple(arms), tuple(timings))


def _rate(arm: Arm) -> float:
    """The share of tokens its gates let through on validation text, over gates and seeds."""
    return round(statistics.mean(rate for trial in arm.trials for rate in trial.diagnostics["gate_rates"]), 3)


def _of_equal_flops(arms: Sequence[Arm], name: str) -> dict[str, dict[str, Any]]:
    budgets = {arm.name: round(arm.mean(name)) for arm in arms}
    return {f"no gates, FLOPs of {arm}": {"match.flops": flops} for arm, flops in budgets.items()}


PARTS: dict[str, Callable[[Bench], Finding]] = {"ffn": ffn, "streams": streams, "gates": gates, "images": images}


# ---- how long inference takes --------------------------------------------------------------------------------

SAMPLES = {"text": 32, "images": 256}  # windows or images a forward
REPEATS = 15


def _timings(bench: Bench, study: str, arms: Sequence[Arm]) -> list[Timing]:
    """Of each arm's net of the first seed, on validation data."""
    row = bench.store.study(study)
    row = name_space(row, row.space.name)  # written by this file's own search
    deterministic()
    out = []
    for arm in arms:
        trial = arm.trials[0]
        space = load_space(row.space.name, row.space.settings)
        arch, task = space.from_json(trial.arch), TASKS[space.task]
        inputs, _ = next(task.validation(task.load(None), arch, trial.recipe, SAMPLES[space.task]))
        model = space.build(arch)
        model.load_state_dict(load(trained_weights(bench.store, row, trial)))
        plain = space.build(space.from_json({**trial.arch, "gates.placement": "none"}))
        skipping, cir = _milliseconds(model, inputs), _spread_of_cir(model, inputs)
        for gate in gates_of(model):
            gate.bias.data.fill_(1e3)
        flops = space.cost(arch).flops_executed(trial.diagnostics["gate_rates"])
        share = flops / space.cost(space.from_json({**trial.arch, "gates.placement": "none"})).flops_total
        forced, ungated = _milliseconds(model, inputs), _milliseconds(plain, inputs)
        out.append(Timing(arm.name, share, skipping, forced, ungated, *cir))
    return out


@torch.no_grad()
def _spread_of_cir(model: torch.nn.Module, inputs: torch.Tensor) -> tuple[float, float]:
    """How predicted CIR differs within gates, and between them."""
    seen: list[torch.Tensor] = []
    handles = [
        gate.controller.register_forward_hook(lambda _, __, logits: seen.append(2 * logits.sigmoid()))
        for gate in gates_of(model)
    ]
    model.eval()(inputs)
    for handle in handles:
        handle.remove()
    means = torch.stack([cir.mean() for cir in seen])
    return torch.stack([cir.std() for cir in seen]).mean().item(), means.std().item()


@torch.no_grad()
def _milliseconds(model: torch.nn.Module, inputs: torch.Tensor) -> float:
    model.eval()
    model(inputs)
    spent = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        model(inputs)
        spent.append(time.perf_counter() - start)
    return 1e3 * statistics.median(spent)


# ---- saying what came of it ----------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds."""
    return statistics.stdev(values)


def difference(values: Sequence[float], control: Sequence[float]) -> tuple[float, float]:
    """Difference of the means, and its standard error (Welch)."""
    error = math.sqrt(sum(statistics.variance(some) / len(some) for some in (values, control)))
    return statistics.mean(values) - statistics.mean(control), error


def verdict(values: Sequence[float], control: Sequence[float]) -> str:
    """Lower, higher, or no difference: 3 seeds a side leave 4 degrees of freedom, for which 95 % is 2.8 errors."""
    delta, error = difference(values, control)
    return "no difference" if abs(delta) <= 2.8 * error else "lower" if delta < 0 else "higher"


def table(finding: Finding) -> list[str]:
    """The finding as Markdown, arms against the first."""
    control, loss = finding.arms[0], finding.loss
    head = [
        "arm",
        "parameters",
        f"FLOPs per {finding.unit}",
        loss.replace("_", " "),
        "against the first",
        "",
        "accuracy",
    ]
    head += ["learning rate", "gates open"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for arm in finding.arms:
        if len(arm.trials) < 2:
            failure = arm.failed[0].failure
            lines.append(
                f"| {arm.name} | {len(arm.failed)} of {len(SEEDS)} trials failed: {failure and failure.kind} |"
            )
            continue
        delta, error = difference(arm.all(loss), control.all(loss))
        against = (
            ["", ""] if arm is control else [f"{delta:+.4f} ± {error:.4f}", verdict(arm.all(loss), control.all(loss))]
        )
        opened = [rate for trial in arm.trials for rate in trial.diagnostics.get("gate_rates", ())]
        cells = [
            arm.name,
            f"{arm.mean('parameters'):,.0f}",
            f"{arm.mean(f'flops_per_{finding.unit}'):,.0f}",
            f"{arm.mean(loss):.4f} ± {spread(arm.all(loss)):.4f}",
            *against,
            f"{arm.mean('accuracy'):.4f} ± {spread(arm.all('accuracy')):.4f}",
            f"{arm.rate:g}" + ("*" if arm.rate in (RATES[0], RATES[-1]) else ""),
            f"{statistics.mean(opened):.2f} ({min(opened):.2f} to {max(opened):.2f})" if opened else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def timing_table(timings: Sequence[Timing]) -> list[str]:
    head = [
        "arm",
        "FLOPs of the ungated net",
        "ms skipping",
        "ms with gates held open",
        "ms ungated",
        "time of the ungated net",
        "CIR within a gate",
        "CIR between gates",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for t in timings:
        cells = [t.arm, f"{t.executed:.0%}", f"{t.skipping:.1f}", f"{t.forced:.1f}", f"{t.ungated:.1f}"]
        cells += [f"{t.skipping / t.ungated:.0%}", f"± {t.within:.3f}", f"± {t.between:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def raw_rows(part: str, finding: Finding) -> list[dict[str, Any]]:
    """Every trial behind a table, tuning included."""
    return [
        {
            "part": part,
            "arm": arm.name,
            "for": purpose,
            "study": arm.study,
            "trial": trial.number,
            "state": str(trial.state),
            "learning_rate": trial.recipe.learning_rate,
            "seed": trial.recipe.seed,
            **dict(trial.values),
            "train_seconds": trial.train_seconds,
            "gate_rates": json.dumps(trial.diagnostics.get("gate_rates", [])),
        }
        for arm in finding.arms
        for purpose, trials in (("tuning", arm.tuning), ("result", arm.trials + arm.failed))
        for trial in trials
    ]


INTRODUCTION = """# What the four ideas are worth in small nets

Written by `make study-ideas` on {date}: torch {torch}, Python {python}, {cpu}, {workers} workers of one thread each.
Text: {tokens:,} bytes of Python's standard library a trial, scored in bits per byte. Images: {images:,} of MNIST's
digits a trial (4,000 different ones, shifted a little), scored on 1,000 others. Every trial is in ideas.csv.

Every arm was tried at the learning rates {rates} with seed {first}, then trained at its best rate with seeds
{seeds}: means ± standard deviations of these. An asterisk marks a best rate at an end of the grid: a better one may
lie outside. Differences are to the first arm, ± their standard error; beyond 2.8 errors (95 %, Student's t with 4
degrees of freedom) they count as higher or lower, which with so many comparisons one in twenty will do by chance.
FLOPs are forward, and only those executed. Nets this small, trained this shortly, say nothing of large ones.
"""


TIMINGS = """One forward of the first seed's net on validation data, one thread. The last two columns say what a gate
can tell apart: how predicted CIR differs between the inputs of one gate, and between the gates. Where the second is
larger, closing whole layers meets the target more easily than choosing inputs does."""


def report(findings: Mapping[str, Finding], bench: Bench) -> str:
    """docs/results/ideas.md."""
    made = next(trial for finding in findings.values() for arm in finding.arms for trial in arm.trials).provenance
    introduction = INTRODUCTION.format(
        date=time.strftime("%Y-%m-%d"),
        **{name: made[name] for name in ("torch", "python", "cpu")},
        workers=bench.executor.workers,
        tokens=bench.tokens,
        images=bench.images,
        rates=", ".join(f"{rate:g}" for rate in RATES),
        first=SEEDS[0],
        seeds=", ".join(map(str, SEEDS)),
    )
    lines = []
    for finding in findings.values():
        lines += ["", f"## {finding.title}", "", finding.question, "", *table(finding)]
        if finding.timings:
            lines += ["", TIMINGS, "", *timing_table(finding.timings)]
    return introduction + "\n".join(lines) + "\n"


def write(findings: Mapping[str, Finding], bench: Bench, folder: Path) -> None:
    """ideas.md, and every trial in ideas.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ideas.md").write_text(report(findings, bench))
    rows = [row for part, finding in findings.items() for row in raw_rows(part, finding)]
    with (folder / "ideas.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--store", default="runs/ideas.db", show_default=True, metavar="URL", help="Where the studies are kept.")
@click.option("--out", type=Path, default=Path("docs/results"), show_default=True, help="Of ideas.md and ideas.csv.")
@click.option("--part", "parts", type=click.Choice(list(PARTS)), multiple=True, help="Only this; repeat for more.")
@click.option("--tokens", type=int, default=TEXT["train.tokens"], show_default=True, help="A trial on text.")
@click.option("--images", type=int, default=IMAGES["train.images"], show_default=True, help="A trial on images.")
@cluster_options
def command(store: str, out: Path, parts: Sequence[str], tokens: int, images: int, **flags: Any) -> None:
    Path(store).parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with Store(store, create=True) as opened:
        given = ran_on(opened, "ideas-text") | given_flags(flags)
        with closing(executor_of(StudyConfig(**given))) as executor:
            bench = Bench(opened, executor, given, tokens, images)
            findings = {part: PARTS[part](bench) for part in PARTS if not parts or part in parts}
            text = report(findings, bench)
            write(findings, bench, out)
    print(text)
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
