"""What a study says of its space: importances, margins, pairs."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hypernas.dashboards.figures.scale import natural_order
from hypernas.dashboards.figures.style import (
    BLUE,
    MARKS,
    SVG_POINTS,
    VERMILLION,
    Mark,
    bar_figure,
    message_figure,
    new_figure,
    scatter_class,
)
from hypernas.dashboards.texts import label, number, pseudo, setting
from hypernas.pareto import LOGARITHMIC
from hypernas.records import State


def importance_figure(frame: pd.DataFrame, objective: str) -> go.Figure:
    """What each choice explains of an objective by itself. `frame` is importance_frame's."""
    title = f"share of the variance of {label(objective)}"
    empty = "Importance needs more completed trials than a choice has values."
    return bar_figure(frame, "choice", "share", title, empty, whole=1.0)


def marginal_figure(frame: pd.DataFrame, parameter: str, objective: str) -> go.Figure:
    """One objective for each value of one choice, a box each with its trials beside it. `frame` is space_frame's."""
    if frame.empty:
        return message_figure("No trial has completed yet.")
    frame = frame[frame[parameter].notna()]
    figure = new_figure(pseudo(parameter), label(objective))
    for value in sorted(frame[parameter].unique(), key=natural_order):
        rows = frame[frame[parameter] == value]
        figure.add_trace(
            go.Box(
                y=rows[objective],
                name=pseudo(setting(value), 40),
                boxpoints="all" if len(frame) <= SVG_POINTS else False,
                marker={"color": BLUE, "size": 5},
                customdata=rows["trial"].tolist(),
                hovertemplate="trial %{customdata}: %{y}<extra></extra>",
                showlegend=False,
            )
        )
    figure.update_xaxes(type="category")
    if objective in LOGARITHMIC:
        figure.update_yaxes(type="log", tickformat="~s")
    return figure


def tried_figure(frame: pd.DataFrame, parameter: str) -> go.Figure:
    """Which value of one choice each trial got, over the trial's number. `frame` is space_frame's."""
    if frame.empty:
        return message_figure("No trial has completed yet.")
    frame = frame[frame[parameter].notna()]
    values = sorted(frame[parameter].unique(), key=natural_order)
    figure = new_figure("trial", pseudo(parameter))
    for front, mark in ((False, MARKS[State.COMPLETE]), (True, Mark("on the front", VERMILLION, "diamond", 10))):
        rows = frame[frame["on_front"] == front]
        figure.add_trace(
            scatter_class(len(frame))(
                x=rows["trial"],
                y=[pseudo(setting(value), 40) for value in rows[parameter]],
                customdata=rows["trial"].tolist(),
                name=mark.name,
                mode="markers",
                marker={"color": mark.colour, "symbol": mark.symbol, "size": mark.size},
                hovertemplate="trial %{customdata}: %{y}<extra></extra>",
            )
        )
    figure.update_yaxes(type="category", categoryarray=[pseudo(setting(value), 40) for value in values])
    return figure


def pair_figure(frame: pd.DataFrame, across: str, down: str, objective: str) -> go.Figure:
    """Two choices against each other: how many trials of each pair stand on the front. `frame` is pair_frame's."""
    if frame.empty:
        return message_figure("No trial has completed yet.")
    figure = new_figure(pseudo(across), pseudo(down))
    columns = sorted(frame["across"].unique(), key=natural_order)
    rows = sorted(frame["down"].unique(), key=natural_order)
    counts = frame.pivot(index="down", columns="across", values="on_front").reindex(index=rows, columns=columns)
    texts = {
        (row.down, row.across): f"{row.on_front} of {row.trials}<br>best {number(objective, row.best)}"
        for row in frame.itertuples(index=False)
    }
    figure.add_trace(
        go.Heatmap(
            z=counts.to_numpy(float),
            x=[pseudo(setting(value), 40) for value in columns],
            y=[pseudo(setting(value), 40) for value in rows],
            text=[[texts.get((row, column), "") for column in columns] for row in rows],
            texttemplate="%{text}" if len(frame) <= 60 else None,
            hovertemplate="%{x} with %{y}: %{text}<extra></extra>",
            hoverongaps=False,
            colorscale=[[0, "rgba(128,128,128,0.15)"], [1, "rgba(213,94,0,0.75)"]],
            colorbar={"title": {"text": "trials on<br>the front"}, "dtick": -(-int(counts.max(axis=None)) // 5) or 1},
            xgap=2,
            ygap=2,
        )
    )
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    return figure


def parallel_figure(frame: pd.DataFrame, parameters: Sequence[str], objectives: Sequence[str]) -> go.Figure:
    """Every COMPLETE trial as a line across its choices and objectives; dragging along an axis keeps a part of it."""
    if frame.empty:
        return message_figure("No trial has completed yet.")
    frame = frame.dropna(subset=list(parameters))
    if frame.empty:
        return message_figure("No trial made all of these choices.")
    dimensions = []
    for name in parameters:
        values = sorted(frame[name].unique(), key=natural_order)
        places = {value: index for index, value in enumerate(values)}
        dimensions.append(
            {
                "label": pseudo(name, 24),
                "values": [places[value] for value in frame[name]],
                "tickvals": list(range(len(values))),
                "ticktext": [pseudo(setting(value), 40) for value in values],
            }
        )
    for name in objectives:
        logarithmic = name in LOGARITHMIC
        values = np.log10(frame[name].clip(lower=1e-12)) if logarithmic else frame[name]
        dimensions.append({"label": ("log10 " if logarithmic else "") + pseudo(name, 24), "values": values})
    figure = new_figure()
    figure.add_trace(
        go.Parcoords(
            dimensions=dimensions,
            line={"color": frame[objectives[0]], "colorscale": "Cividis", "reversescale": True, "showscale": False},
            labelangle=-15,
            tickfont={"size": 11},
        )
    )
    figure.update_layout(margin={"l": 70, "r": 60, "t": 90, "b": 30})
    return figure
