"""The front, its history, and what is marked on it."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hypernas.dashboards.figures.style import (
    BASELINE,
    BLUE,
    CURVE_COLOURS,
    GREY,
    INFEASIBLE,
    MARKS,
    PURPLE,
    VERMILLION,
    Mark,
    hover_text,
    logarithmic_axis,
    message_figure,
    new_figure,
    scatter_class,
)
from hypernas.dashboards.frames import front_frame, seed_frame
from hypernas.dashboards.texts import better, label, number, pseudo
from hypernas.pareto import LOGARITHMIC
from hypernas.records import State


def placeable_trials(frame: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The trials that have a place over (x, y): both measured, finite, and above 0 on a logarithmic axis."""
    if x not in frame or y not in frame:
        return frame.iloc[:0]
    inside = np.isfinite(frame[x]) & np.isfinite(frame[y])
    return frame[inside & (frame[x] > 0)] if x in LOGARITHMIC else frame[inside]


def pareto_figure(frame: pd.DataFrame, x: str, y: str) -> go.Figure:
    """Quality `y` over cost `x`: every trial with its state, the front as a staircase, the baselines as diamonds.

    Infeasible trials have a mark of their own. A bar on the front spans what other seeds of it gave.
    A trial's number is in `customdata`, as a list: Dash does not decode an array when a point is clicked. The
    staircase is what is reachable: at a budget x, the best y so far.
    """
    shown = placeable_trials(frame, x, y)
    if shown.empty:
        return message_figure("No trial has been measured yet." if not len(frame) else "No trial has a result to show.")
    figure = new_figure(label(x), f"{label(y)}, {better(y)}")
    if x in LOGARITHMIC:
        logarithmic_axis(figure, shown[x])
    scatter = scatter_class(len(shown))
    front = front_frame(shown, (y, x)).sort_values(x)
    infeasible = (shown["violation"] > 0) & (shown["state"] == State.COMPLETE)
    is_baseline = (shown["origin"] == "baseline") & (shown["state"] == State.COMPLETE) & ~infeasible
    rest = shown[~is_baseline & ~infeasible]
    groups = [(mark, rest[rest["state"] == state]) for state, mark in MARKS.items()]
    groups.append((INFEASIBLE, shown[infeasible]))
    for mark, rows in groups:
        if len(rows):
            figure.add_trace(_points(scatter, rows, mark, x, y, opacity=0.75))
    if len(front):
        figure.add_trace(
            go.Scatter(
                x=front[x],
                y=front[y],
                name="best so far" if x == "trial" else "front",
                mode="lines",
                line={"color": VERMILLION, "width": 2.5, "shape": "hv"},
                hoverinfo="skip",
            )
        )
    if is_baseline.any():
        figure.add_trace(_points(go.Scatter, shown[is_baseline], BASELINE, x, y))
    if len(front):
        ring = Mark("best so far" if x == "trial" else "on the front", VERMILLION, "circle-open", 14)
        figure.add_trace(_points(go.Scatter, front, ring, x, y, line_width=2.5))
        spread = seed_frame(front, frame, y)
        if len(spread):
            figure.add_trace(_seed_bars(front.merge(spread, on="trial"), x, y))
    return figure


def _seed_bars(rows: pd.DataFrame, x: str, y: str) -> go.Scatter:
    """From the lowest to the highest value that a configuration reached, whatever its seed."""
    return go.Scatter(
        x=rows[x],
        y=rows[y],
        name="range over seeds",
        mode="markers",
        marker={"color": VERMILLION, "size": 1},
        error_y={
            "symmetric": False,
            "array": rows["high"] - rows[y],
            "arrayminus": rows[y] - rows["low"],
            "color": VERMILLION,
            "width": 6,
        },
        hovertext=[
            f"<b>trial {trial}</b>: {seeds} seeds, {number(y, low)} to {number(y, high)}"
            for trial, seeds, low, high in zip(*(rows[c] for c in ("trial", "seeds", "low", "high")), strict=True)
        ],
        hoverinfo="text",
    )


