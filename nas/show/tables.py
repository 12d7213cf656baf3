"""Tables of the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from hypernas.config.keys import LIMITS, training_keys
from hypernas.records import IMPORTED, State, Trial
from hypernas.search_spaces.base import Choices, Range, Space
from hypernas.show.terminal import make_console
from hypernas.show.words import describe_arch, describe_values
from hypernas.training.repeats import spread


def _outcome(trial: Trial) -> str:
    if trial.state != State.COMPLETE:
        return str(trial.state)
    if trial.origin == IMPORTED:  # its values are Optuna's, by their own names
        return ", ".join(f"{name} {value:.6g}" for name, value in trial.values.items())
    return describe_values(trial.values, spread(trial, trial.values))


def front_table(trials: Sequence[Trial], title: str = "") -> Table:
    """Trials as a table, one row each."""
    table = Table(title=title or None, title_justify="left", box=None, padding=(0, 1))
    for column in ("trial", "values", "parameters", "architecture", "lr"):
        table.add_column(column, justify="right" if column in ("trial", "parameters") else "left")
    for trial in trials:
        table.add_row(
            f"{trial.number}{'*' if trial.origin == 'baseline' else ''}",
            Text(_outcome(trial)),
            f"{trial.parameters:,}" if trial.parameters else "-",
            Text(describe_arch(dict(trial.arch))),
            "-" if trial.origin == IMPORTED else f"{trial.recipe.learning_rate:.3g}",
        )
    return table


def print_table(table: Table) -> None:
    """A table on stdout; whole lines where stdout is a pipe and has no width."""
    console = make_console()
    (console if console.is_terminal else make_console(width=240)).print(table)


def cost_table(data: Mapping[str, Any]) -> Table:
    """The cost by part, parameters beside FLOPs."""
    unit = next(name for name in data if name.startswith("flops_per_"))
    table = Table(box=None, padding=(0, 1))
    for column in ("part", "parameters", unit.replace("_", " ")):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, flops in data[unit].items():
        parameters = data["parameters"].get(part)
        table.add_row(part, "" if parameters is None else f"{parameters:,}", f"{flops:,}")
    return table


def keys_table(space: Space) -> Table:
    """Every key that `--set` takes: the space's, then the training's, then the limits."""
    table = Table(box=None, padding=(0, 1))
    for column in ("key", "baseline", "searched", "meaning"):
        table.add_column(column)
    for key in [*space.keys.values(), *training_keys(space.task).values(), *LIMITS.values()]:
        domain = key.search
        if isinstance(domain, Choices):
            searched = ", ".join(_short(value) for value in domain.values) if len(domain.values) > 1 else ""
        else:
            assert isinstance(domain, Range)
            searched = f"{domain.low:g}..{domain.high:g}" + (":log" if domain.log else "")
        legal = f" (one of {', '.join(map(str, key.options))})" if key.options else ""
        table.add_row(key.name, _short(key.default), searched, key.help + legal)
    return table


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def bench_table(data: Mapping[str, Any]) -> Table:
    """Rows of `nas bench`: one measurement each, with its ratio to the baseline."""
    table = Table(title=f"{data['device']}; {data['versions']}", title_justify="left", box=None, padding=(0, 1))
    for column in ("name", "backend", "value", "unit", "baseline", "ratio"):
        table.add_column(column, justify="right" if column in ("value", "ratio") else "left")
    for row in data["rows"]:
        table.add_row(
            row["name"],
            row["backend"],
            f"{row['value']:.2f}",
            row["unit"],
            row["baseline"] or "",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        )
    return table
