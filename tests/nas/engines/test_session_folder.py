"""Where Ray writes of a cluster of our own: it goes with the cluster, or with the next one."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from hypernas.engines.session_folder import close_session_folder, open_session_folder


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Ray's folder of a test; its name is short, as those of sockets have to be."""
    with tempfile.TemporaryDirectory(prefix="nr", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder) / "ray"


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


KEPT = f"nas-crashed-{os.getuid()}"


def test_a_session_goes_with_its_cluster_and_of_those_that_crashed_the_last_one_stays(root: Path) -> None:
    (Path(str(open_session_folder())) / "raylet.out").write_text("in order")
    close_session_folder()
    assert names(root) == set()
    for crash in ("first", "second"):
        (Path(str(open_session_folder())) / "raylet.out").write_text(crash)
        close_session_folder(crashed=True)
    assert names(root) == {KEPT} and (root / KEPT / "raylet.out").read_text() == "second"
    open_session_folder()
    close_session_folder()
    assert names(root) == {KEPT}
    close_session_folder()  # of a cluster that was joined there is none


def test_a_killed_searchs_session_goes_with_the_next_and_no_other_does(root: Path) -> None:
    open_it = "from hypernas.engines.session_folder import open_session_folder as open_it; open_it()"
    command = [sys.executable, "-c", f"{open_it}; print('here', flush=True); input()"]
    (root / "session_of_others").mkdir(parents=True)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "here\n"
        open_session_folder()
        close_session_folder()
        assert len(names(root)) == 3  # the folder of one that lives, and its lock
        other.send_signal(signal.SIGKILL)
    open_session_folder()
    close_session_folder()
    assert names(root) == {"session_of_others"}


def test_where_sockets_would_have_too_long_a_name_ray_makes_its_own_folder(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(root.parent / "of-a-job-of-some-batch-system"))
    assert open_session_folder() is None
    close_session_folder()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "tune"])
def test_searches_leave_nothing_in_rays_folder_whether_they_end_or_are_killed(
    engine: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = ["search", "--store", str(tmp_path / "nas.db"), "--engine", engine, "--preset", "quick", "--workers", "1"]
    command += ["--set", "depth=2", "--set", "d_model=32", "--set", f"data.path={text}", "--set", "train.tokens=20000"]
    with subprocess.Popen([sys.executable, "-m", "hypernas", *command], stderr=subprocess.PIPE, text=True) as search:
        assert search.stderr is not None
        said = []
        for line in search.stderr:
            said.append(line)
            if "starts" in line:
                break
        assert "starts" in said[-1], said
        children = psutil.Process(search.pid).children(recursive=True)
        search.kill()
    assert len(names(root)) == 2  # at once: nobody waits for Ray's helpers, which stay for a minute or two
    again = [sys.executable, "-m", "hypernas", *command, "--resume", "--trials", "4"]
    assert subprocess.run(again, check=False, timeout=600).returncode == 0
    assert names(root) == set()
    assert {path.name for path in tmp_path.iterdir() if "nas-" in path.name} == {"nas-artifacts"}
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
