"""A trial: its values, its failure, its figures, its settings, and how to take it home."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from shlex import quote
from typing import Any

import pandas as pd
from dash import dcc, html

from hypernas.dashboards.figures.style import CONFIG
from hypernas.dashboards.live import LiveStudy
from hypernas.dashboards.pages.parts import facts, link, table, trials_table
from hypernas.dashboards.texts import duration, label, number, plain, setting, short
from hypernas.records import IMPORTED, Report, State, StudyRow, Trial, violation

TRACEBACK = 100_000  # characters


def trial_page() -> list[Any]:
    return [html.Div(id="trial-content")]


def trial_content(
    study: StudyRow,
    trial: Trial,
    reports: Sequence[Report],
    parts: pd.DataFrame | None,
    pictures: Mapping[str, Any],
    store: str,
    exportable: bool,
) -> list[Any]:
    """Everything about one trial; `pictures` maps a heading to a figure, `parts` has part, parameters and FLOPs."""
    previous = [dcc.Link("Previous trial", href=link("/trial", study.name, trial.number - 1))] if trial.number else []
    after = dcc.Link("Next trial", href=link("/trial", study.name, trial.number + 1))
    content: list[Any] = [
        html.H1([f"Trial {trial.number} of ", html.Bdi(plain(study.name))]),
        html.P([*previous, " " if previous else "", after], className="steps"),
        _facts(trial, reports[-1] if reports else None),
        *_failure(trial),
    ]
    for title, figure in pictures.items():
        content += [html.H2(title), dcc.Graph(figure=figure, className="plot", config=CONFIG)]
    if parts is not None:
        rows = [[part, f"{count:,}", f"{flops:,}"] for part, count, flops in parts.itertuples(index=False)]
        content += [
            html.H2("Parameters and FLOPs by part"),
            table(["part", "parameters", "forward FLOPs"], rows, numeric=["parameters", "forward FLOPs"]),
        ]
    return [*content, *_settings(trial), *_export(study, trial, store, exportable)]


def _facts(trial: Trial, last: Report | None) -> html.Dl:
    """State, measured values and times."""
    pairs: list[tuple[str, object]] = [("State", str(trial.state).lower()), ("Origin", trial.origin)]
    pairs += [(label(name), number(name, value)) for name, value in trial.values.items()]
    if trial.state != State.COMPLETE and last:
        said = f"rung {last.rung}, loss {last.loss:.4f} after {short(last.tokens)} seen"
        if trial.origin == IMPORTED:
            said = f"{last.loss:.6g} at step {last.step}"
        pairs.append(("Last report", said))
    if trial.state == State.COMPLETE and violation(trial):
        pairs.append(("Infeasible", f"violates its constraints by {violation(trial):.4g}"))
    pairs += [
        ("Waited", duration(_seconds(trial.created, trial.started))),
        ("Training", duration(trial.train_seconds)),
        ("Evaluation", duration(trial.evaluate_seconds)),
        ("Finished", f"{trial.finished:%Y-%m-%d %H:%M:%S} UTC" if trial.finished else "–"),
        ("Attempts", trial.attempts),
        ("Worker", trial.worker or "–"),
    ]
    return facts(pairs)


def _failure(trial: Trial) -> list[Any]:
    if not trial.failure:
        return []
    return [
        html.H2("Failure"),
        html.P([html.Strong(str(trial.failure.kind).replace("_", " ")), ": ", plain(trial.failure.message)]),
        html.Pre(plain(trial.failure.traceback, TRACEBACK) or "no traceback", tabIndex="0", dir="auto"),
    ]


def _settings(trial: Trial) -> list[Any]:
    """Tables of the architecture, the recipe, where it ran and on which kernels; an empty one is left out."""
    tables = {
        "Parameters" if trial.origin == IMPORTED else "Architecture": trial.arch,
        "Training": {name: getattr(trial.recipe, name) for name in trial.recipe.__slots__ if trial.origin != IMPORTED},
        "Provenance": {name: value for name, value in trial.provenance.items() if name != "kernels"},
        "Kernels that ran, and why": trial.provenance.get("kernels", {}),
    }
    return [
        part
        for title, values in tables.items()
        if values
        for part in (
            html.H2(title),
            table(["name", "value"], [[name, setting(value)] for name, value in values.items()]),
        )
    ]


def _seconds(start: datetime, end: datetime | None) -> float | None:
    return None if end is None else (end - start).total_seconds()


def _export(study: StudyRow, trial: Trial, store: str, exportable: bool) -> list[Any]:
    """The commands that export and retrain a COMPLETE trial, and the download."""
    if trial.state != State.COMPLETE or study.settings.imported:
        return []
    names = f"--study {quote(study.name)} --store {quote(store)} --trial {trial.number}"
    again = f"nas train {names} --out trial-{trial.number}-trained"
    hint = "" if exportable else " Its weights are not kept here: the command trains it again first."
    return [
        html.H2("Take it home"),
        html.P(f"A folder with the model's source, its weights and a model card.{hint}"),
        html.Pre(plain(f"nas export {names} --out trial-{trial.number}", 2000), tabIndex="0"),
        html.P("To train it again from its row, to the same weights, or longer with --tokens:"),
        html.Pre(plain(again, 2000), tabIndex="0"),
        html.Button("Download the export", id="export-button", disabled=not exportable, type="button"),
        html.Span(id="export-status", role="status"),
    ]


def no_trial(study: LiveStudy, wanted: str | None) -> list[Any]:
    """The Trial page without a trial: the front's trials to choose from."""
    heading = "Choose a trial" if wanted is None else f"No trial {plain(wanted, 20)} yet"
    front = study.frame[study.frame["on_front"]]
    chosen = front if len(front) else study.frame
    note = "The trials on the front." if len(front) else "No trial has completed yet."
    return [html.H1(heading), *trials_table(study, chosen, note)]
