"""A trial's page: its blocks, costs and gates, and taking it home."""

import io
import zipfile
from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from dash import Dash, Input, Output, State, ctx, dcc, no_update

from hypernas import records
from hypernas.dashboards import figures, frames, pages
from hypernas.dashboards.live import LiveStudy, Watch
from hypernas.dashboards.picture import architecture_figure, connection_names, gate_names
from hypernas.dashboards.selection import parse_query
from hypernas.dashboards.texts import plain
from hypernas.errors import StudyError, UserError
from hypernas.files import scratch_folder
from hypernas.store import Reader
from hypernas.store.weights import find_weights


def wire_trial(app: Dash, watch: Watch) -> None:
    _wire_content(app, watch)
    _wire_download(app, watch)


def _wire_content(app: Dash, watch: Watch) -> None:
    @app.callback(
        Output("trial-content", "children"),
        Input("seq", "data"),
        Input("url", "search"),
        State("study", "data"),
        State("trial-content", "children"),
    )
    def trial(_: int, search: str, shown: dict, present: Any) -> Any:
        study, store = watch.study(shown["name"]), watch.store()
        if study is None or store is None:
            return no_update
        found = _find_trial(store, study, parse_query(search, "trial"))
        if found is None:
            return pages.no_trial(study, parse_query(search, "trial"))
        if present and ctx.triggered_id == "seq" and found.state in records.FINISHED:
            return no_update  # a finished trial never changes
        reports = store.reports(study.row, [found.number])
        pictures = trial_figures(found, reports, frames.loss_name(study.row))
        exportable = _is_exportable(store, study, found)
        parts = cost_frame(study, found)
        return pages.trial_content(study.row, found, reports, parts, pictures, watch.url, exportable)


def _wire_download(app: Dash, watch: Watch) -> None:
    @app.callback(
        Output("download", "data"),
        Output("export-status", "children"),
        Input("export-button", "n_clicks"),
        State("url", "search"),
        State("study", "data"),
        prevent_initial_call=True,
        running=[(Output("export-button", "disabled"), True, False)],
    )
    def download(clicks: int | None, search: str, shown: dict) -> tuple:
        study, store = watch.study((shown or {}).get("name", "")), watch.store()
        if not clicks or study is None or store is None:
            return no_update, no_update
        found = _find_trial(store, study, parse_query(search, "trial"))
        if found is None or not _is_exportable(store, study, found):  # who asks need not have seen a button
            return no_update, "Not exported: here nothing is trained, and no code but hypernas's own is run."
        try:
            data = export_zip(store, study.row, found)
        except UserError as error:
            return no_update, plain(error)
        return dcc.send_bytes(data, f"trial-{found.number}.zip"), "Downloaded, and checked to compute the same."


def trial_figures(trial: records.Trial, reports: Sequence[records.Report], loss: str) -> dict[str, go.Figure]:
    """A trial's figures by their headings: those for which it measured something."""
    drawn = {
        "Architecture": architecture_figure(trial.arch, trial.diagnostics.get("gate_rates", ())),
        "Learning curve": figures.curve_figure(frames.curve_frame(reports), [trial.number], loss),
    }
    rates = gate_rate_frame(trial)
    if len(rates):
        heading = "Share of tokens each gate lets through"
        drawn[heading] = figures.bar_figure(rates, "gate", "rate", "share", "", 1.0)
    matrices = trial.diagnostics.get("mean_mixing")
    if matrices:
        names = connection_names(trial.arch, len(matrices))
        drawn["How the streams mix: mean matrix of each connection"] = figures.mixing_figure(matrices, names)
        drawn["Composite gain over depth"] = figures.gain_figure(frames.gain_frame(matrices))
    return drawn


def _find_trial(store: Reader, study: LiveStudy, wanted: str | None) -> records.Trial | None:
    try:
        return store.trial(study.row, int(wanted or ""))
    except (StudyError, ValueError):
        return None


def _is_exportable(store: Reader, study: LiveStudy, trial: records.Trial) -> bool:
    """Whether the trial has a model, and its export needs no training and runs no code but ours."""
    from hypernas.search_spaces import SPACES

    ours = trial.state == records.State.COMPLETE and study.row.space.name in SPACES
    return ours and find_weights(store, study.row, trial.number) is not None


def export_zip(store: Reader, row: records.StudyRow, trial: records.Trial) -> bytes:
    """`nas export` of a trial whose weights are kept, as a zip archive. Raises UserError, and trains nothing."""
    from hypernas.export.write import export_trial  # brings torch: only taking a model home needs it

    with scratch_folder(stem="nas-download-") as scratch:
        folder = scratch / f"trial-{trial.number}"
        export_trial(store, row, trial, out=str(folder), formats="py", progress=False, train=False)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.rglob("*")):
                archive.write(path, path.relative_to(scratch))
    return packed.getvalue()


def cost_frame(study: LiveStudy, trial: records.Trial) -> pd.DataFrame | None:
    """Parameters and FLOPs by part; None for a space of the user's own, whose code a page does not run."""
    from hypernas.search_spaces import SPACES, stored_space
    from hypernas.search_spaces.base import SpaceError

    if study.row.space.name not in SPACES:
        return None
    try:
        space = stored_space(study.row.space)
        cost = space.cost(space.from_json(trial.arch))
    except SpaceError:
        return None  # an architecture that cannot be built has no cost; its failure says why
    rows = [(part, cost.parameters.get(part, 0), flops) for part, flops in cost.flops.items()]
    rows.append(("total", cost.parameters_total, cost.flops_total))
    return pd.DataFrame(rows, columns=["part", "parameters", "flops"])


def gate_rate_frame(trial: records.Trial) -> pd.DataFrame:
    """The measured rate of every gate, in model order. Columns: gate, rate."""
    rates = trial.diagnostics.get("gate_rates", [])
    names = [f"layer {layer + 1} {part}" for layer, part in gate_names(trial.arch)]
    if len(names) != len(rates):
        names = [f"gate {index + 1}" for index in range(len(rates))]
    return pd.DataFrame({"gate": names, "rate": pd.Series(list(rates), dtype="float64")})
