"""On what a process trains: the GPU that it has, unless it was asked for its CPU; and what is said of it.

GPUs that are only declared, on clusters, are in tests/nas/engines/test_cluster.py.
"""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hypernas.config.study_config import check_gpus
from hypernas.data.tasks import TASKS
from hypernas.engines.cluster import _share_out
from hypernas.engines.devices import asked_device, on_what, place_job
from hypernas.engines.inline import Inline
from hypernas.errors import UserError
from hypernas.records import Job, Recipe, Result, Seen, SpaceSpec
from hypernas.training import worker
from hypernas.training.device import provenance, worker_device

H100 = Seen("NVIDIA H100 80GB HBM3", "bfloat16 products: cuda", 8.5e10)
CPU = Seen("cpu", "float32")
TINY = {"depth": 1, "d_model": 16, "head_dim": 8, "context": 32}


@pytest.fixture
def job(text: str) -> Job:
    recipe = Recipe(3e-3, tokens=512, batch_tokens=256)
    return Job("s", 0, 1, SpaceSpec("lm"), TINY, recipe, text, TASKS["text"].load(text).hash, 0)


def result_of(engine: Inline, job: Job) -> Result:
    engine.submit(job)
    while True:
        for event in engine.wait(1.0):
            if isinstance(event, Result):
                return event


# ---- what workers take of a cluster ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "asked", "workers", "gpus"),
    [
        ([{"CPU": 4}], None, 4, 0),
        ([{"CPU": 4}, {"CPU": 2}, {}], None, 6, 0),
        ([{"CPU": 16, "GPU": 8}, {"CPU": 4}], None, 8, 1),
        ([{"CPU": 16, "GPU": 8}, {"CPU": 4}], 0, 20, 0),
        ([{"CPU": 16, "GPU": 8}, {"CPU": 16, "GPU": 1}], 2, 4, 2),
        ([{"CPU": 16, "GPU": 2}], 0.25, 8, 0.25),
        ([{"CPU": 16, "GPU": 2}], 0.4, 4, 0.4),  # a share is of one GPU: a fifth of each is left
        ([{"CPU": 16, "GPU": 1}], 0.1, 10, 0.1),
        ([{"CPU": 3, "GPU": 8}], 1, 3, 1),  # each takes a CPU too
        ([{"CPU": 0}], None, 1, 0),  # a cluster that has yet to grow
    ],
)
def test_a_trial_takes_a_gpu_where_there_is_one_and_workers_are_as_many_as_fit(
    nodes: list[Mapping[str, float]], asked: float | None, workers: int, gpus: float
) -> None:
    found = _share_out(None, nodes, 0, asked, own=False)
    assert (found.workers, found.gpus) == (workers, gpus)


def test_on_a_cluster_of_our_own_a_gpu_is_shared_by_more_workers_than_there_are_cpus() -> None:
    assert _share_out(None, [{"CPU": 2, "GPU": 1}], 0, 0.125, own=True).workers == 8


def test_workers_for_whom_there_is_no_room_are_waited_for_only_where_a_cluster_may_grow() -> None:
    nodes = [{"CPU": 8, "GPU": 2}]
    assert _share_out(None, nodes, 5, 1, own=False).workers == 5
    with pytest.raises(UserError, match=r"--workers 5 \(given.+\): with .+ 1 this machine has room for 2; give"):
        _share_out(None, nodes, 5, 1, own=True)


@pytest.mark.parametrize("gpus", [0, 0.01, 0.5, 1, 1.0, 4, None])
def test_a_share_of_one_gpu_and_whole_ones_can_be_asked_for(gpus: float | None) -> None:
    check_gpus(gpus)


# ---- what is said of it ------------------------------------------------------------------------------------------


class Pool:
    """As much of an engine as is said of its workers."""

    def __init__(self, workers: int, gpus: float, seen: Mapping[Seen, int]) -> None:
        self.workers, self.gpus, self.seen = workers, gpus, seen


