"""Files of data, and of architectures to start from, that come from anywhere."""

import gzip
import io
import json
import os
import pickle
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.nas.hostile import Command, Given, row
from tests.nas.hostile_exports import Evil

MIB = 1 << 20


def search(given: Given, data: Path, space: str = "lm") -> list[Command]:
    """A search on the data; it ends where the data is refused, before anything is trained."""
    store = str(given.folder / "nas.db")
    flags = ["--engine", "inline", "--trials", "1", "--preset", "quick", "--space", space]
    return [["search", "--study", "x", "--store", store, *flags, "--set", f"data.path={data}"]]


def text(given: Given, name: str, content: bytes) -> list[Command]:
    path = given.folder / name
    path.write_bytes(content)
    return search(given, path)


def images(given: Given, write: Callable[[Path], object]) -> list[Command]:
    """A search on a folder of images of two classes, in which `write` spoils a file's place."""
    for name in ("cat", "dog"):
        folder = given.folder / "images" / name
        folder.mkdir(parents=True)
        for number in range(5):
            (folder / f"{number}.png").write_bytes(png(4, 4, number + 10 * (name == "dog")))
    write(given.folder / "images" / "cat" / "0.png")
    return search(given, given.folder / "images", "vision")


def png(
    width: int, height: int, shade: int = 0, *, bits: int = 8, claims: tuple[int, int] | None = None, extra: bytes = b""
) -> bytes:
    """A grey picture; `claims` is the size that its header says, `extra` a chunk."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *(claims or (width, height)), bits, 0, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes([shade]) * (width * bits // 8)) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def members(content: bytes, count: int) -> bytes:
    """A .gz of the content many times over: a bomb that takes no time to make."""
    return gzip.compress(content) * count


def parquet(given: Given, table: Any, name: str = "x.parquet", space: str = "lm", **how: Any) -> list[Command]:
    import pyarrow.parquet

    path = given.folder / name
    pyarrow.parquet.write_table(table, path, **how)
    return search(given, path, space)


# ---- text ----------------------------------------------------------------------------------------------------------


@row("line 1: longer than")
def one_long_line(given: Given) -> list[Command]:
    """a .jsonl.gz of 583 KB that is one line of 600 MB"""
    content = gzip.compress(b'{"text": "') + members(b"a" * MIB, 572) + gzip.compress(b'"}\n')
    return text(given, "x.jsonl.gz", content)


@row("unpacks to more than", slow=True)
def text_bomb(given: Given) -> list[Command]:
    """a .txt.gz that is 4 GB of text"""
    return text(given, "x.txt.gz", members(b"a" * 4 * MIB, 1000))


@row("line 1: longer than")
def long_plain_line(given: Given) -> list[Command]:
    """a .jsonl that is one line of 8 GB and takes no room on the disk"""
    path = given.folder / "x.jsonl"
    with path.open("wb") as file:
        file.truncate(8 << 30)
    return search(given, path)


@row("cannot be read")
def cut_gz(given: Given) -> list[Command]:
    """the first half of a .gz"""
    content = gzip.compress(os.urandom(1000))
    return text(given, "x.txt.gz", content[: len(content) // 2])


@row("give more text")
def gz_of_gz(given: Given) -> list[Command]:
    """a .gz of a .gz of a .gz: bytes that are no text are bytes"""
    return text(given, "x.txt.gz", gzip.compress(gzip.compress(gzip.compress(b"a" * 100))))


@row("cannot be read")
def zip_as_gz(given: Given) -> list[Command]:
    """a .zip named .gz, with a path out of the folder"""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("../../outside/evil", b"evil")
    return text(given, "x.txt.gz", packed.getvalue())


@row("line 2: not JSON")
def broken_unicode(given: Given) -> list[Command]:
    """a line that is no UTF-8"""
    return text(given, "x.jsonl", b'{"text": "a"}\n{"text": "\xff\xfe"}\n')


@row("half a surrogate pair")
def lone_surrogate(given: Given) -> list[Command]:
    """half a surrogate pair"""
    return text(given, "x.jsonl", b'{"text": "a\\ud800"}\n')


@row("line 1: not JSON")
def deep_line(given: Given) -> list[Command]:
    """a line of 100,000 brackets"""
    return text(given, "x.jsonl", b"[" * 100_000)


@row("line 1: not JSON")
def huge_integer(given: Given) -> list[Command]:
    """a number of 100,000 digits for a text"""
    return text(given, "x.jsonl", b'{"text": ' + b"9" * 100_000 + b"}\n")


@row("no `text` field")
def escapes(given: Given) -> list[Command]:
    """fields named like escape sequences, two lines and HTML"""
    return text(given, "x.jsonl", json.dumps({"\x1b[2J\n<script>": 1}).encode() + b"\n")


@row("neither a file nor a folder")
def pipe(given: Given) -> list[Command]:
    """a pipe that nobody writes to"""
    os.mkfifo(given.folder / "x.txt")
    return search(given, given.folder / "x.txt")


@row("holds no text .*pipe, socket or device")
def specials(given: Given) -> list[Command]:
    """a folder of a pipe, a socket, a device and a link out of it"""
    folder = given.folder / "data"
    folder.mkdir()
    os.mkfifo(folder / "a.txt")
    before = Path.cwd()
    os.chdir(folder)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("b.txt")
    finally:
        os.chdir(before)
    (folder / "c.txt").symlink_to("/dev/zero")
    (folder / "d").symlink_to(given.folder.parent / "outside")
    (folder / "e").symlink_to(folder)
    return search(given, folder)


# ---- parquet -------------------------------------------------------------------------------------------------------


@row("2 columns named `text`")
def column_twice(given: Given) -> list[Command]:
    """a column twice"""
    import pyarrow as pa

    return parquet(given, pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]))


@row("is of type list.*wanted a string")
def nested(given: Given) -> list[Command]:
    """a text that is a list of structures"""
    import pyarrow as pa

    return parquet(given, pa.table({"text": [[{"a": ["b"]}]]}))


@row("no `text` column")
def no_text(given: Given) -> list[Command]:
    """columns named like escape sequences and HTML"""
    import pyarrow as pa

    return parquet(given, pa.table({"\x1b[2J\n<script>": ["a"]}))


@row("cannot be read")
def corrupt_footer(given: Given) -> list[Command]:
    """a footer of 2 GB in a file of 100 bytes"""
    return text(given, "x.parquet", b"PAR1" + b"\x15" * 88 + struct.pack("<I", 2**31 - 1) + b"PAR1")


@row("unpacks to more than")
def dictionary_bomb(given: Given) -> list[Command]:
    """a million rows of one text of a megabyte: 1 TB in a file of a few KB"""
    import pyarrow as pa

    indices = pa.array([0], pa.int32()).take(pa.array([0]))
    column = pa.DictionaryArray.from_arrays(pa.repeat(indices[0], 1_000_000), pa.array(["a" * MIB]))
    return parquet(given, pa.table({"text": column}), compression="zstd")


@row("unpacks to more than", slow=True)
def compressed_bomb(given: Given) -> list[Command]:
    """texts that are 140 MB in one page of a few KB"""
    import pyarrow as pa

    table = pa.table({"text": ["a" * 70 * MIB, "b" * 70 * MIB]})
    return parquet(given, table, compression="zstd", use_dictionary=False)


@row("unpacks to more than", slow=True)
def empty_rows(given: Given) -> list[Command]:
    """ten million empty texts in a few bytes"""
    import pyarrow as pa

    column = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), 10_000_000), pa.array([""]))
    return parquet(given, pa.table({"text": column}))


@row("wanted PNG or JPEG bytes")
def no_picture(given: Given) -> list[Command]:
    """pictures that are structures of structures"""
    import pyarrow as pa

    return parquet(given, pa.table({"image": [{"bytes": {"a": 1}}], "label": [0]}), space="vision")


@row("unpacks to more than", slow=True)
def picture_bomb(given: Given) -> list[Command]:
    """a thousand times one white picture of 4000 x 4000"""
    import pyarrow as pa

    column = pa.DictionaryArray.from_arrays(
        pa.repeat(pa.scalar(0, pa.int32()), 1000), pa.array([png(4000, 4000, bits=1)])
    )
    table = pa.table({"image": column, "label": pa.repeat(0, 1000)})
    return parquet(given, table, space="vision")


@row("wanted the number of a class")
def huge_label(given: Given) -> list[Command]:
    """a label of 2**64 - 1"""
    import pyarrow as pa

    table = pa.table({"image": [png(4, 4)], "label": pa.array([2**64 - 1], pa.uint64())})
    return parquet(given, table, space="vision")


@row("classes")
def many_classes(given: Given) -> list[Command]:
    """2**62 classes"""
    import pyarrow as pa

    pictures = [png(4, 4, n) for n in range(20)]
    table = pa.table({"image": pictures, "label": [0] * 10 + [2**62] * 10})
    return parquet(given, table, space="vision")


# ---- images --------------------------------------------------------------------------------------------------------


@row("wanted at most 4096 x 4096")
def absurd_size(given: Given) -> list[Command]:
    """a picture that says it is 2**31 - 1 pixels wide and high"""
    return images(given, lambda path: path.write_bytes(png(4, 4, claims=(2**31 - 1, 2**31 - 1))))


@row("wanted at most 4096 x 4096")
def decompression_bomb(given: Given) -> list[Command]:
    """a picture of 9000 x 9000 in 80 KB"""
    return images(given, lambda path: path.write_bytes(png(9000, 9000)))


@row("not an image that can be read")
def empty_size(given: Given) -> list[Command]:
    """a picture of no pixels"""
    return images(given, lambda path: path.write_bytes(png(4, 4, claims=(0, 4))))


@row("not an image that can be read")
def text_chunk(given: Given) -> list[Command]:
    """a picture with a comment of 1 GB in 1 MB"""
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(MIB)) for _ in range(100)) + packer.flush()
    data = b"a\0\0" + packed
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    return images(given, lambda path: path.write_bytes(png(4, 4, extra=chunk)))


@row("not an image that can be read")
def postscript(given: Given) -> list[Command]:
    """PostScript that writes a file, named .png"""
    program = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n({given.canary}) (w) file closefile\nshowpage\n"
    return images(given, lambda path: path.write_bytes(program.encode()))


@row("is a link to a folder|pipe|belong to no class|not followed")
def linked_class(given: Given) -> list[Command]:
    """a class that is a link out of the folder"""
    commands = images(given, lambda path: None)
    (given.folder / "images" / "evil").symlink_to(given.folder.parent / "outside")
    return commands


def cifar(given: Given, content: bytes) -> list[Command]:
    folder = given.folder / "cifar"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch"):
        (folder / name).write_bytes(content)
    return search(given, folder, "vision")


@row("which no CIFAR batch needs")
def pickled_batch(given: Given) -> list[Command]:
    """a CIFAR batch that runs code"""
    return cifar(given, pickle.dumps(Evil(given.payload)))


@row("which no CIFAR batch needs|wanted a CIFAR-10 batch")
def slow_codec(given: Given) -> list[Command]:
    """a CIFAR batch that is encoded by the slowest codec there is"""

    class Slow:
        def __reduce__(self) -> Any:
            import _codecs

            return _codecs.encode, ("".join(map(chr, range(0x4E00, 0x9F00))) * 50, "punycode")

    return cifar(given, pickle.dumps(Slow(), protocol=2))


@row("wanted a CIFAR-10 batch")
def huge_array(given: Given) -> list[Command]:
    """a CIFAR batch that is an array of 2**50 bytes"""
    return cifar(given, b"cnumpy\nndarray\n(I1125899906842624\nS'u1'\ntR.")


@row("its header promises")
def idx_header(given: Given) -> list[Command]:
    """an IDX file that promises 2**32 pictures of 2**32 x 2**32"""
    return idx(given, struct.pack(">4BIII", 0, 0, 8, 3, *[2**32 - 1] * 3))


@row("unpacks to more than", slow=True)
def idx_bomb(given: Given) -> list[Command]:
    """an IDX file of 1 GB in 1 MB"""
    return idx(given, members(struct.pack(">4BIII", 0, 0, 8, 3, 1, 1, 1) + bytes(4 * MIB), 256), ".gz")


def idx(given: Given, content: bytes, suffix: str = "") -> list[Command]:
    folder = given.folder / "mnist"
    folder.mkdir()
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"{name}-ubyte{suffix}").write_bytes(content)
    return search(given, folder, "vision")


# ---- architectures and settings ------------------------------------------------------------------------------------


def warm(given: Given, content: bytes | None) -> list[Command]:
    """A search that starts from what a file says; None: a pipe."""
    path = given.folder / "start.json"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    words = given.folder / "words.txt"
    words.write_text("some words to learn from\n" * 1000)
    return [[*search(given, words)[0], "--warm-start", str(path)]]


@row("not JSON")
def deep_start(given: Given) -> list[Command]:
    """architectures of 100,000 brackets"""
    return warm(given, b"[" * 100_000)


@row("no regular file")
def piped_start(given: Given) -> list[Command]:
    """architectures from a pipe that nobody writes to"""
    return warm(given, None)


@row("is not in this search")
def largest_start(given: Given) -> list[Command]:
    """an architecture of 10 TB"""
    return warm(given, b'[{"depth": 1024, "d_model": 65536}]')


@row("wanted a list of architectures|is not in this search")
def odd_start(given: Given) -> list[Command]:
    """an architecture that is a text, and training that is a list"""
    return warm(given, b'[{"trial": 1, "arch": "x", "training": []}]')


@row("not TOML|unknown table")
def deep_settings(given: Given) -> list[Command]:
    """settings of 100,000 brackets"""
    path = given.folder / "x.toml"
    path.write_text("x = " + "[" * 100_000)
    return [["search", "--config", str(path)]]
