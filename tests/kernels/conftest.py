"""Fixtures that every kernel test shares."""

from collections.abc import Callable, Iterator

import pytest
import torch

from hypernas.kernels import dispatch

Agrees = Callable[..., None]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty holds NaN, so an element that a kernel forgot is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def agrees(poisoned) -> Agrees:
    """agrees(op, args, backend="cpu"): every output and gradient is within the dtype's tolerance of float64."""

    def check(op: dispatch.Op, args: tuple, backend: str = "cpu", tolerance: float | None = None) -> None:
        dtype = next(a.dtype for a in args if isinstance(a, torch.Tensor))
        limit = dispatch.TOLERANCE[dtype] if tolerance is None else tolerance
        errors = dispatch.relative_errors(op, args, backend)
        assert {name: error for name, error in errors.items() if not error <= limit} == {}

    return check


@pytest.fixture(autouse=True)
def automatic_back_end() -> Iterator[None]:
    """Each test starts and ends with the choice left to the dispatcher and nothing recorded."""
    dispatch.set_backend("auto")
    dispatch.forget_choices()
    yield
    dispatch.set_backend("auto")
    dispatch.forget_choices()
