"""Training curves."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hypernas.dashboards.figures.style import (
    CURVE_COLOURS,
    CURVE_DASHES,
    GREY,
    logarithmic_axis,
    message_figure,
    new_figure,
    scatter_class,
)
from hypernas.dashboards.texts import label, short

HIGHLIGHTED = 8  # front curves drawn each in its own colour


def curve_figure(curves: pd.DataFrame, highlighted: Sequence[int] = (), loss: str = "bits_per_byte") -> go.Figure:
    """Loss at each rung over training FLOPs: every trial in grey, the first few `highlighted` in colour.

    Over steps where no FLOPs are known: Optuna's reports have none.
    """
    if curves.empty:
        return message_figure("No trial has reached its first rung yet.")
    x = "training_flops" if (curves["training_flops"] > 0).any() else "step"
    figure = new_figure(label(x), label(loss))
    if x == "training_flops":
        logarithmic_axis(figure, curves[x])
    bright = list(highlighted)[:HIGHLIGHTED]
    rest = curves[~curves["trial"].isin(bright)]
    if len(rest):
        figure.add_trace(_all_curves(rest, x))
    for index, trial in enumerate(bright):
        rows = curves[curves["trial"] == trial]
        if len(rows):
            figure.add_trace(
                go.Scatter(
                    x=rows[x],
                    y=rows["loss"],
                    customdata=rows["trial"].tolist(),
                    name=f"trial {trial}",
                    mode="lines+markers",
                    line={
                        "color": CURVE_COLOURS[index % len(CURVE_COLOURS)],
                        "dash": CURVE_DASHES[index // len(CURVE_COLOURS) % len(CURVE_DASHES)],
                        "width": 2.5,
                    },
                    hovertext=[
                        f"<b>trial {trial}</b> rung {row.rung}<br>loss {row.loss:.4f} after {short(row.tokens)} seen"
                        if x == "training_flops"
                        else f"<b>trial {trial}</b> step {row.step}<br>reported {row.loss:.6g}"
                        for row in rows.itertuples(index=False)
                    ],
                    hoverinfo="text",
                )
            )
    return figure


def _all_curves(curves: pd.DataFrame, x: str) -> go.Scatter:
    """Many curves as one trace: a gap parts each from the next."""
    last = (curves["trial"] != curves["trial"].shift(-1)).to_numpy()
    after = np.flatnonzero(last) + 1
    return scatter_class(len(curves))(
        x=np.insert(curves[x].to_numpy(float), after, np.nan),
        y=np.insert(curves["loss"].to_numpy(float), after, np.nan),
        name="other trials",
        mode="lines",
        line={"color": GREY, "width": 1},
        opacity=0.45,
        hoverinfo="skip",
    )
