"""A study's figures as PNG and SVG files for a paper, and the frame behind each as CSV."""

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import plotly.io

from hypernas.dashboards import figures, frames
from hypernas.dashboards.figures.style import CONFIG
from hypernas.dashboards.live import scale_of
from hypernas.dashboards.texts import axes
from hypernas.errors import UserError
from hypernas.store import Reader

NO_BROWSER = "pictures need kaleido and Chrome or Chromium (pip install kaleido, apt-get install chromium)"
WIDTH, HEIGHT, SCALE = 900, 540, 2  # pixels, and PNG pixels to each


def write_figures(store: Reader, study: str, folder: str) -> list[Path]:
    """Writes front, curves, hypervolume and what `nas scale` found into `folder`: a .png, an .svg and a .csv each.

    The folder is made when its parent is there. Returns the files. Raises StudyError when there is no such study,
    UserError when the folder cannot be written or no Chrome or Chromium is there to draw the pictures.
    """
    drawn = study_figures(store, study)
    target = Path(folder)
    try:
        target.mkdir(exist_ok=True)
        for name, (frame, _) in drawn.items():
            frame.to_csv(target / f"{name}.csv", index=False)
    except OSError as error:
        raise UserError(f"--figures {folder} cannot be written: {error.strerror}") from error
    pictures = [(figure, target / f"{name}.{kind}") for name, (_, figure) in drawn.items() for kind in ("png", "svg")]
    _write_pictures([figure for figure, _ in pictures], [path for _, path in pictures])
    return sorted([*(target / f"{name}.csv" for name in drawn), *(path for _, path in pictures)])


def study_figures(store: Reader, study: str) -> dict[str, tuple[pd.DataFrame, go.Figure]]:
    """Every figure with its frame, by file name."""
    row = store.study(study)
    reports = store.reports(row)
    trials = frames.trial_frame(store.trials(row), reports, row.objectives)
    curves = frames.curve_frame(reports)
    history = frames.hypervolume_frame(store.hypervolumes(row), trials)
    x, y = axes(row.objectives, imported=row.settings.imported)
    front = trials.loc[trials["on_front"], "trial"].tolist()
    scale = scale_of(store, study)
    drawn = figures.pareto_figure(trials, x, y)
    figures.add_variants(drawn, frames.variant_frame(row.settings.variants), x, y)
    return {
        "front": (trials, drawn),
        "curves": (curves, figures.curve_figure(curves, front, frames.loss_name(row))),
        "hypervolume": (history, figures.hypervolume_figure(history)),
        **({} if scale is None else figures.ladder_figures(scale)),
    }


def check_file(path: str) -> None:
    """Raises UserError for a file that `write_figure` cannot write by its ending."""
    if Path(path).suffix not in (".html", ".png", ".svg"):
        raise UserError(f"--figure {path}: wanted a file that ends in .html, .png or .svg")
    if not Path(path).resolve().parent.is_dir():
        raise UserError(f"--figure {path}: the folder {Path(path).resolve().parent} does not exist")


def write_figure(figure: go.Figure, path: str) -> None:
    """HTML, PNG or SVG, by the file's ending. Raises UserError as `check_file`, and where no browser draws pictures."""
    check_file(path)
    if path.endswith(".html"):
        figure.write_html(path, include_plotlyjs=True, config=CONFIG)
        return
    try:
        figure.write_image(path)
    except RuntimeError as error:  # as below
        raise UserError(f"--figure {path}: {NO_BROWSER}; .html needs neither") from error


def _write_pictures(drawn: list[go.Figure], paths: list[Path]) -> None:
    for figure in drawn:
        figure.update_layout(paper_bgcolor="white", plot_bgcolor="white", width=WIDTH, height=HEIGHT)
    try:
        plotly.io.write_images(drawn, paths, scale=SCALE)
    except RuntimeError as error:  # Plotly's word for: no kaleido, or no browser for it
        raise UserError(f"--figures: {NO_BROWSER}; the CSV files are written") from error
