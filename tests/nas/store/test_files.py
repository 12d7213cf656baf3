"""The file of a store is found from its URL alone, and by SQLAlchemy's rules."""

from pathlib import Path

import pytest

from hypernas.errors import StoreError
from hypernas.store import Reader
from hypernas.store.connection import parse_url
from hypernas.store.files import check_store, file_of


@pytest.mark.parametrize(
    "url", ["nas.db", "a/b c.db", "/tmp/x.db", "x.db?timeout=3", "sqlite:///x.db", "sqlite:////tmp/x.db?timeout=3"]
)
def test_a_urls_file_is_the_one_that_is_opened(url: str) -> None:
    assert file_of(url) == parse_url(url).database


@pytest.mark.parametrize(
    "url", ["", ":memory:", "sqlite://", "sqlite:///", "sqlite:///:memory:", "postgresql://u@h/d", "mysql:///x"]
)
def test_a_url_of_no_file_is_left_to_whoever_opens_it(url: str) -> None:
    assert file_of(url) is None
    check_store(url)


def test_a_missing_file_is_refused_in_the_sentence_of_whoever_would_open_it(tmp_path: Path) -> None:
    for url, message in (
        (f"{tmp_path}/no.db", "no such file"),
        (f"{tmp_path}/no/x.db", "the folder .* does not exist"),
    ):
        with pytest.raises(StoreError, match=message) as early:
            check_store(url)
        with pytest.raises(StoreError) as late:
            Reader(url)
        assert (str(early.value), early.value.missing) == (str(late.value), late.value.missing)
