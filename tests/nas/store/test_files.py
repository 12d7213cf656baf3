"""The file of a store is found from its URL alone, and by SQLAlchemy's rules."""

from pathlib import Path

import pytest

from hypernas.errors import StoreError
from hypernas.store import Reader, Store
from hypernas.store.connection import parse_url
from hypernas.store.files import check_store, file_of

NAMES = ("q?a.db", "q?b.db", "x%20y.db", "x y.db", "a#b.db", "50%.db", "t?timeout=3", "a@b:c.db", "to.://x.db", "ü.db")


@pytest.mark.parametrize(
    "url",
    [
        *("nas.db", "a/b c.db", "/tmp/x.db", "sqlite:///x.db", "sqlite:////tmp/x.db?timeout=3", "sqlite:///x%20y.db"),
        *("sqlite+pysqlite:///x%3Fy.db?timeout=3", *NAMES),
    ],
)
def test_a_urls_file_is_the_one_that_is_opened(url: str) -> None:
    assert file_of(url) == parse_url(url).database


def test_a_store_given_as_a_file_name_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("to.:").mkdir()
    for name in NAMES:
        with Store(name, create=True) as store:
            assert store.url.database == name
        with Reader(store.to_type) as again:  # what is printed to be typed again
            assert again.url.database == name
    files = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {Path(name) for name in NAMES}


def test_a_url_keeps_its_meaning(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path}/x%20y.db?timeout=3", create=True):
        assert [path.name for path in tmp_path.glob("*.db")] == ["x y.db"]
    with Reader(str(tmp_path / "x y.db")):
        pass


@pytest.mark.parametrize(
    "url",
    ["sqlite:///x.db?timeout=soon", "sqlite:///x.db?mode=ro", "sqlite:///file:x.db?uri=true", "sqlite://host/x.db"],
)
def test_a_url_that_sqlite_does_not_take_is_refused_in_one_sentence(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="--store") as refused:
        Store(url, create=True)
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url", ["", ":memory:", "sqlite://", "sqlite:///", "sqlite:///:memory:", "postgresql://u@h/d", "mysql:///x"]
)
def test_a_url_of_no_file_is_left_to_whoever_opens_it(url: str) -> None:
    assert file_of(url) is None
    check_store(url)


def test_a_missing_file_is_refused_in_the_sentence_of_whoever_would_open_it(tmp_path: Path) -> None:
    for url, message in (
        (f"{tmp_path}/no.db", "no such file"),
        (f"{tmp_path}/no?x%20.db", "no such file"),
        (f"{tmp_path}/no/x.db", "the folder .* does not exist"),
    ):
        with pytest.raises(StoreError, match=message) as early:
            check_store(url)
        with pytest.raises(StoreError) as late:
            Reader(url)
        assert (str(early.value), early.value.missing) == (str(late.value), late.value.missing)
