"""The front's page: selection, curves, exports."""

from typing import Any
from urllib.parse import urlencode

import numpy as np
from dash import Dash, Input, Output, State, ctx, no_update

from hypernas.dashboards import figures, frames, pages
from hypernas.dashboards.live import Watch
from hypernas.dashboards.selection import (
    at_moment,
    axis_scale,
    best_within,
    budget_of,
    cost_range,
    holds,
    hypervolumes_of,
    in_states,
    select_trials,
)

ALL_CURVES = 100  # trials whose curves a live page draws


def wire_front(app: Dash, watch: Watch) -> None:
    _wire_figure(app, watch)
    _wire_facts(app, watch)
    _wire_selection(app, watch)
    _wire_budget(app, watch)
    _wire_curves_and_table(app, watch)
    _wire_hypervolume(app, watch)
    _wire_clicks(app)


def _wire_figure(app: Dash, watch: Watch) -> None:
    """The front, and the slider through the moments at which trials finished."""

    @app.callback(
        Output("front", "figure"),
        Output("front-moment", "max"),
        Output("front-moment", "value"),
        Input("seq", "data"),
        Input("front-x", "value"),
        Input("front-y", "value"),
        Input("front-states", "value"),
        Input("front-compare", "value"),
        Input("front-moment", "value"),
        Input("front-budget", "value"),
        Input("selection", "data"),
        State("front-moment", "max"),
        State("study", "data"),
    )
    def front(
        _: int,
        x: str,
        y: str,
        states: list,
        compare: list,
        moment: int,
        share: float,
        selection: dict | None,
        most: int,
        shown: dict,
    ) -> tuple:
        study = watch.study(shown["name"])
        if study is None:
            return (no_update,) * 3
        frame, most, moment = at_moment(study.frame, moment, most)
        frame = in_states(frame, states)
        figure = figures.pareto_figure(frame, x, y)
        for index, name in enumerate(compare or []):
            other = watch.study(name)
            if other is not None:
                figures.add_front(figure, other.frame, x, y, name, index)
        figures.add_variants(figure, frames.variant_frame(study.row.settings.variants), x, y)
        budget = budget_of(frame, x, y, share)
        if budget is not None:
            figures.add_budget(figure, budget)
        if selection and holds(selection, study) and (selection["x"][0], selection["y"][0]) == (x, y):
            figures.add_region(figure, selection["x"][1:], selection["y"][1:])
        return figure, most, moment


def _wire_facts(app: Dash, watch: Watch) -> None:
    """The study's facts, and the best trial within the budget."""

    @app.callback(
        Output("front-facts", "children"),
        Output("front-best", "children"),
        Input("seq", "data"),
        Input("front-x", "value"),
        Input("front-y", "value"),
        Input("front-states", "value"),
        Input("front-moment", "value"),
        Input("front-budget", "value"),
        Input("selection", "data"),
        State("front-moment", "max"),
        State("study", "data"),
    )
    def facts(
        _: int, x: str, y: str, states: list, moment: int, share: float, selection: dict, most: int, shown: dict
    ) -> tuple:
        study = watch.study(shown["name"])
        if study is None:
            return no_update, no_update
        needed = study.frame[list({"trial", "state", "violation", "finished", "on_front", x, y})]
        frame = in_states(at_moment(needed, moment, most)[0], states)
        best = best_within(select_trials(frame, study, selection), x, y, budget_of(frame, x, y, share))
        volumes = hypervolumes_of(study, selection)
        volume = float(volumes["hypervolume"].iloc[-1]) if len(volumes) else None
        return pages.study_facts(study, select_trials(needed, study, selection), volume), best


