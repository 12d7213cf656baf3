"""Space `vision`: image classifiers whose blocks may be skipped, image by image.

Two families. `resnet`: `stages` stages of `depth` two-convolution blocks, `width` channels in the first stage, twice
as many and half the size in each next one. ResNet-20 is 3 stages of 3 blocks, width 16; CosineGate's own net is
4 stages of 2 blocks, width 32. `vit`: patches through the Transformer layers of `lm`, every patch seeing every other.

The size of the images and the number of classes are keys too (`image.*`), set from the data by who runs the search.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from hypernas.search_spaces import layers, transformer
from hypernas.search_spaces.base import Cost, arch_from, arch_to_json
from hypernas.search_spaces.gates import CosineGate, SteadyGate, gate_cost, gated_layers
from hypernas.search_spaces.grid import Family, Flat, GridSpace, Solve
from hypernas.search_spaces.growth import GROWTH
from hypernas.search_spaces.layers import FREE, LayerCost
from hypernas.search_spaces.transformer import CONSISTENCY, GATE_CHOICES, STACK_KEYS, Gates, by_name, make_key


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


class BlockGate(CosineGate):
    """A cosine gate of a residual block, with the controller of the authors' notebook: pooled input, 64, 32, 1."""

    hidden: ClassVar[tuple[int, ...]] = (64, 32)


class SteadyBlockGate(SteadyGate):
    """The same controller, with the paper's other consistency term."""

    hidden: ClassVar[tuple[int, ...]] = BlockGate.hidden


BLOCK_GATES = {"distance": BlockGate, "perturbation": SteadyBlockGate}  # by `gates.consistency`


class SameShape(nn.Module):
    """x as it is: the shortcut where a block changes nothing of its shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Projection(nn.Module):
    """1 x 1 convolution and norm: the shortcut where a block changes size or channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.inputs, self.outputs, self.stride = inputs, outputs, stride
        self.conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class TwoConvolutions(nn.Module):
    """norm(conv(relu(norm(conv(x))))), 3 x 3: what a block adds to its shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.inputs, self.outputs, self.stride = inputs, outputs, stride
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))


class Block(nn.Module):
    """shortcut(x) + branch(x), without a ReLU after it (CosineGate's block; 2512.22206)."""

    def __init__(self, shortcut: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.shortcut, self.branch = shortcut, branch

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.branch(x)


class GatedBlock(nn.Module):
    """A block whose branch a gate may skip, image by image: CIR compares branch and shortcut over all their values.

    In training the branch runs for every image and the gate scales it; afterwards a skipped image is not computed.
    """

    def __init__(self, shortcut: nn.Module, branch: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.shortcut, self.branch, self.gate = shortcut, branch, gate

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C', H', W')."""
        same, pooled = self.shortcut(x), x.mean((-2, -1))
        if self.training:
            return same + self.gate(same.flatten(1), self.branch(x).flatten(1), pooled).view_as(same)
        runs = self.gate.decide(pooled)
        out = same.clone()  # the shortcut may be x itself
        out[runs] += self.branch(x[runs])
        return out


class ResNet(nn.Module):
    """Convolution, norm and ReLU; blocks; the mean over all pixels; logits."""

    def __init__(self, channels: int, width: int, classes: int, blocks: list[nn.Module], features: int) -> None:
        super().__init__()
        self.channels, self.width, self.classes, self.features = channels, width, classes, features
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, channels, H, W) -> logits (B, classes)."""
        x = F.relu(self.norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((-2, -1)))


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
            gates += pooling + gate_cost(block.inputs, BlockGate.hidden)
            saved.append(branch.matmul + branch.elementwise + 2 * norm.elementwise)
        kept += 6 * values
    parts = {
        "stem": convolution_cost(image.channels, arch.width, 3, pixels) + LayerCost(0, 0, arch.width * pixels),
        "blocks": blocks,
        "gates": gates,
        "norms": norms,
        "head": class_head_cost(outputs, image.classes) + LayerCost(0, 0, outputs * last),
    }
    return layers.total_cost(parts, activation_bytes=4 * kept, gated_flops=tuple(saved))


def class_head_cost(features: int, classes: int) -> LayerCost:
    return LayerCost((features + 1) * classes, 2 * features * classes, classes)


def build_resnet(arch: ResNetArch) -> ResNet:
    """The module, initialised from torch's global generator (convolutions as He et al. 2015, by outputs)."""
    blocks: list[nn.Module] = []
    flops = iter(resnet_cost(arch).gated_flops)
    features = arch.width
    for shape in block_shapes(arch):
        features = shape.outputs
        branch = TwoConvolutions(shape.inputs, shape.outputs, shape.stride)
        shortcut = Projection(shape.inputs, shape.outputs, shape.stride) if shape.projects else SameShape()
        if shape.gated:
            kind = BLOCK_GATES[arch.gates.consistency or "distance"]
            gate = kind(shape.inputs, arch.gates.rate or 1.0, float(next(flops)))
            blocks.append(GatedBlock(shortcut, branch, gate))
        else:
            blocks.append(Block(shortcut, branch))
    model = ResNet(arch.image.channels, arch.width, arch.image.classes, blocks, features)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


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
        make_key("position", "learned", ("learned",), "position encoding", options=tuple(layers.POSITIONS)),
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
    return layers.total_cost(
        parts,
        activation_bytes=tokens * (kept + 4 * 2 * arch.d_model),
        gated_flops=tuple(tokens * flops for flops in gated_flops),
    )


class Patches(nn.Module):
    """Cuts an image into squares and projects each: (B, C, H, W) -> (B, tokens, d_model), row by row."""

    def __init__(self, channels: int, d_model: int, patch: int) -> None:
        super().__init__()
        self.channels, self.d_model, self.patch = channels, d_model, patch
        self.conv = nn.Conv2d(channels, d_model, patch, stride=patch, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        filled = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        return self.conv(filled).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Patches, the residual stack, a norm, the mean over patches, logits (2010.11929)."""

    def __init__(
        self,
        d_model: int,
        classes: int,
        patches: nn.Module,
        positions: nn.Module,
        stack: nn.Module,
        norm: nn.Module,
    ) -> None:
        super().__init__()
        self.d_model, self.classes = d_model, classes
        self.patches, self.positions = patches, positions
        self.stack = stack
        self.norm = norm
        self.head = nn.Linear(d_model, classes)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> logits (B, classes)."""
        x = self.stack(self.positions(self.patches(images)))
        return self.head(self.norm(x).mean(1))


def build_vit(arch: ViTArch) -> VisionTransformer:
    """The module, initialised from torch's global generator."""
    model = VisionTransformer(
        d_model=arch.d_model,
        classes=arch.image.classes,
        patches=Patches(arch.image.channels, arch.d_model, arch.patch),
        positions=transformer.make_positions(arch, arch.tokens),
        stack=transformer.make_stack(arch, layers.BidirectionalAttention, arch.tokens),
        norm=transformer.make_norm(arch),
    )
    layers.initialise(model, branches=transformer.residual_writes(arch))
    return model


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
    deepen=transformer.deepened,
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
