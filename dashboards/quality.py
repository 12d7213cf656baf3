"""The figure of `nas bench search --part quality`: hypervolume against training compute, one line a method."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

COLOURS = ("#d62728", "#7f7f7f", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#bcbd22", "#e377c2")


def figure(curves: Mapping[str, Any]) -> go.Figure:
    """Medians, the default's quartiles as a band around its line; shares of the table's own hypervolume."""
    drawn = go.Figure()
    for place, (name, curve) in enumerate(curves.items()):
        colour, dash = COLOURS[place % len(COLOURS)], "solid" if place < len(COLOURS) else "dot"
        low, middle, high = curve["quartiles"]
        x = curve["trainings"]
        if name == "default":
            drawn.add_scatter(
                x=[*x, *reversed(x)], y=[*high, *reversed(low)], fill="toself", fillcolor=colour, opacity=0.15,
                line={"width": 0}, hoverinfo="skip", showlegend=False,
            )  # fmt: skip
        line = {"color": colour, "width": 3 if name == "default" else 1.5, "shape": "hv", "dash": dash}
        drawn.add_scatter(x=x, y=middle, name=name, mode="lines", line=line)
    drawn.update_layout(
        template="plotly_white",
        xaxis_title="training compute, in full trainings of the mean configuration",
        yaxis_title="hypervolume, share of the best possible",
        width=900,
        height=520,
    )
    return drawn
