"""Colours, marks and layout that figures share."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hypernas.dashboards.texts import label, number, pseudo
from hypernas.records import State

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, GREY = "#2380C4", "#B87F00", "#009E73", "#D55E00", "#C0659A", "#808080"
HEIGHT, MESSAGE_HEIGHT = 460, 200  # pixels
SVG_POINTS = 1_000  # above so many points a figure draws with WebGL
# Plotly's button "Share chart" sends a figure to a cloud: it is taken off where we draw, and off the figure itself, for
# whoever else draws it.
CONFIG = {"displaylogo": False, "showSendToCloud": False}
NO_UPLOAD = {"remove": ["sendChartToCloud"]}


@dataclass(frozen=True, slots=True)
class Mark:
    """How one kind of trial is drawn."""

    name: str
    colour: str
    symbol: str
    size: int


MARKS = {
    State.COMPLETE: Mark("complete", BLUE, "circle", 8),
    State.STOPPED: Mark("stopped at a rung", PURPLE, "triangle-down-open", 9),
    State.FAILED: Mark("failed, at its last report", GREY, "x-thin-open", 9),
    State.RUNNING: Mark("running, at its last report", ORANGE, "circle-open", 9),
}
BASELINE = Mark("baseline", GREEN, "diamond", 13)
INFEASIBLE = Mark("infeasible: violates a constraint", GREY, "square-x-open", 9)
CURVE_COLOURS = (VERMILLION, BLUE, GREEN, ORANGE, PURPLE)
CURVE_DASHES = ("solid", "dash")


def new_figure(x: str = "", y: str = "") -> go.Figure:
    grid = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "automargin": True}
    # One layout at once: every update_... costs milliseconds of a live tick.
    layout = {
        "template": "none",
        "height": HEIGHT,
        "margin": {"l": 70, "r": 20, "t": 20, "b": 60},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 14},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hoverlabel": {"align": "left"},
        "modebar": NO_UPLOAD,
        "uirevision": "kept",  # zoom and hidden legend entries outlive an update
        "xaxis": grid | {"title": {"text": x}},
        "yaxis": grid | {"title": {"text": y}},
    }
    return go.Figure(layout=layout)


def logarithmic_axis(figure: go.Figure, values: pd.Series) -> None:
    """A logarithmic x axis labelled 1, 2, 5, 10, or 1, 10, 100 when it is long."""
    decades = float(np.log10(values.max() / values.min()))
    dtick = {"dtick": "D2" if decades < 4 else 1} if decades > 1 else {"nticks": 8}
    figure.update_xaxes(type="log", tickformat="~s", **dtick)


def blank_figure(height: int = HEIGHT) -> go.Figure:
    """A figure without axes."""
    figure = new_figure()
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.update_layout(height=height, showlegend=False)
    return figure


def message_figure(text: str) -> go.Figure:
    """A figure with nothing to show yet says so."""
    figure = blank_figure(MESSAGE_HEIGHT)
    figure.add_annotation(
        text=pseudo(text), showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper", font={"size": 16}
    )
    return figure


def scatter_class(points: int) -> type:
    return go.Scatter if points <= SVG_POINTS else go.Scattergl


def hover_text(rows: pd.DataFrame, x: str, y: str) -> dict[str, Any]:
    """What a mark says when pointed at; in a large cloud without the architecture, which would be most of the page."""
    if len(rows) > SVG_POINTS:
        return {
            "hovertemplate": f"<b>trial %{{customdata}}</b><br>{label(y)}: %{{y}}<br>{label(x)}: %{{x}}<extra></extra>"
        }
    columns = ("trial", "state", "origin", "violation", y, x, "architecture", "learning_rate")
    texts = [
        f"<b>trial {trial}</b> {pseudo(state).lower()}{' (baseline)' if origin == 'baseline' else ''}"
        f"{' infeasible' if violation > 0 else ''}"
        f"<br>{label(y)}: {number(y, quality)}<br>{label(x)}: {number(x, cost)}"
        f"<br>{pseudo(architecture)}" + ("" if pd.isna(rate) else f"<br>learning rate {rate:.3g}")
        for trial, state, origin, violation, quality, cost, architecture, rate in zip(
            *(rows[c] for c in columns), strict=True
        )
    ]
    return {"hovertext": texts, "hoverinfo": "text"}


def bar_figure(
    frame: pd.DataFrame, name: str, value: str, title: str, empty: str, whole: float | None = None
) -> go.Figure:
    """One horizontal bar for each row, the first on top, drawn against `whole` if given; `empty` is said for none."""
    if frame.empty:
        return message_figure(empty)
    figure = new_figure(title)
    figure.add_trace(
        go.Bar(
            x=frame[value],
            y=[pseudo(text, 60) for text in frame[name]],
            orientation="h",
            marker={"color": BLUE},
            text=[f"{number:.3g}" for number in frame[value]],
            textposition="outside",
            cliponaxis=False,
            hoverinfo="skip",
        )
    )
    figure.update_xaxes(showticklabels=False, showgrid=False)  # every bar says its number
    if whole is not None:
        figure.update_xaxes(range=[min(0.0, float(frame[value].min())), whole])
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_layout(height=34 * len(frame) + 110, margin={"l": 120, "r": 70})
    return figure
