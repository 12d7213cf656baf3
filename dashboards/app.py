"""The live web app: serves the pages, and wires frames, figures and pages to what the reader does.

Each open page asks every two seconds whether its study changed; only then are its figures drawn again, from what
`live.Watch` holds. Nothing is written to the store.
"""

import io
import logging
import socket
import tempfile
import zipfile
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlencode

import numpy as np
import pandas as pd
from dash import Dash, Input, Output, State, ctx, dcc, html, no_update
from werkzeug.serving import BaseWSGIServer, make_server

from hypernas import records
from hypernas.dashboards import figures, frames, pages
from hypernas.dashboards.live import LiveStudy, Watch, scale_of
from hypernas.dashboards.picture import architecture_figure, connection_names, gate_names
from hypernas.dashboards.texts import label, number, short
from hypernas.errors import StudyError, UserError
from hypernas.pareto import LOGARITHMIC
from hypernas.store import Store
from hypernas.store.weights import find_weights

TICK = 2_000  # milliseconds
ALL_CURVES = 100  # trials whose curves a live page draws


def serve(store_url: str, host: str = "127.0.0.1", port: int = 8050) -> None:
    """Serves the app until interrupted. Raises UserError when the port is taken or the store cannot be opened."""
    server = make_app_server(store_url, host, port)
    print(f"dashboard of {store_url}: http://{host}:{server.port}/   (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.shutdown()
    finally:
        server.server_close()


def make_app_server(store_url: str, host: str = "127.0.0.1", port: int = 8050) -> BaseWSGIServer:
    """A server ready for `serve_forever`; port 0 takes a free one, `server.port` says which. Raises UserError."""
    watch = Watch(store_url)
    app = make_app(watch)
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or "a port is between 0 and 65535"
        raise UserError(f"--port {port} on {host}: {reason}; name another port") from error
    listening.listen()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request would bury the address
    server = make_server(host, port, app.server, threaded=True, fd=listening.fileno())
    listening.close()  # the server holds its own copy
    Thread(target=watch.warm_up, daemon=True).start()  # while the browser loads its scripts
    return server


def make_app(watch: Watch) -> Dash:
    """The app over one store."""
    app = Dash(
        "dashboards",
        assets_folder=str(Path(__file__).parent / "assets"),
        title="hypernas",
        update_title="",
        suppress_callback_exceptions=True,
        serve_locally=True,
    )
    app.layout = _layout()
    _wire_shell(app, watch)
    _wire_front(app, watch)
    _wire_trial(app, watch)
    _wire_space(app, watch)
    _wire_scale(app, watch)
    _wire_cluster(app, watch)
    return app


def _layout() -> html.Div:
    return html.Div(
        [
            dcc.Location(id="url", refresh=False),
            dcc.Interval(id="tick", interval=TICK),
            dcc.Store(id="study"),  # the shown study's name
            dcc.Store(id="seq"),  # grows when it changes
            dcc.Store(id="selection"),  # {study, x, y}: the region of the front that filters every page
            html.Header(
                [
                    html.Nav(html.Ul(id="nav"), **{"aria-label": "Pages"}),
                    html.Div(
                        [
                            html.Label("Study", htmlFor="studies"),
                            dcc.Dropdown([], None, id="studies", clearable=False, placeholder="no study yet"),
                        ],
                        className="field",
                    ),
                ],
                className="page bar",
            ),
            html.P(
                [html.Span(id="selection-said"), " ", html.Button("Show all", id="selection-clear", type="button")],
                id="selection-bar",
                className="page",
                hidden=True,
                role="status",
            ),
            dcc.Download(id="download"),
            html.Main(id="page"),
        ]
    )


def _query(search: str | None, name: str) -> str | None:
    found = parse_qs((search or "").removeprefix("?")).get(name)
    return found[0] if found else None


# ---- the frame around every page -------------------------------------------------------------------------------


def _wire_shell(app: Dash, watch: Watch) -> None:
    @app.callback(
        Output("studies", "options"),
        Output("studies", "value"),
        Output("study", "data"),
        Output("seq", "data"),
        Input("tick", "n_intervals"),
        Input("url", "search"),
        State("studies", "options"),
        State("study", "data"),
        State("seq", "data"),
    )
    def look(_: int, search: str, known: list, shown: dict | None, seq: int | None) -> tuple:
        """Asks the store what changed; what did not is not sent."""
        store, names = watch.store(), watch.names()
        wanted = _query(search, "study") or (names[0] if names else None)
        study = watch.study(wanted) if wanted else None
        options = [{"label": pages.plain(name, 60), "value": name} for name in names]
        state = {
            "name": study.row.name if study else None,
            "id": study.row.id if study else None,
            "exists": store is not None,
            "wanted": _query(search, "study"),
        }
        current = study.seq if study else -1
        return (
            no_update if options == known else options,
            no_update if not study else study.row.name,
            no_update if state == shown else state,
            no_update if current == seq and state == shown else current,
        )

    @app.callback(
        Output("page", "children"),
        Output("nav", "children"),
        Input("url", "pathname"),
        Input("study", "data"),
    )
    def page(pathname: str, shown: dict | None) -> tuple[Any, list]:
        shown = shown or {}
        path = pathname if pathname in pages.PAGES else "/"
        links = [
            html.Li(
                dcc.Link(title, href=pages.link(to, shown.get("name"))),
                **{"aria-current": "page"} if to == path else {},
            )
            for to, title in pages.PAGES.items()
        ]
        study = watch.study(shown["name"]) if shown.get("name") else None
        if study is None:
            return pages.waiting(watch.url, bool(shown.get("exists")), shown.get("wanted")), links
        if path == "/":
            return pages.front_page(study, [name for name in watch.names() if name != study.row.name]), links
        if path == "/trial":
            return pages.trial_page(), links
        rest = {"/space": pages.space_page, "/scale": pages.scale_page, "/cluster": pages.cluster_page}
        return rest[path](study), links

    app.clientside_callback(
        "shown => { document.title = shown?.name ? `${shown.name} – hypernas` : 'hypernas'; }", Input("study", "data")
    )

    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Input("studies", "value"),
        State("study", "data"),
        prevent_initial_call=True,
    )
    def switch(name: str, shown: dict | None) -> Any:
        if name is None or (shown and shown["name"] == name):
            return no_update
        return "?" + urlencode({"study": name})


