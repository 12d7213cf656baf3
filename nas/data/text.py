"""Text for training: any text becomes two byte files, one to train on and one to validate on, mapped into memory.

The split never leaks. Documents (files, .jsonl lines, .parquet rows) that repeat are kept once; documents in the
order of their SHA-256 go to validation until it holds 5 % of the bytes. With fewer than 40 documents the last 5 %
of each is validation instead, and training stops before it. Either way it depends on contents alone, so that two
machines with the same text have the same split and the same `Corpus.hash`. A newline byte ends each document:
unlike NUL it occurs in all text anyway, so no byte value is spent on a separator.

Formats: plain text by its bytes, whatever the encoding; .jsonl with a `text` field a line; .gz of both; .parquet
with a `text` column. In a folder (searched recursively, hidden files and folders left out) only files with a known
extension are read; `Corpus.reading` counts the others. A single file with an unknown extension is plain text unless it
contains a NUL byte.

Preparing streams: memory grows by about 150 bytes a document, not with the text.
"""

import json
import math
import sys
import sysconfig
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np

from hypernas.data.files import Reading, kind, open_binary, reading_of, sort_files, unreadable, walk
from hypernas.data.tables import parquet_rows
from hypernas.errors import DataError
from hypernas.files import scratch_folder, user_cache

PLAIN_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".xml", ".csv", ".tsv", ".log"),
    *(".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql"),
)
KNOWN = (
    "plain text (.txt, .md, .py and the like), .jsonl with a `text` field, .gz of both, .parquet with a `text` column"
)

VALIDATION_SHARE = 20  # one byte in 20
FEW_DOCUMENTS = 40  # from here on the smallest document is at most half of the validation part, so one always fits
CHUNK = 1 << 20  # bytes
LONGEST_LINE = 64 << 20  # bytes of a document in a table, which is read at once
CACHE_FORMAT = 2  # goes up when the split or the files change, so that old caches are not read

# Left out of the standard library: tests; packages installed beside it; and `encodings`, whose code-page tables are
# near-duplicates of each other, so that the ones trained on would give away the ones validated on.
_STDLIB_SKIPS = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"))
_MACHINE_SPECIFIC = ("_sysconfigdata", "config-", "sitecustomize")


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text split in two. `train` and `validation` are read-only uint8 memory maps.

    `hash` is the SHA-256 (hex) of contents and split. `unigram_bits` is what a model that knows only byte
    frequencies scores: bits per byte of the validation text under the training text's byte distribution
    (add-one smoothed), the hypervolume's reference loss. `path` is None for the default corpus. `reading` says of which
    files it is, and what was left out.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    hash: str
    unigram_bits: float
    path: str | None
    reading: Reading = field(default_factory=Reading)


def load_corpus(path: str | None, cache: Path | None = None) -> Corpus:
    """The text at `path`, a file or a folder, or Python's own standard library source when `path` is None.

    Prepared on first use and kept below `cache` (default: $XDG_CACHE_HOME or ~/.cache, then `hypernas`) under a key
    of its path, file sizes and modification times. Raises DataError for text that cannot be read or split.
    """
    root, files, left_out = _stdlib_files() if path is None else _user_files(path)
    name = f"python-{sys.version_info.major}.{sys.version_info.minor}-stdlib" if path is None else root.name
    cache = cache or user_cache()
    folder = cache / f"text-{_key(root, files)}"
    try:
        if not folder.exists():
            _prepare(files, folder, str(root))
        return _open(folder, name, None if path is None else str(root), reading_of(files, left_out))
    except OSError as error:
        raise DataError(
            f"cannot keep the prepared text below {cache}: {error.strerror or error}. Wanted a folder that can be "
            "written, with room for twice the text; free some space or set XDG_CACHE_HOME to another folder"
        ) from error


def training_batch(corpus: Corpus, seed: int, step: int, windows: int, context: int) -> np.ndarray:
    """The batch of one step, (windows, context + 1) int64 bytes: inputs `[:, :-1]`, targets `[:, 1:]`.

    A pure function of (seed, step): resuming needs no state, and all trials of a study see the same batches.
    Raises DataError when the training text is shorter than one window.
    """
    _require_window(corpus, "training", corpus.train, context)
    # Philox is counter-based: the generator of one step costs nothing to make and depends on no other step.
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    return _windows(corpus.train, rng.integers(0, len(corpus.train) - context, size=windows), context)


