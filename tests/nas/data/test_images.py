import gzip
import io
import os
import pickle
import re
import struct
from typing import ClassVar

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hypernas.data.images import ImageData, augment, image_batch, load_images, normalise
from hypernas.errors import DataError


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(file, array, magic=8):
    content = bytes((0, 0, magic, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def write_mnist(folder, dot="-", gz="", train=20, test=10):
    folder.mkdir(exist_ok=True)
    for part, N, seed in (("train", train, 0), ("t10k", test, 1)):
        write_idx(folder / f"{part}-images{dot}idx3-ubyte{gz}", pixels(N, 28, 28, seed=seed))
        write_idx(folder / f"{part}-labels{dot}idx1-ubyte{gz}", np.arange(N, dtype=np.uint8) % 10)


class Python2Pickler(pickle._Pickler):
    """Writes strings the way Python 2 did, which is how the published CIFAR batches are stored."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        value = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = dispatch[str] = save_string


def python2_pickle(value):
    out = io.BytesIO()
    Python2Pickler(out, protocol=2).dump(value)
    return out.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_cifar10(folder, dump=python2_pickle):
    for i, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        batch = {b"data": pixels(10, 3072, seed=i), b"labels": list(range(10)), b"batch_label": b"a batch"}
        (folder / name).write_bytes(dump(batch))


def encoded(image, kind="PNG"):
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind)
    return out.getvalue()


def write_folder(root, classes=("cat", "dog"), each=10, shape=(8, 8, 3), seed=0):
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i}.png").write_bytes(encoded(pixels(*shape, seed=seed + 100 * k + i)))


def write_parquet(file, column="img", label="label", N=20, shape=(8, 8, 3), seed=0):
    images = [{"bytes": encoded(pixels(*shape, seed=seed + i)), "path": None} for i in range(N)]
    pyarrow.parquet.write_table(pyarrow.table({label: [i % 2 for i in range(N)], column: images}), file)


def images_of(N=10, C=3, H=8, W=8, **changes):
    parts = {
        "train_images": pixels(N, C, H, W),
        "train_labels": np.arange(N),
        "test_images": pixels(2, C, H, W, seed=1),
        "test_labels": np.arange(2),
        "mean": (0.5,) * C,
        "std": (0.25,) * C,
    }
    return ImageData(**({"name": "memory", "classes": N, "hash": ""} | parts | changes))


# --- the default images


def test_default_images_are_real_mnist():
    data = load_images(None)
    assert (data.name, data.classes) == ("mnist-5k", 10)
    assert (data.train_images.shape, data.train_images.dtype) == ((4000, 1, 28, 28), np.uint8)
    assert data.test_images.shape == (1000, 1, 28, 28)
    assert (np.bincount(data.train_labels) == 400).all() and (np.bincount(data.test_labels) == 100).all()
    assert data.mean == pytest.approx((0.1307,), abs=0.002)  # all 60,000: 0.1307 and 0.3081
    assert data.std == pytest.approx((0.3081,), abs=0.002)
    assert load_images(None).hash == data.hash


# --- MNIST


@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize("gz", ["", ".gz"])
def test_idx_files_are_read(dot, gz, tmp_path):
    write_mnist(tmp_path, dot, gz)
    data = load_images(str(tmp_path))
    assert np.array_equal(data.train_images[:, 0], pixels(20, 28, 28))
    assert np.array_equal(data.test_images[:, 0], pixels(10, 28, 28, seed=1))
    assert data.test_labels.tolist() == list(range(10))
    assert (data.classes, data.test_labels.dtype) == (10, np.int64)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("train-images-idx3-ubyte", b"", "begins with nothing: wanted 00 00 08 03"),
        ("train-images-idx3-ubyte", b"\0\0\x0d\x03" + bytes(12), "begins with 00 00 0d 03: wanted 00 00 08 03"),
        (
            "train-images-idx3-ubyte",
            b"\0\0\x08\x03" + struct.pack(">3I", 9, 9, 9),
            "16 bytes and its header promises 745",
        ),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + b"\xff" * 12, "has 16 bytes and its header promises"),
        ("t10k-labels-idx1-ubyte", b"\0\0\x08\x01" + struct.pack(">I", 1) + b"\1", "has 10 images and .* 1 labels"),
    ],
)
def test_damaged_idx_file_is_named(name, content, message, tmp_path):
    write_mnist(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_images(str(tmp_path))
    assert name in str(caught.value)


def test_truncated_idx_gz_is_named(tmp_path):
    write_mnist(tmp_path, gz=".gz")
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        load_images(str(tmp_path))


def test_missing_idx_file_is_asked_for(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="add the missing ones"):
        load_images(str(tmp_path))


# --- CIFAR


@pytest.mark.parametrize("dump", [python2_pickle, *(lambda x, p=p: pickle.dumps(x, protocol=p) for p in range(2, 6))])
def test_cifar_10_pickles_of_every_age_are_read(dump, tmp_path):
    write_cifar10(tmp_path, dump)
    data = load_images(str(tmp_path))
    assert (data.train_images.shape, data.classes) == ((20, 3, 32, 32), 10)
    assert np.array_equal(data.train_images[10, 2], pixels(10, 3072, seed=1)[0, 2048:].reshape(32, 32))
    assert data.train_labels.tolist() == [*range(10), *range(10)]


def test_cifar_100_pickles_give_fine_labels(tmp_path):
    for name in ("train", "test"):
        batch = {b"data": pixels(5, 3072), b"fine_labels": [0, 99, 2, 3, 4], b"coarse_labels": [0] * 5}
        (tmp_path / name).write_bytes(python2_pickle(batch))
    data = load_images(str(tmp_path))
    assert (data.classes, data.test_labels.tolist()) == (100, [0, 99, 2, 3, 4])


@pytest.mark.parametrize(
    "names, label_bytes, classes",
    [(("data_batch_1.bin", "test_batch.bin"), 1, 10), (("train.bin", "test.bin"), 2, 100)],
)
def test_cifar_binary_batches_are_read(names, label_bytes, classes, tmp_path):
    labels = np.stack([np.full(6, 7), np.arange(6)], axis=1)[:, -label_bytes:].astype(np.uint8)
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(np.concatenate([labels, pixels(6, 3072, seed=i)], axis=1).tobytes())
    data = load_images(str(tmp_path))
    assert np.array_equal(data.train_images.reshape(6, 3072), pixels(6, 3072))
    assert (data.classes, data.train_labels.tolist()) == (classes, list(range(6)))


class Ran:
    def __reduce__(self):
        return (print, ("a pickle ran code",))


@pytest.mark.parametrize(
    "content, message",
    [
        (pickle.dumps(Ran()), r"it names builtins\.print, which no CIFAR batch needs"),
        (b"", "EOFError"),
        (b"garbage", "wanted a CIFAR-10 batch"),
        (pickle.dumps([1, 2]), "wanted a CIFAR-10 batch"),
        (pickle.dumps({b"data": pixels(2, 3072)}), "'labels'"),
        (pickle.dumps({b"data": pixels(2, 3072), b"labels": [1]}), r"data is uint8 \(2, 3072\) with 1 labels"),
        (pickle.dumps({b"data": pixels(2, 100), b"labels": [1, 2]}), r"data is uint8 \(2, 100\) with 2 labels"),
        (pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}), "data is float64"),
        (pickle.dumps({b"data": "pixels", b"labels": [1, 2]}), "data is str"),
        (pickle.dumps({b"data": pixels(2, 3072), b"labels": ["cat", "dog"]}), "wanted a CIFAR-10 batch"),
    ],
)
def test_bad_cifar_pickle_is_named_and_runs_nothing(content, message, tmp_path, capsys):
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_2").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_images(str(tmp_path))
    assert "data_batch_2" in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", bytes(3072)])
def test_cifar_binary_of_odd_length_is_named(content, tmp_path):
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"data_batch_1\.bin has {len(content)} bytes: wanted rows of 3073"):
        load_images(str(tmp_path))


def test_cifar_without_its_test_batch_is_an_error(tmp_path):
    write_cifar10(tmp_path)
    (tmp_path / "test_batch").unlink()
    with pytest.raises(DataError, match="no test_batch"):
        load_images(str(tmp_path))


def test_label_beyond_the_classes_of_cifar_is_an_error(tmp_path):
    row = bytes([10]) + bytes(3072)
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (tmp_path / name).write_bytes(row)
    with pytest.raises(DataError, match="labels up to 10: wanted two classes or more, and at most 10"):
        load_images(str(tmp_path))


# --- folders of images


def test_folder_without_a_split_scores_a_fifth_of_each_class(tmp_path):
    write_folder(tmp_path / "pets")
    data = load_images(str(tmp_path / "pets"))
    assert (data.name, data.classes, data.train_images.shape) == ("pets", 2, (16, 3, 8, 8))
    assert np.bincount(data.test_labels).tolist() == [2, 2]
    found = {image.tobytes(): label for image, label in zip(data.train_images, data.train_labels, strict=True)}
    assert found | {
        image.tobytes(): label for image, label in zip(data.test_images, data.test_labels, strict=True)
    } == {pixels(8, 8, 3, seed=100 * k + i).transpose(2, 0, 1).tobytes(): k for k in range(2) for i in range(10)}


def test_images_that_repeat_are_kept_once_and_names_do_not_matter(tmp_path):
    for root in (tmp_path / "one", tmp_path / "two"):
        write_folder(root)
    for file in (tmp_path / "two" / "cat").iterdir():
        file.with_name(f"copy-{file.name}").write_bytes(file.read_bytes())
    one, two = (load_images(str(tmp_path / name)) for name in ("one", "two"))
    assert {image.tobytes() for image in one.test_images} == {image.tobytes() for image in two.test_images}
    assert len(two.train_images) == len(one.train_images)


@pytest.mark.parametrize("scored", ["test", "val", "Validation"])
def test_split_that_comes_with_a_folder_is_kept(scored, tmp_path):
    write_folder(tmp_path / "train", each=3)
    write_folder(tmp_path / scored, classes=("dog",), each=2, seed=50)
    data = load_images(str(tmp_path))
    assert (len(data.train_images), data.test_labels.tolist(), data.classes) == (6, [1, 1], 2)


def test_val_goes_before_test(tmp_path):
    for part, each in (("train", 3), ("test", 2), ("val", 1)):
        write_folder(tmp_path / part, each=each)
    assert len(load_images(str(tmp_path)).test_images) == 2


def test_train_folder_alone_is_split(tmp_path):
    write_folder(tmp_path / "train")
    data = load_images(str(tmp_path))
    assert (data.classes, len(data.train_images), len(data.test_images)) == (2, 16, 4)


def test_grey_jpg_folder_has_one_channel(tmp_path):
    write_folder(tmp_path, shape=(8, 6))
    for file in tmp_path.rglob("*.png"):
        Image.open(file).save(file.with_suffix(".JPG"))
        file.unlink()
    assert load_images(str(tmp_path)).train_images.shape == (16, 1, 8, 6)


def test_grey_images_among_coloured_ones_become_coloured(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "cat" / "grey.png").write_bytes(encoded(pixels(8, 8)))
    assert load_images(str(tmp_path)).train_images.shape[1] == 3


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("cat/z.png", encoded(pixels(9, 8, 3)), r"z\.png: is 9 x 8 where the first image is 8 x 8: scale"),
        ("cat/z.png", b"no image", r"z\.png: not an image"),
        ("cat/z.png", encoded(pixels(8, 8, 3))[:80], r"z\.png: not an image"),
        ("cat/z.png", b"", r"z\.png: not an image"),
        ("cat/z.png", encoded(pixels(8, 8).astype(np.uint16)), r"z\.png: has more than 8 bits"),
        ("z.png", encoded(pixels(8, 8, 3)), r"belong to no class, such as z\.png"),
    ],
)
def test_bad_image_is_named(name, content, message, tmp_path):
    write_folder(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_images(str(tmp_path))


def test_class_that_is_scored_but_not_trained_is_an_error(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", classes=("cat", "emu"))
    with pytest.raises(DataError, match="has not: emu"):
        load_images(str(tmp_path))


def test_training_and_scored_images_of_two_sizes_are_an_error(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", shape=(9, 9, 3))
    with pytest.raises(DataError, match="3x8x8 and 3x9x9"):
        load_images(str(tmp_path))


def test_one_class_is_an_error(tmp_path):
    write_folder(tmp_path, classes=("cat",))
    with pytest.raises(DataError, match="wanted two classes or more"):
        load_images(str(tmp_path))


def test_too_few_images_to_split_is_an_error(tmp_path):
    write_folder(tmp_path, each=4)
    with pytest.raises(DataError, match="no scored images: give at least 5 of each class"):
        load_images(str(tmp_path))


def test_files_beside_those_of_a_known_format_are_counted(tmp_path):
    write_mnist(tmp_path)
    write_folder(tmp_path / "photographs")
    assert load_images(str(tmp_path)).reading.left_out["of type .png"] == 20
    (tmp_path / "rows").mkdir()
    for name in ("train", "test", "extra"):
        write_parquet(tmp_path / "rows" / f"{name}.parquet")
    left_out = load_images(str(tmp_path / "rows")).reading.left_out
    assert left_out["files beside those of train and test"] == 1


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load_images(str(tmp_path / "pipe"))


@pytest.mark.parametrize("twice", ["image", "label"])
def test_a_column_that_is_there_twice_is_named(twice, tmp_path):
    columns = {"image": [b""], "label": [0]}
    names = ["image", "label", twice]
    table = pyarrow.Table.from_arrays([pyarrow.array(columns[name]) for name in names], names=names)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet: 2 columns named `{twice}`"):
        load_images(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("path", ["", "nowhere/at-all", "nul\0byte", "x" * 5000])
def test_path_that_does_not_exist_says_what_was_wanted(path):
    with pytest.raises(DataError, match="wanted"):
        load_images(path)


def test_folder_without_images_and_other_files_say_what_is_known(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(DataError, match=re.escape("MNIST IDX files, CIFAR batches, Hugging Face .parquet")):
            load_images(str(path))


# --- parquet


@pytest.mark.parametrize("column, label, shape", [("img", "label", (8, 8, 3)), ("image", "fine_label", (8, 8))])
def test_hugging_face_parquet_is_read(column, label, shape, tmp_path):
    write_parquet(tmp_path / "train-00000-of-00001.parquet", column, label, shape=shape)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", column, label, N=4, shape=shape, seed=50)
    data = load_images(str(tmp_path))
    assert data.train_images.shape == (20, 3 if len(shape) == 3 else 1, 8, 8)
    assert data.train_labels[:4].tolist() == data.test_labels.tolist() == [0, 1, 0, 1]
    assert np.array_equal(data.train_images[1], np.moveaxis(pixels(*shape, seed=1).reshape(8, 8, -1), 2, 0))


def test_parquet_file_alone_is_split(tmp_path):
    write_parquet(tmp_path / "train.parquet")
    data = load_images(str(tmp_path / "train.parquet"))
    assert (len(data.train_images), len(data.test_images)) == (16, 4)
    assert load_images(str(tmp_path)).hash == data.hash


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"picture": [b""], "label": [0]}, "no `img` or `image` column, but picture, label"),
        ({"img": [b"x"], "class": [0]}, "no `label` or `fine_label` column"),
        ({"img": ["a.png"], "label": [0]}, "row 1: the image is str"),
        ({"img": [{"path": "a.png", "bytes": None}], "label": [0]}, "row 1: the image is NoneType"),
        ({"img": [b"not an image"], "label": [0]}, "row 1: not an image"),
        ({"img": [encoded(pixels(8, 8))], "label": ["cat"]}, "row 1: the label is str"),
        ({"img": [encoded(pixels(8, 8, seed=i)) for i in range(9)], "label": [-1] * 9}, "the label -1"),
    ],
)
def test_bad_parquet_is_named(columns, message, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message) as caught:
        load_images(str(tmp_path / "a.parquet"))
    assert "a.parquet" in str(caught.value)


# --- statistics, batches, augmentation


def test_normalised_training_images_have_mean_zero_and_variance_one(tmp_path):
    write_folder(tmp_path)
    data = load_images(str(tmp_path))
    images = normalise(data, data.train_images)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_channel_that_never_changes_is_zero(tmp_path):
    for i in range(10):
        image = pixels(8, 8, 3, seed=i)
        image[..., 2] = 200
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[i % 2] / f"{i}.png").write_bytes(encoded(image))
    data = load_images(str(tmp_path))
    assert normalise(data, data.train_images)[:, 2].abs().max() < 1e-4


@given(N=st.integers(1, 40), size=st.integers(1, 60), seed=st.integers(0, 2**63))
def test_steps_show_each_image_once_an_epoch(N, size, seed):
    data = images_of(N, H=2, W=2)
    seen = torch.cat([image_batch(data, seed, step, size)[1] for step in range(-(-2 * N // size))])
    for epoch in range(2):
        assert sorted(seen[epoch * N : (epoch + 1) * N].tolist()) == list(range(N))


def test_batch_depends_on_seed_and_step_alone_and_pairs_images_with_labels():
    data = images_of(50)
    images, labels = image_batch(data, 3, 7, 16)
    image_batch(data, 3, 8, 16)
    again = image_batch(data, 3, 7, 16)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert torch.equal(images, normalise(data, data.train_images[labels.numpy()]))
    assert not torch.equal(labels, image_batch(data, 4, 7, 16)[1])


@given(H=st.integers(1, 20), W=st.integers(1, 20), C=st.sampled_from([1, 3]), seed=st.integers(0, 2**31))
def test_augmented_image_is_a_shifted_and_only_in_colour_mirrored_one(H, W, C, seed):
    images = torch.rand(3, C, H, W, generator=torch.Generator().manual_seed(seed)) + 1
    out = augment(images, torch.Generator().manual_seed(seed))
    assert out.stride() == torch.empty(out.shape).stride()  # of one channel too
    assert out.shape == images.shape
    m = H // 8
    for before, after in zip(images, out, strict=True):
        padded = torch.nn.functional.pad(before, (m,) * 4)
        crops = [padded[:, y : y + H, x : x + W] for y in range(2 * m + 1) for x in range(2 * m + 1)]
        flips = [crop.flip(-1) for crop in crops] if C == 3 else []
        assert any(torch.equal(after, crop) for crop in crops + flips)


def test_augmentation_uses_every_shift_and_mirrors_half():
    images = torch.arange(1.0, 65).view(1, 1, 8, 8).expand(4000, 3, 8, 8)
    out = augment(images, torch.Generator().manual_seed(0))
    assert len(out[:, 0].flatten(1).unique(dim=0)) == 9 * 2
    mirrored = (out[:, 0, 4, 3] > out[:, 0, 4, 4]).float().mean()
    assert abs(mirrored - 0.5) < 0.03  # four standard errors


def test_augmentation_is_drawn_from_its_generator():
    images = torch.rand(8, 3, 16, 16)
    one, two, three = (augment(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, three)
