"""A training step on CUDA graphs: which steps may be captured, and that a captured one computes the same.

Marked gpu is what needs a device; the rest holds for any.
"""

import copy
import dataclasses
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypernas.data.text import load_corpus
from hypernas.kernels.dispatch import use_backend
from hypernas.records import Job, Recipe, Result, SpaceSpec
from hypernas.search_spaces.lm import LanguageModels
from hypernas.training import cuda_graph
from hypernas.training.device import deterministic, mixed_precision
from hypernas.training.model import seeded_build
from hypernas.training.step import make_optimizers, train_step
from hypernas.training.worker import run

SPACE = LanguageModels()
SMALL = {"depth": 2, "d_model": 32, "head_dim": 8, "context": 32, "gates.placement": "none"}
RECIPE = Recipe(3e-3, tokens=4096, batch_tokens=256)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class OwnSpace(LanguageModels):
    """A space as a user would write one."""


def job(text: str, **arch: object) -> Job:
    return Job("s", 7, 1, SpaceSpec("lm"), SMALL | arch, RECIPE, text, load_corpus(text).hash, 0)


def built(**arch: object) -> nn.Module:
    return seeded_build(SPACE, SPACE.from_json(SMALL | arch), 0).train()


def batches(count: int, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(256, (2, 8, SMALL["context"]), generator=generator).to(device) for _ in range(count)]
    return [(pair[0], pair[1]) for pair in drawn]


def losses(model: nn.Module, of: list[tuple[Tensor, Tensor]]) -> list[float]:
    optimizers = make_optimizers(model, RECIPE)
    return [float(train_step(model, optimizers, batch, RECIPE, step, len(of))) for step, batch in enumerate(of)]


def test_a_step_in_which_nothing_depends_on_the_step_may_be_captured() -> None:
    for arch in ({}, {"streams.n": 4, "streams.mixing": "mhc"}, {"streams.n": 4, "ffn.shape": "hourglass"}):
        assert cuda_graph.obstacle(SPACE, built(**arch), compiled=False, micro_batches=1) is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model": built(**{"gates.placement": "ffn"})}, "gates draw their noise"),
        ({"compiled": True}, "compiled"),
        ({"micro_batches": 2}, "in parts"),
        ({"space": OwnSpace()}, "a space of one's own"),
    ],
)
def test_any_other_step_is_not_captured_and_says_why(changed: dict, reason: str) -> None:
    given = {"space": SPACE, "model": built(), "compiled": False, "micro_batches": 1} | changed
    why = cuda_graph.obstacle(given.pop("space"), given.pop("model"), **given)
    assert why is not None and reason in why


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_what_is_captured_is_the_models_own_step(products: torch.dtype) -> None:
    model = built(**{"streams.n": 4})
    other = copy.deepcopy(model)
    whole = cuda_graph.Forward(other, lambda device: mixed_precision(device, products))
    optimizers = [make_optimizers(net, RECIPE) for net in (model, whole)]
    with use_backend("reference"):
        for step, batch in enumerate(batches(3)):
            # The precision inside decides, as it does in a graph: the step's own has nothing left to say.
            alone = train_step(model, optimizers[0], batch, RECIPE, step, 3, products=products)
            assert train_step(whole, optimizers[1], batch, RECIPE, step, 3, products=torch.float32) == alone
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_warming_up_leaves_statistics_and_random_states_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    where = [buffer.data_ptr() for buffer in model.buffers()]
    with cuda_graph.preserve_state(model, torch.device("cpu")):
        for _ in range(3):
            torch.autograd.grad(model(torch.randn(8, 4)).sum(), list(model.parameters()))
        assert not torch.equal(model.state_dict()["1.running_mean"], before["1.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [buffer.data_ptr() for buffer in model.buffers()] == where
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_trial_on_a_cpu_says_nothing_of_graphs(text: str) -> None:
    short = dataclasses.replace(RECIPE, tokens=256)
    *_, result = run(dataclasses.replace(job(text), recipe=short, kernels="reference"))
    assert isinstance(result, Result) and result.failure is None
    assert "cuda_graph" not in result.provenance


# ---- on a device -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    "arch", [{}, {"streams.n": 4}, {"streams.n": 4, "streams.mixing": "mhc"}, {"family": "lstm"}], ids=str
)
def test_losses_on_graphs_are_those_of_single_launches(arch: dict) -> None:
    deterministic()
    cuda = torch.device("cuda")
    eager = built(**arch).to(cuda)
    captured, steps = copy.deepcopy(eager), batches(8, "cuda")
    before = {name: value.clone() for name, value in captured.state_dict().items()}
    graphed = cuda_graph.capture(captured, steps[0][0], mixed_precision)
    assert all(torch.equal(value, before[name]) for name, value in captured.state_dict().items())
    # The same kernels on the same numbers; cuBLAS may choose another for a workspace of another stream.
    assert losses(graphed, steps) == pytest.approx(losses(eager, steps), rel=1e-3)


@pytest.mark.gpu
@gpu
def test_rows_say_whether_they_trained_on_graphs(text: str) -> None:
    said = {}
    for placement in ("none", "ffn"):
        *_, result = run(job(text, **{"gates.placement": placement}))
        assert isinstance(result, Result) and result.failure is None
        said[placement] = result.provenance["cuda_graph"]
    assert said == {"none": "yes", "ffn": "no: gates draw their noise at every step"}


@pytest.mark.gpu
@gpu
def test_what_cannot_be_captured_trains_eagerly() -> None:
    class Asks(nn.Module):
        """Asks the device for a number, which a capture must not."""

        def __init__(self) -> None:
            super().__init__()
            self.net = built()

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.net(tokens)
            return logits if logits.sum().item() else 2 * logits

    model, stream = Asks().cuda(), torch.cuda.current_stream()
    ((tokens, classes),) = batches(1, "cuda")
    trained, said = cuda_graph.try_capture(SPACE, model, tokens, mixed_precision, compiled=False, micro_batches=1)
    assert trained is model and said.startswith("no: ")
    assert torch.cuda.current_stream() == stream
    F.cross_entropy(trained(tokens).float().flatten(0, -2), classes.flatten()).backward()


@pytest.mark.gpu
@gpu
def test_a_trials_graphs_are_freed_with_its_model(text: str) -> None:
    deterministic()
    held = []
    for _ in range(3):
        *_, result = run(job(text))
        assert isinstance(result, Result) and result.provenance["cuda_graph"] == "yes"
        held.append(torch.cuda.memory_allocated())
    stopped = run(job(text))
    next(stopped)  # at its first report, as halving would
    stopped.close()
    held.append(torch.cuda.memory_allocated())
    gc.collect()
    assert len(set(held)) == 1
