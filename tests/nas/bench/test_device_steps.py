"""The benchmark of training steps on a device: every row can be had, tiny, on a CPU; and what rows are made of."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hypernas.bench.device_steps import (
    MODES,
    NETS,
    SIZES,
    TINY,
    _union_length,
    against_plain,
    launches_on,
    profile_of,
    run_on,
    steps_on,
)
from hypernas.search_spaces.lm import LanguageModels

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("net", NETS)
def test_every_net_has_its_row_of_a_step(net, mode):
    row = steps_on(CPU, TINY, net, mode, steps=2)
    assert (row["net"], row["size"], row["backend"], row["unit"]) == (net, TINY.name, mode, "tokens/s")
    assert row["value"] == pytest.approx(1e3 * TINY.batch_tokens / row["step_ms"], rel=1e-2)
    assert row["mfu"] > 0 and row["start_seconds"] > 0
    assert row["cuda_graph"] == ("no: a CPU has none" if mode == "graphs" else None)


@pytest.mark.slow
def test_everything_that_a_gpu_is_asked_runs():
    rows = run_on(CPU, (TINY,))["rows"]
    steps = [row for row in rows if row["unit"] == "tokens/s"]
    assert [(row["net"], row["mode"]) for row in steps] == [
        (net, mode) for net in NETS for mode in (MODES if net == "plain" else MODES[:3])
    ]
    assert all(row["value"] > 0 and row["ratio"] > 0 for row in steps)
    assert len(rows) == len(steps) + 2 * len(NETS)


def test_a_net_stands_beside_the_plain_one_of_its_size_and_mode():
    made = [("plain", "a", "eager", 10), ("mhc n=4", "a", "eager", 8), ("plain", "a", "graphs", 20)]
    made += [("mhc n=4", "a", "graphs", 15), ("mhc n=4", "b", "eager", 3)]
    rows = [dict(zip(("net", "size", "mode", "value"), row, strict=True)) for row in made]
    rows = [row | {"baseline": None, "ratio": None} for row in rows]
    assert [row["ratio"] for row in against_plain(rows)] == [1.0, 0.8, 1.0, 0.75, None]
    assert [row["baseline"] for row in against_plain(rows)] == ["plain"] * 4 + [None]


def test_the_larger_plain_net_is_gpt_2s_smallest_without_its_vocabulary():
    space = LanguageModels()
    cost = space.cost(space.from_json(dict(SIZES[1].settings)))
    body = cost.parameters_total - cost.parameters["embedding"]
    assert body == pytest.approx(12 * 12 * 768**2, rel=0.01)
    assert all(size.batch_tokens % size.settings["context"] == 0 for size in (*SIZES, TINY))


def test_a_profile_has_shares_launches_and_idleness():
    rows = profile_of(CPU, TINY, "plain", "eager")
    assert [row["backend"] for row in rows[-3:]] == ["launches", "kernels", "idle"]
    shares = [row["value"] for row in rows[:-3]]
    assert len(shares) == 10 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 101
    assert 0 <= rows[-1]["value"] <= 100


def test_time_in_which_two_kernels_run_counts_once():
    assert _union_length([(5, 9), (0, 2), (1, 3), (6, 7)]) == 7
    assert _union_length([]) == 0


@pytest.mark.parametrize("module", ["hypernas.bench.device_steps", "hypernas.bench.kernels"])
def test_a_machine_with_torch_alone_can_import_it(module):
    missing = ["sqlalchemy", "ray", "optuna", "click", "rich", "plotly", "dash", "moocore", "hyper_connections"]
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in missing)
    subprocess.run([sys.executable, "-c", f"import sys; {blocked}; import {module}"], check=True)


@pytest.mark.parametrize("command", ["kernels", "train"])
@pytest.mark.parametrize("device", ["tpu", pytest.param("cuda", marks=pytest.mark.skipif("torch.cuda.is_available()"))])
def test_a_device_that_is_not_there_is_one_sentence(command, device, capsys):
    from hypernas.cli.main import main

    assert main(["bench", command, "--device", device]) == 2
    assert f"--device {device}: wanted cpu, or cuda where a CUDA device is present" in capsys.readouterr().err


# ---- on a device -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("net", ["plain", "kromhc n=4"])
def test_graphs_are_launched_in_place_of_their_kernels(net):
    size = replace(TINY, settings=TINY.settings | {"depth": 4})
    eager, graphs = (launches_on(torch.device("cuda"), size, net, mode) for mode in ("eager", "graphs"))
    assert graphs["cuda_graph"] == "yes"
    assert eager["value"] > 100 and eager["kernels"] > 100
    assert graphs["value"] < eager["value"] / 2 < graphs["kernels"]


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("net", NETS)
def test_a_step_on_a_device_has_its_memory_and_says_whether_it_was_captured(net, mode):
    row = steps_on(torch.device("cuda"), TINY, net, mode, steps=2)
    assert row["value"] > 0 and row["mfu"] < 1
    assert 0 < row["peak_bytes"] <= row["reserved_bytes"]
    assert (row["cuda_graph"] is None) == (mode == "eager")


@pytest.mark.gpu
@gpu
def test_a_profile_of_a_device_counts_kernels_and_launches():
    rows = profile_of(torch.device("cuda"), TINY, "plain", "eager")
    launches, kernels, idle = (row["value"] for row in rows[-3:])
    assert launches > 0 and kernels > 0 and 0 <= idle < 100
    assert 0 < sum(row["value"] for row in rows[:-3]) <= 101