def _points(
    scatter: type, rows: pd.DataFrame, mark: Mark, x: str, y: str, *, opacity: float = 1.0, line_width: float = 1.5
) -> go.Scatter:
    return scatter(
        x=rows[x],
        y=rows[y],
        customdata=rows["trial"].to_numpy(object),
        name=mark.name,
        mode="markers",
        marker={
            "color": mark.colour,
            "symbol": mark.symbol,
            "size": mark.size,
            "line": {"width": line_width, "color": mark.colour},
        },
        opacity=opacity,
        **hover_text(rows, x, y),
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
    figure = new_figure(HYPERVOLUME_AXES[over], "hypervolume, higher is better")
    volumes = frame["hypervolume"]
    steps = frame[(volumes != volumes.shift()) | (frame.index == frame.index[-1])]  # between them the line is level
    figure.add_trace(
        go.Scatter(
            x=steps[over],
            y=steps["hypervolume"],
            customdata=steps["trial"].tolist(),
            name="hypervolume",
            mode="lines+markers" if len(steps) <= 100 else "lines",
            line={"color": BLUE, "width": 2.5, "shape": "hv"},
            hovertemplate="after trial %{customdata}: %{y:.4f}<extra></extra>",
            showlegend=False,
        )
    )
    if over == "training_flops":
        figure.update_xaxes(tickformat="~s")
    elif over == "completed" and len(frame) <= 10:
        figure.update_xaxes(dtick=1)
    return figure


def add_front(figure: go.Figure, frame: pd.DataFrame, x: str, y: str, name: str, index: int) -> None:
    """Another study's front as a staircase, to compare with; `index` picks its colour and dash."""
    shown = placeable_trials(frame, x, y)
    if shown.empty:  # or it measured other things
        return
    front = front_frame(shown, (y, x)).sort_values(x)
    if front.empty:
        return
    colour = CURVE_COLOURS[1:][index % (len(CURVE_COLOURS) - 1)]
    figure.add_trace(
        go.Scatter(
            x=front[x],
            y=front[y],
            name=pseudo(name, 40),
            mode="lines+markers",
            line={"color": colour, "width": 2, "shape": "hv", "dash": ("dash", "dot", "dashdot")[index % 3]},
            hovertext=[f"{pseudo(name, 40)}, trial {trial}" for trial in front["trial"]],
            hoverinfo="text+x+y",
        )
    )


def add_variants(figure: go.Figure, variants: pd.DataFrame, x: str, y: str) -> None:
    """What is left of a trial that was taken apart into blocks: a dotted curve a trial, points of their own."""
    if x not in variants or y not in variants:
        return
    for trial, points in variants.groupby("trial"):
        name = f"trial {trial} in blocks"
        figure.add_trace(
            go.Scatter(
                x=points[x],
                y=points[y],
                customdata=points["trial"].to_numpy(object),
                name=name,
                mode="lines+markers",
                line={"color": PURPLE, "width": 1.5, "dash": "dot"},
                marker={"color": PURPLE, "size": 8, "symbol": "square-open"},
                hovertext=[
                    f"<b>{name}</b><br>of {kept:.3g} of its confirmed edges<br>{label(y)}: {number(y, quality)}"
                    f"<br>{label(x)}: {number(x, cost)}"
                    for kept, quality, cost in zip(points["kept"], points[y], points[x], strict=True)
                ],
                hoverinfo="text",
            )
        )


def add_budget(figure: go.Figure, budget: float) -> None:
    """A vertical line at a budget of the cost on the x axis."""
    line = {"color": GREY, "width": 3, "dash": "dot"}
    figure.add_shape(type="line", x0=budget, x1=budget, y0=0, y1=1, yref="y domain", line=line)


def add_region(figure: go.Figure, x: Sequence[float], y: Sequence[float]) -> None:
    """The outline of a selected region, (from, to) on each axis: without it a redrawn figure forgets the selection."""
    figure.update_layout(
        selections=[{"type": "rect", "xref": "x", "yref": "y", "x0": x[0], "x1": x[1], "y0": y[0], "y1": y[1]}]
    )
