"""The front: what was measured, over what it costs."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from dash import dcc, html

from hypernas.dashboards import figures, frames
from hypernas.dashboards.live import LiveStudy
from hypernas.dashboards.pages.parts import facts, field, graph
from hypernas.dashboards.texts import axes, label, plain
from hypernas.pareto import LOGARITHMIC
from hypernas.records import State
from hypernas.show.words import format_volume

STATES = [State.COMPLETE, State.STOPPED, State.FAILED, State.RUNNING]


def front_page(study: LiveStudy, others: Sequence[str]) -> list[Any]:
    """The page's frame; callbacks fill it. `others` are the names of the studies to compare with."""
    over = dcc.RadioItems(
        [{"label": text, "value": name} for name, text in figures.HYPERVOLUME_AXES.items()],
        "completed",
        id="front-over",
        inline=True,
    )
    return [
        html.H1(["Study ", html.Bdi(plain(study.row.name))]),
        html.Div(id="front-facts"),
        _controls(study, others),
        graph(
            "front",
            "Front",
            clear_on_unhover=True,
            config={"edits": {"shapePosition": True}, "modeBarButtonsToRemove": ["lasso2d"]},
        ),
        html.P(id="front-best", role="status"),
        _sliders(),
        graph("front-curves", "Learning curves"),
        graph("front-volume", "Hypervolume"),
        field("front-over", "Over", over),
        html.Section([html.H2("Trials", id="trials-title"), html.Div(id="front-table")]),
    ]


def _controls(study: LiveStudy, others: Sequence[str]) -> html.Div:
    """Axes, states and other studies: the row above the front."""
    x, y = axes(study.row.objectives, imported=study.row.settings.imported)
    costs, qualities = axis_choices(study)
    control = {"clearable": False, "searchable": False}
    states = dcc.Checklist(
        [{"label": state.lower(), "value": str(state)} for state in STATES],
        [str(state) for state in STATES],
        id="front-states",
        inline=True,
    )
    compare = dcc.Dropdown(
        [{"label": plain(name, 60), "value": name} for name in others],
        [],
        id="front-compare",
        multi=True,
        placeholder="other studies",
    )
    return html.Div(
        [
            field("front-y", "Quality", dcc.Dropdown(qualities, y, id="front-y", **control)),
            field("front-x", "Cost", dcc.Dropdown(costs, x, id="front-x", **control)),
            field("front-states", "States", states),
            field("front-compare", "Compare with", compare),
        ],
        className="controls",
    )


def _sliders() -> html.Div:
    """The moment and the budget: the row below the front."""
    moment = dcc.Slider(
        0, 1, 1, value=1, id="front-moment", marks=None, allow_direct_input=False, tooltip={"always_visible": False}
    )
    budget = dcc.Slider(0, 1, 0.005, value=1, id="front-budget", marks=None, allow_direct_input=False)
    return html.Div(
        [
            field("front-moment", "As it stood after so many finished trials", moment, wide=True),
            field("front-budget", "Best within a budget: move this, or drag the dotted line", budget, wide=True),
        ],
        className="controls",
    )


def axis_choices(study: LiveStudy) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """What may stand on the cost axis and on the quality axis: everything measured, and the objectives."""
    own = {name for name in frames.COLUMNS if name not in ("parameters", "training_flops")} | {"on_front"}
    names = [name for name in dict.fromkeys([*study.row.objectives, *study.frame.columns]) if name not in own]
    costs = [name for name in names if name in LOGARITHMIC or name == "training_flops"]
    qualities = [name for name in names if name not in costs] or costs
    if (x := axes(study.row.objectives, imported=study.row.settings.imported)[0]) not in costs:
        costs = list(dict.fromkeys([x, *qualities, *costs]))

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
        ("Hypervolume", "–" if volume is None else format_volume(volume)),
        ("Space", study.row.space.name),
        ("Data", study.row.data_name),
    ]
    return facts(pairs)
