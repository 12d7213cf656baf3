import pandas as pd
import pytest

from hypernas.cli.main import main
from hypernas.dashboards.paper import study_figures, write_figures
from hypernas.errors import UserError

NAMES = ["curves", "front", "hypervolume"]


def test_every_figure_has_the_frame_behind_it(small):
    drawn = study_figures(small.store, "first")
    assert sorted(drawn) == NAMES
    assert drawn["front"][0]["trial"].tolist() == [0, 1, 2, 3, 4]
    assert drawn["hypervolume"][0]["completed"].tolist() == [1, 2, 3]


def test_a_folder_that_cannot_be_made_is_named(small, tmp_path):
    for folder in (tmp_path / "no" / "figures", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=str(folder)):
            write_figures(small.store, "first", str(folder))


@pytest.mark.browser
def test_figures_are_written_as_png_svg_and_csv(small, tmp_path, browser_path):
    files = write_figures(small.store, "first", str(tmp_path / "figures"))
    assert [path.name for path in files] == sorted(f"{name}.{kind}" for name in NAMES for kind in ("csv", "png", "svg"))
    assert (tmp_path / "figures" / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "validation loss" in (tmp_path / "figures" / "front.svg").read_text()
    assert pd.read_csv(tmp_path / "figures" / "front.csv")["bits_per_byte"].tolist()[:3] == [3.0, 3.5, 2.5]


@pytest.mark.browser
def test_nas_report_writes_the_figures_when_asked(small, tmp_path, browser_path, capsys):
    command = ["report", "--study", "first", "--store", small.store.url.database, "--out", str(tmp_path / "r.html")]
    assert main([*command, "--figures", str(tmp_path / "figures")]) == 0
    assert f"9 figure files written to {tmp_path / 'figures'}" in capsys.readouterr().out
    assert len(list((tmp_path / "figures").iterdir())) == 9
    assert main([*command, "--figures", str(tmp_path / "no" / "figures")]) == 2
