"""The ladder of `nas scale`: laws, gains, and both in words."""

from collections.abc import Mapping
from shlex import quote
from typing import Any

from dash import html

from hypernas.dashboards.live import LiveStudy
from hypernas.dashboards.pages.parts import graph
from hypernas.dashboards.texts import LADDER_NOTES, plain


def scale_page(study: LiveStudy) -> list[Any]:
    return [
        html.H1(["Scale of ", html.Bdi(plain(study.row.name))]),
        graph("scale-laws", "Loss over training compute"),
        html.P(LADDER_NOTES["scale-laws"], className="note"),
        graph("scale-gains", "Compute-equivalent gain"),
        html.P(LADDER_NOTES["scale-gains"], className="note"),
        html.Div(id="scale-said"),
    ]


def scale_said(scale: Mapping[str, Any] | None, study: str) -> Any:
    """The analysis in words, or the command that makes one."""
    if scale is None:
        return html.P(["Nothing yet. ", html.Code(f"nas scale --study {quote(plain(study))}"), " trains a ladder."])
    from hypernas.scaling.analysis import describe  # brings torch

    return html.Pre(plain("\n".join(describe(scale)), 20_000))
