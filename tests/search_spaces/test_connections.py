"""The connections against their papers' numbers, against dense definitions, and against each other."""

import math
from contextlib import nullcontext
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hypernas.kernels.dispatch import forget_choices, list_choices, use_backend
from hypernas.kernels.sinkhorn import sinkhorn
from hypernas.search_spaces.base import SpaceError
from hypernas.search_spaces.connections import (
    KroneckerHyperConnection,
    PermutationHyperConnection,
    PlainResidual,
    SinkhornHyperConnection,
    WalshKroneckerHyperConnection,
    connection_parameters,
    make_connection,
    recomputing_streams,
    stochastic_errors,
)
from hypernas.search_spaces.gates import start_step
from hypernas.search_spaces.lm import LanguageModels
from hypernas.search_spaces.streams import (
    MIXINGS,
    SINKHORN_ITERATIONS,
    STREAMS,
    canonical_streams,
    check_streams,
    connection_cost,
    factorisations,
)

SPACE = LanguageModels()


def orders(n):
    """Every ordered factorisation of n into factors of 2 to 4."""
    return sorted({"x".join(order) for text in factorisations(n) for order in permutations(text.split("x"))})


EVERY = [
    (1, "none", None),
    *((n, mixing, None) for mixing in ("hc_static", "hc") for n in STREAMS),
    *((n, "mhc", None) for n in STREAMS[1:]),
    *((n, "mhc_lite", None) for n in (2, 3, 4)),
    *((n, "kromhc", factors) for n in STREAMS for factors in orders(n)),
]
FEW = [
    (1, "none", None),
    (3, "hc_static", None),
    (1, "hc", None),
    (4, "hc", None),
    (4, "mhc", None),
    (3, "mhc_lite", None),
    (2, "kromhc", "2"),
    (8, "kromhc", "2x2x2"),
    (6, "kromhc", "3x2"),
]
DTYPES = [torch.float32, torch.float64]


def randomised(connection, dtype=torch.float64, scale=0.5, seed=0):
    """The connection with every parameter moved away from its first value."""
    generator = torch.Generator().manual_seed(seed)
    connection = connection.to(dtype)
    with torch.no_grad():
        for parameter in connection.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise.to(dtype))
    return connection


def run(connection, x, sublayers=3):
    """A toy net of `sublayers` nonlinear sublayers around one connection."""
    X = connection.expand(x)
    for _ in range(sublayers):
        h, coefficients = connection.read(X)
        X = connection.write(X, h.tanh(), coefficients)
    return connection.reduce(X)


def states(connection, dtype=torch.float64, tokens=7, seed=1):
    """Streams (1, tokens, n, C) that differ from one another."""
    generator = torch.Generator().manual_seed(seed)
    n, C = connection.n, connection.d_model
    return torch.randn(1, tokens, n, C, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    "C, n, factors, modules, kromhc, mhc, mhc_lite",
    [
        (768, 4, "2x2", 24, 958_824, 1_843_848, 2_433_864),
        (768, 8, "2x2x2", 24, 3_392_088, 11_945_928, None),
        (768, 16, "2x2x2x2", 24, 12_092_424, 85_236_552, None),
        (768, 2, "2", 24, 258_264, 332_040, 258_264),
        (384, 4, "2x2", 12, 239_796, 461_124, 608_676),
        (384, 8, "2x2x2", 12, 848_172, 2_986_980, None),
        (512, 4, "2x2", 12, 319_668, 614_724, 811_428),
        (1024, 4, "2x2", 48, 2_556_624, 4_916_496, 6_489_744),
    ],
)
def test_connections_have_the_parameters_of_the_published_code(C, n, factors, modules, kromhc, mhc, mhc_lite):
    assert modules * connection_cost(n, "kromhc", factors, C)[0] == kromhc
    assert modules * connection_cost(n, "mhc", None, C)[0] == mhc
    if mhc_lite is not None:
        assert modules * connection_cost(n, "mhc_lite", None, C)[0] == mhc_lite


def test_hyper_connections_have_the_parameters_the_paper_gives_for_olmo():
    assert 32 * connection_cost(4, "hc_static", None, 2048)[0] == 768
    assert 32 * (connection_cost(4, "hc", None, 2048)[0] - 2048) == 394_048  # their norms have no weights
    assert connection_cost(4, "hc", None, 768)[0] == 5_402  # with the norm's weight, as in the public code


