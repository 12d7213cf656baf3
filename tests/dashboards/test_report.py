from html.parser import HTMLParser
from pathlib import Path

import pytest

from hypernas.dashboards.report import write_report
from hypernas.errors import StudyError, UserError


class Page(HTMLParser):
    """Counts tags and collects what a reader sees outside of scripts and styles."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text, self.links, self._open = [], "", [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._open = tag
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open not in ("script", "style"):
            self.text += data


def read(writer, tmp_path) -> Page:
    return Page(write_report(writer.store, writer.study.name, str(tmp_path / "report.html")).read_text("utf-8"))


def test_the_report_is_one_file_that_loads_nothing(small, tmp_path):
    page = read(small, tmp_path)
    assert page.links == [] and "link" not in page.tags
    assert page.tags.count("table") == 1 and page.tags.count("tr") == 1 + 5


def test_the_report_says_what_the_study_is_and_how_its_trials_ended(small, tmp_path):
    text = read(small, tmp_path).text
    for wanted in ("Study first", "1 running, 3 complete, 1 failed", "1 out of memory", "No found architecture beats"):
        assert wanted in text


def test_the_table_lists_the_front_first(small, tmp_path):
    source = write_report(small.store, "first", str(tmp_path / "r.html")).read_text("utf-8")
    rows = source.split("<tbody>")[1].split("<tr")[1:]
    assert [row.split('data-key="')[1].split('"')[0] for row in rows] == ["0", "2", "1", "3", "4"]
    assert ["front" in row.split(">")[0] for row in rows] == [True, True, False, False, False]


def test_a_value_of_several_seeds_has_its_deviation_beside_it(writer, tmp_path):
    writer.complete(2.5, 1e6, diagnostics={"by_seed": {"seed": [0, 1], "bits_per_byte": [2.4, 2.6]}})
    assert "2.5000 ± 0.1414" in read(writer, tmp_path).text


def test_an_empty_study_makes_a_page_that_says_so(writer, tmp_path):
    text = read(writer, tmp_path).text
    assert "none yet" in text and "No trials yet" in text


def test_a_study_of_failures_only_lists_them(writer, tmp_path):
    writer.fail("exploded")
    assert "exploded" in read(writer, tmp_path).text


def test_hostile_texts_are_shown_as_text(store, write_in, tmp_path, hostile):
    writer = write_in(store, hostile)
    writer.complete(3.0, 1e6, rungs=1, arch={"family": hostile}, origin=hostile[:16])
    writer.fail(hostile + "x" * 1_000_000)
    page = read(writer, tmp_path)
    assert page.text.count("<script>alert(1)</script><img src=x onerror=alert(2)>") >= 3  # heading, cell, failure
    assert "img" not in page.tags and page.tags.count("script") == 2 + 3  # Plotly, ours, and a data block a figure
    assert "\u202e" not in page.text and len(page.text) < 20_000


def test_a_missing_folder_an_unwritable_path_and_a_folder_are_named(small, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "no" / "r.html", tmp_path, tmp_path / "file" / "r.html", "/proc/report.html"):
        with pytest.raises(UserError, match=str(out)):
            write_report(small.store, "first", str(out))


def test_an_unknown_study_is_named(store, tmp_path):
    with pytest.raises(StudyError, match="no study 'none'"):
        write_report(store, "none", str(tmp_path / "r.html"))
    assert not (tmp_path / "r.html").exists()


@pytest.mark.browser
def test_the_report_opens_in_a_browser_without_a_network(small, tmp_path, browser):
    path = write_report(small.store, "first", str(tmp_path / "report.html"))
    context = browser.new_context(offline=True, color_scheme="dark")
    page = context.new_page()
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.goto(Path(path).as_uri())
    page.wait_for_function("document.querySelectorAll('.main-svg .trace').length >= 6")
    page.get_by_role("button", name="bits per byte").click()
    assert page.locator("tbody tr td:first-child").all_inner_texts() == ["4", "2", "0", "1", "3"]
    assert problems == []
    context.close()
