import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from hypernas.kernels import dispatch
from hypernas.kernels import stream_chain as stream_chain_module
from hypernas.kernels.stream_boundary import example_arguments as boundary_arguments
from hypernas.kernels.stream_boundary import stream_boundary
from hypernas.kernels.stream_chain import STREAM_CHAIN, chain_length, example_arguments, recomputing, stream_chain

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "tokens, n, C, layers", [(1, 1, 1, 1), (37, 4, 50, 3), (301, 8, 17, 2), (5, 2, 33, 7), (4100, 4, 64, 4)]
)
def test_cpu_agrees_with_float64(agrees, dtype, tokens, n, C, layers):
    agrees(STREAM_CHAIN, example_arguments(tokens, n, C, layers, dtype, CPU))


# The last is large enough for stores past the cache.
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "tokens, n, C, layers", [(1, 1, 1, 1), (37, 4, 50, 3), (301, 8, 17, 2), (5, 2, 33, 7), (4100, 4, 64, 4)]
)
def test_recomputed_streams_have_the_bits_that_were_written_forward(tokens, n, C, layers, dtype, backend):
    X, *pairs = example_arguments(tokens, n, C, layers, dtype, CPU)
    phi, bias = boundary_arguments(tokens, n, C, dtype, CPU)[3:]
    with dispatch.use_backend(backend):
        recomputed = stream_chain(X, pairs[::2], pairs[1::2])
        for y, coefficients, streams in zip(pairs[::2], pairs[1::2], recomputed, strict=True):
            X = stream_boundary(X, y, coefficients, phi, bias)[0]
            assert torch.equal(X, streams)


def test_inputs_with_gaps_and_batch_axes_are_taken(agrees):
    X, *pairs = example_arguments(24, 4, 10, 2, torch.float32, CPU)
    gaps = X.repeat(1, 1, 2)[..., ::2].reshape(2, 12, 4, 10).transpose(0, 1)
    agrees(STREAM_CHAIN, (gaps, *(t.reshape(2, 12, -1).transpose(0, 1) for t in pairs)))


def test_the_operator_is_well_formed():
    X, *pairs = example_arguments(3, 2, 8, 2, torch.float32, CPU)
    torch.library.opcheck(torch.ops.hypernas.stream_chain.default, (X, pairs[::2], pairs[1::2], "cpu"))


def test_wrong_shapes_are_named():
    X, y, coefficients = example_arguments(3, 2, 8, 1, torch.float32, CPU)
    with pytest.raises(ValueError, match=r"want y \(3, 8\) for X \(3, 2, 8\), got \(3, 7\)"):
        stream_chain(X, [y[:, :7]], [coefficients])
    with pytest.raises(ValueError, match=r"want coefficients \(3, 4\) for X \(3, 2, 8\), got \(3, 3\)"):
        stream_chain(X, [y], [coefficients[:, :3]])
    with pytest.raises(ValueError, match="want as many ys as coefficients, one at least: got 1 and 0"):
        stream_chain(X, [y], [])


def test_a_chain_is_as_long_as_the_paper_has_it_and_two_boundaries_at_least():
    assert [chain_length(4, boundaries) for boundaries in (1, 6, 24, 96)] == [2, 2, 4, 8]
    assert chain_length(8, 60) == 7


def net(X, weights, layers):
    """Streams through `layers` writes with a product and a tanh for a branch: a loss, and which memory each took."""
    phi, bias, branch = weights
    seen = []
    X, h, coefficients = stream_boundary(X, None, None, phi, bias)
    for _ in range(layers):
        X, h, coefficients = stream_boundary(X, (h @ branch).tanh(), coefficients, phi, bias)
        seen.append(StorageWeakRef(X.untyped_storage()))
    return h.float().square().sum() + coefficients.sum(), seen


def arguments(n, dtype):
    X, _, _, phi, bias = boundary_arguments(12, n, 10, dtype, CPU)
    return [t.requires_grad_() for t in (X, phi, bias, torch.eye(10, dtype=dtype))]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_through_recomputed_streams_keep_their_bits(dtype, backend):
    X, *weights = arguments(4, dtype)
    with dispatch.use_backend(backend):
        want = torch.autograd.grad(net(X, weights, 9)[0], [X, *weights])
        with recomputing(10):
            loss, _ = net(X, weights, 9)
    got = torch.autograd.grad(loss, [X, *weights])  # of itself on the back end that ran forward
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_graph_that_is_kept_can_go_backward_twice():
    X, *weights = arguments(4, torch.float32)
    with recomputing(10):
        loss, _ = net(X, weights, 9)
    first = torch.autograd.grad(loss, [X, *weights], retain_graph=True)
    second = torch.autograd.grad(loss, [X, *weights])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def alive(memory):
    return [layer for layer, storage in enumerate(memory, 1) if not storage.expired()]


@pytest.mark.parametrize("backend, kept", [("reference", [3, 6, 9]), ("cpu", [3, 6])])
def test_only_the_streams_at_the_ends_of_chains_outlive_the_forward_pass(backend, kept):
    X, *weights = arguments(4, torch.float32)
    with dispatch.use_backend(backend):
        loss, memory = net(X, weights, 9)
        assert len(alive(memory)) >= 8
        with recomputing(10):
            loss, memory = net(X, weights, 9)
        assert alive(memory) == kept
        gc.disable()  # nothing refers to itself, so nothing waits for the collector
        try:
            loss.backward(retain_graph=True)
            del loss
            assert alive(memory) == []
        finally:
            gc.enable()


def test_backward_has_the_streams_of_one_chain_at_a_time(monkeypatch):
    X, *weights = arguments(4, torch.float32)
    made = []
    run = stream_chain_module._run

    def seen(*inputs):
        before = len(alive(made))
        outputs = run(*inputs)
        made.extend(StorageWeakRef(streams.untyped_storage()) for streams in outputs)
        assert before <= 1  # the last one that the chain before it is still computing with
        return outputs

    monkeypatch.setattr(stream_chain_module, "_run", seen)
    with recomputing(10):
        loss, _ = net(X, weights, 9)
    assert made == []
    loss.backward()
    assert len(made) == 6 and alive(made) == []


def test_nothing_is_recomputed_where_nothing_goes_backward():
    X, *weights = arguments(4, torch.float32)
    with recomputing(10), torch.no_grad():
        loss, memory = net(X, weights, 9)
    assert alive(memory) == [] and not loss.requires_grad
    assert "stream_chain" not in dispatch.list_choices()


def test_streams_that_are_read_elsewhere_too_stay_what_they_are():
    X, *weights = arguments(4, torch.float32)
    phi, bias, branch = weights

    def read():
        first, h, coefficients = stream_boundary(X, None, None, phi, bias)
        second, h, coefficients = stream_boundary(first, h @ branch, coefficients, phi, bias)
        third, h, coefficients = stream_boundary(second, h @ branch, coefficients, phi, bias)
        other = stream_boundary(second, h @ branch, coefficients, phi, bias)[1]
        return (h + other + third.sum(-2)).square().sum()

    want = torch.autograd.grad(read(), [X, *weights])
    with recomputing(50):
        loss = read()
    got = torch.autograd.grad(loss, [X, *weights])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_compile_sees_through_a_boundary_that_could_be_followed():
    leaves = [t.requires_grad_() for t in boundary_arguments(5, 4, 8, torch.float32, CPU)]
    compiled = torch.compile(stream_boundary, fullgraph=True, backend="aot_eager")
    with recomputing(10):
        outputs = compiled(*leaves)
    torch.testing.assert_close(outputs, stream_boundary(*leaves))