@pytest.mark.parametrize(
    ("workers", "gpus", "seen", "said"),
    [
        (8, 1, {H100: 8}, "8 workers, each on one NVIDIA H100 80GB HBM3"),
        (1, 1, {H100: 1}, "1 worker on one NVIDIA H100 80GB HBM3"),
        (4, 0.25, {H100: 4}, "4 workers, each on a quarter of one NVIDIA H100 80GB HBM3"),
        (3, 0.3, {H100: 3}, "3 workers, each on 0.3 of one NVIDIA H100 80GB HBM3"),
        (2, 2, {H100: 2}, "2 workers, each on 2 NVIDIA H100 80GB HBM3"),
        (2, 0, {CPU: 2}, "2 workers on CPU cores"),
        (1, 0, {CPU: 1}, "1 worker on a CPU core"),
        (2, 1, {CPU: 2}, "2 workers, each with one GPU that torch does not see, so on CPU cores"),
        (3, 1, {H100: 1}, "1 worker on one NVIDIA H100 80GB HBM3; 2 workers yet to come, each with one GPU"),
        (
            3,
            1,
            {H100: 2, replace(H100, device="NVIDIA A100"): 1},
            "2 workers, each on one NVIDIA H100 80GB HBM3; 1 worker on one NVIDIA A100",
        ),
    ],
)
def test_a_line_says_on_what_a_search_runs(workers: int, gpus: float, seen: dict[Seen, int], said: str) -> None:
    assert on_what(Pool(workers, gpus, seen)) == said  # type: ignore[arg-type]


# ---- this process ------------------------------------------------------------------------------------------------


def test_a_worker_sees_what_its_trials_rows_will_say(job: Job) -> None:
    engine = Inline(gpus_per_trial=0)
    row = result_of(engine, job).provenance
    (found,) = engine.seen
    assert (found.device, found.precision) == (row["device"], row["precision"])
    assert provenance(torch.device("cpu"))["precision"] == found.precision


def test_a_job_for_the_cpu_trains_there_in_a_process_that_has_a_gpu(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    before = result_of(Inline(gpus_per_trial=0), job)
    engine = Inline(gpus_per_trial=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert worker_device().type == "cuda" and worker_device("cpu").type == "cpu"
    after = result_of(engine, job)
    assert after.failure is None and after.provenance["device"] == "cpu"
    assert after.values == before.values


def test_only_a_trial_that_takes_no_gpu_is_sent_to_the_cpu(job: Job) -> None:
    assert place_job(job, 0.0).device == "cpu"
    assert place_job(job, 0.5) == job and job.device == "auto"


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@no_gpu
def test_a_gpu_that_is_asked_for_and_not_here_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match="--gpus-per-trial 1: torch sees no GPU here; --gpus-per-trial 0 asks for CPUs"):
        Inline(gpus_per_trial=1)
    assert asked_device(None) == asked_device(0) == torch.device("cpu")


def driver_with_a_gpu(folder: Path) -> None:
    """A program nvidia-smi in the folder that lists a GPU."""
    (folder / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: some'\n")
    (folder / "nvidia-smi").chmod(0o755)


@no_gpu
def test_a_driver_whose_gpu_torch_cannot_use_is_a_problem_and_a_gpu_without_driver_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert worker.inspect_device(gpu=True) == worker.inspect_device(
        gpu=False
    )  # declared to a cluster, and nothing else
    driver_with_a_gpu(tmp_path)
    assert worker.inspect_device(gpu=True).problem
    with pytest.raises(UserError, match=r"cannot be used \(.+\): see nas doctor there, .*--gpus-per-trial 0"):
        asked_device(None)
    assert asked_device(0) == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the usual way to hide it
    assert asked_device(None) == torch.device("cpu")


@no_gpu
@pytest.mark.parametrize("engine", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_search_on_gpus_that_are_not_here_is_one_sentence(engine: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hypernas", "search", "--store", str(tmp_path / "nas.db"), "--engine", engine]
    done = subprocess.run([*command, "--gpus-per-trial", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (said,) = done.stderr.strip().splitlines()
    assert "--gpus-per-trial 1: " in said and said.endswith("--gpus-per-trial 0 asks for CPUs")
    assert list(tmp_path.iterdir()) == []


@no_gpu
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "tune"])
def test_a_search_whose_gpu_cannot_be_used_ends_with_what_to_do(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver_with_a_gpu(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 1}')  # what Ray would find there
    command = [sys.executable, "-m", "hypernas", "search", "--store", str(tmp_path / "nas.db"), "--engine", engine]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    said = done.stderr.strip().splitlines()[-1]  # a slow machine says before it that its workers are yet to come
    assert "cannot be used" in said and said.endswith("or use its CPUs with --gpus-per-trial 0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_this_process_trains_on_its_gpu_unless_it_was_asked_for_the_cpu(job: Job) -> None:
    name = torch.cuda.get_device_name()
    for asked, device in ((None, name), (1, name), (0.5, name), (0, "cpu")):
        engine = Inline(gpus_per_trial=asked)
        assert result_of(engine, job).provenance["device"] == device
        assert [found.device for found in engine.seen] == [device]
    assert asked_device(None).type == "cuda" and asked_device(0).type == "cpu"