# ---- Front -----------------------------------------------------------------------------------------------------


def _wire_front(app: Dash, watch: Watch) -> None:
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
        frame, most, moment = _at_moment(study.frame, moment, most)
        frame = _in_states(frame, states)
        figure = figures.pareto_figure(frame, x, y)
        for index, name in enumerate(compare or []):
            other = watch.study(name)
            if other is not None:
                figures.add_front(figure, other.frame, x, y, name, index)
        figures.add_variants(figure, frames.variant_frame(study.row.variants), x, y)
        budget = _budget(frame, x, y, share)
        if budget is not None:
            figures.add_budget(figure, budget)
        if selection and _holds(selection, study) and (selection["x"][0], selection["y"][0]) == (x, y):
            figures.add_region(figure, selection["x"][1:], selection["y"][1:])
        return figure, most, moment

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
    def said(
        _: int, x: str, y: str, states: list, moment: int, share: float, selection: dict, most: int, shown: dict
    ) -> tuple:
        study = watch.study(shown["name"])
        if study is None:
            return no_update, no_update
        needed = study.frame[list({"trial", "state", "violation", "finished", "on_front", x, y})]
        frame = _in_states(_at_moment(needed, moment, most)[0], states)
        best = _best_within(_selected(frame, study, selection), x, y, _budget(frame, x, y, share))
        volumes = _volumes(study, selection)
        volume = float(volumes["hypervolume"].iloc[-1]) if len(volumes) else None
        return pages.study_facts(study, _selected(needed, study, selection), volume), best

    @app.callback(
        Output("selection-said", "children"),
        Output("selection-bar", "hidden"),
        Input("seq", "data"),
        Input("selection", "data"),
        Input("study", "data"),
    )
    def bar(_: int, selection: dict | None, shown: dict | None) -> tuple:
        study = watch.study(shown["name"]) if shown and shown.get("name") else None
        if study is None or not _holds(selection, study):
            return "", True
        count = len(_selected(study.frame, study, selection))
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
        low, high = _cost_range(study.frame[study.frame["state"].isin(states)], x, y)
        return float(np.clip((_scale(x, float(budget)) - low) / ((high - low) or 1.0), 0.0, 1.0))

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
        frame = _in_states(study.frame, states)
        frame = _selected(frame, study, selection)
        best = frame[frame["on_front"]]["trial"].tolist()
        drawn = [*best, *frame.loc[~frame["on_front"], "trial"].tolist()[-ALL_CURVES:]]
        curves = figures.curve_figure(watch.curves(study, sorted(drawn)), best, frames.loss_name(study.row.objectives))
        return curves, pages.trials_table(study, frame, "Select a region of the front to see its trials alone.")

    @app.callback(
        Output("front-volume", "figure"),
        Input("seq", "data"),
        Input("front-over", "value"),
        Input("selection", "data"),
        State("study", "data"),
    )
    def volume(_: int, over: str, selection: dict | None, shown: dict) -> Any:
        study = watch.study(shown["name"])
        return no_update if study is None else figures.hypervolume_figure(_volumes(study, selection), over)

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


