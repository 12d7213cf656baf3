"""What is waited for: a lock, a server that restarts. It is said, it goes on afterwards, and it can be ended."""

import os
import signal
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from hypernas.bench.postgres import Postgres, throw_away_postgres
from hypernas.cli.main import main
from hypernas.errors import StoreError, UserError
from hypernas.store import Reader, Store
from hypernas.store.connection import parse_url
from hypernas.study.driver import Interrupt
from tests.nas.studies import new_study


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said after one and a half seconds is said at once, and SQLite's own waits are short."""
    monkeypatch.setattr("hypernas.store.patience.SILENT_SECONDS", 0.02)
    monkeypatch.setattr("hypernas.store.connection.TRY_SECONDS", 0.05)


class Said:
    """What has been written to stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self.text = capsys, ""

    def read(self) -> str:
        self.text += self._capsys.readouterr().err
        return self.text

    def wait_for(self, words: str, work: "Future[Any] | None" = None) -> None:
        """Until the words were said; fails where `work` ends without."""
        while words not in self.read():
            assert work is None or not work.done(), (self.text, work.exception())
            time.sleep(0.01)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return Said(capsys)


@contextmanager
def locked(store: Store) -> Iterator[None]:
    """Another process' lock on all that is in the store."""
    if store.url.get_backend_name() == "postgresql":
        with Store(store.url.render_as_string(hide_password=False)) as other, other._writing.begin() as connection:
            connection.execute(text("LOCK TABLE studies, trials, drivers IN ACCESS EXCLUSIVE MODE"))
            yield
        return
    holder = sqlite3.connect(str(store.url.database), isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    yield
    holder.execute("ROLLBACK")
    holder.close()


def goes_on_after(lock: Any, said: Said, *works: Callable[[], object]) -> None:
    """Each of the works waits for the lock, says so in one line together, and ends once it is gone."""
    with ThreadPoolExecutor(len(works)) as threads:
        with lock:
            waiting = [threads.submit(work) for work in works]
            said.wait_for("locked by another", waiting[0])
            time.sleep(0.2)  # whoever else waits has nothing to add
            assert not any(work.done() for work in waiting)
        for work in waiting:
            work.result(60)
    lines = said.read().splitlines()
    assert len(lines) == 1 and lines[0].startswith("--store ") and "waiting" in lines[0], lines


def test_a_locked_store_says_so_in_one_line_and_goes_on_once_the_lock_is_gone(store: Store, said: Said) -> None:
    study = new_study(store)
    driver = store.start_driver(study, 1)
    goes_on_after(
        locked(store), said, lambda: store.heartbeat(driver), lambda: store.update_settings(study, study.settings)
    )
    store.heartbeat(driver)
    assert store.shown in said.text and not said.read().splitlines()[1:]


def test_whoever_looks_at_a_table_that_is_locked_says_so_too(postgres: str, said: Said) -> None:
    with Store(postgres, create=True) as store:
        study = new_study(store, "looked at")
        with Reader(postgres) as reader:
            goes_on_after(locked(store), said, lambda: reader.trials(study))
        store.delete_study("looked at")
    assert "(process " in said.text


def test_whoever_opens_a_file_that_another_process_has_for_itself_says_so_too(tmp_path: Path, said: Said) -> None:
    path = str(tmp_path / "nas.db")
    with Store(path, create=True) as store:
        new_study(store)

    @contextmanager
    def exclusive() -> Iterator[None]:
        holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN IMMEDIATE")
        yield
        holder.close()

    def look() -> list[str]:
        with Reader(path) as reader:
            return [study["name"] for study in reader.studies()]

    goes_on_after(exclusive(), said, look)


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """A PostgreSQL that wants a password of the user `guarded`."""
    try:
        with throw_away_postgres(durable=True) as server:
            with Store(server.url, create=True) as store, store._engine.begin() as connection:
                connection.execute(text("CREATE ROLE guarded LOGIN PASSWORD 'right'"))
            rules = server.home / "data" / "pg_hba.conf"
            rules.write_text("local all guarded scram-sha-256\n" + rules.read_text())
            server.kill()
            server.start()
            yield server
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("opens", [Store, lambda url: Reader(url, waits=True)], ids=["store", "reader"])
def test_a_server_that_is_away_as_a_search_starts_is_waited_for(server: Postgres, opens: Any, said: Said) -> None:
    server.kill()  # and recovers as it starts: it is starting up for a moment, and says so
    with ThreadPoolExecutor(1) as thread:
        opened = thread.submit(opens, server.url)
        said.wait_for("does not answer", opened)
        server.start()
        opened.result(60).close()
    assert "No such file" in said.text or "refused" in said.text


def test_who_only_looks_is_answered_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    monkeypatch.setattr("hypernas.store.patience.LOOK_SECONDS", 0.1)
    assert main(["status", "--study", "s", "--store", f"postgresql://u@/d?host={tmp_path}"]) == 2
    assert "not reachable for 0 seconds: " in said.read()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"database": "nothing"}, 'database "nothing" does not exist'),
        ({"username": "nobody_here"}, 'role "nobody_here" does not exist'),
        ({"username": "guarded", "password": "wrong"}, "password authentication failed"),
        ({"username": "guarded"}, "no password supplied"),
    ],
)
def test_what_a_server_will_never_take_is_refused_at_once(
    server: Postgres, change: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGPASSWORD", raising=False)
    url = parse_url(server.url).set(**change).render_as_string(hide_password=False)
    monkeypatch.setattr("hypernas.store.patience.sleep", lambda _: pytest.fail("it was waited for"))
    with pytest.raises(StoreError, match="cannot be opened: ") as refused:
        Store(url)
    assert words in str(refused.value)


def test_a_host_that_does_not_exist_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypernas.store.patience.sleep", lambda _: pytest.fail("it was waited for"))
    with pytest.raises(StoreError, match=r"cannot be opened: .*host"):
        Store("postgresql://u@there.is.none.invalid/d")


def test_ctrl_c_ends_the_wait_for_a_server_at_once(said: Said) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes of pytest-xdist take no notice of it

    def stop() -> None:
        said.wait_for("does not answer")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:  # a socket's path has at most 107 bytes
        assert main(["search", "--study", "s", "--store", f"postgresql://u@/d?host={folder}"]) == 1
    signal.signal(signal.SIGINT, before)
    thread.join()
    assert said.read().splitlines()[1:] == ["", "aborted"]


def test_ctrl_c_ends_what_a_search_waits_for_before_its_first_trial() -> None:
    interrupt = Interrupt()

    def wait() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with interrupt.caught():
        with pytest.raises(KeyboardInterrupt):
            interrupt.at_once(wait)
        os.kill(os.getpid(), signal.SIGTERM)  # and later ones are counted as before
    assert interrupt.count == 2
