"""Which connections there are by name: their factorisations, what they cost, and how one is made."""

import math

from hypernas.search_spaces.base import SpaceError
from hypernas.search_spaces.connections import (
    Connection,
    HyperConnection,
    KroneckerHyperConnection,
    PermutationHyperConnection,
    PlainResidual,
    SinkhornHyperConnection,
    StaticHyperConnection,
    WalshKroneckerHyperConnection,
)

STREAMS = (1, 2, 3, 4, 6, 8, 9, 12, 16)
MIXINGS = ("none", "hc_static", "hc", "mhc", "mhc_lite", "kromhc")
LARGEST_FACTOR = 4  # 5! = 120 permutations would cost more than the matrix they mix


def make_connection(n: int, mixing: str, factors: str | None, d_model: int, layer_index: int) -> Connection:
    """The connection module around sublayer number `layer_index` (counted over the whole model). Raises SpaceError."""
    check_streams(n, mixing, factors)
    if mixing == "none":
        return PlainResidual()
    if mixing == "hc_static":
        return StaticHyperConnection(n, d_model, layer_index)
    if mixing == "hc":
        return HyperConnection(n, d_model, layer_index)
    if mixing == "mhc":
        return SinkhornHyperConnection(n, d_model, layer_index)
    sizes = _mixed_factors(n, mixing, factors)
    if set(sizes) == {2}:
        return WalshKroneckerHyperConnection(n, d_model, layer_index)
    if len(sizes) == 1:
        return PermutationHyperConnection(n, d_model, layer_index)
    return KroneckerHyperConnection(sizes, d_model, layer_index)


def connection_cost(n: int, mixing: str, factors: str | None, d_model: int) -> tuple[int, int, int]:
    """(parameters, matmul FLOPs, elementwise FLOPs) of one module, FLOPs per token. Raises SpaceError."""
    check_streams(n, mixing, factors)
    if mixing == "none":
        return PlainResidual.parameter_count(), *PlainResidual.flops(d_model)
    if mixing == "hc_static":
        return StaticHyperConnection.parameter_count(n), *StaticHyperConnection.flops(n, d_model)
    if mixing == "hc":
        return HyperConnection.parameter_count(n, d_model), *HyperConnection.flops(n, d_model)
    if mixing == "mhc":
        return SinkhornHyperConnection.parameter_count(n, d_model), *SinkhornHyperConnection.flops(n, d_model)
    sizes = _mixed_factors(n, mixing, factors)
    if set(sizes) == {2}:
        walsh = WalshKroneckerHyperConnection
        return walsh.parameter_count(n, d_model), *walsh.flops(n, d_model)
    if len(sizes) == 1:
        return PermutationHyperConnection.parameter_count(n, d_model), *PermutationHyperConnection.flops(n, d_model)
    return KroneckerHyperConnection.parameter_count(sizes, d_model), *KroneckerHyperConnection.flops(sizes, d_model)


def _mixed_factors(n: int, mixing: str, factors: str | None) -> tuple[int, ...]:
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
    sizes = sorted(_mixed_factors(n, mixing, factors))
    return (n, "mhc_lite", None) if len(sizes) == 1 else (n, mixing, "x".join(map(str, sizes)))
