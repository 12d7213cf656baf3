"""DataFrames of `hypernas.dashboards.frames` as Plotly figures.

Colours are from Okabe and Ito's palette, each legible on white and on black, and never alone: shape or dash says
the same. Backgrounds are transparent and texts are coloured by the page's style sheet. Whatever comes from the
database passes `texts.pseudo`, as Plotly reads a little HTML in labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from hypernas.dashboards.frames import front_frame, scale_gain_frame, scale_law_frame, scale_run_frame, seed_frame
from hypernas.dashboards.texts import better, label, number, pseudo, setting, short
from hypernas.pareto import LOGARITHMIC
from hypernas.records import State

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, GREY = "#2380C4", "#B87F00", "#009E73", "#D55E00", "#C0659A", "#808080"
HEIGHT, MESSAGE_HEIGHT = 460, 200  # pixels
SVG_POINTS = 1_000  # above so many points a figure draws with WebGL
MATRICES = 8  # mixing matrices side by side
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
INFEASIBLE = Mark("infeasible: violates a constraint", GREY, "square-x-open", 9)
CURVE_COLOURS = (VERMILLION, BLUE, GREEN, ORANGE, PURPLE)
CURVE_DASHES = ("solid", "dash")


def _figure(x: str = "", y: str = "") -> go.Figure:
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
        "uirevision": "kept",  # zoom and hidden legend entries outlive an update
        "xaxis": grid | {"title": {"text": x}},
        "yaxis": grid | {"title": {"text": y}},
    }
    return go.Figure(layout=layout)


def _logarithmic(figure: go.Figure, values: pd.Series) -> None:
    """A logarithmic x axis labelled 1, 2, 5, 10, or 1, 10, 100 when it is long."""
    decades = float(np.log10(values.max() / values.min()))
    dtick = {"dtick": "D2" if decades < 4 else 1} if decades > 1 else {"nticks": 8}
    figure.update_xaxes(type="log", tickformat="~s", **dtick)


def blank_figure(height: int = HEIGHT) -> go.Figure:
    """A figure without axes."""
    figure = _figure()
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


def _scatter(points: int) -> type:
    return go.Scatter if points <= SVG_POINTS else go.Scattergl


def _hover(rows: pd.DataFrame, x: str, y: str) -> dict[str, Any]:
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
        f"<br>{pseudo(architecture)}<br>learning rate {rate:.3g}"
        for trial, state, origin, violation, quality, cost, architecture, rate in zip(
            *(rows[c] for c in columns), strict=True
        )
    ]
    return {"hovertext": texts, "hoverinfo": "text"}


def placed(frame: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
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
    shown = placed(frame, x, y)
    if shown.empty:
        return message_figure("No trial has been measured yet." if not len(frame) else "No trial has a result to show.")
    figure = _figure(label(x), f"{label(y)}, {better(y)}")
    if x in LOGARITHMIC:
        _logarithmic(figure, shown[x])
    scatter = _scatter(len(shown))
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
        **_hover(rows, x, y),
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
    front = front_frame(placed(frame, x, y), (y, x)).sort_values(x)
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


def bar_figure(
    frame: pd.DataFrame, name: str, value: str, title: str, empty: str, whole: float | None = None
) -> go.Figure:
    """One horizontal bar for each row, the first on top, drawn against `whole` if given; `empty` is said for none."""
    if frame.empty:
        return message_figure(empty)
    figure = _figure(title)
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


def importance_figure(frame: pd.DataFrame, objective: str) -> go.Figure:
    """What each choice explains of an objective by itself. `frame` is importance_frame's."""
    title = f"share of the variance of {label(objective)}"
    empty = "Importance needs more completed trials than a choice has values."
    return bar_figure(frame, "choice", "share", title, empty, whole=1.0)


