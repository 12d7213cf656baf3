"""Exceptions of other libraries, as far as the command line."""

import subprocess
import sys
from pathlib import Path

import pytest

from hypernas.cli.borders import explain
from hypernas.cli.main import main
from hypernas.store import Store
from tests.nas.studies import new_study


@pytest.mark.parametrize("command", [["gallery"], ["--help"], ["search", "--help"]], ids=" ".join)
def test_output_that_cannot_be_written_is_one_sentence(command: list[str]) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("only Linux has a device that is always full")
    with full.open("w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "hypernas", *command], stdout=out, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == "nas: writing: No space left on device; make room there and try again\n"


@pytest.mark.parametrize("flag", ["--study", "--store"])
def test_an_argument_that_is_not_utf8_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["front", "--study", "s", flag, "b\udcff"]) == 2
    assert "is not UTF-8" in capsys.readouterr().err


def test_a_name_too_long_for_the_disk_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["front", "--study", "s", "--store", "a" * 300 + ".db"]) == 2
    assert capsys.readouterr().err.endswith(".db: File name too long\n")


@pytest.mark.parametrize("command", ["status --study s", "front --study s", "study list", "study delete s --yes"])
def test_a_store_with_damaged_pages_is_one_sentence_that_says_what_saves_it(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nas.db"
    with Store(str(path), create=True) as store:
        new_study(store)
    pages = bytearray(path.read_bytes())
    pages[4096:] = b"\x55" * (len(pages) - 4096)
    path.write_bytes(pages)
    assert main([*command.split(), "--store", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("nas: ") and err.count("\n") == 1 and "malformed" in err and ".recover" in err


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    assert explain(KeyError("objectives")) is None and explain(AssertionError()) is None


def test_arrow_and_safetensors_are_known_by_their_errors(tmp_path: Path) -> None:
    import pyarrow.parquet
    from safetensors import SafetensorError, safe_open

    (tmp_path / "damaged").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(Exception) as arrow:
        pyarrow.parquet.read_table(tmp_path / "damaged")
    with pytest.raises(SafetensorError) as weights:
        safe_open(tmp_path / "damaged", framework="numpy").__enter__()
    assert "a file of data cannot be read" in (explain(arrow.value) or "")
    assert "a file of weights cannot be read" in (explain(weights.value) or "")
