"""Folders of images: every format that Pillow reads, folders around the classes, and what is left out is said."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypernas.data.image_folders import DRAWN_BY_OTHERS, image_formats
from hypernas.data.images import load_images
from hypernas.errors import DataError

SUFFIXES = (".png", ".jpg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".tga", ".jp2", ".qoi", ".avif")


def draw(file: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def write_classes(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 5, suffix: str = ".png") -> Path:
    for number, name in enumerate(classes):
        for i in range(each):
            draw(root / name / f"{i}{suffix}", 100 * number + i)
    return root


def test_a_class_in_any_format_that_pillow_reads_is_a_class(tmp_path: Path) -> None:
    for number, suffix in enumerate(SUFFIXES):
        for i in range(5):
            draw(tmp_path / f"class{suffix}" / f"{i}{suffix.upper() if i else suffix}", 100 * number + i)
    data = load_images(str(tmp_path))
    assert data.classes == len(SUFFIXES)
    assert (len(data.train_labels), len(data.test_labels)) == (4 * len(SUFFIXES), len(SUFFIXES))
    assert data.reading.files == 5 * len(SUFFIXES)
    assert data.reading.bytes == sum(file.stat().st_size for file in tmp_path.rglob("*.*") if file.is_file())


def test_an_image_that_another_program_would_have_to_draw_is_not_opened(tmp_path: Path) -> None:
    assert {"WEBP", "BMP", "GIF", "TIFF", "JPEG"} <= set(image_formats()) and not DRAWN_BY_OTHERS & set(image_formats())
    write_classes(tmp_path)
    (tmp_path / "cat" / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    with pytest.raises(DataError, match=r"0\.png: not an image that can be read"):
        load_images(str(tmp_path))


@pytest.mark.parametrize("wrapper", ["flowers", "a/b", "photos/flowers/images"])
def test_a_folder_around_the_class_folders_changes_nothing(wrapper: str, tmp_path: Path) -> None:
    plain = load_images(str(write_classes(tmp_path / "plain")))
    write_classes(tmp_path / "wrapped" / wrapper)
    (tmp_path / "wrapped" / "README.txt").write_text("photographs")
    wrapped = load_images(str(tmp_path / "wrapped"))
    assert (wrapped.hash, wrapped.classes) == (plain.hash, 2)
    assert wrapped.reading.left_out["of type .txt"] == 1


def test_a_split_may_be_wrapped_and_so_may_its_parts(tmp_path: Path) -> None:
    for root, inner in ((tmp_path / "plain", ""), (tmp_path / "wrapped" / "dataset", "images")):
        write_classes(root / "train" / inner)
        write_classes(root / "val" / inner, each=1)
    plain, wrapped = (load_images(str(tmp_path / name)) for name in ("plain", "wrapped"))
    assert wrapped.hash == plain.hash and (len(wrapped.train_labels), len(wrapped.test_labels)) == (10, 2)


def test_a_folder_of_one_class_is_refused_rather_than_unwrapped(tmp_path: Path) -> None:
    write_classes(tmp_path, classes=("cat",))
    write_classes(tmp_path / "cat", classes=("kitten",))
    with pytest.raises(DataError, match="wanted two classes or more"):
        load_images(str(tmp_path))


def test_folders_that_each_hold_all_classes_are_refused_in_one_sentence(tmp_path: Path) -> None:
    for part in ("training", "testing"):
        write_classes(tmp_path / part)
    with pytest.raises(DataError, match=r"holds testing, training, and several of them hold a folder '(cat|dog)'"):
        load_images(str(tmp_path))


def test_a_class_may_have_folders_of_its_own(tmp_path: Path) -> None:
    write_classes(tmp_path, classes=("cat/tabby", "cat/siamese", "dog/beagle", "dog/poodle"))
    data = load_images(str(tmp_path))
    assert (data.classes, np.bincount(data.train_labels).tolist()) == (2, [8, 8])


def test_no_class_vanishes(tmp_path: Path) -> None:
    write_classes(tmp_path / "some")
    write_classes(tmp_path / "elsewhere", classes=("fox",))
    for name, make, why in (
        ("empty", lambda folder: folder.mkdir(), "holds no image"),
        ("raw", lambda folder: [folder.mkdir(), (folder / "1.heic").write_bytes(b"?")], "holds no image"),
        ("fox", lambda folder: folder.symlink_to(tmp_path / "elsewhere" / "fox"), "is a link to a folder"),
    ):
        folder = tmp_path / "some" / name
        make(folder)
        with pytest.raises(DataError, match=f"{name} {why}.*a class would be lost"):
            load_images(str(tmp_path / "some"))
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    assert load_images(str(tmp_path / "some")).classes == 2


def test_what_is_left_out_is_counted_by_why(tmp_path: Path) -> None:
    write_classes(tmp_path / "train")
    for part in ("val", "test"):
        write_classes(tmp_path / part, each=2)
    (tmp_path / "labels.csv").write_text("")
    (tmp_path / "train" / "cat" / "raw.HEIC").write_bytes(b"?")
    (tmp_path / ".DS_Store").write_bytes(b"")
    os.mkfifo(tmp_path / "train" / "cat" / "pipe.png")  # opened, it would never end
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 255)]
    frames[0].save(tmp_path / "train" / "dog" / "moving.gif", save_all=True, append_images=frames[1:])
    reading = load_images(str(tmp_path)).reading
    assert {why: count for why, count in reading.left_out.items() if count} == {
        "images beside the folders train and val": 4,
        "of type .csv": 1,
        "of type .heic": 1,
        "hidden": 1,
        "no regular file (a pipe, socket or device)": 1,
        "images' frames after the first": 1,
    }
    said = reading.describe("pets")
    assert said.startswith(f"data pets: 15 files, {reading.bytes:,} bytes read; left out: 4 images beside the folders")


def test_images_that_repeat_are_said_and_take_no_class_away(tmp_path: Path) -> None:
    write_classes(tmp_path)
    shutil.copy(tmp_path / "cat" / "0.png", tmp_path / "cat" / "copy.png")
    assert load_images(str(tmp_path)).reading.left_out["images that repeat"] == 1
    shutil.copytree(tmp_path / "cat", tmp_path / "cats")
    with pytest.raises(DataError, match="class 1, counted from 0, has no image of its own"):
        load_images(str(tmp_path))
