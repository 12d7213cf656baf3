"""The live pages in a real browser, and the server behind them."""

import re
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from threading import Thread

import pytest

from hypernas.dashboards.app import make_app_server
from hypernas.dashboards.pages import PAGES
from hypernas.errors import UserError
from hypernas.store import Store

WAIT = 30_000  # milliseconds: the machine may be busy
ARCH = {"family": "transformer", "depth": 4, "d_model": 128, "ffn.shape": "conventional", "ffn.ratio": 4.0,
        "attention.ratio": 1.0, "gates.placement": "none"}  # fmt: skip


@pytest.fixture
def serve():
    """Starts a server on a free port in a thread; returns its address."""
    servers = []

    def start(store_url: object) -> str:
        server = make_app_server(str(store_url), port=0)
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def page(browser):
    """A tab that fails the test when the page logs an error or opens a dialog."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    tab = context.new_page()
    tab.set_default_timeout(WAIT)
    problems = []
    tab.on("console", lambda message: message.type == "error" and problems.append(f"{tab.url}: {message.text}"))
    tab.on("pageerror", lambda error: problems.append(f"{tab.url}: {error}"))
    tab.on("dialog", lambda dialog: (problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
    yield tab
    context.close()
    assert problems == []


def follow(page, path: str) -> None:
    """To a page by its link, and until it is there: a load of the scripts costs seconds."""
    page.get_by_role("link", name=PAGES[path], exact=True).click()
    page.locator('nav li[aria-current="page"]').get_by_text(PAGES[path], exact=True).wait_for()


def go_back_to(page, address: str) -> None:
    """To an address as the browser's way back leads there."""
    page.evaluate(
        "address => { for (const _ of [1, 2]) history.pushState(null, '', address); history.back() }", address
    )


def choose_study(page, name: str) -> None:
    page.locator("#studies").click()
    page.get_by_role("option", name=name, exact=True).click()
    page.wait_for_url(f"**study={name}*")


def says(page, text: str) -> None:
    page.get_by_text(text).first.wait_for()


def wait_for_figures(page) -> None:
    """Until every figure of the page is drawn as `figures.style.new_figure` lays it out: before, it is an empty one."""
    page.wait_for_function(
        "[...document.querySelectorAll('main .js-plotly-plot, main .dash-graph--pending')]"
        ".every(plot => plot.layout?.uirevision && plot.querySelector('.main-svg text'))"
    )


def complete_marks(page) -> int:
    return page.evaluate(
        "(document.querySelector('#front .js-plotly-plot')?.calcdata ?? [])"
        ".filter(points => ['complete', 'baseline'].includes(points[0].trace.name)).flat().length"
    )


def wait_for_marks(page, count: int) -> None:
    deadline = time.monotonic() + WAIT / 1000
    while complete_marks(page) != count:
        assert time.monotonic() < deadline, f"wanted {count} completed trials, the front shows {complete_marks(page)}"
        page.wait_for_timeout(200)


def settled(page, selector: str) -> dict[str, float]:
    """Where an element is, once it has stopped moving: pages grow while their figures come in."""
    before = None
    while True:
        box = page.locator(selector).first.bounding_box()
        if box and box == before:
            return box
        before = box
        page.wait_for_timeout(400)


# ---- the server ------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_named(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}"):
            make_app_server(str(tmp_path / "nas.db"), port=port)


def test_a_port_that_is_none_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"--port 70000 .*between 0 and 65535"):
        make_app_server(str(tmp_path / "nas.db"), port=70_000)


