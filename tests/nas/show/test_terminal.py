"""Text from a database reaches a terminal as text: no escape sequence, no turned writing direction."""

import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from hypernas.cli.main import main
from hypernas.records import Failure, FailureKind, Proposal, Recipe, Result
from hypernas.show.terminal import INVISIBLE, make_console, visible
from hypernas.show.views import Lines, Screen
from hypernas.store import Store
from tests.nas.studies import new_study

CLIPBOARD = "\x1b]52;c;cm0gLXJmIH4=\x07"  # OSC 52: the terminal's clipboard now holds a command
HOSTILE = f"first{CLIPBOARD}\x1b[2J\x1b[31m\u202egnp.exe\x9b2K\x7f\r"


@pytest.fixture
def url(tmp_path: Path) -> str:
    path = str(tmp_path / "nas.db")
    with Store(path, create=True) as store:
        row = new_study(store, HOSTILE, data_name=HOSTILE)
        driver = store.start_driver(row, 1)
        arch = {"family": HOSTILE, HOSTILE: HOSTILE}
        for number in range(2):
            proposal = Proposal(arch, arch, f"a{number}", f"c{number}", Recipe(1e-3), "sampler", {})
            assert store.lease_new(row, driver, proposal, 9) is not None
        store.finish(row, Result(0, 1, {"bits_per_byte": 4.0, "flops_per_token": 1e6}, provenance={HOSTILE: HOSTILE}))
        store.finish(row, Result(1, 1, failure=Failure(FailureKind.ERROR, HOSTILE, HOSTILE)))
        store.stop_driver(driver)
    return path


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["study", "list"], 0),
        (["front", "--study", HOSTILE], 0),
        (["front", "--study", HOSTILE, "--format", "csv"], 0),
        (["status", "--study", HOSTILE], 0),
        (["status", "--study", "unknown"], 2),  # the message names the studies there are
        (["show", "--study", HOSTILE, "--trial", "0"], 2),
        (["export", "--study", HOSTILE, "--trial", "1", "--out", "out"], 2),
        (["study", "delete", HOSTILE, "--yes"], 0),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_what_a_command_prints_of_a_database_is_visible_text(
    words: list[str], code: int, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--store", url]) == code
    printed = capsys.readouterr()
    assert printed.out + printed.err and re.findall(INVISIBLE, printed.out + printed.err) == []


def test_json_says_exactly_what_the_database_holds(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "list", "--json", "--store", url]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)[0]["name"] == HOSTILE and re.findall(INVISIBLE, printed) == []
    assert main(["front", "--json", "--study", HOSTILE, "--store", url]) == 0
    assert json.loads(capsys.readouterr().out)[0]["arch"][HOSTILE] == HOSTILE


@given(st.text())
def test_json_survives_the_way_to_the_terminal(text: str) -> None:
    assert json.loads(visible(json.dumps(text))) == text


def test_a_live_view_moves_the_cursor_and_texts_in_it_do_not() -> None:
    out = io.StringIO()
    console = make_console(file=out, force_terminal=True, width=400)
    with Screen(3, 0, list, console) as view:
        view.message(HOSTILE)
        view.on_end(1, Result(1, 1, failure=Failure(FailureKind.ERROR, HOSTILE)))
    table = Table(title=f"[link=https://somebody.example]{HOSTILE}")
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    Lines(1, 0, "token", console).message(HOSTILE)
    printed = out.getvalue()
    assert "\x1b[?25l" in printed  # Rich's own: the cursor is hidden
    assert "somebody.example" in printed and "\\u001b]52;c;" in printed
    for harm in ("\x1b]", "\x07", "\x1b[2J", "\u202e", "\x9b", "\x7f"):
        assert harm not in printed
