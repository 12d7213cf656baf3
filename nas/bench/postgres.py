"""A throw-away PostgreSQL server for measurements and tests: in a temporary folder, reached by a socket there.

It needs the server's programs (Debian: postgresql) and runs as root and not.
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypernas.errors import UserError

START_SECONDS = 30.0


@dataclass(slots=True)
class Postgres:
    """A running server. `url` stays good while it is killed and started again."""

    home: Path
    binaries: Path
    options: dict[str, Any]
    durable: bool
    server: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.home}"

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        settings = [] if self.durable else ["fsync=off", "synchronous_commit=off"]
        settings += ["listen_addresses="]
        command = [str(self.binaries / "postgres"), "-D", str(self.home / "data"), "-k", str(self.home)]
        command += [part for setting in settings for part in ("-c", setting)]
        self.server = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **self.options
        )
        ready = [str(self.binaries / "pg_isready"), "-q", "-h", str(self.home)]
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run(ready, check=False).returncode:
            if self.server.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"PostgreSQL of {self.binaries} did not start in {self.home}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to the server and its processes: what a crash of the machine would leave."""
        assert self.server is not None
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait(20)
        # Its processes have groups of their own; they end by themselves once the first is gone.
        (self.home / "data" / "postmaster.pid").unlink(missing_ok=True)

    def stop(self) -> None:
        if self.server is not None and self.server.poll() is None:
            self.server.send_signal(signal.SIGINT)  # fast shutdown
            self.server.wait(20)


@contextmanager
def throw_away_postgres(*, durable: bool = False) -> Iterator[Postgres]:
    """A server of its own, deleted in the end; `durable` waits for the disk as a real one does.

    Raises UserError where its programs are not installed.
    """
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    on_path = shutil.which("initdb")
    folders += [Path(on_path).parent] if on_path else []
    binaries = next((folder for folder in folders if (folder / "initdb").exists()), None)
    if binaries is None:
        raise UserError("no PostgreSQL server is installed here: install one (Debian: postgresql), or name a database")
    home = Path(tempfile.mkdtemp(prefix="pg-"))
    home.chmod(0o755)
    options: dict[str, Any] = {"env": os.environ | {"LC_ALL": "C", "HOME": str(home)}, "cwd": home}
    if os.geteuid() == 0:  # the server refuses to run as root
        nobody = pwd.getpwnam("nobody")
        os.chown(home, nobody.pw_uid, nobody.pw_gid)
        options |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    init = [binaries / "initdb", "-D", home / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]
    server = Postgres(home, binaries, options, durable)
    try:
        subprocess.run([str(part) for part in init], check=True, stdout=subprocess.DEVNULL, **options)
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(home, ignore_errors=True)
