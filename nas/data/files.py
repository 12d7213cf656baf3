"""Files of data: which of a folder are read, which are left out and why, and how one is opened."""

import gzip
import io
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from hypernas.errors import DataError
from hypernas.files import SPECIAL

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

UNPACKED = 200  # times its size that a file may unpack to: text packs 3 to 20 times, what packs better is no text
UNPACKED_BYTES = 128 << 20  # which any file may unpack to
SHOWN = 8  # reasons that are said one by one
_PACKED_BY_MACOS = "__MACOSX"  # in archives: a hidden file for each real one


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read as data, and how much was left out of it, by why: {"of type .pdf": 2, "hidden": 1}."""

    files: int = 0
    bytes: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)

    def describe(self, name: str) -> str:
        """In a line: `data books: 12 files, 3,456,789 bytes read; left out: 2 of type .pdf, 1 hidden`."""
        line = f"data {name}: {self.files:,} file{'s' * (self.files != 1)}, {self.bytes:,} bytes read"
        counts = sorted(((count, why) for why, count in self.left_out.items() if count), key=lambda it: (-it[0], it[1]))
        said = [f"{count:,} {why}" for count, why in counts[:SHOWN]]
        if rest := sum(count for count, _ in counts[SHOWN:]):
            said.append(f"{rest:,} for other reasons")
        return f"{line}; left out: {', '.join(said)}" if said else line


def reading_of(files: list[Path], left_out: Mapping[str, int]) -> Reading:
    """What was read of these files. Raises DataError for one that is gone."""
    try:
        return Reading(len(files), sum(file.stat().st_size for file in files), left_out)
    except OSError as error:
        raise unreadable(Path(error.filename), error) from error


def kind(file: Path) -> str:
    """Why a file whose name says nothing that is known is left out: `of type .pdf`."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    shown = "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])
    return f"of type {shown}" if shown else "without an extension"


def sort_files(root: Path, why: Callable[[Path], str | None]) -> tuple[list[Path], Counter[str]]:
    """The files below `root` that are to be read, in an order that every machine agrees on; the others' number, by why.

    `why` says of a regular file why it is left out; None where it is read. Hidden files and folders, links to folders
    and what is no regular file (reading a pipe would wait for ever) are left out anyway. Raises DataError.
    """
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    for folder, subfolders, names in os.walk(root, onerror=_fail):
        left_out["hidden"] += sum(map(is_hidden, (*subfolders, *names)))
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        left_out["links to folders"] += sum(Path(folder, name).is_symlink() for name in subfolders)
        for name in sorted(name for name in names if not is_hidden(name)):
            file = Path(folder, name)
            reason = SPECIAL if is_special(file) else why(file)
            if reason is None:
                files.append(file)
            else:
                left_out[reason] += 1
    return files, left_out


def walk(root: Path, skip: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files below `root` in an order that every machine agrees on; hidden ones, linked folders and `skip` left out."""
    for folder, subfolders, names in os.walk(root, onerror=_fail):
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name) and name not in skip)
        yield from (Path(folder, name) for name in sorted(names) if not is_hidden(name))


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == _PACKED_BY_MACOS


def is_special(file: Path) -> bool:
    """Whether it is there and neither a file nor a folder: a pipe, a socket or a device."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return False
    except OSError as error:
        raise unreadable(file, error) from error
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _fail(error: OSError) -> None:
    raise unreadable(Path(error.filename), error) from error


class Allowance:
    """How much some files may unpack to: UNPACKED times their size, or `least` bytes where that is more.

    A file of a few KB may hold gigabytes of one letter, which would fill memory and the cache on the disk.
    """

    def __init__(self, name: Path, size: int, least: int = UNPACKED_BYTES) -> None:
        self._name, self._most = name, max(least, UNPACKED * size)
        self._left = self._most

    def check(self, count: int) -> None:
        """Raises DataError where a part of the file says that it unpacks to more."""
        if count > self._left:
            self.spend(count)

    def spend(self, count: int) -> None:
        """Raises DataError once more was unpacked than may be."""
        self._left -= count
        if self._left < 0:
            raise DataError(
                f"{self._name} unpacks to more than {self._most >> 20} MiB and {UNPACKED} times its size: such data is "
                "a mistake, or made to fill this machine; unpack it yourself if it is meant so"
            )


class _Unpacked(io.RawIOBase):
    """What a .gz holds, as far as its allowance goes."""

    def __init__(self, file: Path) -> None:
        self._packed = gzip.GzipFile(file)
        self._allowance = Allowance(file, file.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Buffer") -> int:
        count = self._packed.readinto(buffer)
        self._allowance.spend(count)
        return count

    def close(self) -> None:
        self._packed.close()
        super().close()


def open_binary(file: Path) -> BufferedIOBase:
    """The bytes of a file, decompressed when its name ends in .gz. Reading raises DataError as `Allowance`."""
    return BufferedReader(_Unpacked(file), 1 << 17) if file.suffix.lower() == ".gz" else file.open("rb")


def unreadable(file: Path, error: Exception, where: str = "") -> DataError:
    """The error for a file that `error` kept from being read, `where` in it."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    at = f"{file}, {where}" if where else f"{file}"
    return DataError(f"{at}: cannot be read ({reason}); wanted a whole, readable file: mend, replace or remove it")
