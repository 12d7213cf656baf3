"""Keys of --set: what may be searched beside the architecture."""

from collections.abc import Mapping
from dataclasses import replace
from math import inf
from typing import Any

from hypernas.errors import SpaceError, nearest
from hypernas.records import Recipe
from hypernas.search_spaces.base import Choices, Key, Space

MEASURED = ("latency_ms", "peak_bytes")  # on the worker: one sample forward; a training step
OBJECTIVES = {
    "text": ("bits_per_byte", "accuracy", "ceg", "flops_per_token", "parameters", *MEASURED),
    "images": ("loss", "accuracy", "flops_per_image", "parameters", *MEASURED),
}
DEFAULT_OBJECTIVES = {"text": ("bits_per_byte", "flops_per_token"), "images": ("accuracy", "flops_per_image")}
DEFAULT_RATE = 3e-3
RATE_GRID = tuple(DEFAULT_RATE * 3.0**k for k in (-2, -1, 0, 1))


def _training_key(name: str, default: Any, search: tuple, help: str, **limits: Any) -> Key:
    return Key(name, type(default), default, Choices(search), help, **limits)


TRAINING_KEYS: dict[str, Key] = {
    key.name: key
    for key in (
        _training_key("optim.name", "adamw", ("adamw",), "optimiser", options=("adamw", "muon", "sgd")),
        _training_key("optim.lr", DEFAULT_RATE, RATE_GRID, "peak learning rate", low=1e-9, high=100.0),
        _training_key("optim.weight_decay", 0.1, (0.1,), "weight decay of matrices", low=0.0, high=10.0),
        _training_key("optim.schedule", "cosine", ("cosine",), "learning rate over time",
                      options=("cosine", "linear", "inverse_sqrt")),
        _training_key("train.tokens", 1_000_000, (1_000_000,), "tokens a trial trains on", low=1, high=10**13),
        _training_key("train.batch_tokens", 2048, (2048,), "tokens a step", low=8, high=10**9),
        _training_key("train.images", 40_000, (40_000,), "images a trial trains on", low=1, high=10**13),
        _training_key("train.batch_images", 64, (64,), "images a step", low=2, high=10**9),
        _training_key("train.seed", 0, (0,), "seed of initial weights and gate noise", low=0, high=2**31),
        Key("data.path", str, "", Choices(("",)), "your own text or images: a file or a folder"),
    )
}  # fmt: skip
# The keys that may be searched, in the order in which they are drawn, and the recipe's field of each.
SEARCHED = {
    "optim.name": "optimizer",
    "optim.lr": "learning_rate",
    "optim.weight_decay": "weight_decay",
    "optim.schedule": "schedule",
}
FIXED_ONLY = ("train.tokens", "train.batch_tokens", "train.images", "train.batch_images", "train.seed", "data.path")
COUNTED = {"text": ("train.tokens", "train.batch_tokens"), "images": ("train.images", "train.batch_images")}


# What no architecture may exceed, however it is drawn. FLOPs count with every gate open: the most a token can take.
# Latency alone is not known before a worker has measured it.
LATENCY = "max.latency_ms"
LIMITS: dict[str, Key] = {
    key.name: key
    for key in (
        _training_key("max.flops", inf, (inf,), "FLOPs a token or an image, at most", low=1),
        _training_key("max.parameters", inf, (inf,), "parameters, at most", low=1),
        _training_key("max.memory", inf, (inf,), "bytes of activations a training step keeps, at most", low=1),
        _training_key(LATENCY, inf, (inf,), "milliseconds a forward pass of one sample takes, at most", low=1e-9),
    )
}


def training_keys(task: str) -> dict[str, Key]:
    """The training keys of one task: text counts tokens, images count images."""
    others = {name for other, names in COUNTED.items() if other != task for name in names}
    return {name: key for name, key in TRAINING_KEYS.items() if name not in others}


def recipe_keys(recipe: Recipe) -> dict[str, Any]:
    """A recipe under the names of `--set`, as far as it may be searched."""
    return {name: getattr(recipe, attribute) for name, attribute in SEARCHED.items()}


def recipe_with(recipe: Recipe, training: Mapping[str, str], task: str) -> Recipe:
    """The recipe with what these keys say, each one value. Raises SpaceError naming what is legal."""
    total, batch = COUNTED[task]
    fields_of = {**SEARCHED, "train.seed": "seed", total: "tokens", batch: "batch_tokens"}
    given = {name: text for name, text in training.items() if name in fields_of}
    return replace(recipe, **{fields_of[name]: TRAINING_KEYS[name].check(text) for name, text in given.items()})


def split_settings(settings: Mapping[str, str], space: Space) -> tuple[dict[str, str], dict[str, str]]:
    """`--set` keys of the space, and all others. Raises SpaceError naming the nearest known key."""
    training = {**training_keys(space.task), **LIMITS}
    known = (*space.keys, *training)
    for name in settings:
        if name not in known:
            raise SpaceError(f"unknown key {name!r}; {nearest(name, known)}")
    return (
        {name: text for name, text in settings.items() if name in space.keys},
        {name: text for name, text in settings.items() if name in training},
    )
