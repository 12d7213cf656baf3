"""Exported folders that were changed by somebody who can also make their card again."""

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import hypernas
from tests.nas.hostile import Command, Given, row, sign

WEIGHTS = "model.safetensors"


def load(folder: Path) -> list[Command]:
    """The command that reads the whole of an export, its weights too."""
    return [["generate", str(folder), "--prompt", "a", "--count", "1", "--gpus-per-trial", "0"]]


def evaluate(folder: Path) -> list[Command]:
    return [["evaluate", str(folder), "--gpus-per-trial", "0"]]


def with_weights(given: Given, content: bytes) -> list[Command]:
    folder = given.export()
    (folder / WEIGHTS).write_bytes(content)
    return load(sign(folder))


def with_tensors(given: Given, **changed: Any) -> list[Command]:
    """The export with some tensors changed; None leaves one out."""
    from safetensors.torch import load_file, save_file

    folder = given.export()
    tensors = load_file(folder / WEIGHTS) | {name.replace("__", "."): found for name, found in changed.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)
    return load(sign(folder))


def safetensors(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def with_config(given: Given, text: str) -> list[Command]:
    folder = given.export()
    (folder / "config.json").write_text(text)
    return load(sign(folder))


def with_arch(given: Given, **changed: Any) -> list[Command]:
    whole = json.loads((given.whole / "winner" / "config.json").read_text())
    return load(given.export(arch=whole["arch"] | {name.replace("__", "."): value for name, value in changed.items()}))


# ---- weights -------------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> Any:
        return exec, (self.code,)


@row("cannot be read")
def pickled(given: Given) -> list[Command]:
    """a pickle that runs code, named model.safetensors"""
    return with_weights(given, pickle.dumps(Evil(given.payload)))


@row("cannot be read")
def huge_header(given: Given) -> list[Command]:
    """a safetensors header of 2**63 bytes"""
    return with_weights(given, struct.pack("<Q", 2**63) + b"{}")


@row("cannot be read")
def overlapping(given: Given) -> list[Command]:
    """tensors that lie over one another"""
    return with_weights(given, safetensors({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12)))


@row("cannot be read")
def negative_offset(given: Given) -> list[Command]:
    """a tensor that begins before the file"""
    return with_weights(given, safetensors({"a": tensor(-8, 0, [2])}, bytes(8)))


@row("cannot be read")
def beyond_the_end(given: Given) -> list[Command]:
    """a tensor of 2**50 bytes in a file of 80"""
    return with_weights(given, safetensors({"a": tensor(0, 2**50, [2**48])}, bytes(8)))


@row("cannot be read")
def deep_header(given: Given) -> list[Command]:
    """a header of 100,000 brackets"""
    return with_weights(given, safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"))


@row("cannot be read")
def odd_kind(given: Given) -> list[Command]:
    """a tensor of a kind that there is not, named like an escape sequence"""
    return with_weights(given, safetensors({"\x1b]52;c;cm0=\x07": tensor(0, 8, [2], "\x1b[2JF99")}, bytes(8)))


@row("embedding.weight is")
def other_shape(given: Given) -> list[Command]:
    """a tensor of another shape"""
    import torch

    return with_tensors(given, embedding__weight=torch.zeros(300, 50))


@row("embedding.weight is")
def other_dtype(given: Given) -> list[Command]:
    """whole numbers for weights"""
    import torch

    return with_tensors(given, embedding__weight=torch.zeros(256, 16, dtype=torch.int8))


@row("norm.weight is missing")
def missing_tensor(given: Given) -> list[Command]:
    """a tensor too few"""
    import torch

    return with_tensors(given, norm__weight=None, other=torch.zeros(100))


@row("more than its architecture has")
def extra_tensor(given: Given) -> list[Command]:
    """a tensor too many, its name two lines long"""
    import torch

    return with_tensors(given, **{"x\nnas: all is well": torch.zeros(1)})


@row("no finite numbers")
def not_a_number(given: Given) -> list[Command]:
    """weights that are NaN"""
    import torch

    return with_tensors(given, embedding__weight=torch.full((256, 16), torch.nan))


@row("damaged: model.safetensors has sha256")
def unsigned(given: Given) -> list[Command]:
    """weights that the card does not know"""
    folder = given.export()
    (folder / WEIGHTS).write_bytes(b"other")
    return load(folder)


# ---- the configuration ---------------------------------------------------------------------------------------------


@row("names code for others to run")
def space_file(given: Given) -> list[Command]:
    """a space in a file of the folder"""
    folder = given.export(space="evil.py:Space")
    (folder / "evil.py").write_text(given.payload)
    return load(sign(folder))


@row("names code for others to run")
def space_module(given: Given) -> list[Command]:
    """a space that is any function of Python's"""
    return load(given.export(space="os:system"))


@row(None)
def own_source(given: Given) -> list[Command]:
    """a model.py that runs code when it is imported"""
    folder = given.export()
    (folder / "model.py").write_text(given.payload)
    return [lambda: hypernas.load(sign(folder))]


@row("not text as written")
def deep_json(given: Given) -> list[Command]:
    """100,000 brackets"""
    return with_config(given, "[" * 100_000 + "]" * 100_000)


@row("not text as written")
def huge_integer(given: Given) -> list[Command]:
    """a version of 100,000 digits"""
    return with_config(given, '{"version": ' + "9" * 100_000 + "}")


@row("not text as written")
def not_utf8(given: Given) -> list[Command]:
    """bytes that are no UTF-8"""
    folder = given.export()
    (folder / "config.json").write_bytes(b'{"version": 1, "space": "\xff\xfe"}')
    return load(sign(folder))


@row("not text as written")
def endless_text(given: Given) -> list[Command]:
    """a configuration of 4 GiB that takes no room on the disk"""
    folder = given.export()
    with (folder / "config.json").open("r+b") as file:
        file.truncate(1 << 32)
    return load(folder)


@row("has no arch as written")
def duplicate_keys(given: Given) -> list[Command]:
    """two architectures, the second of which is none"""
    whole = (given.whole / "winner" / "config.json").read_text()
    return with_config(given, whole.rstrip().removesuffix("}") + ', "arch": null}')


@row("has no .* as written")
def nothing_but_a_version(given: Given) -> list[Command]:
    """a version and nothing else"""
    return with_config(given, '{"version": 1}')


@row("has no training as written")
def no_training(given: Given) -> list[Command]:
    """a training that is a text"""
    return evaluate(given.export(training="rm -rf"))


@row("has no optim.lr as written")
def half_a_training(given: Given) -> list[Command]:
    """a training without a learning rate"""
    return evaluate(given.export(training={"train.tokens": 1}))


@row("neither a file nor a folder")
def data_device(given: Given) -> list[Command]:
    """data that never ends: /dev/zero"""
    return evaluate(given.export(data={"name": "d", "hash": "0", "path": "/dev/zero", "seed": 0}))


@row("wanted a whole number at least 1 and at most 1024")
def too_deep(given: Given) -> list[Command]:
    """a billion layers"""
    return with_arch(given, depth=10**9)


@row("wanted a whole number at least 8 and at most 65536")
def too_wide(given: Given) -> list[Command]:
    """layers a million wide"""
    return with_arch(given, d_model=10**6)


@row("parameters, .* holds")
def as_large_as_legal(given: Given) -> list[Command]:
    """the largest architecture that is legal, 10 TB, beside the weights of a small one"""
    return with_arch(given, depth=1024, d_model=65536)


@row("parameters, .* holds")
def largest_in_blocks(given: Given) -> list[Command]:
    """the same, said to run in blocks"""
    folder = given.export(blocks={"stack.layers.0.ffn": [[1, 1]]})
    config = json.loads((folder / "config.json").read_text())
    config["arch"] |= {"depth": 1024, "d_model": 65536}
    (folder / "config.json").write_text(json.dumps(config))
    return load(sign(folder))


@row("cannot run in the blocks")
def blocks_of_nothing(given: Given) -> list[Command]:
    """blocks of a net that there is not, far larger than memory"""
    return load(given.export(blocks={"__class__": [[10**12, 10**12]]}))


@row("wanted one value")
def a_range(given: Given) -> list[Command]:
    """an architecture that is a search"""
    return with_arch(given, depth="1..4")


@row("unknown key '<script>")
def markup(given: Given) -> list[Command]:
    """a key that is HTML and an escape sequence"""
    return with_arch(given, **{"<script>alert(1)</script>\x1b[2J": 1})


# ---- files that are none -------------------------------------------------------------------------------------------


@row("no regular file")
def pipe(given: Given) -> list[Command]:
    """a card that is a pipe, which nobody ever writes to"""
    folder = given.export()
    (folder / "README.md").unlink()
    os.mkfifo(folder / "README.md")
    return load(folder)


@row("no regular file")
def device(given: Given) -> list[Command]:
    """a configuration that is a link to /dev/zero"""
    folder = given.export()
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    return load(folder)


@row("incomplete: model.safetensors is missing")
def weights_device(given: Given) -> list[Command]:
    """weights that are a link to /dev/zero"""
    folder = given.export()
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/dev/zero")
    return load(folder)


@row("incomplete: .. is missing")
def outside(given: Given) -> list[Command]:
    """a card that lists the folder above, and a path out of it"""
    folder = given.export()
    card = folder / "README.md"
    lines = "".join(f"- `{name}` sha256 `{'0' * 64}`\n" for name in ("..", "../../secret"))
    card.write_text(f"{card.read_text()}\n{lines}")
    return load(folder)


@row("exists and is not an earlier export")
def target(given: Given) -> list[Command]:
    """a folder to write to that holds what is no export's beside a configuration of 100,000 brackets"""
    folder = given.folder / "out"
    folder.mkdir()
    (folder / "config.json").write_text("[" * 100_000)
    return [["export", "--study", "s", "--trial", "0", "--out", str(folder), "--store", str(given.store())]]
