"""Shows studies: one HTML file (`report`), live pages (`app`), and figures and frames for a notebook.

    from hypernas import dashboards
    dashboards.pareto_figure("first")            # a Plotly figure of study `first` in nas.db
    dashboards.frame("first", store="team.db")   # its trials as a pandas DataFrame

Reads stores and never writes to them.
"""

from hypernas.dashboards.notebook import curve_figure, frame, hypervolume_figure, importance_figure, pareto_figure

__all__ = ["curve_figure", "frame", "hypervolume_figure", "importance_figure", "pareto_figure"]
