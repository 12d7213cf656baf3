"""Cosine gates: what they decide, what they learn from, and that their noise repeats."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hypernas.kernels.cosine_gate import cosine_gate
from hypernas.kernels.dispatch import use_backend
from hypernas.search_spaces.base import SpaceError
from hypernas.search_spaces.costs import CONTROLLER, gate_cost
from hypernas.search_spaces.gates import (
    GATES,
    PENALTY_RAMP,
    PENALTY_WEIGHT,
    CosineGate,
    SteadyGate,
    execution_rates,
    gate_loss,
    gates_of,
    reset_rates,
    start_step,
    straight_through,
)
from hypernas.search_spaces.transformer import CONSISTENCIES, gated_layers

C = 12


def make_gate(seed=0, rate=0.5, cost=100.0, spread=2.0, kind=CosineGate):
    """A float64 gate whose predictions spread over tokens and whose threshold lies among them."""
    torch.manual_seed(seed)
    gate = kind(C, rate, cost).double()
    with torch.no_grad():
        gate.controller[2].weight.normal_(0.0, spread)
        gate.bias.fill_(-1.0 / gate.bias_gain)
    return gate


def tokens(*shape, seed=1):
    return torch.randn(*shape, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Blocks(nn.Module):
    """Residual blocks of one gated linear layer each."""

    def __init__(self, *gates):
        super().__init__()
        self.gates = nn.ModuleList(gates)
        self.branches = nn.ModuleList(nn.Linear(C, C, dtype=torch.float64) for _ in gates)

    def forward(self, x):
        for gate, branch in zip(self.gates, self.branches, strict=True):
            x = x + gate(x, branch(x))
        return x


@pytest.mark.parametrize("kind", [CosineGate, SteadyGate])
def test_decisions_and_noise_are_as_fine_as_the_streams_where_products_are_bfloat16(kind):
    gate, h = kind(C, 0.5, 100.0), tokens(3, 40).float()
    with use_backend("reference"), torch.autocast("cpu", torch.bfloat16):
        assert gate.controller(h).dtype == torch.bfloat16
        logit = gate.logit(gate.predict(h))
        gate(h, h.bfloat16())
    assert logit.dtype == gate.noise(logit).dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in gate.terms)


@pytest.mark.parametrize("d_model", [8, 64])
def test_cost_equals_the_modules_parameters_and_counted_matmuls(d_model):
    with torch.device("meta"):
        gate = CosineGate(d_model, 0.5, 1.0).eval()
        h = torch.zeros(3, 5, d_model)
    with FlopCounterMode(display=False) as counter:
        gate.decide(h)
    parameters, matmul, elementwise = gate_cost(d_model)
    assert parameters == sum(parameter.numel() for parameter in gate.parameters())
    assert 15 * matmul == counter.get_total_flops()
    assert elementwise >= 2 * sum(gate.hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_start_open(dtype):
    torch.manual_seed(0)
    gate = CosineGate(C, 0.5, 1.0).to(dtype)
    h = 5.0 * tokens(4, 50).to(dtype)
    assert gate.decide(h).all()
    start_step(gate, seed=0, step=0, progress=0.0)
    assert (gate(h, torch.ones_like(h))[..., 0] != 0).double().mean() > 0.9


@settings(max_examples=50)
@given(scale=st.floats(-8, 8), bias=st.floats(-1, 1), seed=st.integers(0, 100))
def test_a_token_of_higher_predicted_cir_runs_whenever_a_lower_one_does(scale, bias, seed):
    gate = make_gate(seed)
    with torch.no_grad():
        gate.scale.fill_(scale)
        gate.bias.fill_(bias)
    h = tokens(40)
    cir, runs = gate.predict(h), gate.decide(h)
    assert ((cir >= 0) & (cir <= 2)).all()
    assert not runs.any() or runs[cir >= cir[runs].min()].all()


def test_the_gate_value_is_hard_in_training():
    gate = make_gate()
    y = gate(tokens(4, 50), torch.ones(4, 50, C, dtype=torch.float64))
    assert set(y.unique().tolist()) == {0.0, 1.0}


def test_the_decision_in_evaluation_is_the_one_in_training_without_noise(monkeypatch):
    gate, h = make_gate(), tokens(4, 50)
    monkeypatch.setattr(CosineGate, "noise", lambda self, like: torch.zeros_like(like))
    trained = gate(h, h)
    rate = gate.terms[1]
    decided = gate.eval().decide(h)
    assert 0 < decided.sum() < decided.numel()
    torch.testing.assert_close(trained, h * decided.unsqueeze(-1), rtol=1e-12, atol=0)
    assert torch.equal(gate(h, h), h * decided.unsqueeze(-1))
    torch.testing.assert_close(rate, decided.double().mean())


def test_straight_through_is_a_step_with_the_gradient_of_a_sigmoid():
    logit = torch.tensor([-3.0, -0.1, 0.0, 0.1, 3.0], dtype=torch.float64, requires_grad=True)
    hard = straight_through(logit)
    (gradient,) = torch.autograd.grad(hard.sum(), logit)
    assert hard.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
    torch.testing.assert_close(gradient, logit.sigmoid() * (1 - logit.sigmoid()))


def test_noise_opens_a_gate_as_often_as_the_sigmoid_says():
    gate = make_gate(spread=0.0)
    with torch.no_grad():
        gate.bias.fill_(-0.9 / gate.bias_gain)  # logit 1 - .9
    start_step(gate, seed=0, step=0, progress=0.5)
    h = tokens(20_000)
    opened = (gate(h, torch.ones_like(h))[:, 0] != 0).double().mean().item()
    assert opened == pytest.approx(torch.tensor(0.1 / gate.temperature).sigmoid().item(), abs=0.01)


@pytest.mark.parametrize("training", [True, False])
def test_each_token_is_decided_alone(training):
    gate = make_gate().train(training)
    start_step(gate, seed=0, step=0, progress=0.5)
    h, changed = tokens(1, 30), tokens(1, 30)
    changed[:, 17] *= -3.0
    same = torch.isclose(gate(h, h), gate(changed, changed), rtol=1e-12, atol=1e-12).all(-1)
    assert same[0, torch.arange(30) != 17].all()


def test_noise_is_a_function_of_seed_step_and_layer_alone():
    model, x = Blocks(make_gate(0), make_gate(0)), tokens(4, 50)

    def noise(seed, step):
        torch.rand(3)  # moves the global generator
        start_step(model, seed, step, progress=0.5)
        return [gate.noise(x[..., 0]) for gate in gates_of(model)]

    first, second = noise(1, 2)
    assert all(torch.equal(a, b) for a, b in zip(noise(1, 2), (first, second), strict=True))
    assert not torch.equal(first, second)
    assert not torch.equal(noise(1, 3)[0], first)
    assert not torch.equal(noise(2, 2)[0], first)
    before = torch.get_rng_state()
    model(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unseeded_gate_draws_from_the_global_generator():
    gate, h = make_gate(), tokens(4, 50)
    torch.manual_seed(3)
    first, second = gate(h, h), gate(h, h)
    torch.manual_seed(3)
    assert torch.equal(gate(h, h), first) and not torch.equal(first, second)


def test_the_temperature_falls_over_training():
    gate = make_gate()
    seen = []
    for progress in (0.0, 0.5, 1.0):
        start_step(gate, 0, 0, progress)
        seen.append(gate.temperature)
    assert seen == pytest.approx([0.3, (0.3 * 0.05) ** 0.5, 0.05])


def terms_and_gradients(pick, seed=1, kind=CosineGate):
    """Gradients of one recorded term with respect to h, the controller, s and b."""
    gate, h = make_gate(kind=kind), tokens(4, 50, seed=seed).requires_grad_()
    gate(h, h.sin())
    wanted = {"h": h, "controller": gate.controller[0].weight, "scale": gate.scale, "bias": gate.bias}
    found = torch.autograd.grad(gate.terms[pick], list(wanted.values()), allow_unused=True)
    return {name for name, gradient in zip(wanted, found, strict=True) if gradient is not None and gradient.any()}


def test_the_controller_learns_cir_and_nothing_else_and_does_not_bend_its_input():
    assert terms_and_gradients(0) == {"controller"}


def test_the_penalty_reaches_scale_and_bias():
    assert terms_and_gradients(1) == {"scale", "bias"}


def test_the_tasks_loss_reaches_scale_and_bias_through_the_gate():
    gate, h = make_gate(), tokens(4, 50)
    loss = gate(h, h.sin()).square().sum()
    assert all(gradient.any() for gradient in torch.autograd.grad(loss, [gate.scale, gate.bias]))


def test_regression_is_towards_one_minus_the_cosine():
    gate, h = make_gate(spread=0.0), tokens(4, 50)
    for branch, cir in ((h, 0.0), (-2.0 * h, 2.0), (torch.zeros_like(h), 1.0)):
        gate(h, branch)
        torch.testing.assert_close(gate.terms[0].item(), (1.0 - cir) ** 2)


def test_consistency_is_zero_where_nothing_is_skipped_and_positive_where_something_is():
    gate, h = make_gate(), tokens(4, 50)
    gate(h, h.flip(-1))
    assert gate.terms[2] > 0.01
    with torch.no_grad():
        gate.bias.fill_(10.0)
    gate(h, h.flip(-1))
    assert gate.terms[2].abs() < 1e-12


def test_a_steady_gate_differs_in_its_consistency_term_alone():
    usual, steady, h = make_gate(), make_gate(kind=SteadyGate), tokens(4, 50)
    start_step(usual, 0, 0, 0.5)
    start_step(steady, 0, 0, 0.5)
    assert torch.equal(usual(h, h.sin()), steady(h, h.sin()))
    assert torch.equal(torch.stack(usual.terms[:2]), torch.stack(steady.terms[:2]))
    assert usual.terms[2] != steady.terms[2]
    assert torch.equal(usual.eval().decide(h), steady.eval().decide(h))


def test_steadiness_moves_the_threshold_and_leaves_the_controller_to_cir():
    assert terms_and_gradients(2, kind=SteadyGate) == {"h", "scale", "bias"}


def test_a_steady_gate_pays_for_the_tokens_whose_decision_a_small_change_flips():
    gate, h = make_gate(kind=SteadyGate), tokens(4000)
    start_step(gate, 0, 0, 1.0)
    margin = gate.logit(gate.predict(h)).detach().abs()
    moved = gate.unsteadiness(h, h.flip(-1), h).detach() > 1e-9
    near = margin < margin.median()
    assert moved[near].double().mean() > 0.02 and not moved[~near].any()
    with torch.no_grad():
        gate.bias.fill_(10.0)  # every decision is far from its threshold
    assert gate.unsteadiness(h, h.flip(-1), h).abs().max() < 1e-12


def test_a_steady_gate_in_evaluation_keeps_the_terms_of_its_last_training_forward():
    gate, h = make_gate(kind=SteadyGate), tokens(4, 50)
    gate(h, h)
    terms = gate.terms
    gate.eval()(h, h)
    assert gate.terms is terms


def test_differentiable_pieces_agree_with_finite_differences():
    gate = make_gate()
    a, b = tokens(3).requires_grad_(), tokens(3, seed=2).requires_grad_()
    values = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cosine_gate, (a, b, values))
    weight = gate.controller[0].weight.detach().requires_grad_()

    def logit(scale, bias, weight):
        state = {"scale": scale, "bias": bias, "controller.0.weight": weight}

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.gate = gate

            def forward(self, h):
                return self.gate.logit(self.gate.predict(h))

        return torch.func.functional_call(Net(), {f"gate.{key}": value for key, value in state.items()}, (a.detach(),))

    scale, bias = (parameter.detach().requires_grad_() for parameter in (gate.scale, gate.bias))
    assert torch.autograd.gradcheck(logit, (scale, bias, weight))


def test_the_penalty_weighs_rates_by_flops_and_ramps_up():
    model = Blocks(make_gate(0, rate=0.25, cost=300.0), make_gate(1, rate=0.25, cost=100.0))
    with torch.no_grad():
        model.gates[0].bias.fill_(10.0)  # runs always
        model.gates[1].bias.fill_(-10.0)  # runs never
    losses = []
    for progress in (0.0, PENALTY_RAMP / 2, PENALTY_RAMP, 1.0):
        model(tokens(4, 50))
        losses.append(gate_loss(model, progress).item())
    full = PENALTY_WEIGHT * (0.75 - 0.25) ** 2
    assert [loss - losses[0] for loss in losses] == pytest.approx([0.0, full / 2, full, full])


def test_a_gate_trained_on_its_own_loss_predicts_cir_and_meets_its_rate():
    torch.manual_seed(0)
    gate = CosineGate(C, rate=0.4, cost=1.0)
    mixer = torch.randn(C, C) / C**0.5
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2)
    h, unseen = tokens(2000).float(), tokens(2000, seed=2).float()
    for step in range(300):
        start_step(gate, seed=0, step=step, progress=step / 300)
        gate(h, h @ mixer)
        optimizer.zero_grad()
        gate_loss(gate, step / 300).backward()
        optimizer.step()
    gate.eval()
    reset_rates(gate)
    gate.decide(unseen)
    assert execution_rates(gate) == pytest.approx([0.4], abs=0.05)
    cir = 1 - torch.cosine_similarity(unseen, unseen @ mixer, dim=-1)
    assert torch.corrcoef(torch.stack([gate.predict(unseen).detach(), cir]))[0, 1] > 0.5


def test_gate_loss_takes_the_terms_and_says_when_there_are_none():
    model = Blocks(make_gate(0), make_gate(1))
    with pytest.raises(RuntimeError, match="2 of 2 gates"):
        gate_loss(model, 0.5)
    model(tokens(4, 50))
    gate_loss(model, 0.5).backward()
    assert all(gate.terms is None for gate in gates_of(model))
    copy.deepcopy(model)


def test_a_model_without_gates_has_no_gate_loss():
    assert gate_loss(nn.Linear(2, 2), 0.5).item() == 0.0


def test_execution_rates_count_every_decision_since_the_reset():
    model, x = Blocks(make_gate(0), make_gate(1)).eval(), tokens(4, 50)
    with pytest.raises(RuntimeError, match="gate 0"):
        execution_rates(model)
    reset_rates(model)
    masks = [torch.cat([gate.decide(part).flatten() for part in (x, 2 * x[:1])]) for gate in gates_of(model)]
    assert execution_rates(model) == pytest.approx([mask.double().mean().item() for mask in masks])
    reset_rates(model)
    with pytest.raises(RuntimeError, match="evaluate"):
        execution_rates(model)


def test_training_forwards_are_not_counted_as_decisions():
    gate = make_gate()
    reset_rates(gate)
    gate(tokens(4, 50), tokens(4, 50))
    assert gate.counts[1] == 0


@pytest.mark.parametrize("training", [True, False])
def test_images_are_gated_one_by_one_on_pooled_features(training):
    gate = make_gate().train(training)
    x = torch.randn(16, C, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    branch = torch.ones(16, 2 * C, 3, 3, dtype=torch.float64)  # a block that changes the shape
    shortcut = torch.randn(16, 2 * C, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = gate(shortcut.flatten(1), branch.flatten(1), x.mean((2, 3))).view_as(branch)
    assert y.flatten(1).std(1).max() == 0 and set(y.unique().tolist()) <= {0.0, 1.0}
    assert gate.decide(x.mean((2, 3))).shape == (16,)


def test_placements_name_their_layers():
    assert gated_layers("all", 3) == (True, True, True)
    assert gated_layers("alternate", 4) == (False, True, False, True)
    assert gated_layers("upper", 4) == (False, False, True, True)
    assert gated_layers("upper", 3) == (False, True, True)
    assert gated_layers("0110", 4) == (False, True, True, False)


@pytest.mark.parametrize("layers", ["011", "01100", "0120", "lower", ""])
def test_a_placement_that_does_not_fit_is_refused(layers):
    with pytest.raises(SpaceError, match=f"gates.layers={layers}: .*alternate.*4 digits"):
        gated_layers(layers, 4)


def test_the_space_names_and_prices_the_gates_that_are_built():
    assert tuple(GATES) == CONSISTENCIES
    assert {gate.hidden for gate in GATES.values()} == {CONTROLLER}
