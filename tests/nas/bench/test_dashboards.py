import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.browser
def test_the_bench_measures_the_first_page_a_live_tick_and_memory(browser_path):
    # A process of its own: its memory is what is measured, and playwright runs once in a process.
    command = [sys.executable, "-m", "hypernas.bench.dashboards", "--trials", "1000", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode in (0, 1), done.stderr
    data = json.loads(done.stdout)
    assert (data["trials"], data["reports"]) == (1000, 10_000)
    values = {row["name"]: row["value"] for row in data["rows"]}
    assert values["first_page"] > 0.1
    assert values["live_tick"] > 1
    assert 50 < values["peak_memory"] < 500
