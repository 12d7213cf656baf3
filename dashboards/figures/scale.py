"""The ladder's laws and gains."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from hypernas.dashboards.figures.style import CURVE_COLOURS, GREY, logarithmic_axis, message_figure, new_figure
from hypernas.dashboards.frames import scale_gain_frame, scale_law_frame, scale_run_frame
from hypernas.dashboards.texts import label, pseudo


def ladder_figures(scale: Mapping[str, Any]) -> dict[str, tuple[pd.DataFrame, go.Figure]]:
    """By name, the frames and figures of what `nas scale` found: the laws, and the gains."""
    laws, gains = scale_law_frame(scale), scale_gain_frame(scale)
    return {
        "scale-laws": (laws, scale_figure(scale_run_frame(scale), laws)),
        "scale-gains": (gains, ceg_figure(gains)),
    }


def scale_figure(runs: pd.DataFrame, laws: pd.DataFrame) -> go.Figure:
    """Every training of a ladder and the families' laws: solid where the family was measured, dotted beyond."""
    figure = new_figure("training FLOPs", label("bits_per_byte"))
    for index, (family, law) in enumerate(laws.groupby("family", sort=False)):
        colour = CURVE_COLOURS[index % len(CURVE_COLOURS)]
        own = runs[runs["family"] == family]
        name = pseudo(family, 40)
        figure.add_trace(_band(law, colour, name))
        beyond = ~law["measured"]
        beyond |= beyond.shift(-1, fill_value=False)  # the dotted line starts where the solid one ends
        for shown, dash in ((law["measured"], "solid"), (beyond, "dot")):
            line = {"color": colour, "width": 2, "dash": dash}
            figure.add_trace(_law(law["flops"], law["loss"].where(shown), name, line))
        figure.add_trace(
            go.Scatter(
                x=own["flops"],
                y=own["loss"],
                name=name,
                legendgroup=name,
                mode="markers",
                marker={"color": colour, "size": 8, "symbol": ("circle", "diamond", "square", "x")[index % 4]},
                hovertext=[f"{name}, {parameters:,} parameters" for parameters in own["parameters"]],
                hoverinfo="text+x+y",
            )
        )
    logarithmic_axis(figure, laws["flops"])
    return figure


def ceg_figure(gains: pd.DataFrame) -> go.Figure:
    """Compute-equivalent gain over the candidate's compute: filled marks where measured, open ones extrapolated."""
    if gains.empty:
        return message_figure("No gain is known: the losses of the families never meet.")
    figure = new_figure("the candidate's training FLOPs", "gain over the baseline, in compute")
    # In the colours of their laws, of which the first is the baseline's.
    for index, (candidate, own) in enumerate(gains.groupby("candidate", sort=False), 1):
        colour, name = CURVE_COLOURS[index % len(CURVE_COLOURS)], pseudo(candidate, 40)
        for measured, word in ((True, "measured"), (False, "extrapolated")):
            part = own[own["measured"] == measured]
            symbol = "circle" if measured else "circle-open"
            figure.add_trace(
                go.Scatter(
                    x=part["flops"],
                    y=part["ceg"],
                    error_y={"array": part["high"] - part["ceg"], "arrayminus": part["ceg"] - part["low"]},
                    name=f"{name}, {word}",
                    mode="lines+markers",
                    line={"color": colour, "width": 2, "dash": "solid" if measured else "dot"},
                    marker={"color": colour, "size": 9, "symbol": symbol},
                )
            )
    figure.update_yaxes(type="log")
    figure.add_hline(y=1, line={"color": GREY, "width": 1})
    logarithmic_axis(figure, gains["flops"])
    return figure


def _law(x: pd.Series, y: pd.Series, name: str, line: dict[str, Any]) -> go.Scatter:
    return go.Scatter(x=x, y=y, name=name, legendgroup=name, showlegend=False, mode="lines", line=line)


def _band(law: pd.DataFrame, colour: str, name: str) -> go.Scatter:
    """The interval of a law, as the outline of an area."""
    return go.Scatter(
        x=pd.concat([law["flops"], law["flops"][::-1]]),
        y=pd.concat([law["high"], law["low"][::-1]]),
        fill="toself",
        fillcolor=colour,
        opacity=0.15,
        line={"width": 0},
        legendgroup=name,
        showlegend=False,
        hoverinfo="skip",
    )


def natural_order(value: object) -> tuple[bool, float, str]:
    """Numbers by size, before texts by alphabet."""
    size = float(value) if isinstance(value, Real) else None
    return size is None, size or 0.0, str(value)