def validation_windows(corpus: Corpus, tokens: int, context: int) -> np.ndarray:
    """The windows every trial is scored on, (W, context + 1) int64: evenly spaced, none overlapping.

    W is `tokens // context`, at least 1 and at most what the validation text holds. Raises DataError when that is
    shorter than one window.
    """
    _require_window(corpus, "validation", corpus.validation, context)
    size = len(corpus.validation)
    W = max(1, min(tokens // context, size // (context + 1)))
    return _windows(corpus.validation, np.arange(W) * size // W, context)


def _windows(text: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
    return np.asarray(text)[starts[:, None] + np.arange(context + 1)].astype(np.int64)


def _require_window(corpus: Corpus, part: str, text: np.ndarray, context: int) -> None:
    if len(text) < context + 1:
        raise DataError(
            f"the {part} part of {corpus.path or corpus.name} has {len(text)} bytes, and one window takes "
            f"{context + 1} (context {context} and the byte after it): give more text, or a smaller context"
        )


# --- which files


def _stdlib_files() -> tuple[Path, list[Path], Counter[str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file
        for file in walk(root, skip=_STDLIB_SKIPS)
        if file.suffix == ".py" and not any(part.startswith(_MACHINE_SPECIFIC) for part in file.relative_to(root).parts)
    ]
    if not files:
        raise DataError(
            f"no .py files in {root}: this Python has no library source to train on; "
            "give a text of your own with --set data.path=FILE_OR_FOLDER"
        )
    return root, files, Counter()


def _user_files(path: str) -> tuple[Path, list[Path], Counter[str]]:
    given = Path(path).expanduser()
    try:
        if not path.strip() or not given.exists():
            raise DataError(f"data.path={path!r} does not exist: wanted a file or folder of {KNOWN}")
        root = given.resolve()
        if root.is_file():
            return root, [root], Counter()
        if not root.is_dir():
            raise DataError(f"data.path={path!r} is neither a file nor a folder: wanted {KNOWN}")
    except OSError as error:
        raise unreadable(given, error) from error
    files, left_out = sort_files(root, lambda file: None if _format(file) else kind(file))
    if not files:
        found = ", ".join(f"{count} {why}" for why, count in left_out.items() if count) or "no files"
        raise DataError(f"data.path={path!r} holds no text ({found}): wanted {KNOWN}")
    return root, files, left_out


def _format(file: Path) -> str | None:
    """`plain`, `jsonl` or `parquet` by the extension, `.gz` aside; None when unknown."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes[-1:] == [".parquet"]:
        return "parquet"
    inner = "".join(suffixes[:-1][-1:] if suffixes[-1:] == [".gz"] else suffixes[-1:])
    return "jsonl" if inner == ".jsonl" else "plain" if inner in PLAIN_SUFFIXES else None


# --- documents: each one an iterable of chunks, so that a file larger than memory is one document too

Document = Iterable[bytes]


def _documents(files: Iterable[Path]) -> Iterator[Document]:
    for file in files:
        match _format(file):
            case "jsonl":
                yield from _jsonl_documents(file)
            case "parquet":
                yield from _parquet_documents(file)
            case "plain":
                yield _chunks(file)
            case None:
                yield _chunks_without_nul(file)


def _chunks(file: Path) -> Iterator[bytes]:
    try:
        with open_binary(file) as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file, error) from error


def _chunks_without_nul(file: Path) -> Iterator[bytes]:
    for chunk in _chunks(file):
        if b"\0" in chunk:
            raise DataError(f"{file} has an unknown extension and NUL bytes in it, so it is no text: wanted {KNOWN}")
        yield chunk


def _jsonl_documents(file: Path) -> Iterator[Document]:
    number = 0
    try:
        with open_binary(file) as stream:
            for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE + 1), b""), 1):
                if len(line) > LONGEST_LINE:
                    raise DataError(
                        f"{file}, line {number}: longer than {LONGEST_LINE >> 20} MiB; cut it into documents"
                    )
                if line.strip():
                    yield (_text_of_line(file, number, line),)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file, error, f"after line {number}") from error


def _text_of_line(file: Path, number: int, line: bytes) -> bytes:
    wanted = 'wanted a JSON object with a text, like {"text": "..."}'
    try:
        row = json.loads(line.decode("utf-8-sig"))  # some editors start a file with a byte order mark
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file}, line {number}: not JSON ({error}); {wanted}. Mend or remove the line, "
            "or name the file .txt if it is plain text"
        ) from error
    if not isinstance(row, dict) or "text" not in row:
        came = f"the fields {', '.join(row) or '(none)'}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f"{file}, line {number}: no `text` field, but {came}; {wanted}: rename the field that has it")
    return _encode(row["text"], f"{file}, line {number}")


def _parquet_documents(file: Path) -> Iterator[Document]:
    for number, (text,) in parquet_rows(file, ("text",)):
        yield (_encode(text, f"{file}, row {number}"),)


def _encode(text: Any, where: str) -> bytes:
    if not isinstance(text, str):
        raise DataError(f"{where}: `text` is {type(text).__name__}; wanted a string: mend or remove it")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half a surrogate pair at character {error.start}: mend or remove it") from error


# --- the prepared text on disk


def _key(root: Path, files: Iterable[Path]) -> str:
    key = sha256(json.dumps([CACHE_FORMAT, str(root)]).encode())
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            raise unreadable(file, error) from error
        key.update(json.dumps([str(file), stat.st_size, stat.st_mtime_ns]).encode())
    return key.hexdigest()[:32]


def _prepare(files: Iterable[Path], folder: Path, source: str) -> None:
    """Write train.bin, validation.bin and meta.json to `folder`, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent, ".preparing-") as scratch:
        spool, whole = scratch / "documents.bin", scratch / "corpus"
        whole.mkdir()
        lengths, order, left_out = _spool(_documents(files), spool)
        held_out = _held_out(lengths, order)
        _split(spool, lengths, held_out, whole)
        spool.unlink()
        if not held_out.any():
            raise DataError(
                f"{source} holds {lengths.sum()} bytes of text, too few to keep one in {VALIDATION_SHARE} "
                "for validation: give more text"
            )
        train, validation = (_map(whole / f"{part}.bin") for part in ("train", "validation"))
        (train_hash, train_counts), (validation_hash, validation_counts) = _scan(train), _scan(validation)
        meta = {
            "source": source,
            "bytes": [len(train), len(validation)],
            "hash": sha256(train_hash + validation_hash).hexdigest(),
            "unigram_bits": _cross_entropy_bits(train_counts, validation_counts),
            "left_out": left_out,
        }
        (whole / "meta.json").write_text(json.dumps(meta, indent=1))
        try:
            whole.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            # Another process was first with the same text; what it wrote is as good.


def _spool(documents: Iterable[Document], file: Path) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
    """Write every different document to `file`, end to end: their lengths, the numbers that order them by hash, and how
    many were left out, by why."""
    lengths, prefixes, seen = array("Q"), array("Q"), set()
    left_out: Counter[str] = Counter()
    with file.open("wb") as out:
        for document in documents:
            start, state = out.tell(), sha256()
            for chunk in document:
                out.write(chunk)
                state.update(chunk)
            length, digest = out.tell() - start, state.digest()[:16]
            if digest in seen:
                out.seek(start)
                out.truncate()
                left_out["documents that repeat"] += 1
            elif not length:
                left_out["empty documents"] += 1
            else:
                seen.add(digest)
                lengths.append(length)
                prefixes.append(int.from_bytes(digest[:8], "big"))
    order = np.argsort(np.array(prefixes, dtype=np.uint64), kind="stable")
    return np.array(lengths, dtype=np.int64), order, left_out


def _held_out(lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    """How many bytes at the end of each document are validation: (documents,), all or none where there are many."""
    if len(lengths) < FEW_DOCUMENTS:
        return lengths // VALIDATION_SHARE
    goal = lengths.sum() // VALIDATION_SHARE
    fitting = order[2 * lengths[order] <= goal]  # a huge document must not become the whole validation text
    chosen = fitting[: np.searchsorted(np.cumsum(lengths[fitting]), goal) + 1]
    held_out = np.zeros_like(lengths)
    held_out[chosen] = lengths[chosen]
    return held_out


def _split(spool: Path, lengths: np.ndarray, held_out: np.ndarray, folder: Path) -> None:
    with (
        spool.open("rb") as source,
        (folder / "train.bin").open("wb") as train,
        (folder / "validation.bin").open("wb") as validation,
    ):
        for length, tail in zip(lengths.tolist(), held_out.tolist(), strict=True):
            _copy_document(source, train, length - tail)
            _copy_document(source, validation, tail)


def _copy_document(source: IO[bytes], target: IO[bytes], count: int) -> None:
    for start in range(0, count, CHUNK):
        target.write(source.read(min(CHUNK, count - start)))
    if count:
        target.write(b"\n")


def _scan(text: np.ndarray) -> tuple[bytes, np.ndarray]:
    """SHA-256 and byte counts (256,) of a text."""
    state, counts = sha256(), np.zeros(256, np.int64)
    for start in range(0, len(text), CHUNK):
        chunk = np.asarray(text[start : start + CHUNK])
        state.update(chunk.tobytes())
        counts += np.bincount(chunk, minlength=256)
    return state.digest(), counts


def _cross_entropy_bits(train: np.ndarray, validation: np.ndarray) -> float:
    """Bits per byte of `validation` under the add-one smoothed distribution of `train`; both are counts (256,)."""
    total = int(train.sum()) + len(train)
    # Exact sums over 256 terms, so that machines agree to the last bit.
    bits = math.fsum(int(n) * -math.log2((int(m) + 1) / total) for m, n in zip(train, validation, strict=True))
    return bits / int(validation.sum())


def _map(file: Path) -> np.ndarray:
    return np.memmap(file, dtype=np.uint8, mode="r")


def _open(folder: Path, name: str, path: str | None, reading: Reading) -> Corpus:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        train, validation = _map(folder / "train.bin"), _map(folder / "validation.bin")
        if [len(train), len(validation)] != meta["bytes"]:
            raise ValueError(f"{meta['bytes']} bytes were written, {len(train)} and {len(validation)} are there")
        reading = replace(reading, left_out={**reading.left_out, **meta["left_out"]})
        return Corpus(name, train, validation, meta["hash"], meta["unigram_bits"], path, reading)
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise DataError(
            f"the prepared text in {folder} is damaged ({error}): delete that folder and try again"
        ) from error
