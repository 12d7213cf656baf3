"""Poolers in front of a PostgreSQL, in transaction mode: a transaction is given a session, and the next another."""

import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import cycle
from pathlib import Path

import pytest
from sqlalchemy import URL

from hypernas.store.connection import parse_url

SESSIONS = 3


@contextmanager
def pgbouncer(server: str, database: str) -> Iterator[str]:
    """The URL of a real pgbouncer before the server; skips where none is installed."""
    program = shutil.which("pgbouncer")
    if program is None:
        pytest.skip("no pgbouncer here (apt-get install pgbouncer): the pooler of these tests stands in for it")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "users").write_text('"postgres" ""\n')
        (folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host={parse_url(server).query['host']}\n"
            f"[pgbouncer]\nlisten_addr=\nlisten_port=6432\nunix_socket_dir={folder}\nauth_type=trust\n"
            f"auth_file={folder}/users\npool_mode=transaction\ndefault_pool_size={SESSIONS}\nserver_round_robin=1\n"
        )
        as_nobody = ["-u", "nobody"] if Path(folder).owner() == "root" else []
        process = subprocess.Popen([program, "-q", *as_nobody, str(folder / "pgbouncer.ini")])
        try:
            while not (folder / ".s.PGSQL.6432").exists():
                assert process.poll() is None
                time.sleep(0.05)
            yield f"postgresql://postgres@:6432/{database}?host={folder}"
        finally:
            process.terminate()
            process.wait(10)


@contextmanager
def switching_pooler(server: str, database: str) -> Iterator[str]:
    """The URL of a pooler that takes turns among the server's sessions: no two transactions in a row have one."""
    with tempfile.TemporaryDirectory() as name, closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(f"{name}/.s.PGSQL.6432")
        listener.listen()
        sessions = [_Session(parse_url(server).set(database=database)) for _ in range(SESSIONS)]
        threading.Thread(target=_accept, args=(listener, sessions), daemon=True).start()
        try:
            yield f"postgresql://postgres@:6432/{database}?host={name}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for session in sessions:
                session.stream.close()


class _Session:
    """One session of the real server, used by one client at a time."""

    def __init__(self, url: URL) -> None:
        self.lock = threading.Lock()
        self.stream = socket.socket(socket.AF_UNIX)
        self.stream.connect(f"{url.query['host']}/.s.PGSQL.5432")
        wanted = b"\0\3\0\0user\0postgres\0database\0%s\0client_encoding\0UTF8\0\0" % str(url.database).encode()
        self.stream.sendall((len(wanted) + 4).to_bytes(4, "big") + wanted)
        self.greeting, _ = self.answer()

    def answer(self) -> tuple[bytes, bool]:
        """All that the server says until it is ready again, and whether a transaction is open then."""
        said = b""
        while True:
            kind, message = _read_message(self.stream)
            said += message
            if kind == b"Z":
                return said, message[-1:] != b"I"


def _read_message(stream: socket.socket) -> tuple[bytes, bytes]:
    head = _read(stream, 5)
    return head[:1], head + _read(stream, int.from_bytes(head[1:], "big") - 4)


def _read(stream: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        part = stream.recv(count - len(got))
        if not part:
            raise ConnectionError("closed")
        got += part
    return got


def _accept(listener: socket.socket, sessions: list[_Session]) -> None:
    turns = cycle(sessions)
    with suppress(OSError):
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_serve, args=(client, turns), daemon=True).start()


def _serve(client: socket.socket, turns: Iterator[_Session]) -> None:
    with suppress(ConnectionError, OSError), closing(client):
        _read(client, int.from_bytes(_read(client, 4), "big") - 4)  # who it is; all here are one user
        greeted = False
        while True:
            session = next(turns)
            if not greeted:
                client.sendall(session.greeting)
                greeted = True
            asked = _read_batch(client)
            with session.lock:
                open_ = True
                while open_:
                    session.stream.sendall(asked)
                    said, open_ = session.answer()
                    client.sendall(said)
                    if open_:
                        asked = _read_batch(client)


def _read_batch(client: socket.socket) -> bytes:
    """A client's messages up to the one that asks for an answer."""
    asked = b""
    while True:
        kind, message = _read_message(client)
        if kind == b"X":
            raise ConnectionError("the client leaves")
        asked += message
        if kind in b"QS":
            return asked
