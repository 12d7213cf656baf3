"""The space's page."""

from dash import Dash, Input, Output, State, no_update

from hypernas.dashboards import figures, frames
from hypernas.dashboards.live import Watch
from hypernas.dashboards.selection import select_trials
from hypernas.dashboards.texts import plain


def wire_space(app: Dash, watch: Watch) -> None:
    @app.callback(
        Output("space-importance", "figure"),
        Output("space-marginal", "figure"),
        Output("space-tried", "figure"),
        Output("space-parallel", "figure"),
        Output("space-pair", "figure"),
        Output("space-choice", "options"),
        Output("space-choice", "value"),
        Output("space-other", "options"),
        Output("space-other", "value"),
        Input("seq", "data"),
        Input("space-objective", "value"),
        Input("space-choice", "value"),
        Input("space-other", "value"),
        Input("selection", "data"),
        State("study", "data"),
    )
    def space(
        _: int, objective: str, choice: str | None, other: str | None, selection: dict | None, shown: dict
    ) -> tuple:
        study = watch.study(shown["name"])
        if study is None:
            return (no_update,) * 9
        frame, names = frames.space_frame(select_trials(study.frame, study, selection), study.choices())
        ranking = frames.importance_frame(frame, names, objective)
        order = list(dict.fromkeys([*ranking["choice"], *names]))
        choice = choice if choice in names else next(iter(order), None)
        others = [name for name in order if name != choice]
        other = other if other in others else next(iter(others), None)
        nothing = frame.iloc[:0]
        return (
            figures.importance_figure(ranking, objective),
            figures.marginal_figure(frame if choice else nothing, choice or "", objective),
            figures.tried_figure(frame if choice else nothing, choice or ""),
            figures.parallel_figure(frame if choice else nothing, names, study.row.objectives),
            figures.pair_figure(frames.pair_frame(frame, choice, other, objective), choice, other, objective)
            if choice and other
            else figures.message_figure("This needs completed trials that differ in two choices."),
            [{"label": plain(name, 60), "value": name} for name in names],
            choice,
            [{"label": plain(name, 60), "value": name} for name in others],
            other,
        )
