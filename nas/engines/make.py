"""Makes the engine that a search asks for."""

from hypernas.engines.cluster import set_environment
from hypernas.engines.inline import Inline
from hypernas.engines.protocol import Executor
from hypernas.engines.ray_pool import RayPool


def make_executor(
    engine: str,
    workers: int,
    *,
    address: str | None,
    gpus_per_trial: float | None,
    timeout: float | None,
    evaluate: str = "training",
) -> Executor:
    """`ray`, `tune` or `inline`, for jobs of `evaluate`. Raises UserError as the pools do."""
    if engine == "inline":
        return Inline(timeout, gpus_per_trial)
    if engine == "tune":
        set_environment(own_cluster=address is None)
        from hypernas.engines.tune_pool import TunePool

        return TunePool(workers, address=address, gpus_per_trial=gpus_per_trial, timeout=timeout)
    return RayPool(workers, address=address, gpus_per_trial=gpus_per_trial, timeout=timeout, evaluate=evaluate)
