"""What every page shares: the study, its moment, live news."""

from typing import Any
from urllib.parse import urlencode

from dash import Dash, Input, Output, State, dcc, html, no_update

from hypernas.dashboards import pages
from hypernas.dashboards.live import Watch
from hypernas.dashboards.selection import parse_query
from hypernas.dashboards.texts import plain


def wire_shell(app: Dash, watch: Watch) -> None:
    _wire_ticks(app, watch)
    _wire_pages(app, watch)
    app.clientside_callback(
        "shown => { document.title = shown?.name ? `${shown.name} – hypernas` : 'hypernas'; }", Input("study", "data")
    )
    _wire_choice_of_study(app)


def _wire_ticks(app: Dash, watch: Watch) -> None:
    """Every few seconds: which studies there are, which one is shown, and whether it changed."""

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
        wanted = parse_query(search, "study") or (names[0] if names else None)
        study = watch.study(wanted) if wanted else None
        options = [{"label": plain(name, 60), "value": name} for name in names]
        state = {
            "name": study.row.name if study else None,
            "id": study.row.id if study else None,
            "exists": store is not None,
            "wanted": parse_query(search, "study"),
        }
        current = study.seq if study else -1
        return (
            no_update if options == known else options,
            no_update if not study else study.row.name,
            no_update if state == shown else state,
            no_update if current == seq and state == shown else current,
        )


def _wire_pages(app: Dash, watch: Watch) -> None:
    """The page of an address, and the links to the others."""

    @app.callback(
        Output("page", "children"),
        Output("nav", "children"),
        Input("url", "pathname"),
        Input("study", "data"),
    )
    def page(pathname: str, shown: dict | None) -> tuple[Any, list]:
        shown = shown or {}
        path = pathname if pathname in pages.PAGES else "/"
        links = _links(path, shown.get("name"))
        study = watch.study(shown["name"]) if shown.get("name") else None
        if study is None:
            return pages.waiting(watch.url, bool(shown.get("exists")), shown.get("wanted")), links
        if path == "/":
            return pages.front_page(study, [name for name in watch.names() if name != study.row.name]), links
        if path == "/trial":
            return pages.trial_page(), links
        rest = {"/space": pages.space_page, "/scale": pages.scale_page, "/cluster": pages.cluster_page}
        return rest[path](study), links


def _links(shown: str, study: str | None) -> list[html.Li]:
    """A link to every page; that of the page shown is marked."""
    return [
        html.Li(dcc.Link(title, href=pages.link(path, study)), **{"aria-current": "page"} if path == shown else {})
        for path, title in pages.PAGES.items()
    ]


def _wire_choice_of_study(app: Dash) -> None:
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