def _holds(selection: dict | None, study: LiveStudy) -> bool:
    return selection is not None and selection["study"] == study.row.name


def _selected(frame: pd.DataFrame, study: LiveStudy, selection: dict | None) -> pd.DataFrame:
    """The trials that lie in the region chosen on this study's front; all when none is."""
    if selection is None or not _holds(selection, study):
        return frame
    inside = pd.Series(True, index=frame.index)
    for name, one, other in (selection["x"], selection["y"]):
        inside &= study.frame.loc[frame.index, name].between(min(one, other), max(one, other))
    return frame[inside]


def _volumes(study: LiveStudy, selection: dict | None) -> pd.DataFrame:
    if not _holds(selection, study):
        return study.hypervolumes()
    chosen = _selected(study.frame, study, selection)
    return frames.selected_hypervolume_frame(chosen, study.frame, study.row.objectives, study.row.reference)


def _at_moment(frame: pd.DataFrame, moment: int, most: int) -> tuple[pd.DataFrame, int, int]:
    """The trials finished when `moment` of them were, with the slider's new maximum and place.

    A slider that stands at its maximum, `most`, follows the search: every trial is there, unfinished ones too.
    """
    ended = max(1, int(frame["finished"].count()))
    if moment >= most or moment > ended:
        return frame, ended, ended
    finished = frame["finished"].dropna().sort_values()
    past = frame[frame["finished"] <= finished.iloc[moment - 1]] if moment else frame.iloc[:0]
    return past, ended, moment


def _in_states(frame: pd.DataFrame, states: list[str]) -> pd.DataFrame:
    """The trials in some states; the frame itself when those are all."""
    return frame if set(frame["state"].unique()) <= set(states) else frame[frame["state"].isin(states)]


def _scale(name: str, value: float) -> float:
    return float(np.log10(value)) if name in LOGARITHMIC else value


def _cost_range(frame: pd.DataFrame, x: str, y: str) -> tuple[float, float]:
    costs = figures.placed(frame, x, y)[x]
    return (_scale(x, costs.min()), _scale(x, costs.max())) if len(costs) else (0.0, 1.0)


def _budget(frame: pd.DataFrame, x: str, y: str, share: float) -> float | None:
    """The cost at `share` of the axis; None while nothing has a place."""
    if figures.placed(frame, x, y).empty:
        return None
    low, high = _cost_range(frame, x, y)
    at = low + share * (high - low)
    return float(10**at if x in LOGARITHMIC else at)


def _best_within(frame: pd.DataFrame, x: str, y: str, budget: float | None) -> str:
    """Which trial is best within the budget."""
    if budget is None:
        return ""
    shown = figures.placed(frame, x, y)
    within = frames.front_frame(shown[shown[x] <= budget * (1 + 1e-9)], (y, x))
    if within.empty:
        return f"No completed trial within {short(budget)} {label(x)}."
    best = within.iloc[0]
    return f"Best within {short(budget)} {label(x)}: trial {best['trial']}, {label(y)} {number(y, best[y])}."


# ---- Trial -----------------------------------------------------------------------------------------------------


def _wire_trial(app: Dash, watch: Watch) -> None:
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
        found = _find_trial(store, study, _query(search, "trial"))
        if found is None:
            return pages.no_trial(study, _query(search, "trial"))
        if present and ctx.triggered_id == "seq" and found.state in records.FINISHED:
            return no_update  # a finished trial never changes
        reports = store.reports(study.row, [found.number])
        pictures = {"Architecture": architecture_figure(found.arch, found.diagnostics.get("gate_rates", ()))}
        loss = frames.loss_name(study.row.objectives)
        pictures["Learning curve"] = figures.curve_figure(frames.curve_frame(reports), [found.number], loss)
        rates = gate_rate_frame(found)
        if len(rates):
            pictures["Share of tokens each gate lets through"] = figures.bar_figure(
                rates, "gate", "rate", "share", "", 1.0
            )
        matrices = found.diagnostics.get("mean_mixing")
        if matrices:
            names = connection_names(found.arch, len(matrices))
            pictures["How the streams mix: mean matrix of each connection"] = figures.mixing_figure(matrices, names)
            pictures["Composite gain over depth"] = figures.gain_figure(frames.gain_frame(matrices))
        exportable = found.state == records.State.COMPLETE and _is_kept(store, study, found.number)
        parts = cost_frame(study, found)
        return pages.trial_content(study.row, found, reports, parts, pictures, watch.url, exportable)

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
        store, wanted = watch.store(), _query(search, "trial")
        if not clicks or store is None or wanted is None:
            return no_update, no_update
        try:
            data = export_zip(store, shown["name"], int(wanted))
        except UserError as error:
            return no_update, str(error)
        return dcc.send_bytes(data, f"trial-{int(wanted)}.zip"), "Downloaded, and checked to compute the same."


