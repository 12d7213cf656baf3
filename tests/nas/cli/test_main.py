"""The command line from outside: what it prints, and what it refuses."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hypernas.cli.main import main
from hypernas.store import Store

FAST = ["--engine", "inline", "--preset", "quick"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, text: str) -> str:
    """A store with a finished study of six trials."""
    store = str(tmp_path_factory.mktemp("searched") / "nas.db")
    settings = {
        "depth": "1",
        "d_model": "16,32",
        "head_dim": "8",
        "context": "32",
        "train.tokens": "2048",
        "train.batch_tokens": "256",
        "data.path": text,
    }
    flags = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    assert main(["search", "--study", "s", "--store", store, "--trials", "6", "--halving", "off", *FAST, *flags]) == 0
    return store


def printed(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    capsys.readouterr()
    assert main(list(command)) == 0
    return capsys.readouterr().out


def test_help_answers_without_the_heavy_libraries() -> None:
    code = "import sys; from hypernas.cli.main import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "nas search --study first" in done.stdout
    assert loaded.isdisjoint({"torch", "ray", "optuna", "sqlalchemy", "pandas", "plotly", "numpy"})


REFUSED = (
    "search --sampler foo",
    "search --set depth=x",
    "search --set nonsense=1",
    "search --space vision --set width=x",
    "search --objectives nonsense",
    "search --preset x",
    "search --space nope",
    "search --gpus-per-trial -1",
    "search --store no/such/folder/x.db",
    "status --study s --store no.db",
    "front --study s --store no.db",
    "show --study s --trial 1 --store no.db",
    "describe --set depth=x",
    "report --study s --store no.db",
    "scale --study s --store no.db",
    "scale --study s --store no.db --engine nope",
    "scale --study s --store empty.db --ladder x",
    "scale --study s --store empty.db --ladder 9,8",
    "scale --study s --store empty.db --budget x",
    "scale --study s --store empty.db --seeds 0",
    "dashboard --store no/such/folder/x.db",
    "export --study s --trial 1 --out o --store no.db",
    "export --study s --out o --store empty.db",
    "export --study s --trial 1 --out no/o --store empty.db",
    "export --study s --pick bset --out o --store empty.db",
    "export --study s --pick max-flops=x --out o --store empty.db",
    "export --study s --pick knee --formats tflite --out o --store empty.db",
    "train --study s --trial 1 --out no/o --store empty.db",
    "train --study s --trial 1 --out o --store no.db",
    "train --study s --trial 1 --out o --gpus-per-trial -1",
    "generate folder --prompt x --gpus-per-trial -1",
    "evaluate folder --gpus-per-trial -1",
    "generate folder --prompt x",
    "evaluate folder",
    "decompose folder --out o",
    "decompose folder --out o --controls 2",
    "decompose folder --out o --gpus-per-trial -1",
    "decompose folder --out o --figure x.foo",
    "study list --store no.db",
    "study delete s --store no.db",
    "study replay s --store no.db",
    "study export s --to x.db --store no.db",
    "bench search --workers 2",
    "bench kernels --op x",
    "bench kernels --tokens x",
    "bench kernels --dtype x",
    "bench kernels --device x",
    "bench train --device x",
)


# Each command in a copy of a process that has imported the command line and nothing else.
REFUSES = """
import os, sys
from hypernas.cli.main import main
for command in sys.argv[1:]:
    if os.fork() == 0:
        code = main(command.split())
        heavy = {"torch", "optuna", "ray", "sqlalchemy", "pandas", "plotly", "dash"} & set(sys.modules)
        print(f"nas {command}:", code, *heavy, flush=True)
        os._exit(0)
    os.wait()
