"""DataFrames of `dashboards.frames` as Plotly figures.

Colours are from Okabe and Ito's palette, each legible on white and on black, and never alone: shape or dash says
the same. Backgrounds are transparent and texts are coloured by the page's style sheet. Whatever comes from the
database passes `texts.pseudo`, as Plotly reads a little HTML in labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dashboards.frames import front_frame
from dashboards.texts import better, label, number, pseudo, short
from nas.pareto import LOGARITHMIC
from nas.records import State

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, GREY = "#2380C4", "#B87F00", "#009E73", "#D55E00", "#C0659A", "#808080"
HEIGHT = 460  # pixels
SVG_POINTS = 1_000  # above so many points a figure draws with WebGL
HIGHLIGHTED = 8  # front curves drawn each in its own colour


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
CURVE_COLOURS = (VERMILLION, BLUE, GREEN, ORANGE, PURPLE)
CURVE_DASHES = ("solid", "dash")


def _figure(x: str = "", y: str = "") -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=HEIGHT,
        margin={"l": 70, "r": 20, "t": 20, "b": 60},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 14},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"align": "left"},
        uirevision="kept",  # zoom and hidden legend entries outlive an update
    )
    grid = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "automargin": True}
    figure.update_xaxes(title_text=x, **grid)
    figure.update_yaxes(title_text=y, **grid)
    return figure


def _logarithmic(figure: go.Figure, values: pd.Series) -> None:
    """A logarithmic x axis labelled 1, 2, 5, 10, or 1, 10, 100 when it is long."""
    decades = float(np.log10(values.max() / values.min()))
    dtick = {"dtick": "D2" if decades < 4 else 1} if decades > 1 else {"nticks": 8}
    figure.update_xaxes(type="log", tickformat="~s", **dtick)


def message_figure(text: str) -> go.Figure:
    """A figure with nothing to show yet says so."""
    figure = _figure()
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.add_annotation(
        text=pseudo(text), showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper", font={"size": 16}
    )
    return figure


def _scatter(points: int) -> type:
    return go.Scatter if points <= SVG_POINTS else go.Scattergl


def _hovers(rows: pd.DataFrame, x: str, y: str) -> list[str]:
    columns = ("trial", "state", "origin", y, x, "architecture", "learning_rate")
    return [
        f"<b>trial {trial}</b> {pseudo(state).lower()}{' (baseline)' if origin == 'baseline' else ''}"
        f"<br>{label(y)}: {number(y, quality)}<br>{label(x)}: {number(x, cost)}"
        f"<br>{pseudo(architecture)}<br>learning rate {rate:.3g}"
        for trial, state, origin, quality, cost, architecture, rate in zip(*(rows[c] for c in columns), strict=True)
    ]


def placed(frame: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The trials that have a place over (x, y): both measured, finite, and above 0 on a logarithmic axis."""
    if x not in frame or y not in frame:
        return frame.iloc[:0]
    inside = np.isfinite(frame[x]) & np.isfinite(frame[y])
    return frame[inside & (frame[x] > 0)] if x in LOGARITHMIC else frame[inside]


def pareto_figure(frame: pd.DataFrame, x: str, y: str) -> go.Figure:
    """Quality `y` over cost `x`: every trial with its state, the front as a staircase, the baselines as diamonds.

    A trial's number is in `customdata`. The staircase is what is reachable: at a budget x, the best y so far.
    """
    shown = placed(frame, x, y)
    if shown.empty:
        return message_figure("No trial has been measured yet." if not len(frame) else "No trial has a result to show.")
    figure = _figure(label(x), f"{label(y)}, {better(y)}")
    if x in LOGARITHMIC:
        _logarithmic(figure, shown[x])
    scatter = _scatter(len(shown))
    front = front_frame(shown, (y, x)).sort_values(x)
    is_baseline = (shown["origin"] == "baseline") & (shown["state"] == State.COMPLETE)
    groups = [(mark, shown[(shown["state"] == state) & ~is_baseline]) for state, mark in MARKS.items()]
    for mark, rows in groups:
        if len(rows):
            figure.add_trace(_points(scatter, rows, mark, x, y, opacity=0.75))
    if len(front):
        figure.add_trace(
            go.Scatter(
                x=front[x],
                y=front[y],
                name="front",
                mode="lines",
                line={"color": VERMILLION, "width": 2.5, "shape": "hv"},
                hoverinfo="skip",
            )
        )
    if is_baseline.any():
        figure.add_trace(_points(go.Scatter, shown[is_baseline], BASELINE, x, y))
    if len(front):
        ring = Mark("on the front", VERMILLION, "circle-open", 14)
        figure.add_trace(_points(go.Scatter, front, ring, x, y, line_width=2.5))
    return figure


