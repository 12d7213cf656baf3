"""Every reader walks over every study that stock Optuna made, and says what is right for it."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import optuna
import pytest
from dash import Dash
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from hypernas import dashboards
from hypernas.cli.main import main
from hypernas.dashboards import frames, notebook, pages
from hypernas.dashboards.app import make_app
from hypernas.dashboards.live import Watch
from hypernas.dashboards.paper import study_figures
from hypernas.dashboards.report import render
from hypernas.dashboards.texts import axes
from hypernas.errors import StoreError, StudyError, UserError
from hypernas.integrations.optuna_db import TAKEN, best_params, import_study
from hypernas.integrations.warm_start import warm_start
from hypernas.launch import check_search
from hypernas.records import State, Trial
from hypernas.store import Reader, Store

X = {"x": FloatDistribution(0, 10)}
DOWN, UP = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE
ODD_NAME = "team/run 1 <b>x</b> ü'\""


# Whose pages and figures are drawn in each run of the tests; the slow ones draw all.
ODDEST = ("one", "not finite", "no trials", "unfinished", "names of ours")
FIGURES = ("pareto_figure", "curve_figure", "hypervolume_figure", "importance_figure")


def trial(
    values: Sequence[float] | None,
    params: Mapping[str, Any],
    distributions: Mapping[str, BaseDistribution] = X,
    **more: Any,
) -> FrozenTrial:
    more = {"state": TrialState.COMPLETE if values is not None else TrialState.FAIL, **more}
    return create_trial(values=values, params=dict(params), distributions=dict(distributions), **more)


def of_x(*values: Sequence[float]) -> list[FrozenTrial]:
    return [trial(value, {"x": float(place)}) for place, value in enumerate(values)]


def write_studies(url: str) -> list[str]:
    """Writes the studies into Optuna's database at `url`; their names."""
    kinds = CategoricalDistribution((None, True, "a"))
    family = {"family": CategoricalDistribution(("transformer", "mlp")), "state": IntDistribution(0, 9)}
    family |= {"trial": IntDistribution(0, 9), "loss": FloatDistribution(0, 1)}
    conditional = {"depth": IntDistribution(1, 9)}
    pruned = TrialState.PRUNED
    studies: dict[str, tuple[list[StudyDirection], list[str] | None, list[FrozenTrial]]] = {
        "one": ([DOWN], None, of_x([3.0], [1.0], [2.0])),
        "maximised": ([UP], None, of_x([3.0], [9.0], [2.0])),
        "not finite": (
            [DOWN],
            None,
            [
                *of_x([inf], [1.0], [-inf], [2.0]),
                trial(None, {"x": 1.0}, intermediate_values={0: nan, 1: inf}),
                trial([1.5], {"x": 2.0}, intermediate_values={0: nan, 1: 2.5, 2: -inf, 3: 1.5}),
            ],
        ),
        "up and down": ([DOWN, UP], ["cost", "gain"], of_x([1.0, 1.0], [2.0, 3.0], [3.0, 2.0])),
        "three": ([DOWN, DOWN, UP], None, of_x([1.0, 1.0, 1.0], [2.0, 0.0, 1.0])),
        "no trials": ([DOWN], None, []),
        "failed alone": ([DOWN], None, [trial(None, {"x": 1.0}), trial(None, {"x": 2.0})]),
        "no parameters": ([DOWN], None, [trial([1.0], {}, {}), trial([1.0], {}, {})]),
        ODD_NAME: ([DOWN], ["a, b <i>"], of_x([1.0], [2.0])),
        "unfinished": (
            [DOWN],
            None,
            [
                trial(None, {"x": 1.0}, state=TrialState.RUNNING, intermediate_values={-5: 2.0, 10**9: 1.0}),
                trial(None, {"x": 2.0}, state=TrialState.WAITING),
                trial(None, {"x": 3.0}, state=pruned, intermediate_values={1: 7.0}),
                trial([1.0], {"x": 4.0}, intermediate_values={1: 3.0, 2: 2.0}),
            ],
        ),
        "names of ours": (
            [DOWN, DOWN, DOWN, UP],
            ["loss", "loss", "state", "seed"],
            [
                trial([1.0, 2.0, 3.0, 4.0], {"family": "transformer", "state": 1, "trial": 7, "loss": 0.5}, family),
                trial([2.0, 1.0, 3.0, 4.0], {"family": "mlp", "state": 2, "trial": 8, "loss": 0.25}, family),
            ],
        ),
        "minus": ([DOWN, UP], ["-a", "a"], of_x([1.0, 5.0], [2.0, 6.0])),
        "cost of ours": ([DOWN], ["parameters"], of_x([100.0], [10.0])),
        "choices": (
            [DOWN],
            None,
            [trial([float(i)], {"x": choice}, {"x": kinds}) for i, choice in enumerate(kinds.choices)],
        ),
        "conditional": (
            [DOWN],
            None,
            [*of_x([1.0], [2.0], [4.0]), *(trial([float(d)], {"depth": d}, conditional) for d in (3, 4, 4))],
        ),
        "constrained": (
            [DOWN],
            None,
            [
                trial([1.0], {"x": 1.0}, system_attrs={"constraints": [2.0]}),
                trial([3.0], {"x": 2.0}, system_attrs={"constraints": [-1.0]}, user_attrs={"note": [nan, "\x1b"]}),
            ],
        ),
    }
    storage = optuna.storages.RDBStorage(url)
    for name, (directions, metrics, trials) in studies.items():
        study = optuna.create_study(storage=storage, study_name=name, directions=directions)
        if metrics is not None:
            study.set_metric_names(metrics)
        study.add_trials(trials)
    return list(studies)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """Optuna's database, and the names of its studies."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = tmp_path_factory.mktemp("optuna") / "their?100%25.db"  # a file's name, to the letter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # metric names are experimental there, and choices of mixed kinds
        names = write_studies("sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F"))
    assert path.exists()
    return str(path), names


@pytest.fixture(scope="module")
def imported(
    theirs: tuple[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, list[str]]]:
    """A store of ours with all of them, and what was said of each."""
    path, said = str(tmp_path_factory.mktemp("ours") / "nas.db"), []
    with Store(path, create=True) as store:
        for name in theirs[1]:
            import_study(store, theirs[0], name, lambda line, name=name: said.append(f"{name}: {line}"))
    yield path, said


@pytest.fixture(scope="module")
def reader(imported: tuple[str, list[str]]) -> Iterator[Reader]:
    with Reader(imported[0]) as opened:
        yield opened


def names_of(reader: Reader) -> list[str]:
    return [str(row["name"]) for row in reader.studies()]


def front_of(reader: Reader, study: str) -> list[int]:
    return [trial.number for trial in reader.front(reader.study(study))]


def test_what_is_no_finite_number_is_left_out_and_said(imported: tuple[str, list[str]], reader: Reader) -> None:
    assert imported[1] == [
        "not finite: left out 4 reports that are no finite numbers (NaN or infinite)",
        "not finite: 2 trials count as failed, as their values are no finite numbers",
    ]
    row = reader.study("not finite")
    assert [report.loss for report in reader.reports(row)] == [2.5, 1.5]
    failed = [trial for trial in reader.trials(row) if trial.state == State.FAILED]
    assert [trial.failure and trial.failure.message for trial in failed] == [
        "Optuna was told [inf]: no finite numbers",
        "Optuna was told [-inf]: no finite numbers",
        "it failed in Optuna",
    ]


@pytest.mark.parametrize(
    ("study", "objectives", "front"),
    [
        ("one", ("value_0",), [1]),
        ("maximised", ("-value_0",), [1]),
        ("not finite", ("value_0",), [1]),
        ("up and down", ("cost", "-gain"), [0, 1]),
        ("three", ("value_0", "value_1", "-value_2"), [0, 1]),
        ("no trials", ("value_0",), []),
        ("failed alone", ("value_0",), []),
        ("unfinished", ("value_0",), [3]),
        ("names of ours", ("loss", "loss_1", "state_value", "-seed_value"), [0, 1]),
        ("minus", ("-a", "-a_1"), [0, 1]),
        ("constrained", ("value_0",), [1]),
    ],
)
def test_objectives_have_names_of_their_own_and_directions_are_kept(
    study: str, objectives: tuple[str, ...], front: list[int], reader: Reader
) -> None:
    row = reader.study(study)
    assert row.objectives == objectives
    assert front_of(reader, study) == front
    table = frames.trial_frame(reader.trials(row), reader.reports(row), row.objectives)
    assert sorted(table.loc[table["on_front"], "trial"]) == front


def test_a_value_is_negated_where_it_is_maximised_alone(reader: Reader) -> None:
    first = reader.trial(reader.study("minus"), 0)
    assert dict(first.values) == {"-a": 1.0, "-a_1": -5.0}


def test_no_objective_is_called_as_a_column_of_ours() -> None:
    columns = set(frames.COLUMNS) | {f.name for f in fields(Trial)} | {"on_front"}
    assert columns <= TAKEN


def test_the_terminal_says_what_is_right_for_each_study(
    imported: tuple[str, list[str]], reader: Reader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in names_of(reader):
        base = ["--study", name, "--store", imported[0]]
        row = reader.study(name)
        trials = reader.trials(row)
        for command in (["front"], ["front", "--json"], ["front", "--format", "csv"], ["status"]):
            assert main([*command[:1], *base, *command[1:]]) == 0
        said = capsys.readouterr().out
        assert "imported from Optuna: there is no baseline" in said
        for trial in reader.front(row):
            assert all(f"{objective} {trial.values[objective]:.6g}" in said for objective in row.objectives)
        for trial in trials[-1:]:
            assert main(["show", *base, "--trial", str(trial.number), "--json"]) == 0
            shown = json.loads(capsys.readouterr().out)
            assert (shown["arch"], shown["training"], "cost" in shown) == (dict(trial.params), {}, False)
            assert main(["show", *base, "--trial", str(trial.number)]) == 0
            lines = capsys.readouterr().out
            assert all(
                f"step {report.step}: reported {report.loss:.6g}" in lines
                for report in reader.reports(row, [trial.number])
            )


@pytest.mark.parametrize(
    "command",
    [
        ["export", "--trial", "0", "--out", "OUT"],
        ["export", "--pick", "knee", "--out", "OUT"],
        ["train", "--trial", "0", "--out", "OUT"],
        ["scale", "--trials", "0"],
        ["scale", "--baseline", "llama-like"],
        ["search", "--resume"],
        ["study", "export", "one", "--to", "OUT"],
        ["study", "replay", "one"],
        ["search", "--warm-start", "one", "--resume"],
    ],
)
def test_what_needs_a_space_refuses_in_one_sentence(
    command: list[str], imported: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = [str(out) if part == "OUT" else part for part in command]
    study = [] if command[0] == "study" else ["--study", "one"]
    assert main([*given, *study, "--store", imported[0]]) == 2
    said = capsys.readouterr().err
    assert "Optuna" in said and said.count("\n") == 1 and not out.exists()


def test_warm_starts_from_optuna_say_what_is_wrong(
    theirs: tuple[str, list[str]], imported: tuple[str, list[str]]
) -> None:
    _, plan, _ = check_search({"study": "new", "store": imported[0]})
    for name in ODDEST:
        with pytest.raises(UserError, match=r"is not in this search|there is no architecture in it yet"):
            warm_start(f"optuna:{theirs[0]}#{name}", imported[0], plan)
        with pytest.raises(UserError, match="was imported from Optuna"):
            warm_start(f"{imported[0]}#{name}", "nas.db", plan)
    assert best_params(theirs[0], "maximised") == [(1, {"x": 1.0})]


def test_a_study_that_is_there_already_and_a_name_too_long_are_refused(
    theirs: tuple[str, list[str]], imported: tuple[str, list[str]], tmp_path: Path
) -> None:
    with Store(imported[0]) as store, pytest.raises(StudyError, match=r"'one' is in .* already: delete it there"):
        import_study(store, theirs[0], "one")
    optuna.create_study(study_name="x" * 300, storage=f"sqlite:///{tmp_path}/long.db")
    with Store(imported[0]) as store, pytest.raises(StudyError, match="300 characters: wanted at most 200"):
        import_study(store, f"{tmp_path}/long.db", None)
    with Store(imported[0]) as store, pytest.raises(StoreError, match="there is no such file"):
        import_study(store, f"{theirs[0]}.none", None)


def finite_numbers(drawn: Any) -> bool:
    """Whether a figure can be written as JSON that a browser reads: Plotly writes what is not finite as null."""
    return bool(json.loads(drawn.to_json(), parse_constant=lambda name: pytest.fail(f"{name} in a figure")))


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_reports_figures_and_notebooks_draw_each_study(
    every: bool, imported: tuple[str, list[str]], reader: Reader
) -> None:
    for name in names_of(reader) if every else ODDEST:
        row = reader.study(name)
        page = render(reader, row)
        assert "budget of flops" not in page and "NaN" not in page.partition("<script>")[0]
        for _, drawn in study_figures(reader, name).values():
            assert finite_numbers(drawn)
        for kind in FIGURES:
            assert finite_numbers(getattr(dashboards, kind)(name, store=imported[0]))
        table = dashboards.frame(name, store=imported[0])
        assert len(table) == len(reader.trials(row))
        assert list(notebook.front_frame(name, imported[0])["trial"]) == front_of(reader, name)


def test_the_front_of_one_objective_is_the_best_so_far(imported: tuple[str, list[str]]) -> None:
    drawn = dashboards.pareto_figure("one", store=imported[0])
    line = next(trace for trace in drawn.data if trace.mode == "lines")
    assert (line.name, list(line.x), list(line.y)) == ("best so far", [0, 1], [3.0, 1.0])
    curve = dashboards.curve_figure("unfinished", store=imported[0])
    assert (curve.layout.xaxis.title.text, curve.layout.yaxis.title.text) == ("step", "reported value")


def test_choices_that_depend_on_each_other_are_each_looked_at(reader: Reader) -> None:
    row = reader.study("conditional")
    trials = reader.trials(row)
    choices = frames.choice_frame({trial.number: trial.params for trial in trials})
    space, names = frames.space_frame(frames.trial_frame(trials, [], row.objectives), choices)
    assert (len(space), names) == (6, ["x", "depth"])
    assert list(frames.importance_frame(space, names, "value_0")["choice"]) == ["depth"]  # each x was tried once


def test_a_parameter_called_as_a_column_of_ours_is_beside_it(reader: Reader) -> None:
    row = reader.study("names of ours")
    trials = reader.trials(row)
    choices = frames.choice_frame({trial.number: trial.params for trial in trials})
    space, names = frames.space_frame(frames.trial_frame(trials, [], row.objectives), choices)
    assert set(names) == {"family", "state_chosen", "trial_chosen", "loss_chosen"}
    assert (space["trial"].tolist(), space["trial_chosen"].tolist()) == ([0, 1], [7, 8])
    assert space["loss"].tolist() == [1.0, 2.0] and set(space["state"]) == {"COMPLETE"}


# ---- the live pages, by their callbacks ----------------------------------------------------------------------------


def call(app: Dash, name: str, values: dict[str, Any]) -> Any:
    """What the server answers a browser that asks for one callback; None where it changes nothing."""
    spec = app.callback_map[name]
    asked = {kind: [{**part, "value": values.get(f"{part['id']}.{part['property']}")} for part in spec[kind]]
             for kind in ("inputs", "state")}  # fmt: skip
    outputs = [dict(zip(("id", "property"), part.split("@")[0].rsplit(".", 1), strict=True))
               for part in name.strip(".").split("...")]  # fmt: skip
    body = {
        "output": name,
        "outputs": outputs if name.startswith("..") else outputs[0],
        "changedPropIds": [f"{part['id']}.{part['property']}" for part in spec["inputs"]],
        **asked,
    }
    answer = app.server.test_client().post("/_dash-update-component", json=body, base_url="http://127.0.0.1:8050")
    assert answer.status_code in (200, 204), answer.text
    return None if answer.status_code == 204 else json.loads(answer.text)["response"]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_page_of_the_dashboard_shows_each_study(
    every: bool, imported: tuple[str, list[str]], theirs: tuple[str, list[str]], reader: Reader
) -> None:
    watch = Watch(imported[0])
    app = make_app(watch)
    app.server.config["PROPAGATE_EXCEPTIONS"] = True
    server_side = [name for name, spec in app.callback_map.items() if "callback" in spec]
    assert len(server_side) > 12
    for study in theirs[1] if every else ODDEST:
        live = watch.study(study)
        assert live is not None
        x, y = axes(live.row.objectives, imported=True)
        costs, qualities = pages.axis_choices(live)
        assert x in {option["value"] for option in costs} and y in {option["value"] for option in qualities}
        number = front_of(reader, study)[:1] or [0]
        values = {
            "study.data": {"name": study, "id": live.row.id, "exists": True, "wanted": study},
            "seq.data": live.seq,
            "url.search": "?" + urlencode({"study": study, "trial": number[0]}),
            "front-x.value": x,
            "front-y.value": y,
            "front-states.value": [str(state) for state in State],
            "front-compare.value": [other for other in theirs[1] if other != study][:2],
            "front-moment.value": 1,
            "front-moment.max": 1,
            "front-budget.value": 1,
            "front-over.value": "completed",
            "front.relayoutData": {"shapes[0].x0": 1.0},
            "space-objective.value": live.row.objectives[-1],
            "studies.value": study,
            "export-button.n_clicks": 1,
        }
        for name in server_side:
            for path in pages.PAGES if "page.children" in name else ("/",):
                answer = call(app, name, {**values, "url.pathname": path})
                assert "Traceback" not in json.dumps(answer)
        content = json.dumps(call(app, "trial-content.children", values))
        assert "nas export" not in content and "learning_rate" not in content
    watch.close()


def test_numbers_of_the_store_are_finite(reader: Reader) -> None:
    for name in names_of(reader):
        row = reader.study(name)
        assert all(map(isfinite, row.reference.values()))
        assert all(isfinite(volume) for _, _, volume in reader.hypervolumes(row))
