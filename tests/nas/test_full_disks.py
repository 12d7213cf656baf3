"""A disk that is full, or read-only: one sentence that names what was being written, and nothing half-written."""

import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from hypernas import launch
from hypernas.cli import borders
from hypernas.cli.main import main
from hypernas.data.text import load_corpus
from hypernas.errors import DataError, UserError
from hypernas.files import write_whole
from hypernas.kernels import cpu_library
from hypernas.kernels.dispatch import BackendError
from hypernas.store import Reader, Store
from hypernas.store.weights import keep_weights
from hypernas.study import driver  # noqa: F401 - what searches import is imported once, and not by each child
from hypernas.training.checkpoint_files import open_folder
from tests.nas.studies import new_study

ROOM = "make room there"


def fill(disk: Path) -> None:
    """Leaves no room on it."""
    with (disk / "other").open("wb", buffering=0) as other:
        try:
            while True:
                other.write(bytes(4096))
        except OSError:
            pass


def in_child(work: Callable[[], int], log: Path) -> tuple[int, str]:
    """Exit code and stderr of the work done by a process of its own: no driver of this one stays behind alive."""

    def run() -> None:
        with log.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            code = work()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(300)
    assert child.exitcode is not None
    return child.exitcode, log.read_text()


def test_a_search_whose_disk_fills_up_ends_and_is_resumed_to_the_number_asked_for(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "launch", partial(launch.launch, evaluate="trivial"))
    command = ["search", "--study", "s", "--store", f"{small_disk}/nas.db"]
    start = partial(main, [*command, "--preset", "quick", "--engine", "inline", "--trials", "20"])
    resume = partial(main, [*command, "--resume"])
    code, said = in_child(start, tmp_path / "log")
    sentence = (
        f"nas: --store sqlite:///{small_disk}/nas.db: database or disk is full; nothing that was stored is lost: "
    )
    assert code == 2 and said.splitlines()[-1].startswith(sentence) and ROOM in said and "Traceback" not in said
    assert in_child(resume, tmp_path / "log")[0] == 2  # as long as it is full
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    code, said = in_child(resume, tmp_path / "log")
    assert code == 0 and "finished 20 of 20 trials" in said
    with Reader(f"{small_disk}/nas.db") as store:
        assert [trial.number for trial in store.trials(store.study("s"))] == list(range(20))


def test_a_store_that_has_no_room_to_be_looked_at_is_one_sentence(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store(f"{small_disk}/nas.db", create=True) as store:
        new_study(store)
    fill(small_disk)
    assert main(["status", "--study", "s", "--store", f"{small_disk}/nas.db"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"nas: --store sqlite:///{small_disk}/nas.db: ") and err.count("\n") == 1 and "disk" in err


def test_weights_that_do_not_fit_are_named_and_leave_nothing(small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "nas-artifacts").symlink_to(small_disk)
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        study = new_study(store)
        with pytest.raises(OSError, match="No space left") as full:
            keep_weights(store, study, 0, bytes(2_000_000))
    assert str(full.value.filename).endswith("/trial-0.safetensors")
    assert [path for path in small_disk.rglob("*") if path.is_file()] == []


def test_a_report_that_does_not_fit_leaves_the_older_one(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        new_study(store)
    out = small_disk / "report.html"
    out.write_text("older")
    assert main(["report", "--study", "s", "--store", str(tmp_path / "nas.db"), "--out", str(out)]) == 2
    assert f"--out {out} cannot be written: No space left on device" in capsys.readouterr().err
    assert out.read_text() == "older" and list(small_disk.iterdir()) == [out]


def test_a_folder_for_checkpoints_that_takes_none_is_named_before_the_search(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=f"checkpoints cannot be written to {small_disk}/c: Read-only file system"):
        open_folder(str(small_disk / "c"))


@pytest.mark.slow
def test_ray_without_room_for_its_session_says_which_folder(small_disk: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hypernas", "search", "--study", "s", "--store", str(tmp_path / "nas.db")]
    fill(small_disk)
    with TemporaryDirectory(dir="/tmp") as short:  # names of sockets are
        subprocess.run(["mount", "--bind", str(small_disk), short], check=True)
        try:
            done = subprocess.run(
                [*command, "--engine", "ray", "--workers", "1", "--trials", "1"],
                env={**os.environ, "RAY_TMPDIR": short},
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            subprocess.run(["umount", "--lazy", short], check=True)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("nas: Ray cannot start here: ") and short in last and "RAY_TMPDIR=/tmp, say" in last


def test_text_that_cannot_be_prepared_names_the_cache_and_leaves_nothing(small_disk: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"line {number} of a long text" for number in range(40_000)))
    with pytest.raises(DataError, match=r"cannot keep the prepared text below .*: No space left on device.*free some"):
        load_corpus(str(text), small_disk)
    assert list(small_disk.iterdir()) == []


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As `ulimit -f` has it, which is in force where no disk of one's own may be mounted."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_grows_over_its_limit_is_as_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"older")
    with files_of_at_most(1000), pytest.raises(OSError, match="too large") as refused:
        write_whole(path, bytes(5000))
    assert borders.explain(refused.value) == f"{path}: File too large; {ROOM} and try again"
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def test_a_store_that_grows_over_its_limit_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(tmp_path / "nas.db")
    with Store(store, create=True) as opened:
        new_study(opened)
        for _ in range(3):
            opened.start_driver(opened.study("s"), 1)
    with files_of_at_most(1000):
        assert main(["study", "delete", "s", "--yes", "--store", store]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"nas: --store sqlite:///{store}: disk I/O error (the disk is full") and err.count("\n") == 1


def test_an_export_beside_which_nothing_can_be_written_is_refused_at_once(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store(str(tmp_path / "nas.db"), create=True) as store:
        new_study(store)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    export = ["export", "--study", "s", "--store", str(tmp_path / "nas.db"), "--trial", "0"]
    train = ["train", "--study", "s", "--store", str(tmp_path / "nas.db"), "--trial", "0"]
    for command in (export, train):
        assert main([*command, "--out", str(small_disk / "winner")]) == 2
        err = capsys.readouterr().err
        assert f"{small_disk} cannot be written to" in err and err.count("\n") == 1


def test_a_user_without_a_home_is_told_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.getuid():
        pytest.skip("only root can become a user that nobody knows")
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    os.setresuid(54321, 0, 0)
    try:
        assert main(["search", "--study", "s", "--store", str(tmp_path / "nas.db"), "--engine", "inline"]) == 2
        with pytest.raises(BackendError, match="user 54321 has no home folder"):  # and other kernels are used
            cpu_library.library.__wrapped__()
    finally:
        os.setresuid(0, 0, 0)
    said = "nas: user 54321 has no home folder on this machine: set HOME, or XDG_CACHE_HOME, to a folder"
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("name", ["s" * 250 + ".db", "s" * 246, "\u00e9" * 123])
def test_a_stores_name_that_leaves_no_room_for_its_endings_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", "--study", "s", "--store", str(tmp_path / name), "--engine", "inline"]) == 2
    assert "bytes, and at most 245 leave room" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_may_have_the_longest_name_there_is(tmp_path: Path) -> None:
    path = tmp_path / ("r" * 255)
    write_whole(path, b"whole")
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]
