"""Inputs that somebody made to do harm: each is answered in one sentence, runs nothing, and takes bounded memory.

The table is in the modules hostile_*.py beside this one.
"""

import faulthandler
import gzip
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hypernas.cli.main import main
from hypernas.data import files
from hypernas.data.text import load_corpus
from hypernas.errors import DataError
from tests.nas import hostile_data, hostile_databases, hostile_exports, hostile_stores
from tests.nas.hostile import TABLE, Given, Row, make_whole

MODULES = (hostile_exports, hostile_stores, hostile_databases, hostile_data)  # which fill the table
ROWS = [pytest.param(row, marks=[pytest.mark.slow] * row.slow, id=row.name) for row in TABLE]
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
    status = Path("/proc/self/status")
    found = re.search(r"VmData:\s+(\d+) kB", status.read_text()) if status.exists() else None  # Linux alone says it
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        if found is not None:
            resource.setrlimit(resource.RLIMIT_DATA, ((int(found[1]) << 10) + BYTES, before[1]))
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.parametrize("row", ROWS)
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


def test_the_table_has_every_module_of_hostile_inputs() -> None:
    assert {row.make.__module__ for row in TABLE} == {module.__name__ for module in MODULES} and len(TABLE) > 100


@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.gz"])
def test_text_that_unpacks_too_far_leaves_nothing_in_the_cache(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "UNPACKED", 2)
    monkeypatch.setattr(files.Allowance.__init__, "__defaults__", (1 << 20,))
    (tmp_path / name).write_bytes(gzip.compress(b'{"text": "' + bytes(2 << 20)))
    with pytest.raises(DataError, match="unpacks to more than 1 MiB and 2 times its size"):
        load_corpus(str(tmp_path / name), tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