def _wire_selection(app: Dash, watch: Watch) -> None:
    """A region drawn on the front, and the bar that every page shows while there is one."""

    @app.callback(
        Output("selection-said", "children"),
        Output("selection-bar", "hidden"),
        Input("seq", "data"),
        Input("selection", "data"),
        Input("study", "data"),
    )
    def bar(_: int, selection: dict | None, shown: dict | None) -> tuple:
        study = watch.study(shown["name"]) if shown and shown.get("name") else None
        if study is None or not holds(selection, study):
            return "", True
        count = len(select_trials(study.frame, study, selection))
        return f"{count} selected on the front: all figures but the front itself show these alone.", False

    @app.callback(
        Output("selection", "data"),
        Input("selection-clear", "n_clicks"),
        Input("front", "relayoutData", allow_optional=True),
        State("front-x", "value", allow_optional=True),
        State("front-y", "value", allow_optional=True),
        State("study", "data"),
        prevent_initial_call=True,
    )
    def select(_: int, changed: dict | None, x: str, y: str, shown: dict) -> Any:
        """A region was drawn, moved or cleared; `selectedData` would be emptied by redraws too."""
        if ctx.triggered_id == "selection-clear":
            return None
        moved = {side: (changed or {}).get(f"selections[0].{side}") for side in ("x0", "x1", "y0", "y1")}
        drawn = (changed or {}).get("selections", [moved])
        if drawn and None in [drawn[-1].get(side) for side in moved]:
            return no_update
        box = drawn[-1] if drawn else None
        return box and {"study": shown["name"], "x": [x, box["x0"], box["x1"]], "y": [y, box["y0"], box["y1"]]}


def _wire_budget(app: Dash, watch: Watch) -> None:
    """The dotted line and its slider move together."""

    @app.callback(
        Output("front-budget", "value"),
        Input("front", "relayoutData"),
        State("front-x", "value"),
        State("front-y", "value"),
        State("front-states", "value"),
        State("study", "data"),
        prevent_initial_call=True,
    )
    def drag(changed: dict | None, x: str, y: str, states: list, shown: dict) -> Any:
        """The dotted line was dragged: the slider follows."""
        budget = (changed or {}).get("shapes[0].x0")
        study = watch.study(shown["name"])
        if budget is None or study is None:
            return no_update
        low, high = cost_range(study.frame[study.frame["state"].isin(states)], x, y)
        return float(np.clip((axis_scale(x, float(budget)) - low) / ((high - low) or 1.0), 0.0, 1.0))


def _wire_curves_and_table(app: Dash, watch: Watch) -> None:
    @app.callback(
        Output("front-curves", "figure"),
        Output("front-table", "children"),
        Input("seq", "data"),
        Input("selection", "data"),
        Input("front-states", "value"),
        State("study", "data"),
    )
    def details(_: int, selection: dict | None, states: list, shown: dict) -> tuple:
        study = watch.study(shown["name"])
        if study is None:
            return no_update, no_update
        frame = in_states(study.frame, states)
        frame = select_trials(frame, study, selection)
        best = frame[frame["on_front"]]["trial"].tolist()
        drawn = [*best, *frame.loc[~frame["on_front"], "trial"].tolist()[-ALL_CURVES:]]
        curves = figures.curve_figure(watch.curves(study, sorted(drawn)), best, frames.loss_name(study.row))
        return curves, pages.trials_table(study, frame, "Select a region of the front to see its trials alone.")


def _wire_hypervolume(app: Dash, watch: Watch) -> None:
    @app.callback(
        Output("front-volume", "figure"),
        Input("seq", "data"),
        Input("front-over", "value"),
        Input("selection", "data"),
        State("study", "data"),
    )
    def volume(_: int, over: str, selection: dict | None, shown: dict) -> Any:
        study = watch.study(shown["name"])
        return no_update if study is None else figures.hypervolume_figure(hypervolumes_of(study, selection), over)


def _wire_clicks(app: Dash) -> None:
    """A click on a point of the front opens its trial."""

    @app.callback(
        Output("url", "pathname"),
        Output("url", "search"),
        Input("front", "clickData"),
        State("study", "data"),
        prevent_initial_call=True,
    )
    def open_trial(clicked: dict | None, shown: dict) -> tuple:
        point = (clicked or {}).get("points", [{}])[0]
        if point.get("customdata") is None:
            return no_update, no_update
        return "/trial", "?" + urlencode({"study": shown["name"], "trial": point["customdata"]})
