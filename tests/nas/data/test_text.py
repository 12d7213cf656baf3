import gzip
import json
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypernas.data.text import Corpus, load_corpus, training_batch, validation_windows
from hypernas.errors import DataError

TEXT = b"It is a truth universally acknowledged, that a single man in possession of a good fortune...\n" * 40


def documents(count: int) -> list[str]:
    return [f"document {i} " + chr(ord("a") + i % 26) * (20 + i % 7) for i in range(count)]


def write_jsonl(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return file


def lines(part: np.ndarray) -> list[str]:
    return bytes(part).decode().splitlines()


def corpus_of(train: bytes, validation: bytes = b"v") -> Corpus:
    parts = (np.frombuffer(part, np.uint8) for part in (train, validation))
    return Corpus("memory", *parts, hash="", unigram_bits=8.0, path=None)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


# --- the default corpus


def test_default_corpus_is_megabytes_of_python_source(cache):
    corpus = load_corpus(None, cache)
    assert corpus.name == f"python-{sys.version_info.major}.{sys.version_info.minor}-stdlib"
    assert corpus.path is None
    assert len(corpus.train) > 4e6
    assert 0.04 < len(corpus.validation) / len(corpus.train) < 0.09
    assert 4 < corpus.unigram_bits < 5.5
    text = bytes(corpus.train)
    assert b"class OrderedDict" in text + bytes(corpus.validation)
    assert b"decoding_table" not in text
    assert b"build_time_vars = {" not in text


def test_loading_twice_prepares_once_and_agrees(cache, monkeypatch):
    first = load_corpus(None, cache)
    monkeypatch.setattr("hypernas.data.text._prepare", None)  # a second preparation would raise
    second = load_corpus(None, cache)
    assert (first.hash, first.unigram_bits) == (second.hash, second.unigram_bits)
    assert np.array_equal(first.validation, second.validation)


def test_two_caches_of_the_same_text_have_the_same_hash(tmp_path):
    for machine in ("one", "two"):
        folder = tmp_path / machine
        folder.mkdir()
        (folder / "a.txt").write_bytes(TEXT)
        write_jsonl(folder / "b.jsonl", documents(50))
    one, two = (load_corpus(str(tmp_path / machine), tmp_path / f"cache-{machine}") for machine in ("one", "two"))
    assert one.hash == two.hash
    assert np.array_equal(one.train, two.train)


def test_changed_text_is_prepared_again(tmp_path, cache):
    file = tmp_path / "a.txt"
    file.write_bytes(TEXT)
    before = load_corpus(str(file), cache)
    file.write_bytes(TEXT + b"one more line\n")
    assert load_corpus(str(file), cache).hash != before.hash


def test_default_cache_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    file = tmp_path / "a.txt"
    file.write_bytes(TEXT)
    load_corpus(str(file))
    assert len(list((tmp_path / "xdg" / "hypernas").glob("text-*/train.bin"))) == 1


def test_text_is_mapped_read_only(tmp_path, cache):
    file = tmp_path / "a.txt"
    file.write_bytes(TEXT)
    corpus = load_corpus(str(file), cache)
    assert isinstance(corpus.train, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        corpus.train[0] = 0


# --- the split


@given(st.lists(st.text(st.characters(codec="ascii", min_codepoint=33), min_size=1, max_size=30), min_size=60))
def test_no_document_is_on_both_sides_or_twice(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("split")
    unique = sorted(set(texts) | {f"filler {i}" for i in range(40)})
    corpus = load_corpus(str(write_jsonl(folder / "a.jsonl", texts + unique)), folder)
    assert sorted(lines(corpus.train) + lines(corpus.validation)) == unique
    assert len(corpus.validation) >= sum(len(text) for text in unique) // 20


def test_many_documents_give_about_one_byte_in_twenty_to_validation(tmp_path, cache):
    corpus = load_corpus(str(write_jsonl(tmp_path / "a.jsonl", documents(2000))), cache)
    assert 0.045 < len(corpus.validation) / len(corpus.train) < 0.06


def test_one_huge_document_among_many_stays_in_training(tmp_path, cache):
    huge = "x" * 100_000
    corpus = load_corpus(str(write_jsonl(tmp_path / "a.jsonl", [*documents(100), huge])), cache)
    assert huge in lines(corpus.train)
    assert len(corpus.validation) > 0


def test_few_documents_are_cut_at_their_last_twentieth(tmp_path, cache):
    first, second = bytes(range(65, 91)) * 100, bytes(range(97, 123)) * 50
    (tmp_path / "a.txt").write_bytes(first)
    (tmp_path / "b.txt").write_bytes(second)
    (tmp_path / "copy-of-a.txt").write_bytes(first)
    corpus = load_corpus(str(tmp_path), cache)
    assert bytes(corpus.train) == first[:2470] + b"\n" + second[:1235] + b"\n"
    assert bytes(corpus.validation) == first[2470:] + b"\n" + second[1235:] + b"\n"


def test_document_larger_than_a_chunk_is_copied_whole(tmp_path, cache):
    text = np.random.default_rng(0).integers(65, 91, size=3_000_000, dtype=np.uint8).tobytes()
    (tmp_path / "a.txt").write_bytes(text)
    corpus = load_corpus(str(tmp_path / "a.txt"), cache)
    assert bytes(corpus.train)[:-1] + bytes(corpus.validation)[:-1] == text


def test_unigram_bits_are_the_cross_entropy_of_validation_under_training(tmp_path, cache):
    (tmp_path / "a.txt").write_bytes(b"ab" * 950 + b"b" * 100)
    corpus = load_corpus(str(tmp_path / "a.txt"), cache)
    # Training: 950 a, 950 b and a newline, so 1,901 + 256 after smoothing. Validation: 100 b and a newline.
    assert corpus.unigram_bits == pytest.approx((100 * np.log2(2157 / 951) + np.log2(2157 / 2)) / 101)


# --- formats


def write_plain(file):
    file.write_bytes(TEXT)


def write_plain_gz(file):
    file.write_bytes(gzip.compress(TEXT))


def write_rows(file):
    write_jsonl(file, documents(50))


def write_rows_gz(file):
    write_rows(file)
    file.write_bytes(gzip.compress(file.read_bytes()))


def write_parquet(file):
    pyarrow.parquet.write_table(pyarrow.table({"id": range(50), "text": documents(50)}), file)


@pytest.mark.parametrize(
    "name, write, wanted",
    [
        ("a.txt", write_plain, b"single man"),
        ("A.TXT", write_plain, b"single man"),
        ("a.md", write_plain, b"single man"),
        ("no-extension", write_plain, b"single man"),
        ("a.novel", write_plain, b"single man"),
        ("a.txt.gz", write_plain_gz, b"single man"),
        ("a.jsonl", write_rows, b"document 49"),
        ("a.jsonl.gz", write_rows_gz, b"document 49"),
        ("a.parquet", write_parquet, b"document 49"),
    ],
)
def test_format_is_read(name, write, wanted, tmp_path, cache):
    write(tmp_path / name)
    corpus = load_corpus(str(tmp_path / name), cache)
    assert wanted in bytes(corpus.train) + bytes(corpus.validation)
    assert (corpus.name, corpus.path) == (name, str(tmp_path / name))


def test_rows_are_the_same_documents_in_every_format(tmp_path, cache):
    for name, write in [("a.jsonl", write_rows), ("a.jsonl.gz", write_rows_gz), ("a.parquet", write_parquet)]:
        write(tmp_path / name)
    hashes = {load_corpus(str(tmp_path / name), cache).hash for name in ("a.jsonl", "a.jsonl.gz", "a.parquet")}
    assert len(hashes) == 1


def test_folder_is_read_in_order_without_hidden_and_unknown_files(tmp_path, cache):
    for name in ("z.txt", "sub/a.txt", ".hidden.txt", ".git/config.txt", "photo.png", "B.txt"):
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_text(name + "." * 100)
    corpus = load_corpus(str(tmp_path / "text"), cache)
    assert [line.rstrip(".") for line in lines(corpus.train)] == ["B.txt", "z.txt", "sub/a.txt"]


def test_what_a_folder_holds_besides_is_counted_by_why(tmp_path, cache):
    folder = tmp_path / "text"
    (folder / ".git").mkdir(parents=True)
    (tmp_path / "more").mkdir()
    for name, content in (("a.txt", TEXT), ("copy.txt", TEXT), ("b.md", b""), ("c.pdf", b"%PDF"), ("d.tar.gz", b"")):
        (folder / name).write_bytes(content)
    for name in ("LICENSE", ".hidden.txt"):
        (folder / name).write_bytes(TEXT)
    (folder / "linked").symlink_to(tmp_path / "more")
    os.mkfifo(folder / "pipe.txt")  # opened, it would never end
    for _ in range(2):  # also when the prepared text is there
        reading = load_corpus(str(folder), cache).reading
        assert (reading.files, reading.bytes) == (3, 2 * len(TEXT))
        assert reading.left_out == {
            "hidden": 2,
            "links to folders": 1,
            "of type .pdf": 1,
            "of type .tar.gz": 1,
            "without an extension": 1,
            "no regular file (a pipe, socket or device)": 1,
            "documents that repeat": 1,
            "empty documents": 1,
        }
    assert "left out: 2 hidden, 1 documents that repeat, 1 empty documents, 1 links" in reading.describe("text")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path, cache):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load_corpus(str(tmp_path / "pipe.txt"), cache)


def test_text_in_no_encoding_is_taken_byte_by_byte(tmp_path, cache):
    text = bytes(range(256)) * 20
    (tmp_path / "a.txt").write_bytes(text)
    assert bytes(load_corpus(str(tmp_path / "a.txt"), cache).train).startswith(text[:4000])


def test_byte_order_mark_and_blank_lines_in_jsonl_are_no_documents(tmp_path, cache):
    rows = [json.dumps({"text": text}) for text in documents(50)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(rows).encode())
    corpus = load_corpus(str(tmp_path / "a.jsonl"), cache)
    assert sorted(lines(corpus.train) + lines(corpus.validation)) == sorted(documents(50))


# --- bad input


def zipped(content):
    return gzip.compress(content, mtime=0)  # the parameters of a test must not change with the clock


def good_row(text="fine"):
    return json.dumps({"text": text}).encode() + b"\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", good_row() + b"\x80\x00\xff\n", r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", good_row() + b'{"text": "cut of', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not JSON"),
        ("a.jsonl", good_row() + b'{"body": "x", "id": 1}\n', r"line 2: no `text` field, but the fields body, id"),
        ("a.jsonl", good_row() + b"[1, 2]\n", r"line 2: no `text` field, but a list"),
        ("a.jsonl", good_row() + b'{"text": 3}\n', r"line 2: `text` is int"),
        ("a.jsonl", b'{"text": null}\n', r"line 1: `text` is NoneType"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: half a surrogate pair at character 0"),
        ("a.jsonl.gz", zipped(good_row() + b"nonsense\n"), r"a\.jsonl\.gz, line 2: not JSON"),
        ("a.txt.gz", zipped(np.random.default_rng(0).bytes(5000))[:-2000], r"a\.txt\.gz.*ended before"),
        ("a.jsonl.gz", zipped(good_row() * 9)[:-9], r"a\.jsonl\.gz, after line \d+.*ended before"),
        ("a.txt.gz", b"this is not gzip", r"a\.txt\.gz.*[Nn]ot a gzipped file"),
        ("a.txt.gz", zipped(TEXT)[:20] + b"\xff" * 40, r"a\.txt\.gz: cannot be read"),
        ("a.parquet", b"PAR1 and then nonsense", r"a\.parquet.*cannot be read"),
        ("a.parquet", b"", r"a\.parquet.*cannot be read"),
        ("model.bin", b"\x7fELF\0\0\0", r"model\.bin has an unknown extension and NUL bytes"),
        ("a.txt", b"", r"holds 0 bytes of text"),
        ("a.txt", b"nineteen bytes long", r"holds 19 bytes of text"),
        ("a.jsonl", b"\n\n", r"holds 0 bytes of text"),
    ],
)
def test_bad_file_is_named_with_what_to_do_and_leaves_no_cache(name, content, message, tmp_path, cache):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_corpus(str(tmp_path / name), cache)
    assert str(tmp_path) in str(caught.value)
    assert list(cache.iterdir()) == []


def test_parquet_without_text_column_names_its_columns(tmp_path, cache):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no `text` column, but body, id"):
        load_corpus(str(tmp_path / "a.parquet"), cache)


def test_parquet_with_a_column_twice_is_one_sentence(tmp_path, cache):
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: 2 columns named `text`; keep one, rename the others"):
        load_corpus(str(tmp_path / "a.parquet"), cache)


def test_another_column_twice_is_no_matter(tmp_path, cache):
    texts = pyarrow.array(documents(50))
    table = pyarrow.Table.from_arrays([texts, texts, texts], names=["id", "text", "id"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert len(load_corpus(str(tmp_path / "a.parquet"), cache).train)


def test_parquet_row_without_text_is_named(tmp_path, cache):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2: `text` is NoneType"):
        load_corpus(str(tmp_path / "a.parquet"), cache)


@pytest.mark.parametrize("path", ["", " ", "nowhere/at-all.txt", "nul\0byte", "x" * 5000])
def test_path_that_does_not_exist_says_what_was_wanted(path, cache):
    with pytest.raises(DataError, match="wanted"):
        load_corpus(path, cache)


def test_folder_without_text_names_what_it_has_and_what_is_known(tmp_path, cache):
    (tmp_path / "photo.png").write_bytes(b"png")
    with pytest.raises(DataError, match=r"holds no text \(1 of type \.png\): wanted .*\.jsonl"):
        load_corpus(str(tmp_path), cache)


def test_empty_folder_is_an_error(tmp_path, cache):
    with pytest.raises(DataError, match="no files"):
        load_corpus(str(tmp_path), cache)


def test_dangling_link_in_a_folder_is_named(tmp_path, cache):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read \(No such file"):
        load_corpus(str(tmp_path), cache)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_unreadable_file_is_named(cache):
    with pytest.raises(DataError, match=r"/mem: cannot be read"):
        load_corpus("/proc/self/mem", cache)


def test_cache_that_cannot_be_written_says_where_to_put_it(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="set XDG_CACHE_HOME"):
        load_corpus(str(tmp_path / "a.txt"), tmp_path / "file" / "cache")


@pytest.mark.parametrize("damage", [b"", b"short"])
def test_damaged_cache_is_named(damage, tmp_path, cache):
    (tmp_path / "a.txt").write_bytes(TEXT)
    load_corpus(str(tmp_path / "a.txt"), cache)
    (train,) = cache.glob("*/train.bin")
    train.write_bytes(damage)
    with pytest.raises(DataError, match=f"{train.parent.name} is damaged.*delete that folder"):
        load_corpus(str(tmp_path / "a.txt"), cache)


# --- two processes at once


def load_when_all_are_ready(path, cache, barrier, hashes):
    from hypernas.data import text as data

    prepare = data._prepare

    def prepare_together(*args):
        barrier.wait(60)  # past the look into the cache: both found it empty
        prepare(*args)

    data._prepare = prepare_together
    hashes.put(load_corpus(path, cache).hash)


def test_two_processes_preparing_at_once_leave_one_whole_cache(tmp_path, cache):
    write_jsonl(tmp_path / "a.jsonl", documents(5000))
    context = multiprocessing.get_context("fork")
    barrier, hashes = context.Barrier(2), context.Queue()
    args = (str(tmp_path / "a.jsonl"), cache, barrier, hashes)
    processes = [context.Process(target=load_when_all_are_ready, args=args) for _ in range(2)]
    for process in processes:
        process.start()
    found = {hashes.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    (folder,) = cache.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["meta.json", "train.bin", "validation.bin"]
    assert found == {load_corpus(str(tmp_path / "a.jsonl"), cache).hash}


# --- batches and windows


@given(
    size=st.integers(2, 200), data=st.data(), seed=st.integers(0, 2**63), step=st.integers(0, 2**40), windows=st.just(5)
)
def test_training_windows_lie_in_the_text_and_depend_on_seed_and_step_alone(size, data, seed, step, windows):
    context = data.draw(st.integers(1, size - 1))
    corpus = corpus_of(bytes(range(size)))
    batch = training_batch(corpus, seed, step, windows, context)
    assert (batch.shape, batch.dtype) == ((windows, context + 1), np.int64)
    assert (np.diff(batch, axis=1) == 1).all()
    training_batch(corpus, seed, step + 1, windows, context)
    assert np.array_equal(batch, training_batch(corpus, seed, step, windows, context))


def test_batches_of_other_steps_and_seeds_differ():
    corpus = corpus_of(np.random.default_rng(0).bytes(10_000))
    batches = [training_batch(corpus, seed, step, 4, 16).tobytes() for seed in range(4) for step in range(25)]
    assert len(set(batches)) == 100


def test_training_reaches_the_first_and_the_last_byte():
    starts = training_batch(corpus_of(bytes(range(10))), 0, 0, 1000, 4)[:, 0]
    assert (starts.min(), starts.max()) == (0, 5)


@given(size=st.integers(2, 250), data=st.data(), tokens=st.integers(1, 500))
def test_validation_windows_are_evenly_spaced_and_do_not_overlap(size, data, tokens):
    context = data.draw(st.integers(1, size - 1))
    windows = validation_windows(corpus_of(b"", bytes(range(size))), tokens, context)
    assert windows.dtype == np.int64
    assert len(windows) == max(1, min(tokens // context, size // (context + 1)))
    assert (np.diff(windows, axis=1) == 1).all()
    gaps = np.diff(windows[:, 0])
    assert (gaps > context).all()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_validation_text_shorter_than_a_window_names_both_sizes():
    with pytest.raises(DataError, match=r"validation part of memory has 9 bytes, and one window takes 257"):
        validation_windows(corpus_of(b"", b"123456789"), 1000, 256)


def test_training_text_shorter_than_a_window_names_both_sizes():
    with pytest.raises(DataError, match=r"training part of memory has 9 bytes, and one window takes 10"):
        training_batch(corpus_of(b"123456789"), 0, 0, 1, 9)
