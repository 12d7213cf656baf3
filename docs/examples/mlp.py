"""A search space of your own: multilayer perceptrons on images. docs/space.md walks through it.

nas search --space docs/examples/mlp.py:Space --preset quick
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from hypernas.search_spaces.base import Choices, Cost, Key, arch_from
from hypernas.search_spaces.grid import Family, GridSpace, Solve
from hypernas.search_spaces.vision import IMAGE_KEYS, Image


@dataclass(frozen=True)
class Arch:
    depth: int
    width: int
    image: Image

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.image.shape

    @property
    def sizes(self) -> list[int]:
        channels, height, width = self.image.shape
        return [channels * height * width, *[self.width] * self.depth, self.image.classes]


class Perceptron(nn.Module):
    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes  # an argument kept under its own name: `nas export` relies on it
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes))

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers[0](images.flatten(1))
        for layer in self.layers[1:]:
            x = layer(F.relu(x))
        return x


def cost(arch: Arch) -> Cost:
    weights = sum(inputs * outputs for inputs, outputs in pairwise(arch.sizes))
    units, hidden = sum(arch.sizes[1:]), sum(arch.sizes[1:-1])
    matmul, elementwise = 2 * weights, units + hidden  # biases and ReLUs
    return Cost({"layers": weights + units}, {"layers": matmul + elementwise}, matmul, elementwise, 4 * sum(arch.sizes))


make_arch = partial(arch_from, Arch)
KEYS = {
    "depth": Key("depth", int, 2, Choices((1, 2, 3)), "hidden layers", low=1, high=64),
    "width": Key("width", int, 64, Choices((16, 32, 64, 128)), "units of a hidden layer", low=1, high=65536),
    **IMAGE_KEYS,
}


class Space(GridSpace):
    name = "mlp"
    task = "images"
    families = (
        Family(
            "mlp", KEYS, make_arch, cost, lambda arch: Perceptron(arch.sizes), solves={"width": Solve(1, make_arch)}
        ),
    )
