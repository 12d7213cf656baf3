"""An architecture drawn to scale: layers from bottom to top on their residual streams, widths in units of d_model."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from hypernas.dashboards.figures.style import BLUE, GREEN, GREY, ORANGE, VERMILLION, blank_figure, message_figure
from hypernas.dashboards.texts import pseudo
from hypernas.search_spaces.transformer import gated_layers

MAX_LAYERS = 24
LAYER_PIXELS = 96
STREAM_GAP = 0.12  # of d_model, between two streams
FILL = 0.35  # opacity


def drawable(arch: Mapping[str, Any]) -> bool:
    """Whether the architecture is a stack of attention and feed-forward layers."""
    return {"depth", "d_model", "ffn.shape", "ffn.ratio", "attention.ratio", "streams.n"} <= set(arch)


def gate_names(arch: Mapping[str, Any]) -> list[tuple[int, str]]:
    """(layer, part) of every gate, in model order: the order of a trial's gate rates."""
    placement, depth = str(arch.get("gates.placement", "none")), int(arch.get("depth", 0))
    if placement == "none":
        return []
    parts = [part for part in ("attention", "ffn") if placement in (part, "both")]
    gated = gated_layers(str(arch["gates.layers"]), depth)
    return [(layer, part) for layer in range(depth) if gated[layer] for part in parts]


def connection_names(arch: Mapping[str, Any], count: int) -> list[str]:
    """Whose each of `count` connections is, in model order."""
    if count != 2 * int(arch.get("depth", 0)):
        return [f"connection {index + 1}" for index in range(count)]
    return [f"layer {index // 2 + 1} {('attention', 'ffn')[index % 2]}" for index in range(count)]


def architecture_figure(arch: Mapping[str, Any], gate_rates: Sequence[float] = ()) -> go.Figure:
    """The blocks, their widths, the streams beside them, and each gate with the share of tokens it lets through."""
    if not drawable(arch):
        return message_figure("This family has no picture; its choices are listed below.")
    shown = min(int(arch["depth"]), MAX_LAYERS)
    streams = int(arch["streams.n"])
    widest = max(1.0, float(arch["ffn.ratio"]), float(arch["attention.ratio"])) / 2
    figure = blank_figure(LAYER_PIXELS * shown + 110)
    left = -widest - 0.45
    lines = [left - STREAM_GAP * index for index in range(streams)]
    names = gate_names(arch)
    rates = dict(zip(names, gate_rates, strict=False))
    shapes = [_line((x, -0.2), (x, shown + 0.2), 2) for x in lines]
    for layer in range(shown):
        for part, low in (("attention", 0.06), ("ffn", 0.5)):
            bottom, top = layer + low, layer + low + 0.38
            edge = float(arch["attention.ratio"]) / 2 if part == "attention" else 0.5
            # read below, write back above
            shapes += [_line((lines[-1], y), (-edge, y), 1) for y in (bottom + 0.02, top - 0.02)]
            shapes += [_attention(arch, bottom, top)] if part == "attention" else _ffn(arch, bottom, top)
            if (layer, part) in names:
                _gate(figure, left + 0.22, (bottom + top) / 2, rates.get((layer, part)))
    # All at once: each `add_shape` looks at all before it, and a deep net took ten seconds.
    figure.update_layout(shapes=shapes)
    _texts(figure, arch, shown, lines, widest)
    figure.update_xaxes(range=[lines[-1] - 0.3, widest + 1.9])
    figure.update_yaxes(range=[-0.75, shown + 0.75])
    return figure


def _line(start: tuple[float, float], end: tuple[float, float], width: int) -> dict[str, Any]:
    (x0, y0), (x1, y1) = start, end
    return {"type": "line", "x0": x0, "x1": x1, "y0": y0, "y1": y1, "line": {"color": GREY, "width": width}}


def _filled(colour: str) -> dict[str, Any]:
    return {"line": {"color": colour}, "fillcolor": colour, "opacity": FILL}


def _attention(arch: Mapping[str, Any], bottom: float, top: float) -> dict[str, Any]:
    half = float(arch["attention.ratio"]) / 2
    return {"type": "rect", "x0": -half, "x1": half, "y0": bottom, "y1": top, **_filled(BLUE)}


def _ffn(arch: Mapping[str, Any], bottom: float, top: float) -> list[dict[str, Any]]:
    """d_model wide at both ends, d_hidden in the middle; an hourglass is a stack of them."""
    count = int(arch.get("ffn.sub_mlps", 1))
    half, height = float(arch["ffn.ratio"]) / 2, (top - bottom) / count
    out = []
    for index in range(count):
        low, middle, high = bottom + index * height, bottom + (index + 0.5) * height, bottom + (index + 1) * height
        path = f"M -0.5 {low} L 0.5 {low} L {half} {middle} L 0.5 {high} L -0.5 {high} L {-half} {middle} Z"
        out.append({"type": "path", "path": path, **_filled(GREEN)})
    return out


def _gate(figure: go.Figure, x: float, y: float, rate: float | None) -> None:
    figure.add_trace(
        go.Scatter(
            x=[x],
            y=[y],
            mode="markers+text",
            marker={"symbol": "diamond", "size": 12, "color": ORANGE},
            text=["gate" if rate is None else f"{100 * rate:.0f} %"],
            textposition="top center",
            hoverinfo="skip",
        )
    )


def _texts(figure: go.Figure, arch: Mapping[str, Any], shown: int, lines: Sequence[float], widest: float) -> None:
    hidden = f"{float(arch['ffn.ratio']):.3g} x d_model"
    if "ffn.sub_mlps" in arch:
        hidden += f", {arch['ffn.sub_mlps']} sub-MLPs"
    if "ffn.blocks" in arch:
        hidden += f", {arch['ffn.blocks']} blocks"
    mixing = " ".join(str(arch[key]) for key in ("streams.mixing", "streams.factors") if key in arch)
    streams = f"{arch['streams.n']} streams, {mixing}" if int(arch["streams.n"]) > 1 else "residual stream"
    depth = int(arch["depth"])
    above = f"layers 1 to {shown} of {depth}" if depth > shown else f"{depth} layers of width {arch['d_model']}"
    for text, x, y, colour, anchor in (
        (f"attention {float(arch['attention.ratio']):.3g} x d_model", widest + 0.1, 0.25, BLUE, "left"),
        (f"{arch['ffn.shape']} feed-forward, {hidden}", widest + 0.1, 0.69, GREEN, "left"),
        (streams, lines[-1], -0.45, GREY, "left"),
        (above, lines[-1], shown + 0.45, VERMILLION, "left"),
    ):
        figure.add_annotation(text=pseudo(text), x=x, y=y, showarrow=False, xanchor=anchor, font={"color": colour})
