"""The parts that pages share: addresses, headings with figures, lists of facts, tables, labelled controls."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pandas as pd
from dash import dcc, html

from hypernas.dashboards.figures.style import CONFIG
from hypernas.dashboards.live import LiveStudy
from hypernas.dashboards.texts import number, plain

ROWS = 50  # trials in a table


def link(path: str, study: str | None, trial: int | None = None) -> str:
    """The address of a page."""
    query = {"study": study, "trial": trial}
    known = {name: value for name, value in query.items() if value is not None}
    return path + (f"?{urlencode(known)}" if known else "")


def graph(name: str, title: str, **more: Any) -> html.Section:
    """A heading and a figure that callbacks fill."""
    config = {**CONFIG, "responsive": True, **more.pop("config", {})}
    return html.Section(
        [html.H2(title, id=f"{name}-title"), dcc.Graph(id=name, className="plot", config=config, **more)],
        **{"aria-labelledby": f"{name}-title"},
    )


def facts(pairs: Sequence[tuple[str, object]]) -> html.Dl:
    return html.Dl(
        [html.Div([html.Dt(name), html.Dd(plain(value), dir="auto")]) for name, value in pairs], className="facts"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], numeric: Sequence[str] = ()) -> html.Div:
    """A plain HTML table; a cell may be a component."""

    def cell(name: str, value: Any) -> html.Td:
        shown = value if hasattr(value, "to_plotly_json") else plain(value)
        return html.Td(shown, className="n" if name in numeric else "", dir="auto")

    body = [html.Tr([cell(name, value) for name, value in zip(head, row, strict=True)]) for row in rows]
    heads = [html.Th(name, scope="col", className="n" if name in numeric else "") for name in head]
    return html.Div(
        html.Table([html.Thead(html.Tr(heads)), html.Tbody(body)]), className="scroll", tabIndex="0", role="region"
    )


def field(name: str, title: str, control: Any, wide: bool = False) -> html.Div:
    """A control under its visible label."""
    return html.Div([html.Label(title, htmlFor=name), control], className="field wide" if wide else "field")


def trials_table(study: LiveStudy, rows: pd.DataFrame, note: str) -> list[Any]:
    """Trials, in order of number, as a table with the front first; at most ROWS of them."""
    on_front = rows["on_front"].to_numpy(bool)
    listed = rows.iloc[np.concatenate([np.flatnonzero(on_front), np.flatnonzero(~on_front)])[:ROWS]]
    head = ["trial", "state", *dict.fromkeys([*study.row.objectives, "parameters"]), "learning rate", "architecture"]
    body = []
    for record in listed.to_dict("records"):
        trial = int(record["trial"])
        state = str(record["state"]).lower() + (" (baseline)" if record["origin"] == "baseline" else "")
        state += ", infeasible" if record["violation"] > 0 else ""
        body.append(
            [
                dcc.Link(str(trial), href=link("/trial", study.row.name, trial)),
                state + (", on the front" if record["on_front"] else ""),
                *(number(name, record[name]) for name in head[2:-2]),
                "–" if pd.isna(record["learning_rate"]) else f"{record['learning_rate']:.3g}",
                record["architecture"],
            ]
        )
    more = f" The first {ROWS} are listed." if len(rows) > ROWS else ""
    if not body:
        return [html.P("No trials here yet.", className="note")]
    titles = [name.replace("_", " ") for name in head]
    numeric = [name for name in titles if name not in ("state", "architecture")]
    return [html.P(f"{note}{more}", className="note"), table(titles, body, numeric)]
