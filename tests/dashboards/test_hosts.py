"""The live pages answer for names of this machine, and do on the server what their buttons offer, no more."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from hypernas.dashboards import notebook
from hypernas.dashboards.app import make_app, make_app_server
from hypernas.dashboards.blocks import figure as blocks_figure
from hypernas.dashboards.hosts import answers_for, own_names
from hypernas.dashboards.live import Watch
from hypernas.dashboards.paper import write_figure
from hypernas.dashboards.report import write_report
from hypernas.store import Store
from hypernas.store.weights import keep_weights

ADDRESS = str


@pytest.fixture
def address(store: Store) -> Iterator[ADDRESS]:
    server = make_app_server(str(store.url.database), port=0, names=["proxy.example"])
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join()
    server.server_close()


def status(address: str, path: str, **headers: str) -> int:
    try:
        with urlopen(Request(address + path, headers=headers), timeout=60) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def test_a_name_that_is_not_this_servers_is_not_answered(address: ADDRESS) -> None:
    for path in ("/", "/_dash-layout", "/assets/app.css", "/_dash-update-component"):
        assert status(address, path, Host="rebound.example") == 403
        assert status(address, path, Host="127.0.0.1.rebound.example:8050") == 403
    for name in ("localhost:1", "127.0.0.1", "[::1]:8050", "proxy.example"):
        assert status(address, "/_dash-layout", Host=name) == 200


def test_a_page_of_another_name_gets_no_answer_either(address: ADDRESS) -> None:
    assert status(address, "/_dash-layout", Origin="https://somebody.example") == 403
    assert status(address, "/_dash-layout", Origin="null") == 403
    assert status(address, "/_dash-layout", Origin=address) == 200


@pytest.mark.parametrize(
    ("bound", "asked", "answered"),
    [
        ("127.0.0.1", "10.0.0.7", False),
        ("10.0.0.7", "10.0.0.7:8050", True),
        ("10.0.0.7", "10.0.0.8:8050", False),
        ("0.0.0.0", "10.0.0.7:8050", True),
        ("0.0.0.0", socket.gethostname().upper(), True),
        ("0.0.0.0", "rebound.example", False),
        ("::", "[fe80::1]:8050", True),
        ("node7", "NODE7.:8050", True),
        ("127.0.0.1", "", False),
        ("127.0.0.1", "[", False),
    ],
)
def test_the_address_that_is_listened_on_says_which_names_are_answered(bound: str, asked: str, answered: bool) -> None:
    assert answers_for(asked, own_names(bound), bound) is answered


# ---- the download --------------------------------------------------------------------------------------------------


def press_download(store: Store, study: str, trial: object) -> str:
    """What the server says to the request that the page's button sends, whether there is a button or not."""
    body = {
        "output": "..download.data...export-status.children..",
        "outputs": [{"id": "download", "property": "data"}, {"id": "export-status", "property": "children"}],
        "inputs": [{"id": "export-button", "property": "n_clicks", "value": 1}],
        "changedPropIds": ["export-button.n_clicks"],
        "state": [
            {"id": "url", "property": "search", "value": f"?trial={trial}"},
            {"id": "study", "property": "data", "value": {"name": study}},
        ],
    }
    client = make_app(Watch(str(store.url.database))).server.test_client()
    answer = client.post("/_dash-update-component", json=body)
    assert answer.status_code == 200, answer.text
    return str(json.loads(answer.text)["response"]["export-status"]["children"])


def test_no_request_has_the_server_import_a_space(small, store: Store, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    keep_weights(store, small.study, 2, b"weights")
    with store._engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE studies SET space = '{tmp_path / 'evil.py'}:Space'")
    assert press_download(store, "first", 2).startswith("Not exported")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("trial", [2, 3, 4, 99, "x"], ids=["no weights", "failed", "running", "unknown", "no number"])
def test_no_request_has_the_server_train(small, store: Store, trial: object) -> None:
    assert press_download(store, "first", trial).startswith("Not exported")


# ---- nothing is uploaded -------------------------------------------------------------------------------------------


def test_no_figure_offers_to_upload_itself(small, store: Store, browser, tmp_path: Path) -> None:
    """Live pages draw the same figures, with the report's settings."""
    import numpy as np

    net = {"name": "ffn", "confirmed": 1, "edges": 4, "blocks": [], "coordinate_order": [0, 1], "unit_order": [0, 1],
           "units": 2, "coordinates": 2}  # fmt: skip
    url = str(store.url.database)
    write_report(store, "first", str(tmp_path / "report.html"))
    write_figure(blocks_figure([net], {"ffn": np.eye(2)}), str(tmp_path / "blocks.html"))
    notebook.pareto_figure("first", url).write_html(tmp_path / "notebook.html")  # as a notebook draws it
    tab = browser.new_page()
    for name in ("report", "blocks", "notebook"):
        tab.goto(f"file://{tmp_path}/{name}.html")
        tab.locator(".modebar-btn").first.wait_for(state="attached")
        titles = tab.locator(".modebar-btn").evaluate_all("found => found.map(one => one.dataset.title)")
        assert any("PNG" in str(title) for title in titles), name
        assert not [title for title in titles if re.search("share|cloud|edit in", str(title), re.I)], name
    tab.close()
