"""What tests share: a small text, quick settings, stores of both kinds."""

import contextlib
import os
import pwd
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nas.store import Store


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prepared texts are kept for this session alone."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of words with some structure to learn."""
    rng = random.Random(0)
    words = ["stream", "gate", "width", "depth", "front", "trial", "kernel", "walsh", "loss", "token"]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(1500)))
    return str(path)


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """A throw-away PostgreSQL in a temporary folder, reached by a socket there; yields its URL."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    binary = next((folder for folder in folders if (folder / "initdb").exists()), None)
    if binary is None:
        pytest.skip("no PostgreSQL server binaries on this machine")
    home = Path(tempfile.mkdtemp(prefix="pg-"))
    home.chmod(0o755)
    options: dict = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        nobody = pwd.getpwnam("nobody")
        os.chown(home, nobody.pw_uid, nobody.pw_gid)
        options = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    options |= {"env": os.environ | {"LC_ALL": "C", "HOME": str(home)}, "cwd": home}
    init = [binary / "initdb", "-D", home / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run([str(part) for part in init], check=True, stdout=subprocess.DEVNULL, **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ["fsync=off", "synchronous_commit=off", "listen_addresses="]
    command = [str(binary / "postgres"), "-D", str(home / "data"), "-k", str(home), "-p", str(port)]
    command += [part for setting in settings for part in ("-c", setting)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    try:
        ready = [str(binary / "pg_isready"), "-q", "-h", str(home), "-p", str(port)]
        deadline = time.monotonic() + 20
        while subprocess.run(ready, check=False).returncode:
            assert server.poll() is None and time.monotonic() < deadline, "PostgreSQL did not start"
            time.sleep(0.05)
        yield f"postgresql://postgres@/postgres?host={home}&port={port}"
    finally:
        server.send_signal(2)  # fast shutdown
        server.wait(20)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty store of each kind."""
    if request.param == "sqlite":
        with Store(str(tmp_path / "nas.db"), create=True) as opened:
            yield opened
        return
    with Store(request.getfixturevalue("postgres"), create=True) as opened:
        yield opened
        for study in opened.studies():
            for driver in opened.live_drivers(opened.study(study["name"])):
                opened.stop_driver(driver)
            opened.delete_study(study["name"])
