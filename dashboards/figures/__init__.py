"""DataFrames of `hypernas.dashboards.frames` as Plotly figures.

Colours are from Okabe and Ito's palette, each legible on white and on black, and never alone: shape or dash says
the same. Backgrounds are transparent and texts are coloured by the page's style sheet. Whatever comes from the
database passes `texts.pseudo`, as Plotly reads a little HTML in labels.
"""

from hypernas.dashboards.figures.curves import HIGHLIGHTED, curve_figure
from hypernas.dashboards.figures.front import (
    HYPERVOLUME_AXES,
    add_budget,
    add_front,
    add_region,
    add_variants,
    hypervolume_figure,
    pareto_figure,
    placeable_trials,
)
from hypernas.dashboards.figures.scale import ceg_figure, ladder_figures, scale_figure
from hypernas.dashboards.figures.space import (
    importance_figure,
    marginal_figure,
    pair_figure,
    parallel_figure,
    tried_figure,
)
from hypernas.dashboards.figures.streams import gain_figure, mixing_figure
from hypernas.dashboards.figures.style import INFEASIBLE, bar_figure, blank_figure, message_figure

__all__ = [
    "HIGHLIGHTED",
    "HYPERVOLUME_AXES",
    "INFEASIBLE",
    "add_budget",
    "add_front",
    "add_region",
    "add_variants",
    "bar_figure",
    "blank_figure",
    "ceg_figure",
    "curve_figure",
    "gain_figure",
    "hypervolume_figure",
    "importance_figure",
    "ladder_figures",
    "marginal_figure",
    "message_figure",
    "mixing_figure",
    "pair_figure",
    "parallel_figure",
    "pareto_figure",
    "placeable_trials",
    "scale_figure",
    "tried_figure",
]
