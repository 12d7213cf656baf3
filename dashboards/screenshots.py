"""Pictures of every page for the documentation: python -m hypernas.dashboards.screenshots [--study NAME] [--store URL].

Without a study a small real one is searched first, in a temporary folder; that takes minutes.
Needs playwright (in the `dev` extra) and Chromium.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Thread
from typing import Any

from hypernas.dashboards import pages
from hypernas.dashboards.app import make_app_server
from hypernas.dashboards.live import scale_of
from hypernas.errors import UserError
from hypernas.store import Reader

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
         "--disable-quic", "--disable-component-update", "--enable-unsafe-swiftshader",
         # V8 notes where its bytecode comes from while it compiles, rather than parse plotly.js again when asked: a
         # page costs a fifth less.
         "--js-flags=--no-enable-lazy-source-positions")  # fmt: skip
SEARCH = ("--study", "first", "--preset", "quick", "--trials", "16", "--set", "train.tokens=60000",
          "--set", "depth=2..6", "--set", "d_model=64,96,128", "--set", "context=64")  # fmt: skip
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


def launch_browser(playwright: Any) -> Any:
    """Headless Chromium. Raises UserError when there is none."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        raise UserError(f"no browser here: wanted one of {', '.join(BROWSERS)} (apt-get install chromium)")
    return playwright.chromium.launch(executable_path=path, args=list(FLAGS))


def take(store_url: str, study: str, out: Path) -> list[Path]:
    """One picture a page (of /scale where there is a ladder), the front in dark and on a phone too.

    Raises StoreError, StudyError and UserError.
    """
    from playwright.sync_api import sync_playwright

    with Reader(store_url) as store:
        row = store.study(study)
        front = store.front(row)
        has_ladder = scale_of(store, study) is not None
    trial = front[len(front) // 2].number if front else None
    out.mkdir(parents=True, exist_ok=True)
    server = make_app_server(store_url, port=0)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    shots = [
        ("front", pages.link("/", study), DESKTOP, "light"),
        ("front-dark", pages.link("/", study), DESKTOP, "dark"),
        ("front-phone", pages.link("/", study), PHONE, "light"),
        ("trial", pages.link("/trial", study, trial), DESKTOP, "light"),
        ("space", pages.link("/space", study), DESKTOP, "light"),
        ("cluster", pages.link("/cluster", study), DESKTOP, "light"),
    ]
    if has_ladder:
        shots.append(("scale", pages.link("/scale", study), DESKTOP, "light"))
    try:
        with sync_playwright() as playwright:
            browser = launch_browser(playwright)
            for name, address, size, scheme in shots:
                tab = browser.new_page(viewport=size, color_scheme=scheme)
                tab.goto(f"http://127.0.0.1:{server.port}{address}")
                tab.locator(".main-svg").first.wait_for()
                tab.wait_for_load_state("networkidle")
                tab.screenshot(path=out / f"{name}.png", full_page=name in ("trial", "space", "scale"))
                tab.close()
            browser.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    return [out / f"{name}.png" for name, *_ in shots]


def take_own(out: Path) -> list[Path]:
    """`take` of a small study that is searched for it. Raises UserError when the search does not finish."""
    target = out.resolve()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        command = [sys.executable, "-m", "hypernas", "search", *SEARCH]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            raise UserError(f"the search for the pictures failed: {' '.join(command)}")
        return take("nas.db", SEARCH[1], target)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hypernas.dashboards.screenshots", description=__doc__)
    parser.add_argument("--store", default="nas.db", metavar="URL")
    parser.add_argument("--study", metavar="NAME", help="default: search a small one first")
    parser.add_argument("--out", default="docs/images", metavar="FOLDER")
    given = parser.parse_args(argv)
    try:
        written = take(given.store, given.study, Path(given.out)) if given.study else take_own(Path(given.out))
    except UserError as error:
        print(f"screenshots: {error}", file=sys.stderr)
        return 2
    print("\n".join(str(path) for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
