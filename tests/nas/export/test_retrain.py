"""A trial trained again: alone, longer, interrupted, and by several processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hypernas.cli.main import main
from hypernas.config.study_config import StudyConfig
from hypernas.engines.inline import Inline
from hypernas.show.views import Silent
from hypernas.store import Store
from hypernas.study.driver import run
from hypernas.study.search import open_search, prepare
from hypernas.training.device import product_dtype

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, text: str) -> str:
    """Two trials without gates, whose noise several processes would not share."""
    url = str(tmp_path_factory.mktemp("study") / "nas.db")
    settings = {"depth": "2", "d_model": "32", "head_dim": "8", "context": "32", "streams.n": "2"}
    settings |= {"gates.placement": "none", "data.path": text, "train.tokens": "8192", "train.batch_tokens": "256"}
    with Store(url, create=True) as opened:
        search = open_search(opened, prepare(StudyConfig(study="s", preset="quick", trials=2, settings=settings)))
        run(search, Inline(), Silent())
    return url


def command(store: str, out: Path, *more: str) -> list[str]:
    return ["train", "--study", "s", "--store", store, "--trial", "0", "--out", str(out), *more]


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def trained(store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on twice as much, by one process."""
    out = tmp_path_factory.mktemp("trained") / "long"
    assert main(command(store, out, "--tokens", "16384")) == 0
    return out


def test_trained_again_as_it_was_it_has_the_same_weights_and_values(store: str, tmp_path: Path, capsys):
    out = tmp_path / "again"
    assert main(command(store, out)) == 0
    assert "data words.txt: 1 file, " in capsys.readouterr().err
    exported = tmp_path / "exported"
    assert main(["export", "--study", "s", "--store", store, "--trial", "0", "--out", str(exported)]) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, exported))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with Store(store) as opened:
        values = opened.trial(opened.study("s"), 0).values
    assert json.loads((out / "config.json").read_text())["values"] == dict(values)


def test_longer_training_is_better_and_says_what_it_trained_on(store: str, trained: Path):
    config = json.loads((trained / "config.json").read_text())
    with Store(store) as opened:
        before = opened.trial(opened.study("s"), 0).values["bits_per_byte"]
    assert config["training"]["train.tokens"] == 16384 and config["values"]["bits_per_byte"] < before
    assert not trained.with_name("long.checkpoint").exists()


@pytest.mark.slow
def test_two_processes_train_what_one_does(store: str, trained: Path, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "two"
    torchrun = python("torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}")
    started = [*torchrun, "-m", "hypernas", *command(store, out, "--tokens", "16384", "--json")]
    done = subprocess.run(started, capture_output=True, text=True, env=environment(), timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2
    one, two = (load_file(folder / "model.safetensors") for folder in (trained, out))
    # Each rounds its part of a gradient, where products are bfloat16: 2e-3 measured, in weights and in the loss.
    near = 1e-3 if product_dtype(torch.device("cpu")) is torch.float32 else 1e-2
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, rtol=near, atol=near)
    values = [json.loads((folder / "config.json").read_text())["values"]["bits_per_byte"] for folder in (trained, out)]
    assert values[0] == pytest.approx(values[1], abs=near)


def test_a_killed_training_goes_on_where_it_was_to_the_same_bits(store: str, trained: Path, tmp_path: Path):
    out, checkpoint = tmp_path / "killed", tmp_path / "killed.checkpoint"
    started = python("hypernas", *command(store, out, "--tokens", "16384"))
    process = subprocess.Popen(started, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert main(command(store, out, "--tokens", "16384")) == 2  # it asks for --resume rather than starting over
    assert main(command(store, out, "--tokens", "4096", "--resume")) == 2  # another training's checkpoint
    assert main(command(store, out, "--tokens", "16384", "--resume")) == 0
    resumed, whole = (load_file(folder / "model.safetensors") for folder in (out, trained))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not checkpoint.exists()


def test_an_export_is_scored_as_it_was_and_on_other_text(trained: Path, text: str, tmp_path: Path, capsys):
    assert main(["evaluate", str(trained), "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert f"data {Path(text).name}: 1 file, " in said.err
    values = json.loads((trained / "config.json").read_text())["values"]
    assert found["trained_on_it"] and found["bits_per_byte"] == pytest.approx(values["bits_per_byte"], abs=1e-4)
    other = tmp_path / "other.txt"
    other.write_text("zebra quartz 0123456789 " * 2000)
    assert main(["evaluate", str(trained), "--data", str(other), "--json"]) == 0
    strange = json.loads(capsys.readouterr().out)
    assert not strange["trained_on_it"] and strange["bits_per_byte"] > found["bits_per_byte"]


def test_an_export_continues_a_text_the_same_way_for_the_same_seed(trained: Path, capsys):
    said = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(trained), "--prompt", "stream gate", "--count", "20", "--seed", seed]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2] and said[0].startswith("stream gate")
    assert main(["generate", str(trained), "--prompt", ""]) == 2
    assert main(["generate", str(trained.parent), "--prompt", "x"]) == 2


def test_the_documented_lines_fine_tune_an_export(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.S)
    assert block
    monkeypatch.chdir(trained.parent)
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(block[1].replace('"winner"', f'"{trained.name}"'), {})
    first, last = (float(number) for number in capsys.readouterr().out.split())
    assert last < first
