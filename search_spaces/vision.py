"""Space `vision`: image classifiers whose blocks may be skipped, image by image.

Two families. `resnet`: `stages` stages of `depth` two-convolution blocks, `width` channels in the first stage, twice
as many and half the size in each next one. ResNet-20 is 3 stages of 3 blocks, width 16; CosineGate's own net is
4 stages of 2 blocks, width 32. `vit`: patches through the Transformer layers of `lm`, every patch seeing every other.

The size of the images and the number of classes are keys too (`image.*`), set from the data by who runs the search.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hypernas.search_spaces import costs, transformer
from hypernas.search_spaces.base import Cost, arch_from, arch_to_json
from hypernas.search_spaces.costs import FREE, LayerCost, gate_cost
from hypernas.search_spaces.grid import Family, Flat, GridSpace, Solve
from hypernas.search_spaces.growth import GROWTH
from hypernas.search_spaces.transformer import (
    CONSISTENCY,
    GATE_CHOICES,
    POSITIONS,
    STACK_KEYS,
    Gates,
    by_name,
    gated_layers,
    make_key,
)

if TYPE_CHECKING:
    from hypernas.search_spaces.nets.vision import ResNet, VisionTransformer

BLOCK_CONTROLLER = (64, 32)  # hidden units of a block gate's controller: `nets.vision.BlockGate.hidden`


@dataclass(frozen=True, slots=True)
class Image:
    """What the net reads and how many classes it tells apart."""

    height: int
    width: int
    channels: int
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.height, self.width


IMAGE_KEYS = by_name(
    make_key("image.height", 28, (28,), "pixels; set from the data", low=1, high=4096),
    make_key("image.width", 28, (28,), "pixels; set from the data", low=1, high=4096),
    make_key("image.channels", 1, (1,), "1 grey, 3 colour; set from the data", low=1, high=16),
    make_key("image.classes", 10, (10,), "set from the data", low=2, high=1_000_000),
)


# ---- residual nets -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ResNetArch:
    family: str
    depth: int  # blocks a stage
    width: int  # channels of the first stage
    stages: int
    gates: Gates
    image: Image

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.image.shape

    @property
    def gated(self) -> tuple[bool, ...]:
        """For each block, whether it carries a gate."""
        blocks = self.stages * self.depth
        return (False,) * blocks if self.gates.placement == "none" else gated_layers(self.gates.layers or "all", blocks)


RESNET_KEYS = {
    **by_name(
        make_key("depth", 2, (1, 2, 3), "blocks a stage", low=1, high=256),
        make_key("width", 8, (4, 8, 12, 16), "channels of the first stage; each next one doubles them",
                 low=1, high=4096),
        make_key("stages", 3, (2, 3), "stages, each at half the size of the one before", low=1, high=8),
        make_key("gates.placement", "none", ("none", "blocks"), "whether blocks carry cosine gates",
                 options=("none", "blocks")),
        make_key("gates.layers", "all", ("all", "upper"), "which blocks: all, alternate, upper or a mask like 011011"),
        make_key("gates.rate", 0.5, (0.5, 0.75), "target share of executed images", low=0.01, high=1.0),
        CONSISTENCY,
    ),
    **IMAGE_KEYS,
}  # fmt: skip


def make_resnet_arch(flat: Flat) -> ResNetArch:
    """Raises SpaceError for a mask that does not have a digit a block."""
    arch: ResNetArch = arch_from(ResNetArch, transformer.without_idle_gates(flat))
    assert len(arch.gated) == arch.stages * arch.depth
    return arch


def canonical_resnet(arch: ResNetArch) -> dict[str, Any]:
    return transformer.canonical_gates(arch_to_json(arch), arch.gated)


@dataclass(frozen=True, slots=True)
class BlockShape:
    """What one block turns (inputs, H, W) into, and whether a gate may skip it."""

    inputs: int
    outputs: int
    stride: int
    pixels_in: int
    pixels: int  # of the output
    gated: bool

    @property
    def projects(self) -> bool:
        return self.stride > 1 or self.inputs != self.outputs


def block_shapes(arch: ResNetArch) -> Iterator[BlockShape]:
    """Every block, first to last."""
    inputs, height, width = arch.width, arch.image.height, arch.image.width
    for index, gated in enumerate(arch.gated):
        stage, position = divmod(index, arch.depth)
        outputs, stride = arch.width * 2**stage, 2 if stage and not position else 1
        before = height * width
        height, width = -(-height // stride), -(-width // stride)
        yield BlockShape(inputs, outputs, stride, before, height * width, gated)
        inputs = outputs


def convolution_cost(inputs: int, outputs: int, kernel: int, pixels: int) -> LayerCost:
    weights = kernel * kernel * inputs * outputs
    return LayerCost(weights, 2 * weights * pixels, 0)


def batch_norm_cost(channels: int, pixels: int) -> LayerCost:
    """At inference statistics, weight and bias are one factor and one addend a channel."""
    return LayerCost(2 * channels, 0, 2 * channels * pixels)


def resnet_cost(arch: ResNetArch) -> Cost:
    """Parameters and FLOPs an image by part."""
    image, pixels = arch.image, arch.image.height * arch.image.width
    norms, blocks, gates = batch_norm_cost(arch.width, pixels), FREE, FREE
    saved: list[int] = []
    kept = 3 * arch.width * pixels
    outputs, last = arch.width, pixels
    for block in block_shapes(arch):
        outputs, last = block.outputs, block.pixels
        values = outputs * last
        branch = convolution_cost(block.inputs, outputs, 3, last) + convolution_cost(outputs, outputs, 3, last)
        branch += LayerCost(0, 0, 2 * values)  # ReLU, and the addition to the shortcut
        norm = batch_norm_cost(outputs, last)
        blocks += branch
        norms += norm.times(3 if block.projects else 2)
        if block.projects:
            blocks += convolution_cost(block.inputs, outputs, 1, last)
        if block.gated:
            pooling = LayerCost(0, 0, block.inputs * block.pixels_in)
            gates += pooling + gate_cost(block.inputs, BLOCK_CONTROLLER)
            saved.append(branch.matmul + branch.elementwise + 2 * norm.elementwise)
        kept += 6 * values
    parts = {
        "stem": convolution_cost(image.channels, arch.width, 3, pixels) + LayerCost(0, 0, arch.width * pixels),
        "blocks": blocks,
        "gates": gates,
        "norms": norms,
        "head": class_head_cost(outputs, image.classes) + LayerCost(0, 0, outputs * last),
    }
    return costs.total_cost(parts, activation_bytes=4 * kept, gated_flops=tuple(saved))


def class_head_cost(features: int, classes: int) -> LayerCost:
    return LayerCost((features + 1) * classes, 2 * features * classes, classes)


def build_resnet(arch: ResNetArch) -> "ResNet":
    """The module, initialised from torch's global generator (convolutions as He et al. 2015, by outputs)."""
    from hypernas.search_spaces.nets import vision as nets  # brings torch

    return nets.build_resnet(arch)


