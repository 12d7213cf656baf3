"""Which connections of residual streams there are by name: their factorisations, and what they cost.

The modules are in `connections.py`; nothing here needs torch.
"""

import math

from hypernas.search_spaces.base import SpaceError

STREAMS = (1, 2, 3, 4, 6, 8, 9, 12, 16)
MIXINGS = ("none", "hc_static", "hc", "mhc", "mhc_lite", "kromhc")
SINKHORN_ITERATIONS = 20  # `connections.SinkhornHyperConnection.iterations`
LARGEST_FACTOR = 4  # 5! = 120 permutations would cost more than the matrix they mix


def connection_cost(n: int, mixing: str, factors: str | None, d_model: int) -> tuple[int, int, int]:
    """(parameters, matmul FLOPs, elementwise FLOPs) of one module, FLOPs per token. Raises SpaceError."""
    check_streams(n, mixing, factors)
    if mixing == "none":
        return 0, 0, d_model
    if mixing == "hc_static":  # elementwise: the sum read, the outer product written
        return n * (n + 2), 2 * n * n * d_model, (2 * n - 1) * d_model + 2 * n * d_model
    if mixing == "hc":
        return _hyper_connection_cost(n, d_model)
    if mixing == "mhc":
        return _sinkhorn_cost(n, d_model)
    sizes = mixed_factors(n, mixing, factors)
    if set(sizes) == {2}:
        return _walsh_cost(n, d_model)
    return _permutation_cost(n, d_model) if len(sizes) == 1 else _kronecker_cost(sizes, d_model)


def _hyper_connection_cost(n: int, d_model: int) -> tuple[int, int, int]:
    """Elementwise: n norms over C (2C + 2 each), n(n + 2) coefficients of 4 (divide, tanh, scale, add), the weighted
    sum read (2nC - C) and the outer product written (2nC)."""
    parameters = d_model + d_model * (n + 2) + n * (n + 2) + 2
    matmul = 2 * n * d_model * (n + 2) + 2 * n * n * d_model
    return parameters, matmul, n * (2 * d_model + 2) + 4 * n * (n + 2) + (4 * n - 1) * d_model


def _stream_cost(n: int, d_model: int, res: int) -> tuple[int, int, int]:
    """Parameters and FLOPs of a doubly stochastic connection with `res` logits for H_res; H_res and its use apart.

    Parameters: projection, bias, 3 alphas, gamma. Matmul: projection. Elementwise: norm (2nC + 2), logits (divide,
    scale, add: 3 each), the sigmoids and the 2 of H_post (3n), H_pre X (2nC - C), and the outer product written (2nC).
    Work on the weights alone, done once a forward whatever the number of tokens, is not counted.
    """
    width = n * d_model
    parameters = (width + 1) * (2 * n + res) + 3 + width
    return parameters, 2 * width * (2 * n + res), 6 * width - d_model + 2 + 3 * (2 * n + res) + 3 * n


def _sinkhorn_cost(n: int, d_model: int) -> tuple[int, int, int]:
    """As `_stream_cost`, plus H_res X (matmul), and n^2 exponentials and 40 normalisations of 2n^2 - n each."""
    parameters, matmul, elementwise = _stream_cost(n, d_model, n * n)
    steps = 2 * SINKHORN_ITERATIONS
    return parameters, matmul + 2 * n * n * d_model, elementwise + n * n + steps * (2 * n * n - n)


def _permutation_cost(n: int, d_model: int) -> tuple[int, int, int]:
    """As `_stream_cost`, plus the sum of permutations and H_res X (matmul) and the softmax (3 n!)."""
    count = math.factorial(n)
    parameters, matmul, elementwise = _stream_cost(n, d_model, count)
    return parameters, matmul + 2 * count * n * n + 2 * n * n * d_model, elementwise + 3 * count


