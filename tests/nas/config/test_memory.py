"""What cannot fit into a worker's memory is refused before anything is trained, on CPUs too."""

from pathlib import Path

import pytest

from hypernas.cli.main import main
from hypernas.config.plan import training_bytes
from hypernas.config.study_config import StudyConfig
from hypernas.engines import devices
from hypernas.engines.inline import Inline
from hypernas.errors import UserError
from hypernas.launch import launch
from hypernas.search_spaces import stored_space
from hypernas.store import Reader, Store
from hypernas.study.sweep import sweep

HUGE = {"depth": "999", "d_model": "4096"}  # a terabyte or more of weights, gradients and moments


def flags(folder: Path, settings: dict[str, str], **more: object) -> dict[str, object]:
    given = {"study": "s", "store": str(folder / "nas.db"), "preset": "quick", "engine": "inline", "trials": 4}
    return {**given, "settings": settings, **more}


def test_a_space_of_which_nothing_fits_is_refused_before_the_search_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypernas.config.plan.SAMPLED", 20)
    with pytest.raises(UserError, match=r"depth=999.* needs .* GB to be trained, and a worker has .* GB here: wanted"):
        launch(flags(tmp_path, HUGE), "trivial")
    with Reader(str(tmp_path / "nas.db")) as store:
        assert store.studies() == []


def test_of_a_space_of_which_some_fits_nothing_else_is_proposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hypernas.engines.inline.machine_memory", lambda: 5e7)
    settings = {"depth": "1,400", "d_model": "64,128"}
    assert launch(flags(tmp_path, settings, trials=10, sampler="random"), "trivial") == 0
    assert "exceeded a limit or a worker's memory" in capsys.readouterr().out
    with Reader(str(tmp_path / "nas.db")) as store:
        row = store.study("s")
        space = stored_space(row.space)
        assert all(training_bytes(space, space.from_json(trial.arch)) <= 5e7 for trial in store.trials(row))


def test_a_list_of_which_one_does_not_fit_is_refused_before_any_is_trained(tmp_path: Path) -> None:
    config = StudyConfig(study="s", store=str(tmp_path / "nas.db"), preset="quick", engine="inline")
    with Store(config.store, create=True) as store:
        with pytest.raises(UserError, match=r"999 .* GB here"):
            sweep(store, Inline(), config, [{"depth": 1, "d_model": 32, "head_dim": 8}, {**HUGE, "head_dim": 64}])
        assert store.trials(store.study("s")) == []


def test_the_largest_net_is_not_measured_where_it_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["search", "--study", "s", "--store", str(tmp_path / "nas.db"), "--preset", "quick", "--engine", "inline"]
    wide = ["--set", "d_model=32,65536", "--set", "depth=1,999", "--objectives", "bits_per_byte,peak_bytes"]
    assert main([*command, *wide]) == 2
    assert "peak_bytes is compared with that of the largest architecture, which needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("group", "file"),
    [
        ("0::/system.slice/job.service\n", "memory.max"),
        ("9:memory:/system.slice/job.service\n8:pids:/\n", "memory/memory.limit_in_bytes"),
    ],
    ids=["version 2", "version 1"],
)
def test_a_control_group_limits_the_memory_there_is(tmp_path: Path, group: str, file: str) -> None:
    (tmp_path / "own").write_text(group)
    folder, name = (tmp_path / file).parent, Path(file).name
    (folder / "system.slice/job.service").mkdir(parents=True)
    (folder / "system.slice" / name).write_text("max\n")
    (folder / "system.slice/job.service" / name).write_text("3000000000\n")
    assert list(devices._group_limits(tmp_path, tmp_path / "own")) == [3e9]
    assert list(devices._group_limits(tmp_path, tmp_path / "none")) == []
