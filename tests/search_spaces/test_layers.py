"""Every differentiable layer against finite differences. Connections and gates have their own files."""

import pytest
import torch
from torch import nn

from hypernas.search_spaces import layers, transformer
from hypernas.search_spaces.costs import ACTIVATION_FLOPS
from hypernas.search_spaces.nets import lstm, vision

C, HIDDEN, T = 6, 4, 5


def attention(kind):
    return kind(C, 8, 4, layers.Rotary(4, T))


def hourglass():
    return layers.Hourglass([layers.PreNorm(layers.RMSNorm(C), layers.SwiGLU(C, HIDDEN)) for _ in range(3)])


SEQUENCES = {  # (B, T, C) -> (B, T, anything)
    "rmsnorm": lambda: layers.RMSNorm(C),
    "layernorm": lambda: layers.LayerNorm(C),
    "learned positions": lambda: layers.LearnedPositions(C, T),
    "sinusoidal positions": lambda: layers.SinusoidalPositions(C, T),
    "attention": lambda: attention(layers.Attention),
    "bidirectional attention": lambda: attention(layers.BidirectionalAttention),
    "swiglu": lambda: layers.SwiGLU(C, HIDDEN),
    "gelu": lambda: layers.GELUNet(C, HIDDEN),
    "relu": lambda: layers.ReLUNet(C, HIDDEN),
    "hourglass": hourglass,
    "pre-norm": lambda: layers.PreNormFFN(layers.RMSNorm(C), layers.SwiGLU(C, HIDDEN)),
    "head": lambda: layers.Head(C, 7),
    "lstm": lambda: lstm.LSTM(C),
}
IMAGES = {  # (B, C, H, W) -> (B, C', H', W')
    "projection": lambda: vision.Projection(C, 2 * C, 2),
    "two convolutions": lambda: vision.TwoConvolutions(C, 2 * C, 2),
    "block": lambda: vision.Block(vision.SameShape(), vision.TwoConvolutions(C, C, 1)),
    "patches": lambda: vision.Patches(C, 4, 2),
}
SELECTED = ("attention", "bidirectional attention", "hourglass", "pre-norm")


def made(maker) -> nn.Module:
    torch.manual_seed(0)
    layer = maker().double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def agrees_with_finite_differences(layer: nn.Module, x: torch.Tensor, method: str = "forward", *more) -> bool:
    names = [name for name, _ in layer.named_parameters()]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            # A head's weight may be the embedding's: it is given that as well.
            given = (x, x) if isinstance(layer, layers.Head) else (x, *more)
            return getattr(self.layer, method)(*given)

    def function(x, *parameters):
        state = {f"layer.{name}": value for name, value in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Net(), state, (x,))

    parameters = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
    return torch.autograd.gradcheck(function, (x.requires_grad_(), *parameters), eps=1e-6, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("name", SEQUENCES)
def test_gradients_of_layers_on_sequences_agree_with_finite_differences(name):
    assert agrees_with_finite_differences(made(SEQUENCES[name]), torch.randn(2, T, C, dtype=torch.float64))


@pytest.mark.parametrize("name", SELECTED)
def test_gradients_of_the_selected_rows_agree_with_finite_differences(name):
    x = torch.randn(2, T, C, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True, False], [False, False, True, False, False]])
    assert agrees_with_finite_differences(made(SEQUENCES[name]), x, "selected", mask)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", IMAGES)
def test_gradients_of_layers_on_images_agree_with_finite_differences(name, training):
    layer = made(IMAGES[name]).train(training)
    assert agrees_with_finite_differences(layer, torch.randn(3, C, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", SELECTED)
def test_selected_rows_are_those_of_the_whole_and_others_are_zero(name):
    layer, x = made(SEQUENCES[name]), torch.randn(2, T, C, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True, False], [False, False, True, False, False]])
    torch.testing.assert_close(layer.selected(x, mask), layer(x) * mask.unsqueeze(-1), rtol=1e-12, atol=1e-12)


def test_rotary_turns_a_pair_by_an_angle_that_grows_with_its_position():
    rotary = layers.Rotary(2, 4).double()
    turned = rotary(torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 1, 4, 2))
    angle = torch.arange(4, dtype=torch.float32).double()
    torch.testing.assert_close(turned[0, 0], torch.stack([angle.cos(), angle.sin()], -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_a_cpu_computes_in_float32_what_it_is_given_in_bfloat16(masked):
    generator = torch.Generator().manual_seed(0)
    rounded = [torch.randn(2, 3, 7, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in rounded]
    mask = torch.ones(7, 7, dtype=torch.bool).tril() if masked else None
    with torch.autocast("cpu", torch.bfloat16):  # would round what is inside
        found = layers.attention(*rounded, mask=mask, is_causal=not masked)
    wanted = layers.attention(*exact, mask=mask, is_causal=not masked)
    assert found.dtype is torch.bfloat16 and wanted.dtype is torch.float64
    half_a_digit = 2**-8  # the result is rounded, and nothing before it
    assert ((found.double() - wanted).abs() <= half_a_digit * wanted.abs() + 1e-6).all()
    for ours, theirs in zip(
        torch.autograd.grad(found.float().sum(), rounded), torch.autograd.grad(wanted.sum(), exact), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=1e-6)


def test_the_space_names_the_layers_that_are_built():
    assert tuple(layers.ACTIVATIONS) == tuple(ACTIVATION_FLOPS)
    assert tuple(layers.NORMS) == transformer.NORMS
    assert tuple(layers.POSITIONS) == transformer.POSITIONS
