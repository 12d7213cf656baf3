"""What tests share: a small text, quick settings, stores of both kinds."""

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# Nothing of the store at import: kernels are tested on GPU machines that have torch and no database.
if TYPE_CHECKING:
    from hypernas.store import Store

# An example takes as long as the machine makes it take: no test is about that.
settings.register_profile("hypernas", deadline=None)
settings.load_profile("hypernas")


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prepared texts are kept for this session alone. Compiled kernels stay, named by a hash of what they depend on."""
    from hypernas.kernels import cpu_library

    before = os.environ.get("XDG_CACHE_HOME")
    cache = tmp_path_factory.mktemp("cache")
    kept = cpu_library.cache_folder()
    kept.mkdir(parents=True, exist_ok=True)
    (cache / "hypernas").mkdir()
    (cache / "hypernas" / "kernels").symlink_to(kept)
    os.environ["XDG_CACHE_HOME"] = str(cache)
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
    path.write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(400)))
    return str(path)


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """A throw-away PostgreSQL; yields its URL. Skips where no server is installed."""
    from hypernas.bench.postgres import throw_away_postgres
    from hypernas.errors import UserError

    try:
        with throw_away_postgres() as server:
            yield server.url
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> "Iterator[Store]":
    """An empty store of each kind."""
    from hypernas.store import Store

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


@pytest.fixture
def isolated() -> list[str]:
    """What runs a command in a namespace of process ids of its own; skips where there can be none."""
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("a namespace of process ids cannot be made here")
    return command


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder that is a disk of its own, of 900 KB or what is asked for; skips where none may be mounted."""
    size = getattr(request, "param", "900k")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a disk that fills up wants the right to mount one: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def browser_path() -> str:
    """Where Chromium is; tests that need it are skipped, saying so, where there is none."""
    from hypernas.dashboards.screenshots import BROWSERS

    found = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium here: this test opens pages in a real browser (apt-get install chromium)")
    return found
