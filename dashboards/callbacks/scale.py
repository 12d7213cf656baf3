"""The page of a ladder."""

from dash import Dash, Input, Output, State, no_update

from hypernas.dashboards import figures, pages
from hypernas.dashboards.live import Watch, scale_of


def wire_scale(app: Dash, watch: Watch) -> None:
    @app.callback(
        Output("scale-laws", "figure"),
        Output("scale-gains", "figure"),
        Output("scale-said", "children"),
        Input("seq", "data"),
        State("study", "data"),
    )
    def scale(_: int, shown: dict) -> tuple:
        study, store = watch.study(shown["name"]), watch.store()
        if study is None or store is None:
            return (no_update,) * 3
        found = scale_of(store, study.row.name)
        said = pages.scale_said(found, study.row.name)
        if found is None:
            nothing = figures.message_figure("No ladder was trained yet.")
            return nothing, nothing, said
        drawn = figures.ladder_figures(found)
        return drawn["scale-laws"][1], drawn["scale-gains"][1], said
