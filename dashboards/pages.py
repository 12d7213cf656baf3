"""What the pages are made of: Dash components built from studies and trials. Nothing here reads a store or reacts.

Dash escapes every text it is given; `texts.plain` also makes invisible characters visible and clips long ones.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from shlex import quote
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pandas as pd
from dash import dcc, html

from hypernas.dashboards import figures, frames
from hypernas.dashboards.live import LiveStudy
from hypernas.dashboards.texts import LADDER_NOTES, axes, duration, label, number, plain, setting, short
from hypernas.pareto import LOGARITHMIC
from hypernas.records import Report, State, StudyRow, Trial

PAGES = {"/": "Front", "/trial": "Trial", "/space": "Space", "/scale": "Scale", "/cluster": "Cluster"}
ROWS = 50  # trials in a table
TRACEBACK = 100_000  # characters
STATES = [State.COMPLETE, State.STOPPED, State.FAILED, State.RUNNING]


def link(path: str, study: str | None, trial: int | None = None) -> str:
    """The address of a page."""
    query = {"study": study, "trial": trial}
    known = {name: value for name, value in query.items() if value is not None}
    return path + (f"?{urlencode(known)}" if known else "")


def graph(name: str, title: str, **more: Any) -> html.Section:
    """A heading and a figure that callbacks fill."""
    config = {"displaylogo": False, "responsive": True, **more.pop("config", {})}
    return html.Section(
        [html.H2(title, id=f"{name}-title"), dcc.Graph(id=name, className="plot", config=config, **more)],
        **{"aria-labelledby": f"{name}-title"},
    )


def facts(pairs: Sequence[tuple[str, object]]) -> html.Dl:
    return html.Dl(
        [html.Div([html.Dt(name), html.Dd(plain(value), dir="auto")]) for name, value in pairs], className="facts"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], numeric: Sequence[str] = ()) -> html.Div:
    """A plain HTML table; a cell may be a component."""

    def cell(name: str, value: Any) -> html.Td:
        shown = value if hasattr(value, "to_plotly_json") else plain(value)
        return html.Td(shown, className="n" if name in numeric else "", dir="auto")

    body = [html.Tr([cell(name, value) for name, value in zip(head, row, strict=True)]) for row in rows]
    heads = [html.Th(name, scope="col", className="n" if name in numeric else "") for name in head]
    return html.Div(
        html.Table([html.Thead(html.Tr(heads)), html.Tbody(body)]), className="scroll", tabIndex="0", role="region"
    )


def field(name: str, title: str, control: Any, wide: bool = False) -> html.Div:
    """A control under its visible label."""
    return html.Div([html.Label(title, htmlFor=name), control], className="field wide" if wide else "field")


# ---- waiting -------------------------------------------------------------------------------------------------


def waiting(shown: str, exists: bool, wanted: str | None) -> list[Any]:
    """There is nothing to show yet: why, and what would change that."""
    if wanted is not None:
        title, why = "No such study", f"{shown} has no study named {plain(wanted)!r}. It appears here when it does."
    elif exists:
        title, why = "No study yet", f"{shown} has no study. The first one appears here by itself."
    else:
        title, why = "Waiting for the store", f"{shown} does not exist yet. This page waits for it and creates nothing."
    store = "" if shown == "nas.db" else f" --store {quote(shown)}"
    return [html.H1(title), html.P(why), html.P("A search makes one:"), html.Pre(f"nas search --study first{store}")]


# ---- Front ---------------------------------------------------------------------------------------------------


def front_page(study: LiveStudy, others: Sequence[str]) -> list[Any]:
    x, y = axes(study.row.objectives)
    costs, qualities = axis_choices(study)
    control = {"clearable": False, "searchable": False}
    return [
        html.H1(["Study ", html.Bdi(plain(study.row.name))]),
        html.Div(id="front-facts"),
        html.Div(
            [
                field("front-y", "Quality", dcc.Dropdown(qualities, y, id="front-y", **control)),
                field("front-x", "Cost", dcc.Dropdown(costs, x, id="front-x", **control)),
                field(
                    "front-states",
                    "States",
                    dcc.Checklist(
                        [{"label": state.lower(), "value": str(state)} for state in STATES],
                        [str(state) for state in STATES],
                        id="front-states",
                        inline=True,
                    ),
                ),
                field(
                    "front-compare",
                    "Compare with",
                    dcc.Dropdown(
                        [{"label": plain(name, 60), "value": name} for name in others],
                        [],
                        id="front-compare",
                        multi=True,
                        placeholder="other studies",
                    ),
                ),
            ],
            className="controls",
        ),
        graph(
            "front",
            "Front",
            clear_on_unhover=True,
            config={"edits": {"shapePosition": True}, "modeBarButtonsToRemove": ["lasso2d"]},
        ),
        html.P(id="front-best", role="status"),
        html.Div(
            [
                field(
                    "front-moment",
                    "As it stood after so many finished trials",
                    dcc.Slider(0, 1, 1, value=1, id="front-moment", marks=None, allow_direct_input=False,
                               tooltip={"always_visible": False}),
                    wide=True,
                ),
                field(
                    "front-budget",
                    "Best within a budget: move this, or drag the dotted line",
                    dcc.Slider(0, 1, 0.005, value=1, id="front-budget", marks=None, allow_direct_input=False),
                    wide=True,
                ),
            ],
            className="controls",
        ),
        graph("front-curves", "Learning curves"),
        graph("front-volume", "Hypervolume"),
        field(
            "front-over",
            "Over",
            dcc.RadioItems(
                [{"label": text, "value": name} for name, text in figures.HYPERVOLUME_AXES.items()],
                "completed",
                id="front-over",
                inline=True,
            ),
        ),
        html.Section([html.H2("Trials", id="trials-title"), html.Div(id="front-table")]),
    ]  # fmt: skip


def axis_choices(study: LiveStudy) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """What may stand on the cost axis and on the quality axis: everything measured, and the objectives."""
    own = {name for name in frames.COLUMNS if name not in ("parameters", "training_flops")} | {"on_front"}
    names = [name for name in dict.fromkeys([*study.row.objectives, *study.frame.columns]) if name not in own]
    costs = [name for name in names if name in LOGARITHMIC or name == "training_flops"]
    qualities = [name for name in names if name not in costs] or costs

    def options(chosen: Sequence[str]) -> list[dict[str, str]]:
        return [{"label": plain(label(name), 60), "value": name} for name in chosen]

    return options(costs or names), options(qualities)


def study_facts(study: LiveStudy, frame: pd.DataFrame, volume: float | None) -> html.Dl:
    """The study in a line; `frame` is the part of its trials that is shown."""
    states = [f"{count} {state.lower()}" for state, count in frames.state_counts(frame).items() if count]
    infeasible = int((frame["violation"] > 0).sum())
    pairs: list[tuple[str, object]] = [
        ("Trials", ", ".join(states) or "none yet"),
        *([("Infeasible", infeasible)] if infeasible else []),
        ("On the front", int(frame["on_front"].sum())),
        ("Hypervolume", "–" if volume is None else f"{volume:.4f}"),
        ("Space", study.row.space.name),
        ("Data", study.row.data_name),
    ]
    return facts(pairs)


def trials_table(study: LiveStudy, rows: pd.DataFrame, note: str) -> list[Any]:
    """Trials, in order of number, as a table with the front first; at most ROWS of them."""
    on_front = rows["on_front"].to_numpy(bool)
    listed = rows.iloc[np.concatenate([np.flatnonzero(on_front), np.flatnonzero(~on_front)])[:ROWS]]
    head = ["trial", "state", *dict.fromkeys([*study.row.objectives, "parameters"]), "learning rate", "architecture"]
    body = []
    for record in listed.to_dict("records"):
        trial = int(record["trial"])
        state = str(record["state"]).lower() + (" (baseline)" if record["origin"] == "baseline" else "")
        state += ", infeasible" if record["violation"] > 0 else ""
        body.append(
            [
                dcc.Link(str(trial), href=link("/trial", study.row.name, trial)),
                state + (", on the front" if record["on_front"] else ""),
                *(number(name, record[name]) for name in head[2:-2]),
                f"{record['learning_rate']:.3g}",
                record["architecture"],
            ]
        )
    more = f" The first {ROWS} are listed." if len(rows) > ROWS else ""
    if not body:
        return [html.P("No trials here yet.", className="note")]
    titles = [name.replace("_", " ") for name in head]
    numeric = [name for name in titles if name not in ("state", "architecture")]
    return [html.P(f"{note}{more}", className="note"), table(titles, body, numeric)]


# ---- Trial ---------------------------------------------------------------------------------------------------


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
    last = reports[-1] if reports else None
    pairs: list[tuple[str, object]] = [("State", str(trial.state).lower()), ("Origin", trial.origin)]
    pairs += [(label(name), number(name, value)) for name, value in trial.values.items()]
    if trial.state != State.COMPLETE and last:
        pairs.append(("Last report", f"rung {last.rung}, loss {last.loss:.4f} after {short(last.tokens)} seen"))
    if trial.state == State.COMPLETE and frames.violation(trial):
        pairs.append(("Infeasible", f"violates its constraints by {frames.violation(trial):.4g}"))
    pairs += [
        ("Waited", duration(_seconds(trial.created, trial.started))),
        ("Training", duration(trial.train_seconds)),
        ("Evaluation", duration(trial.evaluate_seconds)),
        ("Finished", f"{trial.finished:%Y-%m-%d %H:%M:%S} UTC" if trial.finished else "–"),
        ("Attempts", trial.attempts),
        ("Worker", trial.worker or "–"),
    ]
    previous = [dcc.Link("Previous trial", href=link("/trial", study.name, trial.number - 1))] if trial.number else []
    after = dcc.Link("Next trial", href=link("/trial", study.name, trial.number + 1))
    content: list[Any] = [
        html.H1([f"Trial {trial.number} of ", html.Bdi(plain(study.name))]),
        html.P([*previous, " " if previous else "", after], className="steps"),
        facts(pairs),
    ]
    if trial.failure:
        content += [
            html.H2("Failure"),
            html.P([html.Strong(str(trial.failure.kind).replace("_", " ")), ": ", plain(trial.failure.message)]),
            html.Pre(plain(trial.failure.traceback, TRACEBACK) or "no traceback", tabIndex="0", dir="auto"),
        ]
    for title, figure in pictures.items():
        content += [html.H2(title), dcc.Graph(figure=figure, className="plot", config={"displaylogo": False})]
    if parts is not None:
        rows = [[part, f"{count:,}", f"{flops:,}"] for part, count, flops in parts.itertuples(index=False)]
        content += [
            html.H2("Parameters and FLOPs by part"),
            table(["part", "parameters", "forward FLOPs"], rows, numeric=["parameters", "forward FLOPs"]),
        ]
    settings = {
        "Architecture": trial.arch,
        "Training": {name: getattr(trial.recipe, name) for name in trial.recipe.__slots__},
        "Provenance": {name: value for name, value in trial.provenance.items() if name != "kernels"},
        "Kernels that ran, and why": trial.provenance.get("kernels", {}),
    }
    for title, values in settings.items():
        if values:
            content += [
                html.H2(title),
                table(["name", "value"], [[name, setting(value)] for name, value in values.items()]),
            ]
    return content + _taking_home(study, trial, store, exportable)


def _seconds(start: datetime, end: datetime | None) -> float | None:
    return None if end is None else (end - start).total_seconds()


def _taking_home(study: StudyRow, trial: Trial, store: str, exportable: bool) -> list[Any]:
    if trial.state != State.COMPLETE:
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


# ---- Space ---------------------------------------------------------------------------------------------------


def space_page(study: LiveStudy) -> list[Any]:
    objectives = [{"label": label(name), "value": name} for name in study.row.objectives]
    control = {"clearable": False, "searchable": False}
    return [
        html.H1(["Choices of ", html.Bdi(plain(study.row.name))]),
        html.Div(
            [
                field(
                    "space-objective",
                    "Objective",
                    dcc.Dropdown(objectives, study.row.objectives[0], id="space-objective", **control),
                ),
                field("space-choice", "Choice", dcc.Dropdown([], None, id="space-choice", **control)),
            ],
            className="controls",
        ),
        graph("space-importance", "What matters"),
        html.P(
            "The share of the objective's variance that each choice explains by itself (omega squared). Choices that "
            "act only together show little here.",
            className="note",
        ),
        graph("space-marginal", "One choice"),
        html.Div(
            field("space-other", "Against", dcc.Dropdown([], None, id="space-other", **control)), className="controls"
        ),
        graph("space-pair", "Two choices on the front"),
        graph("space-tried", "What the sampler tried over time"),
        graph("space-parallel", "All choices at once"),
        html.P("Drag along an axis to keep only the lines that cross it there.", className="note"),
    ]


# ---- Scale ---------------------------------------------------------------------------------------------------


def scale_page(study: LiveStudy) -> list[Any]:
    return [
        html.H1(["Scale of ", html.Bdi(plain(study.row.name))]),
        graph("scale-laws", "Loss over training compute"),
        html.P(LADDER_NOTES["scale-laws"], className="note"),
        graph("scale-gains", "Compute-equivalent gain"),
        html.P(LADDER_NOTES["scale-gains"], className="note"),
        html.Div(id="scale-said"),
    ]


def scale_said(scale: Mapping[str, Any] | None, study: str) -> Any:
    """The analysis in words, or the command that makes one."""
    if scale is None:
        return html.P(["Nothing yet. ", html.Code(f"nas scale --study {quote(plain(study))}"), " trains a ladder."])
    from hypernas.scaling.analysis import describe  # brings torch

    return html.Pre(plain("\n".join(describe(scale)), 20_000))


# ---- Cluster -------------------------------------------------------------------------------------------------


def cluster_page(study: LiveStudy) -> list[Any]:
    return [
        html.H1(["Cluster of ", html.Bdi(plain(study.row.name))]),
        html.Div(id="cluster-facts"),
        html.H2("Running"),
        html.Div(id="cluster-running"),
        graph("cluster-curves", "Losses of running trials"),
        html.H2("Workers"),
        html.Div(id="cluster-workers"),
        graph("cluster-failures", "Failures by cause"),
        graph("cluster-ranks", "Does a rung foretell the end?"),
        html.P("Spearman's rank correlation of the loss at each rung with the loss at the last one.", className="note"),
    ]


def cluster_facts(study: LiveStudy, workers: int, utilisation: float | None) -> html.Dl:
    asked = study.row.settings.trials
    rate, left = frames.pace(study.frame, asked)
    ended = int(study.frame["finished"].notna().sum())
    return facts(
        [
            ("Workers alive", workers),
            ("Utilisation", "–" if utilisation is None else f"{100 * utilisation:.0f} %"),
            ("Finished", f"{ended} of {asked}" if asked else str(ended)),
            ("Trials an hour", "–" if rate is None else f"{rate:.1f}"),
            ("Time left", duration(left) if workers and left else "–"),
        ]
    )


def running_table(study: LiveStudy, now: pd.Timestamp) -> Any:
    running = study.frame[study.frame["state"] == State.RUNNING]
    if running.empty:
        return html.P("Nothing is running.", className="note")
    loss = next((name for name in study.row.objectives if name in frames.LOSSES), None)
    rows = [
        [
            dcc.Link(str(record["trial"]), href=link("/trial", study.row.name, record["trial"])),
            duration((now - record["started"]).total_seconds()),
            "–" if pd.isna(record["rung"]) else f"{record['rung']:.0f}",
            number(loss, record[loss]) if loss else "–",
            record["architecture"],
        ]
        for record in running.to_dict("records")
    ]
    head = ["trial", "for", "rung", "loss there", "architecture"]
    return table(head, rows, numeric=head[:-1])


def workers_table(study: LiveStudy) -> Any:
    done = study.frame[study.frame["worker"] != ""]
    if done.empty:
        return html.P("No worker has finished a trial yet.", className="note")
    rows = []
    for worker, group in done.groupby("worker"):
        busy = group[["train_seconds", "evaluate_seconds"]].sum().sum()
        failed = int((group["state"] == State.FAILED).sum())
        rows.append([worker, len(group), failed, duration(busy), f"{group['finished'].max():%Y-%m-%d %H:%M:%S}"])
    head = ["worker", "trials", "failed", "busy", "last finished (UTC)"]
    return table(head, rows, numeric=["trials", "failed", "busy"])
