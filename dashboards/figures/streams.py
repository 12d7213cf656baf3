"""How residual streams mix."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hypernas.dashboards.figures.style import BLUE, VERMILLION, new_figure
from hypernas.dashboards.texts import pseudo

MATRICES = 8  # mixing matrices side by side


def mixing_figure(matrices: Sequence[Sequence[Sequence[float]]], names: Sequence[str]) -> go.Figure:
    """Mixing matrices (n, n) side by side, in rows of MATRICES; `names` says whose each is. Row: to, column: from."""
    n, across = len(matrices[0]), min(MATRICES, len(matrices))
    down = -(-len(matrices) // across)
    values = np.full((down * (n + 1) - 1, across * (n + 1) - 1), np.nan)
    texts = np.full(values.shape, "", dtype=object)
    annotations = []
    for index, (matrix, name) in enumerate(zip(matrices, names, strict=True)):
        top, left = index // across * (n + 1), index % across * (n + 1)
        values[top : top + n, left : left + n] = matrix
        for to, row in enumerate(matrix):
            for origin, value in enumerate(row):
                texts[top + to, left + origin] = f"{pseudo(name)}: stream {origin + 1} to {to + 1}, {value:.3f}"
        where = {"x": left + (n - 1) / 2, "y": top - 0.55, "yanchor": "bottom"}
        annotations.append({"text": pseudo(name), **where, "showarrow": False, "font": {"size": 11}})
    figure = new_figure()
    figure.add_trace(
        go.Heatmap(
            z=values,
            text=texts.tolist(),
            hovertemplate="%{text}<extra></extra>",
            hoverongaps=False,
            colorscale="Cividis",
            zmin=min(0.0, float(np.nanmin(values))),
            zmax=max(1.0, float(np.nanmax(values))),
            xgap=1,
            ygap=1,
        )
    )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, range=[len(values) - 0.4, -1.4])
    # Names all at once: each `add_annotation` looks at all before it.
    figure.update_layout(height=90 + 105 * down, annotations=annotations)
    return figure


def gain_figure(frame: pd.DataFrame) -> go.Figure:
    """The composite gain after each connection, forward and backward. `frame` is gain_frame's."""
    figure = new_figure("connections passed", "gain of the product of the mixing matrices")
    for name, colour, dash in (("forward", BLUE, "solid"), ("backward", VERMILLION, "dash")):
        figure.add_trace(
            go.Scatter(
                x=frame["connection"],
                y=frame[name],
                name=name,
                mode="lines+markers",
                line={"color": colour, "dash": dash, "width": 2.5},
                hovertemplate="after %{x} connections: %{y:.4f}<extra>" + name + "</extra>",
            )
        )
    figure.update_yaxes(rangemode="tozero")
    return figure
