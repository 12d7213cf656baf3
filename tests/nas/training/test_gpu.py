"""What holds on a GPU alone: a job gives the same bits, and a training step waits for nothing.

Every net is a case of its own, so that their kernels compile beside each other (`pytest -n`).
"""

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypernas.data.images import load_images
from hypernas.data.tasks import TASKS, to_device
from hypernas.data.text import load_corpus
from hypernas.kernels.dispatch import use_backend
from hypernas.records import Job, Recipe, Report, Result, SpaceSpec
from hypernas.search_spaces import load_space
from hypernas.training import cuda_graph
from hypernas.training.device import deterministic, mixed_precision
from hypernas.training.measure import latency_ms
from hypernas.training.model import seeded_build
from hypernas.training.step import make_optimizers, train_step
from hypernas.training.worker import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")
TEXT = {"depth": 2, "d_model": 32, "head_dim": 8, "context": 32, "gates.placement": "none"}
IMAGE = {"image.height": 8, "image.width": 8, "depth": 1}
KROMHC = {"streams.n": 4, "streams.mixing": "kromhc", "streams.factors": "2x2"}
CAPTURED: dict[str, dict[str, Any]] = {
    "plain": TEXT,
    "head_dim 12": TEXT | {"d_model": 48, "head_dim": 12},  # attention pads it to a multiple of 8
    "kromhc": TEXT | KROMHC,
    "mhc": TEXT | {"streams.n": 4, "streams.mixing": "mhc"},
    "hourglass": TEXT | {"ffn.shape": "hourglass"},
    "lstm": {"family": "lstm", "depth": 1, "d_model": 32, "context": 32},
    "resnet": IMAGE | {"family": "resnet", "width": 4, "gates.placement": "none"},
    "vit": IMAGE | {"family": "vit", "d_model": 32, "head_dim": 8, "gates.placement": "none"},
}
GATED: dict[str, dict[str, Any]] = {
    "gates ffn": TEXT | KROMHC | {"gates.placement": "ffn"},
    "gates attention": TEXT | {"gates.placement": "attention", "gates.consistency": "perturbation"},
    "gated resnet": IMAGE | {"family": "resnet", "width": 4, "gates.placement": "blocks"},
}
NETS = CAPTURED | GATED
CASES = [(net, graphs) for net in NETS for graphs in ((True, False) if net in CAPTURED else (False,))]
STEPS = [(*case, "adamw") for case in CASES] + [("hourglass", False, "muon"), ("kromhc", True, "sgd")]


def write_idx(file: Path, array: np.ndarray) -> None:
    file.write_bytes(bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of random images of 8 x 8 pixels in 10 classes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", 500), ("t10k", 200)):
        write_idx(folder / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (count, 8, 8), dtype=np.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    return str(folder)


@pytest.fixture
def made(text: str, pictures: str, request: pytest.FixtureRequest) -> Job:
    """The job of the net that the test names."""
    arch = NETS[request.getfixturevalue("net")]
    if "image.height" in arch:
        recipe = Recipe(3e-3, tokens=16 * 50, batch_tokens=50)
        return Job("s", 7, 1, SpaceSpec("vision"), arch, recipe, pictures, load_images(pictures).hash, 0)
    recipe = Recipe(3e-3, tokens=16 * 256, batch_tokens=256)
    return Job("s", 7, 1, SpaceSpec("lm"), arch, recipe, text, load_corpus(text).hash, 0)


def outcome(events: Iterator[Any]) -> tuple[list[float], Result]:
    *before, result = events
    assert isinstance(result, Result) and result.failure is None, result
    return [event.loss for event in before if isinstance(event, Report)], result


@pytest.mark.parametrize(("net", "graphs"), CASES)
def test_a_job_gives_the_same_bits_again_and_through_a_checkpoint(
    net: str, graphs: bool, made: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if net in CAPTURED and not graphs:
        monkeypatch.setattr(cuda_graph, "obstacle", lambda *_, **__: "asked for")
    losses, first = outcome(run(made))
    assert first.provenance["cuda_graph"].startswith("yes" if graphs else "no: ")
    assert first.provenance["precision"] == "bfloat16 products: cuda"
    assert len(losses) == 4
    again, second = outcome(run(made))
    assert (again, second.weights, second.values) == (losses, first.weights, first.values)

    kept = dataclasses.replace(made, checkpoint=str(tmp_path / "trial-7.checkpoint"))
    stopped = run(kept)
    assert next(event for event in stopped if isinstance(event, Report)).rung == 0
    stopped.close()
    resumed, third = outcome(run(kept))
    assert (resumed, third.weights, third.values) == (losses, first.weights, first.values)


@pytest.mark.parametrize(("net", "graphs", "optimizer"), STEPS)
def test_no_training_step_waits_for_the_device(net: str, graphs: bool, optimizer: str, made: Job) -> None:
    deterministic()
    space = load_space(made.space.name)
    task, arch = TASKS[space.task], space.from_json(made.arch)
    data, recipe = task.load(made.data_path), dataclasses.replace(made.recipe, optimizer=optimizer)
    with use_backend("auto"):
        model = seeded_build(space, arch, 0).to(CUDA).train()
        trained = model
        if graphs:
            sample, _ = task.batch(data, arch, 0, 0, 8)
            trained = cuda_graph.capture(model, sample.to(CUDA), mixed_precision)
        optimizers = make_optimizers(model, recipe)
        losses = []
        try:
            for step in range(6):
                if step == 2:  # by then kernels are compiled and compared, and states and constants are there
                    torch.cuda.set_sync_debug_mode("error")
                batch = to_device(task.batch(data, arch, 0, step, 8), CUDA)
                losses.append(train_step(trained, optimizers, batch, recipe, step, 6))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(isinstance(loss, torch.Tensor) and loss.isfinite() for loss in losses)


def test_a_batch_on_its_way_to_the_device_is_not_overwritten_by_the_next() -> None:
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(256, (16, 65), generator=generator) for _ in range(40)]
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # about a tenth of a second, before which no copy begins
    sent = [to_device((window[:, :-1].clone(), window[:, 1:].clone()), CUDA) for window in windows]
    for window, (inputs, classes) in zip(windows, sent, strict=True):
        assert torch.equal(inputs.cpu(), window[:, :-1]) and torch.equal(classes.cpu(), window[:, 1:])


@pytest.mark.parametrize("net", ["plain", "kromhc", "resnet", "gates ffn", "gates attention"])
def test_latency_says_whether_the_net_alone_was_timed(net: str, made: Job) -> None:
    deterministic()
    space = load_space(made.space.name)
    task, arch = TASKS[space.task], space.from_json(made.arch)
    inputs, _ = task.batch(task.load(made.data_path), arch, 0, 0, 1)
    middle, known = latency_ms(seeded_build(space, arch, 0).to(CUDA), inputs.to(CUDA))
    assert middle > 0 and known["latency_ms_quartiles"] >= 0
    assert known["latency_ms_of"] == ("launches: gates decide on the host" if net in GATED else "graph replays")
