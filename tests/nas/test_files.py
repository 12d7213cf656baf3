"""What is made is whole or not there; what a kill left goes when more is made beside it, and nothing else does."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hypernas.files import new_folder, remove_halves, scratch_folder, write_whole

FOLDER = """
with new_folder(target) as made:
    (made / "weights").write_text("half")
    {then}
"""
FILE = """
os.fsync = lambda descriptor: {then}
write_whole(target, b"half")
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
WAIT = "(print('here', flush=True), sys.stdin.read())"


@contextmanager
def making(what: str, target: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that makes `target`, as far as `what` lets it."""
    code = "import os, signal, sys\nfrom pathlib import Path\nfrom hypernas.files import new_folder, write_whole\n"
    command = [sys.executable, "-c", f"{code}target = Path(sys.argv[1])\n{textwrap.dedent(what)}", str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


def killed(what: str, target: Path) -> None:
    """Has a process end by SIGKILL while it makes `target`."""
    with making(what.format(then=KILL), target) as process:
        assert process.wait(60) == -signal.SIGKILL


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A folder that is there already, beside things of other people that are called much alike."""
    target = tmp_path / "winner"
    target.mkdir()
    (target / "weights").write_text("older")
    for name in (".winner-a1b2c3d4.partial", "winner.partial", ".winner-mine", "winner.0000.partial"):
        (tmp_path / name).write_text("not ours")
    return target


def test_a_folder_whose_making_was_killed_is_as_it_was_and_the_next_run_clears_up(older: Path) -> None:
    before = names(older.parent)
    killed(FOLDER, older)
    assert (older / "weights").read_text() == "older"
    assert len(names(older.parent) - before) == 2
    with new_folder(older) as made:
        (made / "weights").write_text("newer")
    assert names(older.parent) == before
    assert (older / "weights").read_text() == "newer"


def test_a_file_whose_writing_was_killed_is_as_it_was_and_the_next_writing_clears_up(older: Path) -> None:
    before, target = names(older.parent), older.parent / "report.html"
    killed(FILE, target)
    assert not target.exists() and len(names(older.parent) - before) == 1
    write_whole(target, b"whole")
    assert names(older.parent) == before | {"report.html"}


@pytest.mark.parametrize(("what", "entries"), [(FOLDER, 2), (FILE, 1)])
def test_what_a_live_process_is_making_is_left_alone_until_it_dies(what: str, entries: int, tmp_path: Path) -> None:
    target = tmp_path / "winner"
    with making(what.format(then=WAIT), target) as process:
        assert process.stdout and process.stdout.readline() == "here\n"
        remove_halves(tmp_path)
        assert len(names(tmp_path)) == entries
        process.kill()
    remove_halves(tmp_path)
    assert names(tmp_path) == set()


def test_what_another_machine_is_making_in_a_shared_folder_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(FILE, tmp_path / "report.html")
    (half,) = names(tmp_path)
    there = half.removesuffix(".partial")
    elsewhere = f"{there[:-16]}{'0' * 8}{there[-8:]}.partial"
    (tmp_path / half).rename(tmp_path / elsewhere)
    remove_halves(tmp_path)
    assert names(tmp_path) == {elsewhere}
    (tmp_path / elsewhere).rename(tmp_path / half)
    remove_halves(tmp_path)
    assert names(tmp_path) == set()


def test_a_folder_that_fails_is_as_it_was(older: Path) -> None:
    before = names(older.parent)
    with pytest.raises(ValueError, match="no"), new_folder(older):
        raise ValueError("no")
    with pytest.raises(KeyboardInterrupt), scratch_folder(older.parent, ".winner-"):
        raise KeyboardInterrupt
    assert names(older.parent) == before and (older / "weights").read_text() == "older"


def test_what_cannot_be_removed_keeps_its_name_for_the_next_to_try(tmp_path: Path) -> None:
    with scratch_folder(tmp_path, "nas-") as folder:
        moved = folder.rename(tmp_path / "moved")
        folder.write_text("in its place")
    assert len(names(tmp_path)) == 3
    moved.rmdir()
    folder.unlink()
    remove_halves(tmp_path)
    assert names(tmp_path) == set()


def test_a_folder_that_may_not_be_listed_is_no_obstacle(tmp_path: Path) -> None:
    remove_halves(tmp_path / "missing")
    if os.getuid():
        tmp_path.chmod(0o300)
    write_whole(tmp_path / "file", b"whole")
    tmp_path.chmod(0o700)
    assert (tmp_path / "file").read_bytes() == b"whole"
