"""What training on text and training on images differ in: data, batches, and what the results are called.

Everything else (the run, the optimiser, the loss, which is cross-entropy) is the same, in `nas/training/run.py`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hypernas.data.images import ImageData, augment, image_batch, load_images, normalise
from hypernas.data.text import Corpus, load_corpus, training_batch, validation_windows
from hypernas.records import Recipe

Batch = tuple[Tensor, Tensor]  # what the model reads, and the classes it should predict

EVALUATION_SHARE = 1 / 16  # of what a trial trains on, within these bounds:
EVALUATION_TOKENS = (16_384, 1 << 20)
EVALUATION_IMAGES = (1_000, 10_000)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device. A GPU's copy is only queued, after what was launched before: the host goes on meanwhile.

    It is read from pinned memory, which torch's allocator lends to nobody else before the copy ended.
    """
    if device.type != "cuda":
        return batch[0].to(device), batch[1].to(device)
    inputs, classes = (tensor.contiguous().pin_memory().to(device, non_blocking=True) for tensor in batch)
    return inputs, classes


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of data. `unit` is what `train.*` counts, with an s, and what FLOPs are per; `loss` names the score,
    of which one is `nats` nats.

    `load(path)` gives the data, with a `name` and a `hash`; `settings(data)` the keys of the space that it decides;
    `scaling(data)` how inputs were normalised, for who uses an exported model; `worst(data)` what a model scores that
    learned nothing. A batch is of `samples`, each of `units(arch)`; `batch(data, arch, seed, step, samples)` is a pure
    function, and `validation(data, arch, recipe, samples)` yields the batches that every trial is scored on. Both
    raise DataError when there is too little data.
    """

    unit: str
    loss: str
    nats: float
    load: Callable[[str | None], Any]
    settings: Callable[[Any], dict[str, str]]
    scaling: Callable[[Any], dict[str, list[float]]]
    worst: Callable[[Any], dict[str, float]]
    units: Callable[[Any], int]
    batch: Callable[[Any, Any, int, int, int], Batch]
    validation: Callable[[Any, Any, Recipe, int], Iterator[Batch]]


@dataclass(frozen=True, slots=True)
class Steps:
    """How a recipe's tokens (or images) are spent: `count` steps of `samples` samples, `units` of them in a step."""

    samples: int
    units: int
    count: int


def steps_of(task: Task, arch: Any, recipe: Recipe) -> Steps:
    """One sample a step and one step at least, however small the recipe."""
    samples = max(1, recipe.batch_tokens // task.units(arch))
    units = samples * task.units(arch)
    return Steps(samples, units, max(1, round(recipe.tokens / units)))


def evaluation_size(recipe: Recipe, bounds: tuple[int, int]) -> int:
    """Tokens or images that a trial is scored on."""
    return int(min(max(EVALUATION_SHARE * recipe.tokens, bounds[0]), bounds[1]))


# ---- text ----------------------------------------------------------------------------------------------------


def _text_batch(corpus: Corpus, arch: Any, seed: int, step: int, samples: int) -> Batch:
    windows = torch.from_numpy(training_batch(corpus, seed, step, samples, arch.context))
    return windows[:, :-1], windows[:, 1:]


def _text_validation(corpus: Corpus, arch: Any, recipe: Recipe, samples: int) -> Iterator[Batch]:
    windows = torch.from_numpy(validation_windows(corpus, evaluation_size(recipe, EVALUATION_TOKENS), arch.context))
    for some in windows.split(samples):
        yield some[:, :-1], some[:, 1:]


TEXT = Task(
    unit="token",
    loss="bits_per_byte",
    nats=math.log(2),
    load=load_corpus,
    settings=lambda corpus: {},
    scaling=lambda corpus: {},
    worst=lambda corpus: {"bits_per_byte": corpus.unigram_bits, "accuracy": 0.0},
    units=lambda arch: arch.context,
    batch=_text_batch,
    validation=_text_validation,
)


# ---- images --------------------------------------------------------------------------------------------------


def _image_settings(data: ImageData) -> dict[str, str]:
    _, channels, height, width = data.train_images.shape
    found = {"height": height, "width": width, "channels": channels, "classes": data.classes}
    return {f"image.{name}": str(value) for name, value in found.items()}


def _image_batch(data: ImageData, arch: Any, seed: int, step: int, samples: int) -> Batch:
    images, labels = image_batch(data, seed, step, samples)
    # Torch's CPU generator reads 32 bits of its seed; this mixes both numbers into them.
    mixed = int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
    return augment(images, torch.Generator().manual_seed(mixed)), labels


def _image_validation(data: ImageData, arch: Any, recipe: Recipe, samples: int) -> Iterator[Batch]:
    # Evenly spaced, since files are often sorted by class.
    size = len(data.test_labels)
    count = min(size, evaluation_size(recipe, EVALUATION_IMAGES))
    chosen = np.arange(count) * size // count
    for start in range(0, count, samples):
        some = chosen[start : start + samples]
        yield normalise(data, data.test_images[some]), torch.from_numpy(data.test_labels[some])


IMAGES = Task(
    unit="image",
    loss="loss",
    nats=1.0,
    load=load_images,
    settings=_image_settings,
    scaling=lambda data: {"mean": [float(m) for m in data.mean], "std": [float(s) for s in data.std]},
    worst=lambda data: {"loss": math.log(data.classes), "accuracy": 1 / data.classes},
    units=lambda arch: 1,
    batch=_image_batch,
    validation=_image_validation,
)

TASKS: Mapping[str, Task] = {"text": TEXT, "images": IMAGES}