def test_mhc_is_priced_for_the_iterations_it_runs():
    assert SinkhornHyperConnection.iterations == SINKHORN_ITERATIONS


@pytest.mark.parametrize("n, mixing, factors", EVERY)
def test_cost_equals_the_modules_parameters_and_counted_matmuls(n, mixing, factors):
    C, B, T = 6, 2, 5
    with torch.device("meta"):
        connection = make_connection(n, mixing, factors, C, layer_index=1)
        x = torch.zeros(B, T, C)
    with FlopCounterMode(display=False) as counter:
        out = run(connection, x, sublayers=2)
    parameters, matmul, elementwise = connection_cost(n, mixing, factors, C)
    assert out.shape == x.shape
    assert parameters == sum(parameter.numel() for parameter in connection.parameters())
    assert 2 * B * T * matmul == counter.get_total_flops()
    assert elementwise >= C


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("mixing, factors", [("kromhc", "2x2"), ("mhc", None), ("mhc_lite", None)])
def test_first_coefficients_are_the_published_ones(mixing, factors, dtype, tolerance):
    connection = make_connection(4, mixing, factors, 6, layer_index=6).to(dtype)
    X = torch.randn(2, 3, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    streams = connection.expand(X)
    h, coefficients = connection.read(streams)
    pre = h[0, 0, 0] / X[0, 0, 0]  # every stream holds x at first: h = sum(H_pre) x
    high, low = torch.tensor(1.0, dtype=dtype).sigmoid(), torch.tensor(-1.0, dtype=dtype).sigmoid()
    torch.testing.assert_close(pre, high + 3 * low, rtol=tolerance, atol=0)
    assert (round(high.item(), 6), round(low.item(), 6)) == (0.731059, 0.268941)
    before = connection.write(streams, torch.zeros_like(h), coefficients)
    gain = connection.write(streams, torch.ones_like(h), coefficients) - before
    if isinstance(connection, WalshKroneckerHyperConnection):
        gain = connection.signs @ gain / 2
    post = [round(value, 4) for value in gain[0, 0, :, 0].tolist()]
    assert post == [0.5379, 0.5379, 1.4621, 0.5379]  # layer 6: stream 2 is the special one
    if mixing == "kromhc":
        matrix = connection.mean_mixing(streams)
        want = torch.tensor([0.99932942, 3.3523e-4, 3.3523e-4, 1.1246e-7], dtype=dtype)
        torch.testing.assert_close(matrix[0], want, rtol=0, atol=1e-7)
        torch.testing.assert_close(matrix.diagonal(), want[:1].expand(4), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("mixing, factors", [("kromhc", "2x2"), ("kromhc", "4"), ("mhc", None), ("mhc_lite", None)])
def test_every_stream_is_first_read_and_written_with_the_published_weights(mixing, factors, dtype, tolerance):
    connection = make_connection(4, mixing, factors, 6, layer_index=6).to(dtype)  # layer 6: stream 2 is the special one
    one_stream_each = torch.eye(4, dtype=dtype)[None, :, :, None].expand(1, 4, 4, 6)  # token t lives in stream t alone
    walsh = isinstance(connection, WalshKroneckerHyperConnection)
    into = connection.signs / 2 if walsh else torch.eye(4, dtype=dtype)
    h, coefficients = connection.read(into @ one_stream_each)
    y = torch.ones(1, 4, 6, dtype=dtype)
    written = into @ connection.write(torch.zeros(1, 4, 4, 6, dtype=dtype), y, coefficients)
    sigmoid = torch.tensor([-1.0, -1.0, 1.0, -1.0], dtype=dtype).sigmoid()
    torch.testing.assert_close(h[0, :, 0], sigmoid, rtol=tolerance, atol=0)
    torch.testing.assert_close(written[0, 0, :, 0], 2 * sigmoid, rtol=tolerance, atol=0)
    assert [round(value, 6) for value in h[0, :, 0].tolist()] == [0.268941, 0.268941, 0.731059, 0.268941]
    assert [round(value, 6) for value in written[0, 0, :, 0].tolist()] == [0.537883, 0.537883, 1.462117, 0.537883]


@pytest.mark.parametrize("n, mixing", [(1, "hc"), (2, "hc"), (4, "hc"), (8, "hc"), (4, "hc_static"), (3, "hc_static")])
def test_hyper_connections_start_as_the_plain_residual_in_every_stream(n, mixing):
    torch.manual_seed(0)
    C, depth = 8, 6
    x = torch.randn(2, 5, C, dtype=torch.float64)
    branches = [torch.nn.Linear(C, C, dtype=torch.float64) for _ in range(depth)]
    plain = x
    X = x.unsqueeze(-2).expand(2, 5, n, C)
    for layer, branch in enumerate(branches):
        connection = make_connection(n, mixing, None, C, layer).double()
        plain = plain + branch(plain).tanh()
        h, coefficients = connection.read(X)
        X = connection.write(X, branch(h).tanh(), coefficients)
    torch.testing.assert_close(X, plain.unsqueeze(-2).expand_as(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_walsh_and_dense_kromhc_are_the_same_function_of_the_same_state(n):
    C = 6
    dense = randomised(KroneckerHyperConnection((2,) * (n.bit_length() - 1), C, 3), scale=0.3)
    walsh = WalshKroneckerHyperConnection(n, C, 3).double()
    first = KroneckerHyperConnection((2,) * (n.bit_length() - 1), C, 3).state_dict()
    assert {key: value.tolist() for key, value in first.items()} == {
        key: value.float().tolist() for key, value in walsh.state_dict().items()
    }
    walsh.load_state_dict(dense.state_dict())
    x = torch.randn(2, 5, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for connection in (dense, walsh):
        inputs = x.clone().requires_grad_()
        out = run(connection, inputs)
        named = dict(connection.named_parameters())
        gradients = torch.autograd.grad(out.cos().sum(), [inputs, *(named[key] for key in sorted(named))])
        results.append((out, *gradients))
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-12 * want.norm()


@pytest.mark.parametrize("n", [2, 4, 8])
def test_walsh_streams_are_the_orthonormal_transform_of_the_dense_ones(n):
    dense = randomised(KroneckerHyperConnection((2,) * (n.bit_length() - 1), 6, 0))
    walsh = WalshKroneckerHyperConnection(n, 6, 0).double()
    walsh.load_state_dict(dense.state_dict())
    X, y = states(dense), torch.ones(1, 7, 6, dtype=torch.float64)
    transform = walsh.signs / math.sqrt(n)
    torch.testing.assert_close(transform @ transform, torch.eye(n, dtype=torch.float64))
    (h, kept), (h_walsh, kept_walsh) = dense.read(X), walsh.read(transform @ X)
    torch.testing.assert_close(h_walsh, h, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        walsh.write(transform @ X, y, kept_walsh), transform @ dense.write(X, y, kept), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(walsh.matrices(transform @ X), dense.matrices(X), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(walsh.reduce(transform @ X), dense.reduce(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factors", [(2,), (2, 2), (2, 2, 2), (2, 2, 2, 2)])
def test_spectrum_of_factors_of_two_is_the_walsh_closed_form(factors):
    connection = randomised(KroneckerHyperConnection(factors, 6, 0), scale=1.0)
    X = states(connection, tokens=3)
    _, (_, *small) = connection.read(X)
    product = [1.0]
    for matrix in small:  # 1 and 2p - 1 for every factor [[p, 1 - p], [1 - p, p]]
        eigenvalue = 2.0 * matrix[0, 0, 0, 0].item() - 1.0
        product = [value * factor for value in product for factor in (1.0, eigenvalue)]
    got = torch.linalg.eigvalsh(connection.matrices(X)[0, 0])
    torch.testing.assert_close(got, torch.tensor(sorted(product), dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_walsh_matrices_have_the_closed_form_spectrum_of_their_own_logits(n, dtype, tolerance):
    factors = n.bit_length() - 1
    connection = randomised(WalshKroneckerHyperConnection(n, 6, 0), dtype, scale=1.0)
    with torch.no_grad():
        connection.projection.zero_()  # logits are the bias alone, the same for every token
    logits = connection.bias[2 * n :].detach().double().view(factors, 2)
    want = torch.ones(1, dtype=torch.float64)
    for p in logits.softmax(-1)[:, 0]:  # eigenvalues of [[p, 1 - p], [1 - p, p]]: 1 and 2p - 1
        want = torch.cat([want, want * (2 * p - 1)])
    matrix = connection.matrices(states(connection, dtype, tokens=1))[0, 0]
    torch.testing.assert_close(matrix, matrix.mT, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        torch.linalg.eigvalsh(matrix.double()), want.sort().values, rtol=0, atol=tolerance * math.sqrt(n)
    )


@pytest.mark.parametrize("dtype, one, product", [(torch.float32, 1e-6, 1e-5), (torch.float64, 1e-14, 1e-13)])
@pytest.mark.parametrize(
    "n, mixing, factors", [(2, "mhc_lite", None), (3, "mhc_lite", None), (4, "mhc_lite", None)]
    + [(n, "kromhc", factors) for n in STREAMS for factors in factorisations(n)]
)  # fmt: skip
def test_permutation_mixings_are_doubly_stochastic_and_so_is_their_product(n, mixing, factors, dtype, one, product):
    composite = torch.eye(n, dtype=dtype)
    for layer in range(64):
        connection = randomised(make_connection(n, mixing, factors, 6, layer), dtype, scale=2.0, seed=layer)
        matrices = connection.matrices(states(connection, dtype, seed=layer))
        assert matrices.min() >= -one
        assert max(stochastic_errors(matrices)) <= one
        composite = matrices[0, 0] @ composite
    assert max(stochastic_errors(composite)) <= product


def test_sinkhorn_makes_rows_exact_and_its_column_error_is_reported():
    generator = torch.Generator().manual_seed(0)
    rows, columns = stochastic_errors(sinkhorn(torch.randn(1, 64, 4, 4, generator=generator), 20))
    assert rows <= 1e-6 and columns <= 1e-3  # measured 4e-4
    # Two rows want one column, and entries are e^-30 apart, as in a quarter of mHC's inputs by mHC-lite's count.
    hard = torch.tensor([[0.0, -30.0, -30.0], [0.0, -30.0, -30.0], [-30.0, 0.0, 0.0]]).expand(1, 1, 3, 3)
    matrix = sinkhorn(hard, 20)
    torch.testing.assert_close(matrix.sum(-2)[0, 0], torch.tensor([1.829, 0.585, 0.585]), rtol=0, atol=1e-3)
    rows, columns = stochastic_errors(matrix)
    assert rows <= 1e-6 and columns > 0.8


def test_sinkhorn_divides_columns_first_and_rows_last():
    logits = torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = logits.exp()
    for _ in range(20):
        want = want / want.sum(-2, keepdim=True)
        want = want / want.sum(-1, keepdim=True)
    torch.testing.assert_close(sinkhorn(logits, 20), want, rtol=1e-12, atol=0)


def test_sinkhorn_survives_logits_that_underflow():
    logits = torch.tensor([[0.0, 0.0], [-500.0, -500.0]]).expand(1, 1, 2, 2).clone().requires_grad_()
    matrix = sinkhorn(logits, 20)
    matrix.square().sum().backward()
    assert matrix.isfinite().all() and logits.grad.isfinite().all()


def test_kronecker_product_has_the_first_factor_outermost():
    connection = randomised(KroneckerHyperConnection((2, 3), 4, 0))
    X = states(connection)
    _, (_, outer, inner) = connection.read(X)
    want = torch.kron(outer[0, 2], inner[0, 2])
    torch.testing.assert_close(connection.matrices(X)[0, 2], want, rtol=1e-12, atol=0)
    torch.testing.assert_close(connection.mix(X, [outer, inner])[0, 2], want @ X[0, 2], rtol=1e-12, atol=1e-12)


def test_two_orders_of_the_factors_are_one_function_with_the_streams_renamed():
    C = 4
    one = randomised(KroneckerHyperConnection((2, 3), C, 0))
    other = KroneckerHyperConnection((3, 2), C, 0).double()
    renamed = torch.arange(6).view(2, 3).T.flatten()  # stream (a, b) of one is stream (b, a) of the other
    rows = torch.cat([renamed, 6 + renamed, torch.tensor([14, 15, 16, 17, 18, 19, 12, 13])])
    with torch.no_grad():
        other.projection.copy_(one.projection[rows].view(-1, 6, C)[:, renamed].flatten(1))
        other.gamma.copy_(one.gamma.view(6, C)[renamed].flatten())
        other.bias.copy_(one.bias[rows])
        other.alpha.copy_(one.alpha)
    x = torch.randn(2, 5, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(run(other, x), run(one, x), rtol=1e-12, atol=1e-12)
    assert canonical_streams(6, "kromhc", "3x2") == canonical_streams(6, "kromhc", "2x3") == (6, "kromhc", "2x3")


@pytest.mark.parametrize("n, mixing, factors", FEW)
def test_gradients_agree_with_finite_differences(n, mixing, factors):
    connection = randomised(make_connection(n, mixing, factors, 3, 1), scale=0.3)
    names = [name for name, _ in connection.named_parameters()]
    x = torch.randn(1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)

    def net(x, *parameters):
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.connection = connection

            def forward(self, x):
                return run(self.connection, x, sublayers=2)

        state = {f"connection.{name}": value for name, value in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Net(), state, (x,))

    parameters = [parameter.detach().clone().requires_grad_() for parameter in connection.parameters()]
    assert torch.autograd.gradcheck(net, (x, *parameters), eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, mixing, factors", FEW)
def test_zero_input_gives_finite_output_and_gradients(n, mixing, factors, dtype):
    connection = make_connection(n, mixing, factors, 6, 0).to(dtype)
    x = torch.zeros(1, 2, 6, dtype=dtype, requires_grad=True)
    out = run(connection, x)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(tensor.grad.isfinite().all() for tensor in (x, *connection.parameters()) if tensor.grad is not None)


@pytest.mark.parametrize("n, mixing, factors", FEW)
def test_float32_agrees_with_float64(n, mixing, factors):
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    exact = run(randomised(make_connection(n, mixing, factors, 8, 1), scale=0.2), x)
    got = run(randomised(make_connection(n, mixing, factors, 8, 1), torch.float32, scale=0.2), x.float())
    assert (got.double() - exact).norm() <= 2e-6 * exact.norm()


@pytest.mark.parametrize("n, mixing, factors", FEW)
def test_each_token_is_mixed_alone(n, mixing, factors):
    connection = randomised(make_connection(n, mixing, factors, 6, 1))
    x = torch.randn(1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    changed = x.clone()
    changed[:, 3] += 1.0
    same = torch.isclose(run(connection, x), run(connection, changed), rtol=1e-12, atol=1e-12).all(-1)
    assert same.tolist() == [[True, True, True, False, True, True]]


@pytest.mark.parametrize(
    "n, mixing, factors", [(4, "hc", None), (4, "mhc", None), (4, "kromhc", "2x2"), (6, "kromhc", "2x3")]
)
def test_mean_mixing_is_the_mean_over_tokens(n, mixing, factors):
    connection = randomised(make_connection(n, mixing, factors, 6, 1))
    X = states(connection)
    singles = [connection.mean_mixing(X[:, token : token + 1]) for token in range(X.shape[1])]
    torch.testing.assert_close(connection.mean_mixing(X), torch.stack(singles).mean(0), rtol=1e-12, atol=1e-12)


def test_connection_parameters_split_the_projections_from_the_static_tensors():
    model = torch.nn.ModuleList(
        [torch.nn.Linear(6, 6), *(make_connection(n, mixing, factors, 6, 0) for n, mixing, factors in FEW)]
    )
    dynamic, static = connection_parameters(model)
    linear = {id(parameter) for parameter in model[0].parameters()}
    assert {id(p) for p in dynamic} == {id(p) for name, p in model.named_parameters() if name.endswith("projection")}
    assert {id(p) for p in (*dynamic, *static)} == {id(p) for p in model.parameters()} - linear


def test_factors_of_two_never_make_an_n_by_n_matrix_per_token():
    connection = make_connection(8, "kromhc", "2x2x2", 6, 0)
    assert type(connection) is WalshKroneckerHyperConnection
    _, coefficients = connection.read(states(connection, torch.float32))
    assert [tuple(tensor.shape) for tensor in coefficients] == [(1, 7, 16)]  # H_post and the spectrum


def gradients(model, tokens, recomputed):
    """Of a mean logit, summed over two halves of a batch."""
    model.zero_grad()
    start_step(model, 0, 0, 0.5)
    for part in tokens.chunk(2):
        with recomputing_streams(model) if recomputed else nullcontext():
            loss = model(part).square().mean()
        loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("placement", ["none", "both"])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_recomputed_streams_give_the_same_gradients_bit_for_bit(n, placement, backend):
    keys = {"depth": 4, "d_model": 16, "head_dim": 8, "context": 8, "gates.placement": placement}
    streams = {"streams.n": n, "streams.mixing": "kromhc", "streams.factors": "x".join("2" * (n.bit_length() - 1))}
    torch.manual_seed(0)
    model = SPACE.build(SPACE.from_json(keys | streams)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    tokens = torch.randint(256, (4, 8))
    forget_choices()
    with use_backend(backend):
        kept, recomputed = (gradients(model, tokens, on) for on in (False, True))
    assert list_choices()["stream_chain"].backend == backend
    assert recomputed.keys() == kept.keys() and len(kept) > 40
    assert all(torch.equal(recomputed[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    "n, mixing, factors", [(1, "none", None), (4, "mhc", None), (3, "mhc_lite", None), (8, "kromhc", "2x4")]
)
def test_other_connections_keep_their_streams(n, mixing, factors):
    streams = {"streams.n": n, "streams.mixing": mixing} | ({"streams.factors": factors} if factors else {})
    model = SPACE.build(SPACE.from_json({"depth": 2, "d_model": 16, "head_dim": 8, "context": 8} | streams))
    forget_choices()
    gradients(model, torch.randint(256, (4, 8)), True)
    assert "stream_chain" not in list_choices()


def test_names_for_one_function_share_a_class_and_a_canonical_form():
    assert canonical_streams(4, "kromhc", "4") == canonical_streams(4, "mhc_lite", None) == (4, "mhc_lite", None)
    assert canonical_streams(2, "kromhc", "2") == canonical_streams(2, "mhc_lite", None) == (2, "mhc_lite", None)
    assert canonical_streams(8, "kromhc", "4x2") == canonical_streams(8, "kromhc", "2x4") == (8, "kromhc", "2x4")
    assert canonical_streams(4, "hc", "2x2") == (4, "hc", None)
    assert type(make_connection(4, "kromhc", "4", 6, 0)) is PermutationHyperConnection
    assert type(make_connection(2, "mhc_lite", None, 6, 0)) is WalshKroneckerHyperConnection
    assert type(make_connection(4, "mhc", None, 6, 0)) is SinkhornHyperConnection
    assert type(make_connection(1, "none", None, 6, 0)) is PlainResidual


@given(st.sampled_from(EVERY))
def test_canonical_streams_are_legal_cost_the_same_and_are_their_own_canonical_form(streams):
    canonical = canonical_streams(*streams)
    assert canonical_streams(*canonical) == canonical
    assert connection_cost(*canonical, 12)[0] == connection_cost(*streams, 12)[0]


def test_factorisations_are_the_non_decreasing_ones():
    assert factorisations(1) == ()
    assert factorisations(4) == ("2x2", "4")
    assert factorisations(8) == ("2x2x2", "2x4")
    assert factorisations(12) == ("2x2x3", "3x4")
    assert factorisations(16) == ("2x2x2x2", "2x2x4", "4x4")
    assert factorisations(9) == ("3x3",)


@pytest.mark.parametrize(
    "n, mixing, factors, words",
    [
        (4, "sinkhorn", None, ["streams.mixing=sinkhorn", *MIXINGS]),
        (5, "hc", None, ["streams.n=5", "1, 2, 3, 4, 6, 8, 9, 12, 16"]),
        (4, "none", None, ["streams.mixing=none", "streams.n=4", "kromhc"]),
        (1, "kromhc", "2", ["streams.n=1", "none, hc_static or hc"]),
        (8, "mhc_lite", None, ["streams.mixing=mhc_lite", "streams.n=8", "2, 3 or 4"]),
        (8, "kromhc", "2x2", ["streams.factors=2x2", "4, not 8", "2x2x2 or 2x4"]),
        (8, "kromhc", "8", ["streams.factors=8", "2 to 4", "2x2x2 or 2x4"]),
        (8, "kromhc", "8x1", ["streams.factors=8x1", "2 to 4"]),
        (8, "kromhc", None, ["streams.factors=", "2x2x2 or 2x4"]),
        (8, "kromhc", "2*4", ["streams.factors=2*4", "2x2x2 or 2x4"]),
        (8, "kromhc", "2x-4", ["streams.factors=2x-4", "2x2x2 or 2x4"]),
    ],
)
def test_impossible_streams_are_refused_with_the_value_and_the_legal_ones(n, mixing, factors, words):
    for refuse in (
        lambda: check_streams(n, mixing, factors),
        lambda: make_connection(n, mixing, factors, 6, 0),
        lambda: connection_cost(n, mixing, factors, 6),
        lambda: canonical_streams(n, mixing, factors),
    ):
        with pytest.raises(SpaceError) as error:
            refuse()
        assert all(word in str(error.value) for word in words), str(error.value)
