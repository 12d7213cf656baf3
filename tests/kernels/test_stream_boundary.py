import pytest
import torch

from hypernas.kernels.stream_boundary import (
    STREAM_BOUNDARY,
    example_arguments,
    stream_boundary,
    stream_boundary_reference,
)

CPU = torch.device("cpu")


def hadamard(n):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return matrix / n**0.5


def kromhc(X, y, post, factors, weight, bias):
    """KromHC as the paper has it: streams in their own basis, H_res a Kronecker product of 2 x 2 matrices.

    Returns X', u, H_post and the factors' p for the next write.
    """
    T, n, _ = X.shape
    H = torch.ones(T, 1, 1, dtype=X.dtype)
    for p in factors.unbind(-1):
        U = torch.stack((torch.stack((p, 1 - p), -1), torch.stack((1 - p, p), -1)), -2)
        H = torch.einsum("tij,tkl->tikjl", H, U).reshape(T, 2 * H.shape[1], -1)
    X = H @ X + post.unsqueeze(-1) * y.unsqueeze(-2)
    flat = X.flatten(1)
    normalised = flat / flat.square().mean(-1, keepdim=True).sqrt()
    pre, post, factors = (normalised @ weight.T + bias).sigmoid().split((n, n, len(bias) - 2 * n), -1)
    return X, (pre.unsqueeze(-1) * X).sum(1), 2 * post, factors


@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_walsh_form_equals_kromhc_in_the_stream_basis_outputs_and_gradients(n):
    T, C, K = 9, 6, n.bit_length() - 1
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W = hadamard(n)
    leaves = (
        random(T, n, C),
        random(T, C),
        random(T, n),
        random(T, K),
        random(2 * n + K, n * C) / 5,
        random(2 * n + K),
    )
    dense_leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    walsh_leaves = [leaf.clone().requires_grad_() for leaf in leaves]

    def dense(X, y, post, logits, weight, bias):
        return kromhc(X, y, post, logits.sigmoid(), weight, bias)

    def spectrum(p):
        out = torch.ones(T, 1, dtype=torch.float64)
        for e in (2 * p - 1).unbind(-1):
            out = torch.stack((out, out * e.unsqueeze(-1)), -1).flatten(1)
        return out

    def walsh(X, y, post, logits, weight, bias):
        phi = (weight.unflatten(1, (n, C)).mT @ W).mT.flatten(1)
        coefficients = torch.cat((post @ W, spectrum(logits.sigmoid())), -1)
        X, u, following = stream_boundary_reference(W @ X, y, coefficients, phi, bias)
        return W @ X, u, following[:, :n] @ W, following[:, n:]

    X, u, post, factors = dense(*dense_leaves)
    want = (X, u, post, spectrum(factors))
    got = walsh(*walsh_leaves)
    cotangents = [random(*w.shape) for w in want]
    gradients = [
        torch.autograd.grad(outputs, inputs, cotangents)
        for outputs, inputs in ((want, dense_leaves), (got, walsh_leaves))
    ]
    for a, b in zip((*got, *gradients[1]), (*want, *gradients[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_the_reference_passes_gradcheck():
    arguments = [a.requires_grad_() for a in example_arguments(2, 4, 3, torch.float64, CPU)]
    assert torch.autograd.gradcheck(stream_boundary_reference, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("tokens, C", [(1, 5), (37, 50), (300, 64), (19, 17)])
def test_cpu_agrees_with_float64(agrees, dtype, n, tokens, C):
    X, y, coefficients, phi, bias = example_arguments(tokens, n, C, dtype, CPU)
    agrees(STREAM_BOUNDARY, (X, y, coefficients, phi, bias))
    agrees(STREAM_BOUNDARY, (X, None, None, phi, bias))


def test_stores_past_the_cache_agree_too(agrees):
    agrees(STREAM_BOUNDARY, example_arguments(4100, 4, 64, torch.float32, CPU))


def test_inputs_with_gaps_and_batch_axes_are_taken(agrees):
    X, y, coefficients, phi, bias = example_arguments(24, 4, 10, torch.float32, CPU)
    gaps = X.repeat(1, 1, 2)[..., ::2].reshape(2, 12, 4, 10).transpose(0, 1)
    y = y.reshape(2, 12, 10).transpose(0, 1)
    coefficients = coefficients.reshape(12, 2, 8)
    assert not gaps.is_contiguous()
    agrees(STREAM_BOUNDARY, (gaps, y, coefficients, phi.T.contiguous().T, bias))


def test_a_branch_and_coefficients_of_another_dtype_are_taken_and_get_gradients_in_theirs():
    X, y, coefficients, phi, bias = example_arguments(20, 4, 10, torch.bfloat16, CPU)
    leaves = [t.requires_grad_() for t in (X, y.float(), coefficients.bfloat16(), phi.bfloat16(), bias)]
    gradients = torch.autograd.grad(sum(o.float().sum() for o in stream_boundary(*leaves)), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = torch.autograd.grad(sum(o.sum() for o in stream_boundary_reference(*wide)), wide)
    for got, right, leaf in zip(gradients, want, leaves, strict=True):
        assert got.dtype == leaf.dtype
        assert (got - right).norm() <= 2e-2 * right.norm()


def test_without_a_branch_the_streams_come_back_untouched():
    X, _, _, phi, bias = example_arguments(3, 2, 8, torch.float32, CPU)
    assert stream_boundary(X, None, None, phi, bias)[0] is X


def test_streams_of_zeros_read_zero_and_have_finite_gradients():
    X, y, coefficients, phi, bias = (a.requires_grad_() for a in example_arguments(3, 4, 8, torch.float32, CPU))
    outputs = stream_boundary(X * 0, y * 0, coefficients, phi, bias)
    assert outputs[1].abs().max() == 0
    assert torch.autograd.grad(outputs[2].sum(), phi)[0].isfinite().all()


def test_gradients_of_unused_outputs_are_left_out():
    arguments = [a.requires_grad_() for a in example_arguments(5, 4, 8, torch.float32, CPU)]
    for index in range(3):
        got = torch.autograd.grad(stream_boundary(*arguments)[index].sum(), arguments, allow_unused=True)
        want = torch.autograd.grad(stream_boundary_reference(*arguments)[index].sum(), arguments, allow_unused=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_the_operator_is_well_formed():
    arguments = [a.requires_grad_() for a in example_arguments(3, 2, 8, torch.float32, CPU)]
    torch.library.opcheck(torch.ops.hypernas.stream_boundary.default, (*arguments, 1e-6, "cpu"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"X": (3, 3, 8)}, "want a power of two of streams"),
        ({"phi": (5, 8)}, r"want phi \(5, 16\)"),
        ({"y": (3, 7)}, r"want y \(3, 8\), got \(3, 7\)"),
        ({"y": None}, "want y and coefficients together"),
        ({"coefficients": (3, 3)}, r"want coefficients \(3, 4\)"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    shapes = {"X": (3, 2, 8), "y": (3, 8), "coefficients": (3, 4), "phi": (5, 16), "bias": (5,)} | change
    with pytest.raises(ValueError, match=message):
        stream_boundary(*(None if shape is None else torch.zeros(shape) for shape in shapes.values()))