def _kronecker_cost(factors: tuple[int, ...], d_model: int) -> tuple[int, int, int]:
    """As `_stream_cost`, plus for each factor i its permutations, its use (2 i nC: matmul) and softmax (3 i!)."""
    n, counts = math.prod(factors), [math.factorial(factor) for factor in factors]
    parameters, matmul, elementwise = _stream_cost(n, d_model, sum(counts))
    for factor, count in zip(factors, counts, strict=True):
        matmul += 2 * count * factor * factor + 2 * factor * n * d_model
        elementwise += 3 * count
    return parameters, matmul, elementwise


def _walsh_cost(n: int, d_model: int) -> tuple[int, int, int]:
    """Parameters of 2K logits for H_res, FLOPs of K; plus W on H_pre and H_post (nK sums and n products each), 2K for
    the eigenvalues, n - 1 for the spectrum and nC for its use."""
    K = n.bit_length() - 1
    parameters, _, _ = _stream_cost(n, d_model, 2 * K)
    _, matmul, elementwise = _stream_cost(n, d_model, K)
    return parameters, matmul, elementwise + 2 * n * (K + 1) + 2 * K + n - 1 + n * d_model


def mixed_factors(n: int, mixing: str, factors: str | None) -> tuple[int, ...]:
    """mHC-lite is KromHC with the single factor n, so both share the fastest class that computes them."""
    return (n,) if mixing == "mhc_lite" else tuple(int(factor) for factor in (factors or "").split("x"))


def factorisations(n: int) -> tuple[str, ...]:
    """Every way to write n as non-decreasing factors of 2 to 4, like ("2x2x2", "2x4") for 8."""

    def split(rest: int, smallest: int) -> list[list[int]]:
        if rest == 1:
            return [[]]
        factors = [factor for factor in range(smallest, LARGEST_FACTOR + 1) if rest % factor == 0]
        return [[factor, *tail] for factor in factors for tail in split(rest // factor, factor)]

    return tuple("x".join(map(str, factors)) for factors in split(n, 2) if factors)


def check_streams(n: int, mixing: str, factors: str | None) -> None:
    """Raises SpaceError where no connection has these values; `factors` counts for kromhc alone."""
    if mixing not in MIXINGS:
        raise SpaceError(f"streams.mixing={mixing}: wanted one of {', '.join(MIXINGS)}")
    if n not in STREAMS:
        raise SpaceError(f"streams.n={n}: wanted one of {', '.join(map(str, STREAMS))}")
    if mixing == "none" and n != 1:
        raise SpaceError(f"streams.mixing=none with streams.n={n}: wanted n = 1, or one of {', '.join(MIXINGS[1:])}")
    if mixing in ("mhc", "mhc_lite", "kromhc") and n == 1:
        raise SpaceError(f"streams.mixing={mixing} with streams.n=1: nothing to mix; wanted none, hc_static or hc")
    if mixing == "mhc_lite" and n > LARGEST_FACTOR:
        raise SpaceError(f"streams.mixing=mhc_lite with streams.n={n}: it mixes n! permutations; wanted n = 2, 3 or 4")
    if mixing == "kromhc":
        legal = " or ".join(factorisations(n)) + ", in any order"
        parts = (factors or "").split("x")
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise SpaceError(f"streams.factors={factors or ''}: for streams.n={n} wanted {legal}")
        sizes = [int(part) for part in parts]
        if not all(2 <= size <= LARGEST_FACTOR for size in sizes):
            raise SpaceError(f"streams.factors={factors}: factors go from 2 to {LARGEST_FACTOR}; wanted {legal}")
        if math.prod(sizes) != n:
            raise SpaceError(f"streams.factors={factors}: the product is {math.prod(sizes)}, not {n}; wanted {legal}")


def canonical_streams(n: int, mixing: str, factors: str | None) -> tuple[int, str, str | None]:
    """One (n, mixing, factors) for all that name the same function. Raises SpaceError.

    KromHC with a single factor is mHC-lite; the order of factors only names the streams; others have no factors.
    """
    check_streams(n, mixing, factors)
    if mixing != "kromhc":
        return n, mixing, None
    sizes = sorted(mixed_factors(n, mixing, factors))
    return (n, "mhc_lite", None) if len(sizes) == 1 else (n, mixing, "x".join(map(str, sizes)))