def test_a_store_that_cannot_be_opened_is_an_error_before_anything_is_served(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        make_app_server(str(tmp_path / "no" / "nas.db"), port=0)


# ---- pages without much to show ----------------------------------------------------------------------------------

PATHS = tuple(PAGES)


@pytest.mark.browser
def test_every_page_waits_for_a_store_that_is_not_there(serve, page, tmp_path: Path, write_in):
    base = serve(tmp_path / "nas.db")
    page.goto(base + PATHS[-1])
    for path in reversed(PATHS):  # the front last, which then sees a store and a study come
        follow(page, path)
        says(page, "Waiting for the store")
    assert list(tmp_path.iterdir()) == []
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        says(page, "No study yet")
        writer = write_in(store, "late")
        says(page, "No trial has been measured yet")
        writer.complete(3.0, 1e6)
        wait_for_marks(page, 1)


# What the pages say of a study without trials, and of one with a single trial, that ended, failed or runs.
SCARCE = {
    "empty": {"/": "none yet", "/trial": "No trial 0 yet", "/cluster": "No trial has failed"},
    "one": {"/": "Best within", "/trial": "Trial 0 of", "/cluster": "No trial has failed"},
    "failed": {"/": "1 failed", "/trial": "exploded", "/cluster": "out of memory"},
    "running": {"/": "1 running", "/trial": "Trial 0 of", "/cluster": "No trial has failed"},
}


@pytest.mark.browser
def test_every_page_of_a_scarce_study_looks_intended(serve, page, store, write_in):
    from playwright.sync_api import TimeoutError as TimedOut

    studies = {kind: write_in(store, kind) for kind in SCARCE}
    studies["one"].complete(3.0, 1e6, rungs=2, params={"depth": 4})
    studies["failed"].fail("exploded")
    studies["running"].lease()
    wrong = []
    page.goto(serve(store.url.database))
    for kind, said in SCARCE.items():
        wanted = said | {"/space": "Importance needs more", "/scale": f"nas scale --study {kind}"}
        for path in PATHS:  # the front first, whose words no other of these studies has
            go_back_to(page, f"{path}?study={kind}&trial=0")
            try:
                says(page, wanted[path])
                wait_for_figures(page)
            except TimedOut as error:
                wrong.append(f"{path} of a study with {kind}: {error}")
    assert wrong == []


@pytest.mark.browser
def test_hostile_texts_are_shown_as_text_on_every_page(serve, page, store, write_in, hostile):
    name = hostile[:180]
    writer = write_in(store, name)
    writer.complete(3.0, 1e6, rungs=1, arch={"family": hostile}, params={hostile: hostile})
    writer.complete(2.0, 2e6, rungs=1, arch={"family": hostile}, params={hostile: "other"})
    writer.fail(hostile + "x" * 1_000_000, arch={"family": hostile})
    page.goto(serve(store.url.database))
    wanted = dict.fromkeys(("/", "/space", "/scale", "/cluster"), "alert(1)")
    wanted |= {"/trial?trial=0": "Trial 0 of", "/trial?trial=2": "Trial 2 of"}
    for path, said in (wanted | {"/trial?trial=<script>": "No trial <script> yet"}).items():
        go_back_to(page, path)
        says(page, said)
        wait_for_figures(page)
        assert page.locator("img, main script").count() == 0, path


# ---- a reader at work ------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_the_front_updates_without_a_reload_while_trials_finish(serve, page, small):
    page.goto(serve(small.store.url.database))
    wait_for_marks(page, 3)
    page.evaluate("window.same = true")
    small.complete(2.0, 5e6, rungs=2)
    wait_for_marks(page, 4)
    says(page, "4 complete")
    assert page.evaluate("window.same")


@pytest.mark.browser
def test_clicking_a_point_opens_its_trial_and_the_way_back_leads_to_the_front(serve, page, small):
    page.goto(serve(small.store.url.database))
    wait_for_marks(page, 3)
    point = settled(page, "#front .scatterlayer .trace .point")
    page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    page.locator("#front .hoverlayer .hovertext").first.wait_for()
    page.mouse.down()
    page.mouse.up()
    says(page, "Trial 1 of")  # the first mark of the dominated trials
    assert "trial=1" in page.url
    page.get_by_role("link", name="Next trial").click()
    says(page, "Trial 2 of")
    page.go_back()
    page.go_back()
    wait_for_marks(page, 3)


@pytest.mark.browser
def test_states_slider_objectives_and_budget_change_the_front(serve, page, small):
    page.goto(serve(small.store.url.database))
    wait_for_marks(page, 3)
    page.get_by_label("complete", exact=True).uncheck()
    wait_for_marks(page, 0)
    page.get_by_label("complete", exact=True).check()
    wait_for_marks(page, 3)
    says(page, "trial 2, validation loss")
    page.locator("#front-budget [role=slider]").focus()
    page.keyboard.press("Home")
    says(page, "No completed trial within 100k")
    page.locator("#front-moment [role=slider]").focus()
    page.keyboard.press("Home")
    wait_for_marks(page, 0)
    page.keyboard.press("ArrowRight")
    wait_for_marks(page, 1)
    page.keyboard.press("End")
    wait_for_marks(page, 3)
    page.locator("#front-y").click()
    page.get_by_role("option", name="validation accuracy").click()
    says(page, "validation accuracy, higher is better")


@pytest.mark.browser
def test_dragging_the_dotted_line_asks_for_the_best_within_that_budget(serve, page, small):
    page.goto(serve(small.store.url.database))
    says(page, "Best within 4M")
    line = settled(page, "#front .shapelayer path")
    page.mouse.move(line["x"] + line["width"] / 2, line["y"] + line["height"] / 2)
    page.mouse.down()
    page.mouse.move(line["x"] - 100, line["y"] + line["height"] / 2, steps=5)
    page.mouse.up()
    says(page, "trial 0, validation loss")  # trial 2 is too expensive now


@pytest.mark.browser
def test_switching_the_study_shows_the_other_and_names_the_tab_after_it_and_comparing_shows_both(
    serve, page, small, write_in
):
    other = write_in(small.store, "second")
    other.complete(1.0, 1e6)
    page.goto(serve(small.store.url.database) + "?study=first")
    wait_for_marks(page, 3)
    page.locator("#front-compare").click()
    page.get_by_role("option", name="second", exact=True).click()
    page.wait_for_function(
        "document.querySelector('#front .js-plotly-plot').data.some(trace => trace.name === 'second')"
    )
    page.keyboard.press("Escape")
    choose_study(page, "second")
    wait_for_marks(page, 1)
    page.wait_for_function("document.title === 'second – hypernas'")


@pytest.mark.browser
def test_selecting_a_region_lists_its_trials_alone(serve, page, small):
    page.goto(serve(small.store.url.database))
    wait_for_marks(page, 3)
    page.locator("#front .modebar-btn[data-title='Box Select']").click(force=True)
    box = settled(page, "#front .nsewdrag")
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 5, box["y"] + box["height"] - 5, steps=5)
    page.mouse.up()
    says(page, "1 selected")
    cells = page.locator("#front-table tbody tr td:first-child")
    page.wait_for_function("document.querySelectorAll('#front-table tbody tr').length == 1")
    assert cells.all_inner_texts() == ["2"]
    facts = page.locator("#front-facts")
    facts.get_by_text("1 complete", exact=True).wait_for()
    facts.get_by_text("13.1887").wait_for()  # (8 - 2.5)(9 - log10 4e6): trial 2 by itself
    page.locator("#front-budget [role=slider]").focus()
    page.keyboard.press("ArrowLeft")
    says(page, "No completed trial within")  # trial 0 would be, and is not selected
    page.get_by_role("link", name="Space").click()
    says(page, "1 selected on the front")
    page.get_by_role("link", name="Front").click()
    says(page, "1 selected on the front")
    small.complete(2.4, 4.1e6)
    says(page, "2 selected on the front")  # it lies in the region, too
    page.get_by_role("button", name="Show all").click()
    page.locator("#selection-bar").wait_for(state="hidden")
    page.locator("#front-facts").get_by_text("4 complete").wait_for()
    page.get_by_role("link", name="Cluster").click()
    says(page, "Losses of running trials")


