"""Frames and figures of a study by its name, for a notebook. Each call reads the store as it is at that moment.

All raise StoreError when the store cannot be opened and StudyError when it has no such study.
"""

import pandas as pd
import plotly.graph_objects as go

from hypernas.dashboards import figures, frames
from hypernas.dashboards.texts import axes
from hypernas.store import Reader


def frame(study: str, store: str = "nas.db") -> pd.DataFrame:
    """The tidy table: a row a trial with its state, values and timings, and what the sampler chose."""
    with Reader(store) as opened:
        row = opened.study(study)
        trials = opened.trials(row)
        table = frames.trial_frame(trials, opened.reports(row), row.objectives)
    choices = frames.choice_frame({trial.number: trial.params for trial in trials})
    return table.merge(choices, on="trial", suffixes=("", "_chosen"))


def front_frame(study: str, store: str = "nas.db") -> pd.DataFrame:
    """The rows of `frame` that are on the front, best in the first objective first."""
    with Reader(store) as opened:
        numbers = [trial.number for trial in opened.front(opened.study(study))]
    return frame(study, store).set_index("trial").loc[numbers].reset_index()


def pareto_figure(study: str, store: str = "nas.db", x: str | None = None, y: str | None = None) -> go.Figure:
    """The front, over the study's own objectives unless `x` (a cost) and `y` (a quality) name other values."""
    with Reader(store) as opened:
        row = opened.study(study)
        table = frames.trial_frame(opened.trials(row), opened.reports(row), row.objectives)
    cost, quality = axes(row.objectives, imported=row.settings.imported)
    return figures.pareto_figure(table, x or cost, y or quality)


def curve_figure(study: str, store: str = "nas.db") -> go.Figure:
    """Learning curves, the front's in colour."""
    with Reader(store) as opened:
        row = opened.study(study)
        reports = opened.reports(row)
        front = [trial.number for trial in opened.front(row)]
    return figures.curve_figure(frames.curve_frame(reports), front, frames.loss_name(row))


def hypervolume_figure(study: str, store: str = "nas.db", over: str = "completed") -> go.Figure:
    """Hypervolume over `completed` trials, `seconds` or `training_flops`."""
    with Reader(store) as opened:
        row = opened.study(study)
        table = frames.trial_frame(opened.trials(row), opened.reports(row), row.objectives)
        history = opened.hypervolumes(row)
    return figures.hypervolume_figure(frames.hypervolume_frame(history, table), over)


def importance_figure(study: str, store: str = "nas.db", objective: str | None = None) -> go.Figure:
    """The share of an objective's variance (the first one's by default) that each choice explains by itself."""
    with Reader(store) as opened:
        row = opened.study(study)
        trials = opened.trials(row)
    objective = objective or row.objectives[0]
    table = frames.trial_frame(trials, [], row.objectives)
    choices = frames.choice_frame({trial.number: trial.params for trial in trials})
    space, names = frames.space_frame(table, choices)
    return figures.importance_figure(frames.importance_frame(space, names, objective), objective)
