"""Image classifiers as modules: residual nets whose blocks may be skipped, and vision Transformers."""

# mypy: disable-error-code="operator, union-attr, index"
# torch types every attribute of a module `Tensor | Module`, so that no submodule can be called.

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from hypernas.search_spaces import layers
from hypernas.search_spaces.gates import CosineGate, SteadyGate
from hypernas.search_spaces.nets import transformer
from hypernas.search_spaces.vision import ResNetArch, ViTArch, block_shapes, resnet_cost


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


# ---- vision Transformers -------------------------------------------------------------------------------------


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
