"""Inputs that somebody made to do harm: each is answered in one sentence, runs nothing, and takes bounded memory.

The table is in the modules hostile_*.py beside this one.
"""

import faulthandler
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hypernas.cli.main import main
from tests.nas import hostile_data, hostile_databases, hostile_exports, hostile_stores
from tests.nas.hostile import TABLE, Given, Row, make_whole

TABLES = (hostile_exports, hostile_stores, hostile_databases, hostile_data)
ROWS = [row for row in TABLE if row.make.__module__ in {module.__name__ for module in TABLES}]
BYTES = 3 << 29  # what a command may take beside the libraries that it imports, however large the input says it is
SECONDS = 120  # after which a command hangs, on a machine that is busy too


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_whole(folder)
    return folder


@contextmanager
def bounds() -> Iterator[None]:
    """Ends what takes too long, and refuses more memory than it may have."""
    held = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (held + BYTES, before[1]))
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_hostile_input_is_answered_in_one_sentence(
    row: Row, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, outside = tmp_path / "given", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("kept")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    canary = tmp_path / "canary"
    for command in row.make(Given(folder, canary, whole)):
        with bounds():
            code = main(command) if isinstance(command, list) else int(not command())
        out, err = capfd.readouterr()
        assert not canary.exists()
        assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("secret", "kept")]
        assert "\x1b" not in out + err and "Traceback" not in err
        said = [line for line in err.splitlines() if line.startswith("nas: ")]  # the others say what is being done
        if row.answer is None:
            assert (code, said) == (0, []), (command, err)
        else:
            assert (code, len(said)) == (2, 1), (command, code, out[-500:], err[-3000:])
            assert err.endswith(f"{said[0]}\n") and re.search(row.answer, said[0]), (command, err)
