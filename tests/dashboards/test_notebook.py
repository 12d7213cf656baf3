import pytest

from hypernas import dashboards
from hypernas.errors import StoreError, StudyError


def test_a_notebook_gets_frames_and_figures_by_the_studys_name(small):
    url = small.store.url.database
    small.complete(2.0, 5e6, params={"depth": 4})
    frame = dashboards.frame("first", store=url)
    assert frame["trial"].tolist() == [0, 1, 2, 3, 4, 5] and frame["depth"].tolist()[-1] == 4
    front = dashboards.pareto_figure("first", store=url)
    assert front.layout.xaxis.title.text == "forward FLOPs per token"
    assert "accuracy" in dashboards.pareto_figure("first", store=url, y="accuracy").layout.yaxis.title.text
    assert dashboards.curve_figure("first", store=url).data
    assert list(dashboards.hypervolume_figure("first", store=url, over="seconds").data[0].y)
    assert dashboards.importance_figure("first", store=url).layout.annotations[0].text.startswith("Importance needs")


def test_an_unknown_study_or_store_is_named(small, tmp_path):
    with pytest.raises(StudyError, match="it has: first"):
        dashboards.frame("second", store=small.store.url.database)
    with pytest.raises(StoreError, match="no such file"):
        dashboards.pareto_figure("first", store=str(tmp_path / "none.db"))
