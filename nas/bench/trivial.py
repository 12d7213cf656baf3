"""An objective without training, for benchmarks and tests of what a trial costs beside it.

Alone in its module: workers import what they evaluate, and nothing of a driver's belongs to that.
"""

import platform
from collections.abc import Iterator

from hypernas.records import Job, Result


def evaluate(job: Job) -> Iterator[Result]:
    """Values that follow from the architecture's own keys."""
    size = float(job.arch["depth"] * job.arch["d_model"])
    values = {"bits_per_byte": 8.0 / size + job.recipe.learning_rate, "flops_per_token": size}
    yield Result(job.trial, job.token, values=values, parameters=int(size), provenance={"worker": platform.node()})