@pytest.mark.browser
def test_a_trials_page_shows_how_its_streams_mix_where_it_ran_and_how_to_train_it_again(serve, page, writer):
    diagnostics = {"mean_mixing": [[[0.9, 0.1], [0.1, 0.9]]] * 8}
    arch = {**ARCH, "streams.n": 2, "streams.mixing": "mhc_lite"}
    number = writer.complete(3.0, 1e6, rungs=2, arch=arch, diagnostics=diagnostics)
    store = writer.store.url.database
    page.goto(f"{serve(store)}/trial?study=first&trial={number}")
    says(page, "How the streams mix")
    says(page, "layer 4 ffn")
    says(page, "Composite gain over depth")
    says(page, "Kernels that ran, and why")
    page.get_by_role("row", name="swiglu cpu: it is there").wait_for()
    says(page, f"nas train --study first --store {store} --trial {number} --out")
    says(page, f"nas export --study first --store {store} --trial {number} --out")


@pytest.mark.browser
def test_the_controls_of_the_front_are_reached_with_the_keyboard_in_order(serve, page, small):
    page.goto(serve(small.store.url.database))
    wait_for_marks(page, 3)
    reached = []
    for _ in range(100):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "[document.activeElement.closest('nav a, #studies, #front-y, #front-x, #front-states, #front-compare, "
                "#front-moment, #front-budget, #front-over, #front-table a')]"
                ".map(found => found && (found.id || found.textContent))[0]"
            )
        )
    order = [name for name in dict.fromkeys(reached) if name]
    assert order[:5] == ["Front", "Trial", "Space", "Scale", "Cluster"]
    assert order[5:10] == ["studies", "front-y", "front-x", "front-states", "front-compare"]
    assert [name for name in order if name in ("front-moment", "front-budget", "front-over")] == [
        "front-moment", "front-budget", "front-over",
    ]  # fmt: skip
    assert {"0", "2"} <= set(order)  # the front's trials in the table


