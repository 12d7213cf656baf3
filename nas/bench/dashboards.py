"""The live pages with a large study, in a real browser: python -m hypernas.bench.dashboards [--trials N] [--json].

Makes a study in a temporary SQLite file, opens its front page, and then finishes one more trial several times while
the page is open. Prints the seconds from the server's start until its first page shows every trial, the server's time
for a live tick (all its answers to one change, in CPU milliseconds, the least of TICKS) and the server's peak memory.
Needs playwright and Chromium.
"""

import argparse
import json
import random
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

from hypernas.bench.store import peak_memory
from hypernas.dashboards import pages
from hypernas.dashboards.app import make_app_server
from hypernas.dashboards.screenshots import launch_browser
from hypernas.errors import UserError
from hypernas.records import Proposal, Recipe, Report, Result, SpaceSpec, StudyRow, StudySettings
from hypernas.store import Store

REPORTS = 10  # a trial
TICKS = 5
LIMITS = {"first_page": 3.0, "live_tick": 150.0, "peak_memory": 500.0}  # in the units of the rows
ARCH = {"family": "transformer", "depth": 4, "d_model": 128, "ffn.shape": "conventional", "ffn.ratio": 4.0,
        "attention.ratio": 1.0, "streams.n": 1, "gates.placement": "none"}  # fmt: skip


def add_trial(store: Store, study: StudyRow, driver: int, key: str, drawn: random.Random) -> int:
    """One COMPLETE trial with REPORTS reports, through the store's own transactions; its number."""
    flops = 10 ** drawn.uniform(5, 8)
    loss = 6 - flops**0.07 + drawn.random()
    proposal = Proposal({"depth": drawn.choice((2, 4, 6))}, ARCH, key, key, Recipe(3e-3), "sampler", {})
    trial = store.lease_new(study, driver, proposal, limit=10**7)
    assert trial is not None, key
    for rung in range(REPORTS):
        tokens = 1000 << rung
        report = Report(trial.number, rung, rung + 1, tokens, 3 * flops * tokens, loss + 1 / (rung + 1), 1.0 + rung)
        store.report(study, report, trial.token)
    values = {"bits_per_byte": loss, "flops_per_token": flops, "accuracy": 0.5, "training_flops": 3e6 * flops}
    result = Result(trial.number, trial.token, values, parameters=1000, train_seconds=4.0, evaluate_seconds=1.0)
    store.finish(study, result)
    return trial.number


def make_study(path: Path, trials: int) -> tuple[Store, StudyRow, int, random.Random]:
    """A study of `trials` trials: one written as a search does, the others copied from it by SQL with other values.

    Returns the store, the study, a driver to write more with, and the generator the values came from.
    """
    drawn = random.Random(0)
    store = Store(str(path), create=True)
    study = store.create_study(
        "large",
        space=SpaceSpec("lm"),
        objectives=("bits_per_byte", "flops_per_token"),
        settings=StudySettings.of({"trials": trials + TICKS, "seed": 0}),
        reference={"bits_per_byte": 8.0, "flops_per_token": 9.0},
        data_name="none",
        data_hash="0" * 64,
    )
    driver = store.start_driver(study, workers=2)
    add_trial(store, study, driver, "first", drawn)
    with sqlite3.connect(path) as connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(trials)")]
        own = {"id": ":id", "number": ":number", "arch_hash": ":key", "config_hash": ":key", "seq": ":seq"}
        copied = ", ".join(own.get(name, name) for name in columns)
        connection.executemany(
            f"INSERT INTO trials ({', '.join(columns)}) SELECT {copied} FROM trials WHERE id = 1",
            ({"id": n + 1, "number": n, "key": str(n), "seq": n + 100} for n in range(1, trials)),
        )
        jitter = [(n + 1, 10 ** drawn.uniform(-1.5, 1.5), drawn.uniform(0.8, 1.2)) for n in range(1, trials)]
        connection.executemany(
            "INSERT INTO trial_values SELECT ?1, name, value * CASE WHEN name LIKE '%flops%' THEN ?2 ELSE ?3 END "
            "FROM trial_values WHERE trial_id = 1",
            jitter,
        )
        connection.executemany(
            "INSERT INTO reports SELECT ?1, rung, step, tokens, training_flops * ?2, loss * ?3, seconds "
            "FROM reports WHERE trial_id = 1",
            jitter,
        )
        connection.executemany(
            "INSERT INTO front_history SELECT ?, study_id, hypervolume * ?, 0 FROM front_history WHERE trial_id = 1",
            ((n + 1, 1 + n // 50 * 50 / trials) for n in range(1, trials)),  # every 50th trial joins the front
        )
        connection.execute("UPDATE studies SET next_number = ?, seq = ?", (trials, trials + 200))
    connection.close()
    return store, study, driver, drawn


class Clock:
    """WSGI middleware that notes the CPU seconds of every answer the pages ask for."""

    def __init__(self, app: Callable) -> None:
        self._app = app
        self.spent: list[float] = []

    def __call__(self, environ: dict, start: Callable) -> Any:
        begin = time.thread_time()
        answer = self._app(environ, start)
        if environ["PATH_INFO"].endswith("_dash-update-component"):
            self.spent.append(time.thread_time() - begin)
        return answer


def measure(trials: int) -> list[dict[str, Any]]:
    """Rows of name, value, unit and limit. Raises UserError when there is no browser."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = launch_browser(playwright)
        store, study, driver, drawn = make_study(Path(folder) / "nas.db", trials)
        begin = time.perf_counter()
        server = make_app_server(str(Path(folder) / "nas.db"), port=0)
        clock = Clock(server.app)
        server.app = clock
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            tab = browser.new_page(viewport={"width": 1280, "height": 800})
            tab.goto(f"http://127.0.0.1:{server.port}{pages.link('/', study.name)}")
            _wait_for_marks(tab, trials)
            first = time.perf_counter() - begin
            tab.wait_for_load_state("networkidle")
            ticks = []
            for tick in range(TICKS):
                clock.spent.clear()
                add_trial(store, study, driver, f"tick {tick}", drawn)
                _wait_for_marks(tab, trials + tick + 1)
                tab.wait_for_load_state("networkidle")
                ticks.append(1000 * sum(clock.spent))
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
            store.close()
            browser.close()
    peak = peak_memory()
    values = {"first_page": (first, "s"), "live_tick": (min(ticks), "ms"), "peak_memory": (peak, "MB")}
    return [
        {"name": name, "value": value, "unit": unit, "limit": LIMITS[name]} for name, (value, unit) in values.items()
    ]


def _wait_for_marks(tab: Any, count: int) -> None:
    tab.wait_for_function(
        "count => (document.querySelector('#front .js-plotly-plot')?._fullData ?? [])"
        ".some(trace => trace.name === 'complete' && trace._length === count)",
        arg=count,
        timeout=60_000,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hypernas.bench.dashboards", description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000, metavar="N")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    given = parser.parse_args(argv)
    try:
        rows = measure(given.trials)
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps({"trials": given.trials, "reports": REPORTS * given.trials, "rows": rows}, indent=2))
    else:
        print(f"{given.trials:,} trials, {REPORTS * given.trials:,} reports")
        for row in rows:
            print(f"{row['name']:12} {row['value']:8.2f} {row['unit']:3} (at most {row['limit']:g})")
    return 0 if all(row["value"] <= row["limit"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
