"""Folders of images: which folder is which class, and which images are trained and which scored on.

`root/cat/1.webp` is of class cat. `root/train` and `root/val` (or validation, test) are a split that comes with the
data. Either may lie in a folder of its own, as archives have it. What could be read in two ways is an error.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from hypernas.data.files import is_hidden, kind, sort_files
from hypernas.errors import DataError

# What Pillow recognises and other programs have to draw: Ghostscript, or one that it is told of.
DRAWN_BY_OTHERS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
SCORED = ("val", "valid", "validation", "test")


@dataclass(frozen=True, slots=True)
class ClassFolders:
    """Images and their labels, and the names of the classes. `scored` is empty where no split comes with the data;
    `apart` are images that are neither trained nor scored on, by why."""

    classes: list[str]
    train: list[tuple[Path, int]]
    scored: list[tuple[Path, int]] = field(default_factory=list)
    apart: dict[Path, str] = field(default_factory=dict)


@cache
def image_formats() -> tuple[str, ...]:
    """The formats, by Pillow's names, that Pillow reads by itself."""
    from PIL import Image  # needed for encoded images only

    Image.init()
    return tuple(name for name in Image.OPEN if name not in DRAWN_BY_OTHERS)


@cache
def image_suffixes() -> frozenset[str]:
    """The extensions of files in those formats."""
    from PIL import Image

    formats = {*image_formats(), "MPO"}  # which Pillow opens as a JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def find_classes(root: Path, wanted: str) -> ClassFolders:
    """The class folders at a path, or in folders around them. Raises DataError, with what was `wanted`."""
    images = sort_files(root, lambda file: None if file.suffix.lower() in image_suffixes() else kind(file))[0]
    if not images:
        raise DataError(f"{root} holds no images: wanted {wanted}")
    root = _unwrapped(root, images)
    parts = {folder.name.lower(): folder for folder in _subfolders(root)}
    part = next((part for part in SCORED if part in parts), None) if "train" in parts else None
    train = _unwrapped(parts.get("train", root), images)
    classes, of_train = _classes(train, images, wanted)
    _check_classes(train, classes, of_train)
    label = {name: number for number, name in enumerate(classes)}
    labelled = [(train / file, label[file.parts[0]]) for file in of_train]
    if part is None:
        return ClassFolders(classes, labelled, apart=dict.fromkeys(images, "images beside the folder train"))
    scored = _unwrapped(parts[part], images)
    known, of_scored = _classes(scored, images, wanted)
    if unknown := [name for name in known if name not in label]:
        raise DataError(f"{scored} has classes that {train} has not: {', '.join(unknown)}; rename or remove them")
    apart = dict.fromkeys(images, f"images beside the folders train and {part}")
    return ClassFolders(classes, labelled, [(scored / file, label[file.parts[0]]) for file in of_scored], apart)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name))


def _unwrapped(folder: Path, images: list[Path]) -> Path:
    """The folder that holds the class folders, or train: it may lie in others that hold nothing else."""
    loose = {image.parent for image in images}
    while len(inside := _subfolders(folder)) == 1 and inside[0].name.lower() != "train":
        # A folder of images is a class, if the only one.
        if loose & {folder, inside[0]} or inside[0].is_symlink() or not _subfolders(inside[0]):
            break
        folder = inside[0]
    return folder


def _classes(root: Path, images: list[Path], wanted: str) -> tuple[list[str], list[Path]]:
    """The names of the classes, in order, and their images, relative to `root`."""
    below = [image.relative_to(root) for image in images if image.is_relative_to(root)]
    if not below:
        raise DataError(f"{root} holds no images: wanted {wanted}")
    if loose := [str(file) for file in below if len(file.parts) == 1]:
        raise DataError(f"{root} has images that belong to no class, such as {loose[0]}: wanted class/name.png")
    return sorted({file.parts[0] for file in below}), below


def _check_classes(root: Path, classes: list[str], images: list[Path]) -> None:
    """Raises DataError where a class would be lost, or folders that look like classes are something else."""
    if missing := [folder for folder in _subfolders(root) if folder.name not in classes]:
        why = "is a link to a folder, which is not followed" if missing[0].is_symlink() else "holds no image"
        raise DataError(f"{missing[0]} {why}, so a class would be lost: convert or copy its images, or move it away")
    if any(len(file.parts) == 2 for file in images):
        return
    inner = Counter(name for _, name in {file.parts[:2] for file in images})
    if twice := [name for name, count in inner.items() if count > 1]:
        raise DataError(
            f"{root} holds {', '.join(classes)}, and several of them hold a folder {twice[0]!r}, which seems to be the "
            "class: wanted class/name.png, or train and val around the classes; rename them or give one as data.path"
        )
