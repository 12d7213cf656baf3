"""The figure of a net taken apart."""

import numpy as np
import pytest

from hypernas.dashboards.blocks import CELLS, corners, figure, permute_evidence
from hypernas.dashboards.paper import check_file, write_figure
from hypernas.errors import UserError

NET = {
    "name": "net <b>",
    "coordinates": 4,
    "units": 6,
    "edges": 24,
    "confirmed": 12,
    "blocks": [{"coordinates": 2, "units": 3}, {"coordinates": 2, "units": 2}],
    "coordinate_order": [3, 1, 0, 2],
    "unit_order": [5, 0, 2, 1, 4, 3],
}


def test_edges_stand_in_the_order_of_the_blocks():
    surprise = np.arange(24.0).reshape(4, 6)
    shown = permute_evidence(surprise, NET)
    assert shown[0].tolist() == [23, 18, 20, 19, 22, 21]
    assert corners(NET) == [(0, 0, 3, 2), (3, 2, 5, 4)]


def test_a_wide_net_is_drawn_by_the_strongest_edge_of_every_cell():
    surprise = np.zeros((1000, 3))
    surprise[500, 1] = 9.0
    wide = {"coordinate_order": list(range(1000)), "unit_order": [0, 1, 2]}
    shown = permute_evidence(surprise, wide)
    assert shown.shape == (CELLS, 3)
    assert np.argwhere(shown).tolist() == [[CELLS // 2, 1]] and shown.max() == 9


def test_every_net_is_a_matrix_with_its_blocks_outlined_and_its_name_is_no_markup():
    drawn = figure([NET, NET], {"net <b>": np.ones((4, 6))})
    assert len(drawn.data) == 2 and len(drawn.layout.shapes) == 4
    assert drawn.layout.annotations[0].text.startswith("net &lt;b&gt;: 12 of 24 edges")
    assert (drawn.data[0].x0, drawn.data[0].dx) == (0.5, 1.0)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    for path, message in ((tmp_path / "a.jpg", "html, .png or .svg"), (tmp_path / "none" / "a.html", "does not exist")):
        with pytest.raises(UserError, match=message):
            check_file(str(path))
    write_figure(figure([NET], {"net <b>": np.ones((4, 6))}), str(tmp_path / "a.html"))
    assert "-log10 p" in (tmp_path / "a.html").read_text()
