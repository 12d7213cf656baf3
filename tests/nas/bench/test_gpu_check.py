"""The check of a GPU, itself checked on a CPU: its dry form, its limits, and what it reads from what steps print."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hypernas.bench import gpu_check
from hypernas.bench.gpu_check import COMPARISONS, STEPS, Done, Step, check, summary

# What a GPU machine without an installation of ours may lack.
BLOCKED = ("ray", "optuna", "sqlalchemy", "alembic", "psycopg", "moocore", "click", "rich", "plotly", "dash", "kaleido")

HIDES = """
import sys
from importlib.machinery import PathFinder

class Hides(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else super().find_spec(name, path, target)

sys.meta_path[:] = [Hides if finder is PathFinder else finder for finder in sys.meta_path]
"""


def printing(code: str, **more: object) -> Step:
    settings = {"name": "step", "file": "step.txt", "limit": 30.0, "proves": "it"} | more
    return Step(arguments=("-c", code), **settings)  # type: ignore[arg-type]


def test_every_step_runs_in_its_dry_form_and_without_database_or_cluster(tmp_path: Path) -> None:
    blocker = tmp_path / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(HIDES.replace("BLOCKED", repr(BLOCKED)))
    links = tmp_path / "tree"  # as on a machine where nothing of ours is installed
    subprocess.run(["make", "-s", "tree", f"TREE={links}"], cwd=gpu_check.ROOT, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "hypernas.bench.gpu_check", str(tmp_path / "out")],
        cwd=gpu_check.ROOT,
        # pytest looks for its plugins by itself, and dash's needs plotly.
        env=os.environ
        | {"PYTHONPATH": f"{blocker}{os.pathsep}{links}", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": "-p no:dash"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    printed = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert done.returncode == 0, done.stdout + str({name: text[-2000:] for name, text in printed.items()})
    for step in STEPS:
        skipped = set(step.needs) & set(BLOCKED) or step.real
        assert f"{step.name}: {'skipped' if skipped else 'ok'}" in done.stdout
    assert "MISSED" not in printed["summary.md"]  # figures of tiny sizes are no verdict


@pytest.mark.slow
def test_searches_run_in_their_dry_form(tmp_path: Path) -> None:
    searches = [step for step in STEPS if "optuna" in step.needs]
    done = check(tmp_path, searches)
    assert {entry.ended for entry in done if not entry.step.real} == {"ok"}, (tmp_path / "search.txt").read_text()
    found = [row["value"] for entry in done for row in entry.rows if row["name"].endswith(": complete")]
    assert found == [1, 1]


def test_a_step_over_its_limit_is_ended_with_what_it_started_and_the_next_runs(tmp_path: Path) -> None:
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid"
    hangs = printing(f"import subprocess, sys, time; print({child}, flush=True); time.sleep(60)", limit=3.0)
    after = printing('print(\'{"name": "a", "value": 1, "unit": "s"}\')', name="after", file="after.txt")
    first, second = check(tmp_path, [hangs, after])
    assert first.ended == "over its limit of 3 s" and second.ended == "ok"
    assert second.rows == ({"name": "a", "value": 1, "unit": "s"},)
    pid = int((tmp_path / "step.txt").read_text().split()[-1])
    with contextlib.suppress(psutil.NoSuchProcess):  # an orphan ends a moment after its signal, and init may leave it
        child_of_the_step = psutil.Process(pid)
        for _ in range(100):
            if child_of_the_step.status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.1)
        assert child_of_the_step.status() == psutil.STATUS_ZOMBIE


def test_a_step_that_lacks_a_module_or_comes_too_late_is_skipped_and_says_why(tmp_path: Path) -> None:
    (lacks,) = check(tmp_path, [printing("", needs=("sys", "no_such_module"))])
    assert lacks.ended == "skipped: no no_such_module"
    (late,) = check(tmp_path, [printing("")], seconds=0.0)
    assert late.ended.startswith("skipped: the time")


def test_what_a_step_printed_before_it_died_is_kept(tmp_path: Path) -> None:
    row = '{"name": "a", "value": 2.5, "unit": "ms"}'
    (died,) = check(tmp_path, [printing(f"print('{row}'); print('{row[:20]}'); raise SystemExit(3)")])
    assert died.ended == "exit 3" and [entry["value"] for entry in died.rows] == [2.5]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("3 failed, 140 passed, 2 skipped in 61.20s (0:01:01)", {"passed": 140, "failed": 3, "skipped": 2}),
        ("12 passed, 400 deselected in 8.01s", {"passed": 12, "failed": 0, "skipped": 0}),
        ("2 errors in 1.00s", {"passed": 0, "failed": 2, "skipped": 0}),
        ("1 failed, 2 errors in 1.00s", {"passed": 0, "failed": 3, "skipped": 0}),
        ("========= ERROR SUMMARY: 0 errors", {"errors": 0}),
        ("trial 5 done: 4.71 bits/byte, accuracy 0.275, 0.234 MFLOPs/token [6/12, about 60 s left]", {"complete": 6}),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", {"errors": 2}),
    ],
)
def test_what_tests_and_the_sanitizer_print_becomes_figures(tmp_path: Path, line: str, wanted: dict) -> None:
    (done,) = check(tmp_path, [printing(f"print({line!r})")])
    assert {row["name"].removeprefix("step: "): row["value"] for row in done.rows} == wanted


def test_a_figure_stands_beside_what_it_should_be() -> None:
    holds, missed, unmeasured = COMPARISONS[0], COMPARISONS[2], COMPARISONS[3]
    assert not holds.at_most and missed.at_most
    step = printing("")
    rows = ({"name": holds.name, "value": 3.0, "unit": "TB/s"}, {"name": missed.name, "value": 9.0, "unit": "us"})
    lines = summary([Done(step, "ok", 1.0, rows)], dry=False).splitlines()
    found = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    assert found[holds.name].endswith("| holds |") and "3.0 TB/s" in found[holds.name]
    assert found[missed.name].endswith("| MISSED |")
    assert "unmeasured" in found[unmeasured.name]
    assert "MISSED" not in summary([Done(step, "ok", 1.0, rows)], dry=True)
