import gc
import itertools
import math

import pytest
import torch

from hypernas.bench import kernels, timing
from hypernas.bench.kernels import case_of
from hypernas.bench.timing import (
    buffers,
    capture_graph,
    copy_arguments,
    copying,
    make_rotation,
    prepare,
    sets_beyond,
    size_of,
)
from hypernas.kernels import OPS

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("touched", [1, 10**6, 50 * 2**20, 10**9])
def test_no_set_is_still_in_the_cache_when_its_turn_comes(touched):
    cache = 50 * 2**20
    sets = sets_beyond(cache, touched)
    assert sets * touched >= 2 * cache > (sets - 1) * touched


def test_memory_is_counted_once():
    x = torch.zeros(8, 2)
    assert size_of((x, [x[2:], None], torch.zeros(3, dtype=torch.bfloat16), 7)) == 8 * 2 * 4 + 6


def test_a_copy_of_arguments_lies_elsewhere():
    arguments = case_of("rms_norm", 1, 16, 8, torch.float32, CPU).arguments
    assert size_of((arguments, copy_arguments(arguments))) == 2 * size_of(arguments)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
@pytest.mark.parametrize("op", [*OPS, "block_diagonal_linear"])
def test_a_replay_computes_what_the_calls_compute_and_takes_every_set_in_turn(op, phase):
    case = case_of(op, 4, 64, 256, torch.float32, torch.device("cuda"))
    if phase not in kernels._phases(case):
        pytest.skip("has no backward of its own")
    sets = [case.arguments, copy_arguments(case.arguments), copy_arguments(case.arguments)]
    calls = [prepare(case.function, arguments, phase) for arguments in sets]
    graph, results = capture_graph(calls, repeats=2)
    got = [[tensor.detach() for tensor in timing._tensors(each)] for each in results]
    assert size_of(got) == 3 * size_of(got[0])  # apart
    if phase == "forward":  # a replay reads the arguments where they lie, each set its own
        sets[1][0].neg_()
    for tensor in itertools.chain(*got):
        tensor.fill_(math.nan)
    graph.replay()
    for call, each in zip(calls, got, strict=True):
        for ours, tensor in zip(each, timing._tensors(call()), strict=True):
            torch.testing.assert_close(ours, tensor.detach(), rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(first, second) for first, second in zip(got[0], got[1], strict=True))


@pytest.mark.gpu
@gpu
def test_what_a_graph_reads_stays_allocated():
    cuda = torch.device("cuda")
    before = torch.cuda.memory_allocated()
    candidate = make_rotation(copying, buffers(2**20, cuda), 2**20, cuda)
    gc.collect()
    assert candidate.timed == "graph"
    assert torch.cuda.memory_allocated() - before >= candidate.sets * 2**20
