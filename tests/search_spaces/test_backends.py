"""Whole models on the fused kernels against the same models on the ops' eager definitions."""

import pytest
import torch
import torch.nn.functional as F

from hypernas.kernels.dispatch import forget_choices, list_choices, use_backend
from hypernas.search_spaces.gates import gate_loss, gates_of, start_step
from hypernas.search_spaces.lm import LanguageModels

SPACE = LanguageModels()
SMALL = {"depth": 2, "d_model": 40, "head_dim": 8, "context": 19}
MODELS = {
    "plain": {},
    "kromhc 2x2, hourglass, gates": {
        "streams.n": 4, "streams.factors": "2x2", "ffn.shape": "hourglass", "gates.placement": "both"
    },
    "kromhc 2x3": {"streams.n": 6, "streams.factors": "2x3"},
    "kromhc 2x2x2x2": {"streams.n": 16, "streams.factors": "2x2x2x2"},
    "mhc": {"streams.n": 4, "streams.mixing": "mhc"},
    "mhc_lite": {"streams.n": 3, "streams.mixing": "mhc_lite"},
    "hc": {"streams.n": 2, "streams.mixing": "hc"},
    "hc_static, steady gates": {
        "streams.n": 3, "streams.mixing": "hc_static", "gates.placement": "ffn", "gates.consistency": "perturbation"
    },
}  # fmt: skip


def step(settings, backend, dtype=torch.float32):
    """(loss, gradients) of one training step on fixed random bytes; every parameter matters."""
    torch.manual_seed(0)
    model = SPACE.build(SPACE.from_json(SMALL | settings)).to(dtype)
    for parameter in model.parameters():  # zero-initialised tensors too
        parameter.data += 0.02 * torch.randn_like(parameter)
    tokens, classes = torch.randint(256, (2, 3, SMALL["context"]), generator=torch.Generator().manual_seed(1))
    start_step(model, 0, 5, 0.5)
    with use_backend(backend):
        loss = F.cross_entropy(model(tokens).flatten(0, -2), classes.flatten())
        total = loss + gate_loss(model, 0.5) if gates_of(model) else loss
        total.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_on_the_compiled_kernels_are_those_of_the_definitions(name):
    forget_choices()
    loss, gradients = step(MODELS[name], "cpu")
    assert {choice.backend for choice in list_choices().values()} == {"cpu"}
    exact, wanted = step(MODELS[name], "reference")
    assert loss.item() == pytest.approx(exact.item(), rel=2e-5)
    assert gradients.keys() == wanted.keys()
    got, want = (torch.cat([of[key].flatten() for key in wanted]) for of in (gradients, wanted))
    assert (got - want).norm() < 2e-5 * want.norm()
    for key, gradient in gradients.items():  # each by itself too; sums that nearly cancel lose a digit in either form
        assert (gradient - wanted[key]).norm() < 1e-4 * wanted[key].norm().clamp_min(1e-6), key


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_in_mixed_precision(name):
    with torch.autocast("cpu", torch.bfloat16):  # as on a GPU: products in bfloat16, streams in float32
        loss, gradients = step(MODELS[name], "auto")
    exact, wanted = step(MODELS[name], "reference")
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    assert gradients.keys() == wanted.keys()
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())