def _find_trial(store: Store, study: LiveStudy, wanted: str | None) -> records.Trial | None:
    try:
        return store.trial(study.row, int(wanted or ""))
    except (StudyError, ValueError):
        return None


def _is_kept(store: Store, study: LiveStudy, number: int) -> bool:
    """Whether an export needs no training, and runs no code but ours."""
    from hypernas.search_spaces import SPACES

    return study.row.space.name in SPACES and find_weights(store, study.row, number) is not None


def export_zip(store: Store, study: str, trial: int) -> bytes:
    """`nas export` of a trial as a zip archive. Raises UserError."""
    from hypernas.export.write import export_trial  # brings torch: only taking a model home needs it

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / f"trial-{trial}"
        export_trial(store, store.study(study), trial=trial, pick=None, out=str(folder), formats="py")
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.rglob("*")):
                archive.write(path, path.relative_to(scratch))
    return packed.getvalue()


def cost_frame(study: LiveStudy, trial: records.Trial) -> pd.DataFrame | None:
    """Parameters and FLOPs by part; None for a space of the user's own, whose code a page does not run."""
    from hypernas.search_spaces import SPACES, load_space
    from hypernas.search_spaces.base import SpaceError

    if study.row.space.name not in SPACES:
        return None
    try:
        space = load_space(study.row.space.name, study.row.space.settings)
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


# ---- Space and Cluster -----------------------------------------------------------------------------------------


def _wire_space(app: Dash, watch: Watch) -> None:
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
        frame, names = frames.space_frame(_selected(study.frame, study, selection), study.choices())
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
            [{"label": pages.plain(name, 60), "value": name} for name in names],
            choice,
            [{"label": pages.plain(name, 60), "value": name} for name in others],
            other,
        )


def _wire_scale(app: Dash, watch: Watch) -> None:
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


def _wire_cluster(app: Dash, watch: Watch) -> None:
    @app.callback(
        Output("cluster-facts", "children"),
        Output("cluster-running", "children"),
        Output("cluster-workers", "children"),
        Input("tick", "n_intervals"),
        Input("study", "data"),
    )
    def cluster(_: int, shown: dict) -> tuple:
        study, store = watch.study(shown["name"]), watch.store()
        if study is None or store is None:
            return (no_update,) * 3
        workers = sum(store.live_drivers(study.row).values())
        now = pd.Timestamp.now("UTC")
        return (
            pages.cluster_facts(study, workers, study.utilisation()),
            pages.running_table(study, now),
            pages.workers_table(study),
        )

    @app.callback(
        Output("cluster-failures", "figure"),
        Output("cluster-ranks", "figure"),
        Output("cluster-curves", "figure"),
        Input("seq", "data"),
        State("study", "data"),
    )
    def history(_: int, shown: dict) -> tuple:
        study = watch.study(shown["name"])
        if study is None:
            return (no_update,) * 3
        counts = frames.failure_counts(study.frame)
        causes = pd.DataFrame({"cause": [kind.replace("_", " ") for kind in counts], "trials": list(counts.values())})
        complete = study.frame.loc[study.frame["state"] == records.State.COMPLETE, "trial"].tolist()
        ranks = frames.rank_frame(watch.curves(study, complete), complete)
        ranks["rung"] = [
            f"rung {rung} ({trials} trials)" for rung, trials in zip(ranks["rung"], ranks["trials"], strict=True)
        ]
        running = study.frame.loc[study.frame["state"] == records.State.RUNNING, "trial"].tolist()
        return (
            figures.bar_figure(causes, "cause", "trials", "failed trials", "No trial has failed."),
            figures.bar_figure(
                ranks, "rung", "correlation", "rank correlation", "Too few trials with several rungs yet.", 1.0
            ),
            figures.curve_figure(watch.curves(study, running), running, frames.loss_name(study.row.objectives))
            if running
            else figures.message_figure("Nothing is running."),
        )
