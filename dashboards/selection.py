"""What a page's address and controls select of a study."""

from urllib.parse import parse_qs

import numpy as np
import pandas as pd

from hypernas.dashboards import figures, frames
from hypernas.dashboards.live import LiveStudy
from hypernas.dashboards.texts import label, number, short
from hypernas.pareto import LOGARITHMIC


def parse_query(search: str | None, name: str) -> str | None:
    found = parse_qs((search or "").removeprefix("?")).get(name)
    return found[0] if found else None


def holds(selection: dict | None, study: LiveStudy) -> bool:
    return selection is not None and selection["study"] == study.row.name


def select_trials(frame: pd.DataFrame, study: LiveStudy, selection: dict | None) -> pd.DataFrame:
    """The trials that lie in the region chosen on this study's front; all when none is."""
    if selection is None or not holds(selection, study):
        return frame
    inside = pd.Series(True, index=frame.index)
    for name, one, other in (selection["x"], selection["y"]):
        inside &= study.frame.loc[frame.index, name].between(min(one, other), max(one, other))
    return frame[inside]


def hypervolumes_of(study: LiveStudy, selection: dict | None) -> pd.DataFrame:
    if not holds(selection, study):
        return study.hypervolumes()
    chosen = select_trials(study.frame, study, selection)
    return frames.selected_hypervolume_frame(chosen, study.frame, study.row.objectives, study.row.reference)


def at_moment(frame: pd.DataFrame, moment: int, most: int) -> tuple[pd.DataFrame, int, int]:
    """The trials finished when `moment` of them were, with the slider's new maximum and place.

    A slider that stands at its maximum, `most`, follows the search: every trial is there, unfinished ones too.
    """
    ended = max(1, int(frame["finished"].count()))
    if moment >= most or moment > ended:
        return frame, ended, ended
    finished = frame["finished"].dropna().sort_values()
    past = frame[frame["finished"] <= finished.iloc[moment - 1]] if moment else frame.iloc[:0]
    return past, ended, moment


def in_states(frame: pd.DataFrame, states: list[str]) -> pd.DataFrame:
    """The trials in some states; the frame itself when those are all."""
    return frame if set(frame["state"].unique()) <= set(states) else frame[frame["state"].isin(states)]


def axis_scale(name: str, value: float) -> float:
    return float(np.log10(value)) if name in LOGARITHMIC else value


def cost_range(frame: pd.DataFrame, x: str, y: str) -> tuple[float, float]:
    costs = figures.placeable_trials(frame, x, y)[x]
    return (axis_scale(x, costs.min()), axis_scale(x, costs.max())) if len(costs) else (0.0, 1.0)


def budget_of(frame: pd.DataFrame, x: str, y: str, share: float) -> float | None:
    """The cost at `share` of the axis; None while nothing has a place."""
    if figures.placeable_trials(frame, x, y).empty:
        return None
    low, high = cost_range(frame, x, y)
    at = low + share * (high - low)
    return float(10**at if x in LOGARITHMIC else at)


def best_within(frame: pd.DataFrame, x: str, y: str, budget: float | None) -> str:
    """Which trial is best within the budget."""
    if budget is None:
        return ""
    shown = figures.placeable_trials(frame, x, y)
    within = frames.front_frame(shown[shown[x] <= budget * (1 + 1e-9)], (y, x))
    if within.empty:
        return f"No completed trial within {short(budget)} {label(x)}."
    best = within.iloc[0]
    return f"Best within {short(budget)} {label(x)}: trial {best['trial']}, {label(y)} {number(y, best[y])}."
