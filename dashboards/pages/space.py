"""The choices: which of them matter, and what was tried."""

from typing import Any

from dash import dcc, html

from hypernas.dashboards.live import LiveStudy
from hypernas.dashboards.pages.parts import field, graph
from hypernas.dashboards.texts import label, plain


def space_page(study: LiveStudy) -> list[Any]:
    objectives = [{"label": label(name), "value": name} for name in study.row.objectives]
    control = {"clearable": False, "searchable": False}
    return [
        html.H1(["Choices of ", html.Bdi(plain(study.row.name))]),
        html.Div(
            [
                field(
                    "space-objective",
                    "Objective",
                    dcc.Dropdown(objectives, study.row.objectives[0], id="space-objective", **control),
                ),
                field("space-choice", "Choice", dcc.Dropdown([], None, id="space-choice", **control)),
            ],
            className="controls",
        ),
        graph("space-importance", "What matters"),
        html.P(
            "The share of the objective's variance that each choice explains by itself (omega squared). Choices that "
            "act only together show little here.",
            className="note",
        ),
        graph("space-marginal", "One choice"),
        html.Div(
            field("space-other", "Against", dcc.Dropdown([], None, id="space-other", **control)), className="controls"
        ),
        graph("space-pair", "Two choices on the front"),
        graph("space-tried", "What the sampler tried over time"),
        graph("space-parallel", "All choices at once"),
        html.P("Drag along an axis to keep only the lines that cross it there.", className="note"),
    ]