def marginal_figure(frame: pd.DataFrame, parameter: str, objective: str) -> go.Figure:
    """One objective for each value of one choice, a box each with its trials beside it. `frame` is space_frame's."""
    if frame.empty:
        return message_figure("No trial has completed yet.")
    figure = _figure(pseudo(parameter), label(objective))
    for value in sorted(frame[parameter].unique(), key=_natural):
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
    values = sorted(frame[parameter].unique(), key=_natural)
    figure = _figure("trial", pseudo(parameter))
    for front, mark in ((False, MARKS[State.COMPLETE]), (True, Mark("on the front", VERMILLION, "diamond", 10))):
        rows = frame[frame["on_front"] == front]
        figure.add_trace(
            _scatter(len(frame))(
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
    figure = _figure(pseudo(across), pseudo(down))
    columns = sorted(frame["across"].unique(), key=_natural)
    rows = sorted(frame["down"].unique(), key=_natural)
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


def mixing_figure(matrices: Sequence[Sequence[Sequence[float]]], names: Sequence[str]) -> go.Figure:
    """Mixing matrices (n, n) side by side, in rows of MATRICES; `names` says whose each is. Row: to, column: from."""
    n, across = len(matrices[0]), min(MATRICES, len(matrices))
    down = -(-len(matrices) // across)
    values = np.full((down * (n + 1) - 1, across * (n + 1) - 1), np.nan)
    texts = np.full(values.shape, "", dtype=object)
    figure = _figure()
    for index, (matrix, name) in enumerate(zip(matrices, names, strict=True)):
        top, left = index // across * (n + 1), index % across * (n + 1)
        values[top : top + n, left : left + n] = matrix
        for to, row in enumerate(matrix):
            for origin, value in enumerate(row):
                texts[top + to, left + origin] = f"{pseudo(name)}: stream {origin + 1} to {to + 1}, {value:.3f}"
        figure.add_annotation(
            text=pseudo(name), x=left + (n - 1) / 2, y=top - 0.55, yanchor="bottom", showarrow=False, font={"size": 11}
        )
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
    figure.update_layout(height=90 + 105 * down)
    return figure


def gain_figure(frame: pd.DataFrame) -> go.Figure:
    """The composite gain after each connection, forward and backward. `frame` is gain_frame's."""
    figure = _figure("connections passed", "gain of the product of the mixing matrices")
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


def ladder_figures(scale: Mapping[str, Any]) -> dict[str, tuple[pd.DataFrame, go.Figure]]:
    """By name, the frames and figures of what `nas scale` found: the laws, and the gains."""
    laws, gains = scale_law_frame(scale), scale_gain_frame(scale)
    return {
        "scale-laws": (laws, scale_figure(scale_run_frame(scale), laws)),
        "scale-gains": (gains, ceg_figure(gains)),
    }


def scale_figure(runs: pd.DataFrame, laws: pd.DataFrame) -> go.Figure:
    """Every training of a ladder and the families' laws: solid where the family was measured, dotted beyond."""
    figure = _figure("training FLOPs", label("bits_per_byte"))
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
    _logarithmic(figure, laws["flops"])
    return figure


def ceg_figure(gains: pd.DataFrame) -> go.Figure:
    """Compute-equivalent gain over the candidate's compute: filled marks where measured, open ones extrapolated."""
    if gains.empty:
        return message_figure("No gain is known: the losses of the families never meet.")
    figure = _figure("the candidate's training FLOPs", "gain over the baseline, in compute")
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
    _logarithmic(figure, gains["flops"])
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


def _natural(value: object) -> tuple[bool, float, str]:
    """Numbers by size, before texts by alphabet."""
    size = float(value) if isinstance(value, Real) else None
    return size is None, size or 0.0, str(value)


def parallel_figure(frame: pd.DataFrame, parameters: Sequence[str], objectives: Sequence[str]) -> go.Figure:
    """Every COMPLETE trial as a line across its choices and objectives; dragging along an axis keeps a part of it."""
    if frame.empty:
        return message_figure("No trial has completed yet.")
    dimensions = []
    for name in parameters:
        values = sorted(frame[name].unique(), key=_natural)
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
    figure = _figure()
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
