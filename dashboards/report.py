"""One HTML file with a study's figures and trials. It needs no network and no server.

The page is Plotly's script, a style sheet and plain HTML. Texts of the database are escaped on their way in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from hypernas.dashboards import figures, frames
from hypernas.dashboards.live import scale_of
from hypernas.dashboards.texts import LADDER_NOTES, axes, duration, label, number, plain
from hypernas.errors import UserError
from hypernas.files import write_whole
from hypernas.records import StudyRow
from hypernas.show.status import verdict
from hypernas.show.words import format_volume
from hypernas.store import Reader
from hypernas.training.repeats import deviations

DRAW = """
for (const box of document.querySelectorAll("[data-figure]")) {
  const figure = JSON.parse(document.getElementById(box.dataset.figure).textContent);
  Plotly.newPlot(box, figure.data, figure.layout, {responsive: true, displaylogo: false, showSendToCloud: false});
}
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending", key = row => row.cells[head.cellIndex].dataset.key;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const order = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  const compare = (a, b) => a === "" ? 1 : b === "" ? -1 : order(a, b) * (up ? 1 : -1);
  body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
});
"""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, what one sees under it, and a figure."""

    name: str
    title: str
    text: str
    figure: go.Figure


def text(value: object) -> str:
    """A text of the database as HTML: escaped, and its writing direction kept to itself."""
    return f"<bdi>{escape(plain(value))}</bdi>"


def write_report(store: Reader, study: str, out: str) -> Path:
    """Writes the report of a study to the file `out` and returns its path.

    Raises StudyError when there is no such study, UserError when `out` cannot be written.
    """
    row = store.study(study)
    path = Path(out)
    if not path.parent.is_dir():
        raise UserError(f"--out {out}: the folder {path.parent} does not exist; create it or name another")
    if path.is_dir():
        raise UserError(f"--out {out} is a folder: name a file in it, like {path / 'report.html'}")
    page = render(store, row)
    try:
        write_whole(path, page.encode())
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    return path


