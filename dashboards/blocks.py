"""The figure of `nas decompose --figure`: the evidence for every weight, nets permuted into their blocks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hypernas.dashboards.figures.style import NO_UPLOAD
from hypernas.dashboards.texts import pseudo

CELLS = 256  # along a side at most: of what falls into one cell the strongest is drawn
FRAME = "#D55E00"
HEIGHT, WIDTH = 380, 900  # pixels; of one net, of all


def permute_evidence(surprise: np.ndarray, net: Mapping[str, Any]) -> np.ndarray:
    """-log10 p of a net's edges, (C, H), in the order that shows its blocks, at most CELLS x CELLS."""
    shown = surprise[np.ix_(net["coordinate_order"], net["unit_order"])]
    for axis, size in enumerate(shown.shape):
        if size > CELLS:
            shown = np.maximum.reduceat(shown, np.linspace(0, size, CELLS, endpoint=False).astype(int), axis=axis)
    return shown


def corners(net: Mapping[str, Any]) -> list[tuple[int, int, int, int]]:
    """(x0, y0, x1, y1) of every block in the permuted matrix: units across, coordinates down."""
    found, x, y = [], 0, 0
    for block in net["blocks"]:
        found.append((x, y, x + block["units"], y + block["coordinates"]))
        x, y = x + block["units"], y + block["coordinates"]
    return found


def figure(nets: Sequence[Mapping[str, Any]], surprise: Mapping[str, np.ndarray]) -> go.Figure:
    """One matrix a net, `nets` as in the report; what lies outside of all outlines is in no block."""
    titles = [
        f"{pseudo(net['name'], 60)}: {net['confirmed']:,} of {net['edges']:,} edges confirmed, "
        f"{len(net['blocks'])} block{'' if len(net['blocks']) == 1 else 's'}"
        for net in nets
    ]
    drawn = make_subplots(rows=len(nets), cols=1, subplot_titles=titles, vertical_spacing=0.3 / len(nets))
    outlines: list[dict[str, Any]] = []
    for row, net in enumerate(nets, 1):
        z = permute_evidence(surprise[net["name"]], net)
        # Cells are spread over all coordinates and units, however many fell into one.
        steps = {"x0": net["units"] / z.shape[1] / 2, "dx": net["units"] / z.shape[1]}
        steps |= {"y0": net["coordinates"] / z.shape[0] / 2, "dy": net["coordinates"] / z.shape[0]}
        drawn.add_trace(go.Heatmap(z=z, **steps, coloraxis="coloraxis"), row=row, col=1)
        outlines += [
            {"type": "rect", "x0": x0, "x1": x1, "xref": f"x{row if row > 1 else ''}", "y0": y0, "y1": y1}
            | {"yref": f"y{row if row > 1 else ''}", "line": {"color": FRAME, "width": 2}}
            for x0, y0, x1, y1 in corners(net)
        ]
        drawn.update_xaxes(title_text="hidden units", row=row, col=1)
        drawn.update_yaxes(title_text="coordinates", autorange="reversed", row=row, col=1)
    drawn.update_layout(
        shapes=outlines,  # all at once: each `add_shape` looks at all before it
        template="plotly_white",
        modebar=NO_UPLOAD,
        height=HEIGHT * len(nets),
        width=WIDTH,
        coloraxis={"colorscale": "Cividis", "colorbar": {"title": "-log10 p"}},
    )
    return drawn