"""


def test_bad_flags_are_refused_before_a_heavy_library_is_imported(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    done = subprocess.run(
        [sys.executable, "-c", REFUSES, *REFUSED], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"nas {command}: 2" for command in REFUSED], done.stderr


def test_every_command_has_help_that_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    listed = [
        "search",
        "status",
        "front",
        "show",
        "describe",
        "gallery",
        "export",
        "decompose",
        "report",
        "doctor",
        "study",
        "bench",
    ]
    for command in listed:
        assert len(printed(capsys, command, "--help").splitlines()) > 5


def test_front_prints_the_documented_json_best_loss_first(searched: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(printed(capsys, "front", "--study", "s", "--store", searched, "--json"))
    assert rows
    for row in rows:
        assert {"trial", "arch_hash", "values", "arch", "parameters", "seeds"} <= row.keys()
        assert row["values"].keys() == {"bits_per_byte", "flops_per_token"}
    losses = [row["values"]["bits_per_byte"] for row in rows]
    assert losses == sorted(losses)
    flops = [row["values"]["flops_per_token"] for row in rows]
    assert flops == sorted(flops, reverse=True)


def test_front_as_csv_has_a_line_a_trial(searched: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(printed(capsys, "front", "--study", "s", "--store", searched, "--json"))
    lines = printed(capsys, "front", "--study", "s", "--store", searched, "--format", "csv").splitlines()
    assert len(lines) == len(rows) + 1
    assert lines[0].startswith("trial,arch_hash,bits_per_byte,flops_per_token,parameters,")


def test_status_prints_the_documented_json(searched: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = json.loads(printed(capsys, "status", "--study", "s", "--store", searched, "--json"))
    wanted = {"study", "states", "failures", "workers", "utilisation", "trials_per_hour", "eta_seconds"}
    wanted |= {"hypervolume", "rank_correlation"}
    assert status.keys() == wanted
    assert status["states"]["COMPLETE"] == 6
    assert status["workers"] == 0  # nobody is searching now
    assert 0 < status["utilisation"] <= 1
    assert status["hypervolume"] >= 0


def test_show_tells_a_trials_whole_story(searched: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(printed(capsys, "show", "--study", "s", "--store", searched, "--trial", "0", "--json"))
    assert data["origin"] == "baseline"
    assert [point["rung"] for point in data["curve"]] == [0, 1, 2, 3]
    assert data["cost"]["parameters"]["total"] == data["parameters"]
    assert data["provenance"]["threads"] == 1
    text = printed(capsys, "show", "--study", "s", "--store", searched, "--trial", "0")
    assert "trial 0 of s: COMPLETE" in text


def test_describe_prints_the_documented_json(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(printed(capsys, "describe", "--set", "depth=12", "--set", "ffn.shape=hourglass", "--json"))
    assert data["arch"]["depth"] == 12
    parts = {"embedding", "attention", "ffn", "connections", "gates", "norms", "head", "total"}
    assert data["parameters"].keys() == parts
    assert data["flops_per_token"].keys() == parts | {"matmul", "elementwise"}
    total = sum(data["flops_per_token"][part] for part in parts - {"total"})
    assert total == data["flops_per_token"]["total"]
    assert total == data["flops_per_token"]["matmul"] + data["flops_per_token"]["elementwise"]
    assert data["activation_bytes_per_token"] > 0


def test_describe_leaves_out_what_the_architecture_does_not_use(capsys: pytest.CaptureFixture[str]) -> None:
    plain = json.loads(printed(capsys, "describe", "--json"))["arch"]
    assert plain.keys().isdisjoint({"ffn.sub_mlps", "streams.factors", "gates.rate", "gates.layers"})
    keys = printed(capsys, "describe", "--keys")
    assert all(name in keys for name in ("ffn.sub_mlps", "optim.lr", "data.path", "max.flops", "max.latency_ms"))


def test_every_named_architecture_can_be_described(capsys: pytest.CaptureFixture[str]) -> None:
    entries = json.loads(printed(capsys, "gallery", "--json"))
    assert {"gpt2-like", "llama-like", "resnet-20", "cosinegate"} <= {entry["name"] for entry in entries}
    for entry in entries:
        flags = ["--space", entry["space"], "--set", f"base={entry['name']}"]
        assert json.loads(printed(capsys, "describe", *flags, "--json"))["parameters"]["total"] > 0
        assert entry["name"] in printed(capsys, "gallery")


def test_study_list_and_delete(tmp_path: Path, searched: str, capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(printed(capsys, "study", "list", "--store", searched, "--json"))
    assert [(row["name"], row["space"], row["trials"]) for row in listed] == [("s", "lm", 6)]
    assert listed[0]["created"].startswith("20")
    copy = tmp_path / "copy.db"
    # A snapshot of the whole file, whatever is still in its log.
    with Store(searched) as store, store._engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql(f"VACUUM INTO '{copy}'")
    assert main(["study", "delete", "s", "--store", str(copy), "--yes"]) == 0
    assert json.loads(printed(capsys, "study", "list", "--store", str(copy), "--json")) == []


# ---- bad input ---------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


SEARCH = ["search", "--study", "new", *FAST]
BAD = {
    "unknown space": ([*SEARCH, "--space", "lmm"], "lm"),
    "space file": ([*SEARCH, "--space", "none.py:Space"], "no such file"),
    "unknown key": ([*SEARCH, "--set", "dept=3"], "depth"),
    "unknown value": ([*SEARCH, "--set", "ffn.shape=round"], "hourglass"),
    "no number": ([*SEARCH, "--set", "depth=many"], "whole number"),
    "empty range": ([*SEARCH, "--set", "depth=5..2"], "empty"),
    "no equals": ([*SEARCH, "--set", "depth"], "KEY=VALUE"),
    "nothing left": ([*SEARCH, "--set", "ffn.shape=hourglass", "--set", "ffn.ratio=4"], "below 1"),
    "factors": ([*SEARCH, "--set", "streams.n=4", "--set", "streams.factors=2x3"], "4"),
    "trials": ([*SEARCH, "--trials", "0"], "at least 1"),
    "workers": ([*SEARCH, "--workers", "-1"], "at least 1"),
    "trials no number": ([*SEARCH, "--trials", "ten"], "integer"),
    "empty name": (["search", "--study", "", *FAST], "--study"),
    "sampler": ([*SEARCH, "--sampler", "nsga"], "nsgaii"),
    "engine": (["search", "--study", "new", "--engine", "spark"], "ray"),
    "preset": (["search", "--study", "new", "--preset", "tiny"], "quick"),
    "kernels": ([*SEARCH, "--kernels", "fast"], "reference"),
    "objective": ([*SEARCH, "--objectives", "bits_per_byte,beauty"], "beauty"),
    "one objective": ([*SEARCH, "--objectives", "flops"], "two"),
    "latency of nothing": ([*SEARCH, "--set", "max.latency_ms=0"], "max.latency_ms=0.0: wanted a number at least"),
    "latency below nothing": ([*SEARCH, "--set", "max.latency_ms=-3"], "wanted a number at least"),
    "latency no number": ([*SEARCH, "--set", "max.latency_ms=nan"], "wanted a number at least"),
    "latency no word": ([*SEARCH, "--set", "max.latency_ms=fast"], "max.latency_ms=fast: wanted a number"),
    "data missing": ([*SEARCH, "--set", "data.path=/no/such/text"], "/no/such/text"),
    "timeout": ([*SEARCH, "--trial-timeout", "-1"], "above 0"),
    "store folder": (["search", "--study", "new", "--store", "/no/such/folder/nas.db", *FAST], "/no/such/folder"),
    "store kind": (["search", "--study", "new", "--store", "mysql://host/x", *FAST], "mysql"),
    "store of nothing": (["search", "--study", "new", "--store", "", *FAST], "names no file"),
    "store port": (["search", "--study", "new", "--store", "postgresql://u@h:abc/db", *FAST], "--store"),
    "store driver": (["search", "--study", "new", "--store", "postgresql+psycopg2://u@h/db", *FAST], "psycopg2"),
    "too many trials": ([*SEARCH, "--trials", "99999999999999999999"], "at least 1"),
    "no number of GPUs": (["search", "--study", "new", "--gpus-per-trial", "nan"], "a share of one GPU"),
    "part of a second GPU": ([*SEARCH, "--gpus-per-trial", "1.5"], "--gpus-per-trial 1.5: wanted 0 for CPUs"),
    "GPUs below none": ([*SEARCH, "--gpus-per-trial", "-1"], "a whole number of them"),
    "a speck of a GPU": ([*SEARCH, "--gpus-per-trial", "1e-9"], "from 0.01 to 1"),
    "GPUs without end": ([*SEARCH, "--gpus-per-trial", "inf"], "a whole number of them"),
    "workers of another part": (["bench", "search", "--workers", "2"], "--workers: a flag of --record alone"),
    "GPUs of a generation": (["generate", "x", "--prompt", "a", "--gpus-per-trial", "1.5"], "--gpus-per-trial 1.5"),
    "ray client": (["search", "--study", "new", "--preset", "quick", "--address", "ray://127.0.0.1:1"], "Ray Client"),
    "config missing": ([*SEARCH, "--config", "none.toml"], "none.toml"),
    "describe factors": (["describe", "--set", "streams.n=4", "--set", "streams.factors=2x3"], "2x3"),
    "describe factor": (["describe", "--set", "streams.n=8", "--set", "streams.factors=8"], "wanted 2x2x2 or 2x4"),
    "describe mhc-lite": (
        ["describe", "--set", "streams.n=8", "--set", "streams.mixing=mhc_lite"], "n=8: it mixes n! permutations"
    ),
    "describe head": (["describe", "--set", "head_dim=10"], "head_dim=10 does not divide the attention width 128"),
    "describe mask": (["describe", "--set", "gates.placement=ffn", "--set", "gates.layers=01"], "=01: wanted all"),
    "describe budget": (["describe", "--set", "match.parameters=1000"], "match.parameters=1000: wanted 6472 to"),
    "search budget": ([*SEARCH, "--set", "match.flops=1000"], "match.flops=1000: wanted"),
    "search mhc-lite": ([*SEARCH, "--set", "streams.n=8", "--set", "streams.mixing=mhc_lite"], "wanted n = 2, 3 or 4"),
    "search mask": ([*SEARCH, "--set", "gates.placement=ffn", "--set", "gates.layers=01"], "a mask of"),
    "describe ratio": (["describe", "--set", "ffn.shape=hourglass", "--set", "ffn.ratio=2"], "below 1"),
    "no store": (["front", "--study", "s"], "no such file"),
    "unknown command": (["serach"], "serach"),
    "unknown flag": ([*SEARCH, "--colour", "red"], "--colour"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_message_and_writes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, said = BAD[name]
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert "Traceback" not in err and out == ""
    assert len(err.strip().splitlines()) <= 4  # click adds its usage line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["front", "--study", "none"], "it has: s"),
        (["status", "--study", "none"], "it has: s"),
        (["show", "--study", "s", "--trial", "99"], "no trial 99"),
        (["export", "--study", "s", "--out", "x"], "--trial N or --pick"),
        (["export", "--study", "s", "--pick", "fastest", "--out", "x"], "knee"),
        (["export", "--study", "s", "--pick", "max-flops=1", "--out", "x"], "cheapest"),
        (["export", "--study", "s", "--pick", "best", "--out", "x", "--formats", "exe"], "py"),
        (["export", "--study", "s", "--pick", "best", "--out", "no/such/x"], "does not exist"),
        (["search", "--study", "s", *FAST], "--resume"),
        (["search", "--study", "s", "--resume", "--space", "other.mod:Space"], "created with space"),
        (["search", "--study", "s", "--resume", "--set", "depth=3"], "created with settings"),
        (["search", "--study", "s", "--resume", "--seed", "5"], "created with seed"),
        (["study", "delete", "none", "--yes"], "it has: s"),
    ],
)
def test_bad_input_about_a_study_names_what_is_there(
    command: list[str],
    said: str,
    searched: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with Store(searched) as store:
        before = store.trials(store.study("s"))
    assert main([*command, "--store", searched]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    with Store(searched) as store:
        assert store.trials(store.study("s")) == before
    assert list(tmp_path.iterdir()) == []


def test_an_address_nobody_listens_on_is_refused(tmp_path: Path, text: str) -> None:
    command = ["search", "--study", "new", "--store", str(tmp_path / "nas.db"), "--preset", "quick"]
    command += ["--set", f"data.path={text}", "--address", f"127.0.0.1:{free_port()}"]
    done = subprocess.run([sys.executable, "-m", "hypernas", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "no Ray cluster answers" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_database_nobody_serves_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"postgresql://user:secret@127.0.0.1:{free_port()}/x"
    assert main(["front", "--study", "s", "--store", url]) == 2
    err = capsys.readouterr().err
    assert "does not answer" in err and "secret" not in err


def test_settings_come_from_a_file_and_flags_win(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("search.toml").write_text(
        '[search]\nstudy = "filed"\nengine = "inline"\npreset = "quick"\ntrials = 9\n'
        f'[set]\ndepth = 1\nd_model = [16, 32]\nhead_dim = 8\ncontext = 32\n"data.path" = "{text}"\n'
        "[set.train]\ntokens = 512\nbatch_tokens = 256\n"
    )
    assert main(["search", "--config", "search.toml", "--trials", "3", "--set", "d_model=16"]) == 0
    with Store("nas.db") as store:
        row = store.study("filed")
        trials = store.trials(row)
    assert len(trials) == 3
    assert {trial.arch["d_model"] for trial in trials} == {16}
    assert {trial.recipe.tokens for trial in trials} == {512}


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[search]\ntrials = 'ten'", "wanted int"),
        ("[search]\ntrial = 10", "trials"),
        ("[serch]\n", "[search]"),
        ("[search\n", "not TOML"),
        ("[set]\ndepth = 1979-05-27", "wanted text"),
    ],
)
def test_a_wrong_file_is_refused(
    toml: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("search.toml").write_text(toml)
    assert main(["search", "--config", "search.toml"]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["search.toml"]


def test_text_that_changed_since_the_study_began_is_not_mixed_in(tmp_path: Path, text: str) -> None:
    own = tmp_path / "own.txt"
    own.write_text(Path(text).read_text())
    base = ["search", "--study", "s", "--store", str(tmp_path / "nas.db"), "--resume"]
    tiny = ["depth=1", "d_model=16", "head_dim=8", "context=32", "train.tokens=512", "train.batch_tokens=256"]
    flags = [part for setting in [*tiny, f"data.path={own}"] for part in ("--set", setting)]
    assert main([*base, *FAST, *flags, "--trials", "3"]) == 0
    own.write_text(own.read_text() + "something new " * 50)
    assert main([*base, "--trials", "4"]) == 2
