"""The live web app: serves the pages, and wires frames, figures and pages to what the reader does.

Each open page asks every two seconds whether its study changed; only then are its figures drawn again, from what
`live.Watch` holds. Nothing is written to the store.
"""

import logging
import socket
from collections.abc import Collection
from pathlib import Path
from threading import Thread

from dash import Dash, dcc, html
from werkzeug.serving import BaseWSGIServer, make_server

from hypernas.dashboards.callbacks.cluster import wire_cluster
from hypernas.dashboards.callbacks.front import wire_front
from hypernas.dashboards.callbacks.scale import wire_scale
from hypernas.dashboards.callbacks.shell import wire_shell
from hypernas.dashboards.callbacks.space import wire_space
from hypernas.dashboards.callbacks.trial import wire_trial
from hypernas.dashboards.hosts import only_for, own_names
from hypernas.dashboards.live import Watch
from hypernas.errors import UserError

TICK = 2_000  # milliseconds


def serve(store_url: str, host: str = "127.0.0.1", port: int = 8050, names: Collection[str] = ()) -> None:
    """Serves the app until interrupted. Raises UserError when the port is taken or the store cannot be opened."""
    server = make_app_server(store_url, host, port, names)
    print(f"dashboard of {store_url}: http://{host}:{server.port}/   (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.shutdown()
    finally:
        server.server_close()


def make_app_server(
    store_url: str, host: str = "127.0.0.1", port: int = 8050, names: Collection[str] = ()
) -> BaseWSGIServer:
    """A server ready for `serve_forever`; port 0 takes a free one, `server.port` says which. Raises UserError.

    It answers those who ask for it by a name of its own (hosts.py) or one of `names`.
    """
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
    known = own_names(host) | {name.lower() for name in names}
    server = make_server(host, port, only_for(app.server, known, host), threaded=True, fd=listening.fileno())
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
    wire_shell(app, watch)
    wire_front(app, watch)
    wire_trial(app, watch)
    wire_space(app, watch)
    wire_scale(app, watch)
    wire_cluster(app, watch)
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