def render(store: Reader, study: StudyRow) -> str:
    """The whole page."""
    reports = store.reports(study)
    frame = frames.trial_frame(store.trials(study), reports, study.objectives)
    curves = frames.curve_frame(reports)
    history = frames.hypervolume_frame(store.hypervolumes(study), frame)
    said = verdict(store, study) if len(history) else ""
    scale = scale_of(store, study.name)
    parts = [
        f"<p>{text(said[:1].upper() + said[1:])}.</p>" if said else "",
        _facts(study, frame, history),
        *(_section(section) for section in sections(study, frame, curves, history)),
        *(_section(section) for section in scale_sections(scale)),
        _scale_said(scale),
        _table(study, frame),
    ]
    style = (Path(__file__).parent / "assets" / "style.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Study {escape(plain(study.name))} – hypernas report</title>
<style>{style}</style>
</head>
<body>
<header class="page"><h1>Study {text(study.name)}</h1></header>
<main>
{"".join(parts)}
</main>
<script>{get_plotlyjs()}</script>
<script>{DRAW}</script>
</body>
</html>
"""


def sections(
    study: StudyRow, frame: pd.DataFrame, curves: pd.DataFrame, history: pd.DataFrame
) -> tuple[Section, Section, Section]:
    """The figures of the report, in order."""
    x, y = axes(study.objectives, imported=study.settings.imported)
    front = frame[frame["on_front"]].sort_values(x)["trial"].tolist()
    front_figure = figures.pareto_figure(frame, x, y)
    at_rungs = "What was reported at each step" if study.settings.imported else "Validation loss at each rung"
    figures.add_variants(front_figure, frames.variant_frame(study.settings.variants), x, y)
    unplaced = len(frame) - len(figures.placeable_trials(frame, x, y))
    aside = (
        f" {unplaced} of {len(frame)} trials have no measurement yet and are in the table alone." if unplaced else ""
    )
    return (
        Section(
            "front",
            "Front",
            f"Each mark is a trial; the staircase is the best {label(y)} "
            f"{'so far' if x == 'trial' else f'reached at each budget of {label(x)}'}. "
            f"Only completed trials stand on the front.{aside}",
            front_figure,
        ),
        Section(
            "curves",
            "Learning curves",
            f"{at_rungs}; the front's trials in colour, {figures.HIGHLIGHTED} at most.",
            figures.curve_figure(curves, front, frames.loss_name(study)),
        ),
        Section(
            "hypervolume",
            "Hypervolume",
            "The area between the front and the study's fixed reference point, after each completed trial.",
            figures.hypervolume_figure(history),
        ),
    )


def scale_sections(scale: Mapping[str, Any] | None) -> tuple[Section, ...]:
    """What `nas scale` found, once it ran."""
    if scale is None:
        return ()
    titles = {"scale-laws": "Scale", "scale-gains": "Compute-equivalent gain"}
    drawn = figures.ladder_figures(scale)
    return tuple(Section(name, title, LADDER_NOTES[name], drawn[name][1]) for name, title in titles.items())


def _scale_said(scale: Mapping[str, Any] | None) -> str:
    """Laws, gains with their intervals and interactions in numbers."""
    if scale is None:
        return ""
    from hypernas.scaling.analysis import describe  # brings torch

    return f'<pre tabindex="0">{escape(plain(chr(10).join(describe(scale)), 20_000))}</pre>\n'


def _section(section: Section) -> str:
    name = f"figure-{section.name}"
    data = to_json_plotly(section.figure)  # writes "<" as \\u003c: nothing in it ends the script
    return (
        f'<section aria-labelledby="{name}-title"><h2 id="{name}-title">{section.title}</h2>'
        f'<p class="note">{escape(section.text)}</p>'
        f'<script type="application/json" id="{name}">{data}</script>'
        f'<div class="plot" data-figure="{name}" role="img" aria-labelledby="{name}-title"></div></section>\n'
    )


def _facts(study: StudyRow, frame: pd.DataFrame, history: pd.DataFrame) -> str:
    states = [f"{count} {state.lower()}" for state, count in frames.state_counts(frame).items() if count]
    failures = [f"{count} {kind.replace('_', ' ')}" for kind, count in frames.failure_counts(frame).items()]
    worked = frame[["train_seconds", "evaluate_seconds"]].sum().sum()
    facts = [
        ("Space", study.space.name),
        ("Data", study.data_name),
        ("Objectives", ", ".join(label(name) for name in study.objectives)),
        ("Trials", ", ".join(states) or "none yet"),
        ("On the front", int(frame["on_front"].sum())),
        ("Hypervolume", format_volume(history["hypervolume"].iloc[-1]) if len(history) else "–"),
        ("Training and evaluation", duration(worked) if worked else "–"),
        ("Created", f"{study.created:%Y-%m-%d %H:%M} UTC"),
    ]
    if failures:
        facts.append(("Failures", ", ".join(failures)))
    body = "".join(f"<div><dt>{escape(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{body}</dl>\n'


def _table(study: StudyRow, frame: pd.DataFrame) -> str:
    """Every trial, front first, then by number. Each cell carries the key its column sorts by."""
    gain = ["ceg"] if "ceg" in frame else []
    values = dict.fromkeys([*study.objectives, *gain, "parameters"])
    columns = ["trial", "state", *values, "learning_rate", "architecture"]
    columns += ["train_seconds", "message"]
    titles = {"train_seconds": "training (s)", "message": "failure"}
    left = {"state", "architecture", "message"}
    head = "".join(
        f'<th scope="col"{"" if name in left else " class=n"} title="{escape(label(name))}">'
        f'<button type="button">{escape(titles.get(name, name.replace("_", " ")))}</button></th>'
        for name in columns
    )
    ordered = frame.sort_values(["on_front", "trial"], ascending=[False, True])
    body = "".join(_row(record, columns, left) for record in ordered.to_dict("records"))
    empty = f'<tr><td colspan="{len(columns)}">No trials yet: nas search starts some.</td></tr>'
    return (
        '<section aria-labelledby="trials-title"><h2 id="trials-title">Trials</h2>'
        '<p class="note">The front first, marked at its left edge. Values of a trial that is not complete were '
        "measured at its last report. A click on a heading sorts.</p>"
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="trials-title"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{body or empty}</tbody></table></div></section>\n"
    )


def _row(record: dict, columns: Sequence[str], left: set[str]) -> str:
    cells = []
    for name in columns:
        value = record[name]
        key = "" if pd.isna(value) else str(value)
        if name in left:
            shown = text(_state(record) if name == "state" else value)
            kind = ' class="text"' if name != "state" else ""
        else:
            shown = escape(_number(name, value) + _deviation(name, record["by_seed"]))
            kind = ' class="n"'
        cells.append(f'<td{kind} data-key="{escape(plain(key))}">{shown}</td>')
    return f"<tr{' class=front' if record['on_front'] else ''}>{''.join(cells)}</tr>\n"


def _deviation(name: str, by_seed: Mapping[str, Sequence[float]] | None) -> str:
    found = deviations(by_seed or {}, [name])
    return f" ± {number(name, found[name])}" if found else ""


def _state(record: dict) -> str:
    extras = [record["failure"].replace("_", " ")] if record["failure"] else []
    extras += ["baseline"] if record["origin"] == "baseline" else []
    return record["state"].lower() + (f" ({', '.join(extras)})" if extras else "")


def _number(name: str, value: float) -> str:
    if name == "trial":
        return str(value)
    if pd.isna(value):
        return "–"
    if name == "learning_rate":
        return f"{value:.3g}"
    if name == "train_seconds":
        return f"{value:.1f}" if value else "–"
    return number(name, value)