def _points(
    scatter: type, rows: pd.DataFrame, mark: Mark, x: str, y: str, *, opacity: float = 1.0, line_width: float = 1.5
) -> go.Scatter:
    return scatter(
        x=rows[x],
        y=rows[y],
        customdata=rows["trial"],
        name=mark.name,
        mode="markers",
        marker={
            "color": mark.colour,
            "symbol": mark.symbol,
            "size": mark.size,
            "line": {"width": line_width, "color": mark.colour},
        },
        opacity=opacity,
        hovertext=_hovers(rows, x, y),
        hoverinfo="text",
    )


def curve_figure(curves: pd.DataFrame, highlighted: Sequence[int] = (), loss: str = "bits_per_byte") -> go.Figure:
    """Loss at each rung over training FLOPs: every trial in grey, the first few `highlighted` in colour."""
    if curves.empty:
        return message_figure("No trial has reached its first rung yet.")
    figure = _figure(label("training_flops"), label(loss))
    _logarithmic(figure, curves["training_flops"])
    bright = list(highlighted)[:HIGHLIGHTED]
    rest = curves[~curves["trial"].isin(bright)]
    if len(rest):
        figure.add_trace(_all_curves(rest))
    for index, trial in enumerate(bright):
        rows = curves[curves["trial"] == trial]
        if len(rows):
            figure.add_trace(
                go.Scatter(
                    x=rows["training_flops"],
                    y=rows["loss"],
                    customdata=rows["trial"],
                    name=f"trial {trial}",
                    mode="lines+markers",
                    line={
                        "color": CURVE_COLOURS[index % len(CURVE_COLOURS)],
                        "dash": CURVE_DASHES[index // len(CURVE_COLOURS) % len(CURVE_DASHES)],
                        "width": 2.5,
                    },
                    hovertext=[
                        f"<b>trial {trial}</b> rung {row.rung}<br>loss {row.loss:.4f} after {short(row.tokens)} seen"
                        for row in rows.itertuples(index=False)
                    ],
                    hoverinfo="text",
                )
            )
    return figure


def _all_curves(curves: pd.DataFrame) -> go.Scatter:
    """Many curves as one trace: a gap parts each from the next."""
    last = (curves["trial"] != curves["trial"].shift(-1)).to_numpy()
    after = np.flatnonzero(last) + 1
    return _scatter(len(curves))(
        x=np.insert(curves["training_flops"].to_numpy(float), after, np.nan),
        y=np.insert(curves["loss"].to_numpy(float), after, np.nan),
        name="other trials",
        mode="lines",
        line={"color": GREY, "width": 1},
        opacity=0.45,
        hoverinfo="skip",
    )


HYPERVOLUME_AXES = {
    "completed": "completed trials",
    "seconds": "seconds since the search began",
    "training_flops": "training FLOPs of all finished trials",
}


def hypervolume_figure(frame: pd.DataFrame, over: str = "completed") -> go.Figure:
    """The front's hypervolume over `completed` trials, `seconds` or `training_flops`."""
    if frame.empty:
        return message_figure("No trial has completed yet.")
    figure = _figure(HYPERVOLUME_AXES[over], "hypervolume, higher is better")
    figure.add_trace(
        go.Scatter(
            x=frame[over],
            y=frame["hypervolume"],
            customdata=frame["trial"],
            name="hypervolume",
            mode="lines+markers" if len(frame) <= 100 else "lines",
            line={"color": BLUE, "width": 2.5, "shape": "hv"},
            hovertext=[f"after trial {row.trial}: {row.hypervolume:.4f}" for row in frame.itertuples(index=False)],
            hoverinfo="text",
            showlegend=False,
        )
    )
    if over == "training_flops":
        figure.update_xaxes(tickformat="~s")
    elif over == "completed" and len(frame) <= 10:
        figure.update_xaxes(dtick=1)
    return figure