@pytest.mark.browser
@pytest.mark.parametrize("width, height", [(390, 844), pytest.param(1280, 800, marks=pytest.mark.slow)])
def test_every_page_fits_a_phone_and_a_desktop_and_can_be_read_in_light_and_dark(
    serve, page, small, width: int, height: int
):
    base = serve(small.store.url.database)
    page.set_viewport_size({"width": width, "height": height})
    page.goto(f"{base}/trial?trial=2")
    for path in ("/trial", "/", "/space", "/scale", "/cluster"):
        if path != "/trial":
            follow(page, path)
        page.locator("h1").first.wait_for()
        page.locator(".main-svg").first.wait_for()
        wait_for_figures(page)
        papers = set()
        for scheme in ("light", "dark"):  # one load for both: each costs seconds
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path
            ink, paper = page.evaluate(
                "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
            )
            assert contrast(ink, paper) > 7, path
            label = page.evaluate("getComputedStyle(document.querySelector('.js-plotly-plot .main-svg text')).fill")
            assert contrast(label, paper) > 4.5, path
            papers.add(paper)
        assert len(papers) == 2, path  # the page did change


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours like rgb(0, 0, 0)."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.browser
def test_a_real_search_is_watched_and_its_winner_downloaded(serve, page, tmp_path: Path, text: str):
    path = tmp_path / "nas.db"
    page.goto(serve(path))
    says(page, "Waiting for the store")
    settings = ["depth=1", "d_model=32,64", "context=32", "streams.n=1", "gates.placement=none", "train.tokens=2048"]
    settings += [f"data.path={text}"]
    command = [sys.executable, "-m", "hypernas", "search", "--study", "real", "--store", str(path)]
    command += ["--engine", "inline", "--trials", "4", "--halving", "off"]
    command += [part for setting in settings for part in ("--set", setting)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as search:
        output, _ = search.communicate(timeout=200)
    assert search.returncode == 0, output
    wait_for_marks(page, 4)
    with Store(str(path)) as store:
        best = store.front(store.study("real"))[0].number
    page.get_by_role("link", name=str(best), exact=True).first.click()
    says(page, f"Trial {best} of")
    with page.expect_download(timeout=120_000) as waiting:
        page.get_by_role("button", name="Download the export").click()
    with zipfile.ZipFile(waiting.value.path()) as archive:
        names = {Path(name).name for name in archive.namelist()}
    assert {"model.py", "config.json", "model.safetensors", "README.md"} <= names
    says(page, "Downloaded, and checked")
