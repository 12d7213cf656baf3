"""Named architectures: settings that `base=NAME` stands for, whatever they leave out being as in the baseline.

Keys given beside `base` override it: `nas search --set base=llama-like --set depth=4..12` searches the depth alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hypernas.errors import SpaceError, nearest


@dataclass(frozen=True, slots=True)
class Named:
    """One entry. `note` says whose configuration it is: the paper's, or our reconstruction of it."""

    name: str
    space: str
    settings: Mapping[str, str]
    note: str


_D12 = {"depth": "12", "d_model": "768", "head_dim": "64"}
_CIFAR = {"image.height": "32", "image.width": "32", "image.channels": "3", "image.classes": "10"}

_ENTRIES = (
    Named(
        "gpt2-like",
        "lm",
        {**_D12, "ffn.shape": "conventional", "ffn.ratio": "4", "ffn.activation": "gelu", "norm.kind": "layernorm",
         "position": "learned", "context": "1024"},
        "our reconstruction: the shape of GPT-2 small, on bytes (vocab 256, not 50,257) and without biases",
    ),
    Named(
        "llama-like",
        "lm",
        {**_D12, "ffn.shape": "conventional", "ffn.ratio": repr(8 / 3), "ffn.activation": "swiglu",
         "norm.kind": "rmsnorm", "position": "rope", "tied_head": "false", "context": "1024"},
        "our reconstruction: Llama's parts (RMSNorm, SwiGLU, RoPE, a head of its own) at GPT-2 small's size, on bytes",
    ),
    Named(
        "transformer-2017",
        "lm",
        {"depth": "4", "d_model": "64", "head_dim": "16", "ffn.shape": "conventional", "ffn.ratio": "4",
         "ffn.activation": "gelu", "norm.kind": "layernorm", "norm.position": "post", "position": "sinusoidal",
         "context": "128"},
        "our reconstruction: the retro Transformer of 2511.21622 (post-norm, GELU, sinusoidal), on bytes and without "
        "biases; it belongs with optim.schedule=inverse_sqrt",
    ),
    Named(
        "lstm-2",
        "lm",
        {"family": "lstm", "depth": "2", "d_model": "64", "context": "128"},
        "our reconstruction: the two-layer LSTM that 2511.21622 measures progress against, on bytes and trained on "
        "windows that start from a state of zeros",
    ),
    Named(
        "hourglass-113m",
        "lm",
        {"depth": "6", "d_model": "1472", "head_dim": "64", "ffn.shape": "hourglass", "ffn.ratio": "0.4",
         "ffn.sub_mlps": "4", "ffn.activation": "swiglu", "context": "1024"},
        "our reconstruction: 2602.06471 gives 113M parameters, 6 layers and K = 4; the widths are ours, within the "
        "ranges it recommends (d_model / layers 100 to 250, d_h / d_model 0.4 to 0.6)",
    ),
    Named(
        "kromhc-d12",
        "lm",
        {**_D12, "head_dim": "128", "ffn.shape": "conventional", "ffn.ratio": "4", "ffn.activation": "relu",
         "streams.n": "4", "streams.mixing": "kromhc", "streams.factors": "2x2", "tied_head": "false",
         "context": "2048"},
        "the connections are the paper's (2601.21579: C = 768, n = 4 as 2x2, 24 modules, 958,824 parameters); the "
        "Transformer around them is our reconstruction of nanochat's, on bytes and with plain ReLU",
    ),
    Named(
        "resnet-20",
        "vision",
        {**_CIFAR, "family": "resnet", "stages": "3", "depth": "3", "width": "16"},
        "our reconstruction: He et al. 2016, section 4.2, with projections (their option B) where the shape changes "
        "and no ReLU after the addition, so that skipping a block leaves the stream as it is",
    ),
    Named(
        "cosinegate",
        "vision",
        {**_CIFAR, "family": "resnet", "stages": "4", "depth": "2", "width": "32", "gates.placement": "blocks",
         "gates.layers": "all", "gates.rate": "0.72"},
        "the authors' network and target rate (their notebook; 2,797,610 parameters and the controllers); the gate is "
        "ours, as theirs computes every block it skips",
    ),
)  # fmt: skip


def gallery() -> list[Named]:
    """Every named architecture."""
    return list(_ENTRIES)


def names(space: str) -> tuple[str, ...]:
    """What `base` may be in a space."""
    return tuple(entry.name for entry in _ENTRIES if entry.space == space)


def named_settings(space: str, name: str) -> Mapping[str, str]:
    """The settings that `base=NAME` stands for. Raises SpaceError."""
    for entry in _ENTRIES:
        if (entry.space, entry.name) == (space, name):
            return entry.settings
    elsewhere = next((entry.space for entry in _ENTRIES if entry.name == name), None)
    hint = f"it belongs to space {elsewhere}" if elsewhere else nearest(name, names(space))
    raise SpaceError(f"base={name} is no architecture of space {space}; {hint}")