RESNET = Family(
    name="resnet",
    keys=RESNET_KEYS,
    arch=make_resnet_arch,
    cost=resnet_cost,
    build=build_resnet,
    canonical=canonical_resnet,
    joints=(GATE_CHOICES,),
    interacting=(("depth", "stages", "gates"),),
    solves={"width": Solve(1, make_resnet_arch), "depth": Solve(1, make_resnet_arch)},
)


# ---- vision Transformers -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ViTArch(transformer.Stack):
    patch: int
    image: Image

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.image.shape

    @property
    def tokens(self) -> int:
        """Patches an image, those at its edges filled up with zeros."""
        return -(-self.image.height // self.patch) * -(-self.image.width // self.patch)


VIT_KEYS = {
    **by_name(
        make_key("depth", 4, (2, 3, 4, 5, 6), "layers (attention and feed-forward each)", low=1, high=1024),
        make_key("d_model", 64, (32, 64, 96), "width of one residual stream", low=8, high=65536),
    ),
    **STACK_KEYS,
    **by_name(
        make_key("position", "learned", ("learned",), "position encoding", options=POSITIONS),
        make_key("patch", 4, (4, 7), "side of a patch in pixels", low=1, high=4096),
    ),
    **IMAGE_KEYS,
}


def make_vit_arch(flat: Flat) -> ViTArch:
    return transformer.stack_arch(ViTArch, flat)


def vit_cost(arch: ViTArch) -> Cost:
    """Parameters and FLOPs an image by part."""
    tokens, image = arch.tokens, arch.image
    stack, gated_flops, kept = transformer.stack_cost(arch, tokens)

    def of_image(part: LayerCost) -> LayerCost:
        return LayerCost(part.parameters, tokens * part.matmul, tokens * part.elementwise)

    patches = convolution_cost(image.channels, arch.d_model, arch.patch, tokens)
    pooling = LayerCost(0, 0, tokens * arch.d_model)
    parts = {
        "embedding": patches + of_image(transformer.position_cost(arch, tokens)),
        **{name: of_image(part) for name, part in stack.items()},
        "head": pooling + class_head_cost(arch.d_model, image.classes),
    }
    return costs.total_cost(
        parts,
        activation_bytes=tokens * (kept + 4 * 2 * arch.d_model),
        gated_flops=tuple(tokens * flops for flops in gated_flops),
    )


def build_vit(arch: ViTArch) -> "VisionTransformer":
    """The module, initialised from torch's global generator."""
    from hypernas.search_spaces.nets import vision as nets  # brings torch

    return nets.build_vit(arch)


VIT = Family(
    name="vit",
    keys=VIT_KEYS,
    arch=make_vit_arch,
    cost=vit_cost,
    build=build_vit,
    canonical=transformer.canonical,
    joints=transformer.JOINTS,
    interacting=transformer.INTERACTING,
    solves=transformer.solves(ViTArch),
    deepen=transformer.change_depth,
    growth=GROWTH,
)


class ImageClassifiers(GridSpace):
    """The space `vision`."""

    name = "vision"
    task = "images"
    presets: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "quick": {"depth": "1,2", "width": "4,8"},
        "small": {},
        "full": {"depth": "2..6", "width": "16,32,64", "stages": "3,4", "d_model": "256,384,512,768", "head_dim": "64"},
    }
    families = (RESNET, VIT)
